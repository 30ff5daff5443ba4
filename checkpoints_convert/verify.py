"""Checks that an HF directory and a Megatron checkpoint hold the same model: weights to the bit, then logits.

    python -m checkpoints_convert.verify --hf DIR --megatron DIR

Weights are compared in the checkpoint's stored dtype. Logits are compared in fp32 between transformers and this project
on packed random tokens, longer than a rope scaling's original context where that is short, and on a short text. Exit
code 1 if anything differs. Alone, or under torchrun or srun with ``--tensor`` and ``--pipeline``.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from checkpoints_convert.command_line import Session, dtype_of, find_checkpoint, layout_arguments, open_session, run
from checkpoints_convert.export import gather_shards
from checkpoints_convert.hf_reader import HfCheckpoint
from checkpoints_convert.load import load_megatron_weights
from checkpoints_convert.logits import packed_logits
from checkpoints_convert.mapping import Heads, expected_shapes, join_shards
from checkpoints_convert.model_mapping import mapped_parameters
from megatron_tgdpo.checkpoint_format import hf_folder, read_metadata
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.hf_config import read_hf_config
from megatron_tgdpo.models import build_language_model

TOLERANCE = 1e-4
_TEXT = "The quick brown fox jumps over the lazy dog, then sleeps until the morning comes."


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="checkpoints_convert.verify", description=__doc__.split("\n")[0])
    parser.add_argument("--hf", type=Path, required=True, help="HF directory")
    parser.add_argument("--megatron", type=Path, required=True, help="Megatron checkpoint or training output directory")
    layout_arguments(parser)
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.megatron)
    hf_shapes = expected_shapes(read_hf_config(arguments.hf))
    # Ours is built from the checkpoint's own config: what differs in the two configs must show in the logits.
    hf_config = read_hf_config(checkpoint)
    stored = dtype_of(read_metadata(checkpoint), checkpoint)
    session = open_session(arguments)
    different = different_weights(arguments.hf, checkpoint, hf_config, stored, session)
    different = sorted({*different, *(expected_shapes(hf_config).keys() ^ hf_shapes.keys())})
    if different:
        raise UserError(f"{checkpoint}: {len(different)} weights differ from {arguments.hf}, first {different[0]}")
    if session.is_first:
        print(f"weights: all {len(hf_shapes)} tensors equal to the bit in {stored}")
    worst = logit_difference(arguments.hf, checkpoint, hf_config, stored, session)
    if worst >= TOLERANCE:
        raise UserError(f"{checkpoint}: logits differ from {arguments.hf} by {worst:.2e} of the largest logit")
    if session.is_first:
        print(f"logits: largest difference {worst:.2e} of the largest logit, in fp32")


@torch.no_grad()
def different_weights(
    hf: Path, checkpoint: Path, hf_config: PretrainedConfig, stored: torch.dtype, session: Session
) -> list[str]:
    """HF names of the tensors that differ or are missing, the same list on all ranks. Collective over all ranks."""
    model = build_language_model(hf_config, session.layout, session.pg, dtype=stored, device=session.device)
    load_megatron_weights(model, checkpoint, hf_config)
    source, heads, pg = HfCheckpoint(hf), Heads.of(hf_config), session.pg
    compared: dict[str, bool] = {}
    for mapped in mapped_parameters(model, hf_config):
        parameter = mapped.parameter.detach()
        shards = [parameter] if mapped.kind == "copy" else gather_shards(parameter, pg.tp)
        if pg.tp.rank() == 0:
            joined = join_shards(mapped.kind, shards, heads, hf_config.vocab_size)
            for name, tensor in zip(mapped.hf_names, joined, strict=True):
                same = name in source.tensors and torch.equal(source.whole(name).to(stored), tensor.cpu())
                compared[name] = compared.get(name, True) and same
    reports: list[dict[str, bool]] = [{}] * dist.get_world_size()
    dist.all_gather_object(reports, compared)
    return sorted({name for report in reports for name, same in report.items() if not same})


def logit_difference(
    hf: Path, checkpoint: Path, hf_config: PretrainedConfig, stored: torch.dtype, session: Session
) -> float:
    """Largest |logit difference| / largest |logit| over the sequences, the same on all ranks. Collective."""
    model = build_language_model(hf_config, session.layout, session.pg, dtype=torch.float32, device=session.device)
    load_megatron_weights(model, checkpoint, hf_config)
    sequences = _sequences(hf, hf_config)
    lengths = [len(sequence) for sequence in sequences]
    padding = -sum(lengths) % session.layout.tensor
    tokens = torch.cat([*sequences, torch.zeros(padding, dtype=torch.int64)]).to(session.device)
    ours = packed_logits(model, tokens, lengths, session.pg)
    worst = 0.0
    # One rank of the last stage compares: no rank but it needs the whole HF model.
    if ours is not None and session.pg.tp.rank() == 0 and session.pg.dp_cp.rank() == 0:
        worst = _compare(ours.cpu(), sequences, hf, stored)
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, worst)
    return max(values)


def _sequences(hf: Path, hf_config: PretrainedConfig) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    longest = min(hf_config.max_position_embeddings, 200)
    lengths = (longest, max(1, longest // 3))
    sequences = [torch.randint(0, hf_config.vocab_size, (n,), generator=random) for n in lengths]
    directory = hf_folder(hf)
    if (directory / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        text = torch.tensor(tokenizer(_TEXT)["input_ids"], dtype=torch.int64)
        if len(text) and int(text.max()) < hf_config.vocab_size:
            sequences.append(text)
    return sequences


@torch.no_grad()
def _compare(ours: torch.Tensor, sequences: list[torch.Tensor], hf: Path, stored: torch.dtype) -> float:
    theirs = AutoModelForCausalLM.from_pretrained(
        hf,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="eager",
    ).eval()
    for parameter in theirs.parameters():
        # Parameters only: the rotary frequencies, a buffer, stay fp32 in this project.
        parameter.copy_(parameter.to(stored))
    worst, start = 0.0, 0
    for sequence in sequences:
        wanted = theirs(sequence[None]).logits[0]
        difference = (ours[start : start + len(sequence)] - wanted).abs().max() / wanted.abs().max()
        # NaN must not pass as small.
        worst = max(worst, float(difference) if torch.isfinite(difference) else float("inf"))
        start += len(sequence)
    return worst


if __name__ == "__main__":
    run(main)
