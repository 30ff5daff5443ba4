"""Computes the losses of TRL's DPOTrainer, form by form, on token log-probs that are recorded beside them.

    python -m tests.golden.make_trl_forms        rewrites tests/golden/trl_forms.json; needs trl

The models are random: only the log-probs that they give, and what TRL makes of these, are kept.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import datasets
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tgdpo.data.encode import encode_responses
from megatron_tgdpo.data.layouts import parse_record
from megatron_tgdpo.data.tokenizers import load_tokenizer
from tests.reference import response_logps
from tests.tiny_models import make_llama

PAIRS = [
    {"prompt": "w5 w6 w7", "chosen": " w8 w9 w10", "rejected": " w11"},
    {"prompt": "w12", "chosen": " w13 w14", "rejected": " w15 w16 w17 w18 w19"},
    {"prompt": "w20 w21", "chosen": " w22", "rejected": " w23 w24"},
]
BETA = 0.3
SMOOTHING = {"robust": 0.1, "exo_pair": 0.001}
FORMS = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down",
)  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for seed, role in enumerate(("policy", "reference"), 1):
            make_llama(root / role, seed=seed)
        models = {role: AutoModelForCausalLM.from_pretrained(root / role).eval() for role in ("policy", "reference")}
        record: dict = {
            "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
            "beta": BETA, "lengths": [], "policy": [], "reference": [], "forms": {},
        }  # fmt: skip
        tokenizer = load_tokenizer(str(root / "policy"))
        for pair in PAIRS:
            prompt, *sides = encode_responses(parse_record(pair, "trl_plain", "here"), tokenizer, "here")
            record["lengths"] += [len(side) for side in sides]
            with torch.no_grad():
                for role, model in models.items():
                    record[role] += torch.cat([response_logps(model, prompt, side) for side in sides]).tolist()
        for form in FORMS:
            smoothing = SMOOTHING.get(form, 0.0)
            losses = []
            for pair in PAIRS:
                args = trl.DPOConfig(
                    output_dir=str(root / "trl"), beta=BETA, loss_type=form, label_smoothing=smoothing,
                    report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
                )  # fmt: skip
                trainer = trl.DPOTrainer(
                    models["policy"],
                    ref_model=models["reference"],
                    args=args,
                    train_dataset=datasets.Dataset.from_list([pair]),
                    eval_dataset=datasets.Dataset.from_list([pair]),
                    processing_class=AutoTokenizer.from_pretrained(root / "policy", pad_token="<unk>"),
                )
                losses.append(trainer.evaluate()["eval_loss"])
            record["forms"][form] = {"label_smoothing": smoothing, "losses": losses}
    Path(__file__).with_name("trl_forms.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
