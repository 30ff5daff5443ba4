"""DPO beside TRL's DPOTrainer: loss and metrics of the same pairs, from text on. Skipped where TRL is not installed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tgdpo.data.encode import encode_responses
from megatron_tgdpo.data.layouts import parse_record
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.loss.preference import dpo_loss
from megatron_tgdpo.output.metrics import pack_metrics, reduce_metrics
from tests.reference import response_logps
from tests.tiny_models import make_llama

PAIRS = [
    {"prompt": "w5 w6 w7", "chosen": " w8 w9 w10", "rejected": " w11"},
    {"prompt": "w12", "chosen": " w13 w14", "rejected": " w15 w16 w17 w18 w19"},
    {"prompt": "w20 w21", "chosen": " w22", "rejected": " w23 w24"},
]


def test_dpo_equals_trl(tmp_path: Path, single_rank_group: dist.ProcessGroup) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    make_llama(tmp_path / "policy", seed=1)
    make_llama(tmp_path / "reference", seed=2)
    models = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("policy", "reference")}
    trainer = trl.DPOTrainer(
        models["policy"],
        ref_model=models["reference"],
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), beta=0.3, per_device_eval_batch_size=len(PAIRS), report_to="none",
            use_cpu=True, bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        eval_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "policy", pad_token="<unk>"),
    )  # fmt: skip
    theirs = trainer.evaluate()

    tokenizer = load_tokenizer(str(tmp_path / "policy"))
    lengths, logps = [], {"policy": [], "reference": []}
    for record in PAIRS:
        prompt, *sides = encode_responses(parse_record(record, "trl_plain", "here"), tokenizer, "here")
        lengths += [len(side) for side in sides]
        with torch.no_grad():
            for name, packs in logps.items():
                packs += [response_logps(models[name], prompt, side) for side in sides]
    policy, reference = torch.cat(logps["policy"]), torch.cat(logps["reference"])
    loss = dpo_loss(policy, {"reference": reference}, torch.tensor(lengths), {**METHODS["dpo"].options, "beta": 0.3})
    metrics = pack_metrics(loss, torch.arange(len(PAIRS)))
    pg = SimpleNamespace(dp_cp=single_rank_group, pp=single_rank_group)
    ours = reduce_metrics([metrics], pg, torch.device("cpu")).values  # type: ignore[arg-type]
    shared = [name for name in ours if f"eval_{name}" in theirs]
    assert {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= set(shared)
    for name in shared:
        assert ours[name] == pytest.approx(theirs[f"eval_{name}"], rel=2e-5), name
