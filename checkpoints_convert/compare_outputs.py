"""Whether an HF directory and a Megatron checkpoint hold the same model: :func:`verify`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from checkpoints_convert.command_line import dtype_of, find_checkpoint, find_hf
from checkpoints_convert.compare_adapters import verify_adapter
from checkpoints_convert.compare_weights import different_weights
from checkpoints_convert.layout_options import Session, open_session
from checkpoints_convert.logits import RowOutputs, packed_outputs
from checkpoints_convert.probes import Probe, Reference, long_length, make_probes, reference_outputs, spans
from megatron_tgdpo.checkpoints.adapter_directory import is_adapter
from megatron_tgdpo.checkpoints.manifest import read_metadata
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.load import load_megatron_weights
from megatron_tgdpo.models.hf_weights.mapping import expected_shapes
from megatron_tgdpo.models.language_model import build_language_model
from megatron_tgdpo.planning.pipeline_layers import fit_one

LOGIT_LIMIT = 1e-4  # of the largest logit
LOGP_LIMIT = 1e-3  # nats


@dataclass(frozen=True)
class Difference:
    """Of one probe: the largest difference of logits relative to the largest logit, of log-probs in nats, and whether
    the most probable next token is the same."""

    probe: str
    logits: float
    logps: float
    same_next: bool

    @property
    def small(self) -> bool:
        # Written so that NaN is not small.
        return self.logits < LOGIT_LIMIT and self.logps < LOGP_LIMIT and self.same_next

    def __str__(self) -> str:
        same = "same" if self.same_next else "DIFFERENT"
        return (
            f"{self.probe}: logits {self.logits:.1e} of the largest, log-probs {self.logps:.1e} nats, next token {same}"
        )


def verify(arguments: argparse.Namespace) -> None:
    """Compares weights, then outputs, and prints what was found. Collective over all ranks, which it joins.

    Args:
        arguments: Of the command ``tgdpo verify``.

    Raises:
        UserError: They differ, or one of them cannot be read.
    """
    checkpoint = find_checkpoint(arguments.megatron, adapter=True)
    adapter = is_adapter(checkpoint)
    hf = find_hf(arguments.hf, adapter=adapter)
    if adapter:
        session = open_session(arguments)
        found = verify_adapter(hf, checkpoint)
        if session.is_first:
            print(found, flush=True)
        return
    hf_shapes = expected_shapes(read_hf_config(hf))
    # Ours is built from the checkpoint's own config: what differs in the two configs must show in the logits.
    hf_config = read_hf_config(checkpoint)
    stored = dtype_of(read_metadata(checkpoint), checkpoint)
    session = open_session(arguments, sequence_parallel=family_of(hf_config.architectures).has_experts)
    different = different_weights(hf, checkpoint, hf_config, stored)
    different = sorted({*different, *(expected_shapes(hf_config).keys() ^ hf_shapes.keys())})
    if different:
        raise UserError(f"{checkpoint}: {len(different)} weights differ from {hf}, first {different[0]}")
    if session.is_first:
        print(f"weights: all {len(hf_shapes)} tensors equal to the bit in {stored}", flush=True)
    length = arguments.long_tokens or long_length(hf_config)
    differences = compare_outputs(hf, checkpoint, hf_config, stored, length, session)
    if session.is_first:
        print("\n".join(str(difference) for difference in differences))
        for name, span in spans(hf_config).items():
            if span >= length:
                print(f"note: the {name} of {span} was not passed, --long-tokens {span + 64} passes it")
    large = [difference for difference in differences if not difference.small]
    if large:
        raise UserError(f"{checkpoint}: computes something else than {hf}: {large[0]}")


def compare_outputs(
    hf: Path, checkpoint: Path, hf_config: PretrainedConfig, stored: torch.dtype, length: int, session: Session
) -> list[Difference]:
    """Runs both models on the same probes; the same list on all ranks. Collective over all ranks.

    Args:
        hf: The HF directory.
        checkpoint: The Megatron checkpoint.
        hf_config: The checkpoint's own config.
        stored: The checkpoint's dtype.
        length: Tokens of the long probes.
        session: The grid of ranks.

    Raises:
        UserError: On every rank: transformers cannot load the HF directory.
    """
    pg = session.pg
    compares = pg.pp.rank() == pg.pp.size() - 1 and pg.tp.rank() == 0 and pg.dp_cp.rank() == 0
    probes = raise_on_all_ranks(lambda: make_probes(hf, hf_config, length))
    # Before our model is there: so that one rank never holds both.
    references = raise_on_all_ranks(lambda: reference_outputs(hf, probes, stored, session.device) if compares else [])
    layout = fit_one(hf_config, session.layout)
    model = build_language_model(hf_config, layout, pg, dtype=torch.float32, device=session.device)
    load_megatron_weights([model], checkpoint, hf_config)
    lengths = [len(probe.tokens) for probe in probes]
    padding = torch.zeros(-sum(lengths) % session.layout.tensor, dtype=torch.int64)
    tokens = torch.cat([*(probe.tokens for probe in probes), padding]).to(session.device)
    ours = packed_outputs(model, tokens, lengths, pg)
    found = _differences(ours, probes, references) if compares and ours is not None else []
    reports: list[list[Difference]] = [[]] * dist.get_world_size()
    dist.all_gather_object(reports, found)
    return next(report for report in reports if report)


def _differences(ours: RowOutputs, probes: list[Probe], references: list[Reference]) -> list[Difference]:
    found, start = [], 0
    for probe, reference in zip(probes, references, strict=True):
        end = start + len(probe.tokens)
        logits, logps = ours.logits[start:end].cpu(), ours.logps[start : end - 1].cpu()
        found.append(
            Difference(
                probe.name,
                float((logits - reference.logits).abs().max()) / reference.relative_to,
                float((logps - reference.logps(probe.tokens)).abs().max()),
                int(logits[-1].argmax()) == int(reference.logits[-1].argmax()),
            )
        )
        start = end
    return found
