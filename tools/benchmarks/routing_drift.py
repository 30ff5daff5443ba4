"""How many tokens choose other experts in another layout or pack, and what that does to log-probs and the ln 2 check.

    torchrun --nproc-per-node 2 -m tools.benchmarks.routing_drift [--model DIR] [--dtype bf16|fp32] [--experts 64]

Without a model a random Qwen3-MoE is made. Pairs of random tokens are computed as one pack on one rank ("one"), then so
that something rounds elsewhere: experts over two ranks, tensor and sequence parallelism, a pack for each pair, prompts
twice; and as one pack again, with which nothing may differ. "disturbed" is one pack with one unit of rounding added at
random in each layer, of which the ln 2 check allows four times the effect (models/logp_tolerance.py).

A token counts as routed otherwise where its set of experts differs. Differences of log-probs are in nats, over response
tokens; "moved" are those of tokens that some layer routed otherwise themselves.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import destroy_model_parallel, init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.frozen.models import model_logps
from megatron_tgdpo.loss.preference import sum_per_sequence
from megatron_tgdpo.models.experts import Router
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.load import load_hf_weights
from megatron_tgdpo.models.language_model import LanguageModel, build_language_model
from megatron_tgdpo.models.logp_tolerance import LogpDifference, rounding_noise
from megatron_tgdpo.storage.dtypes import DTYPES

_CPU = torch.device("cpu")
# Tensor, expert and expert-tensor ranks of two.
_LAYOUTS = {"one": (1, 1, 1), "EP2": (1, 2, 1), "TP2 + SP": (2, 1, 2), "TP2 + SP, EP2": (2, 2, 1)}


@dataclass(frozen=True)
class Result:
    """Of all pairs: [layers, tokens, experts] bool routes in the order of the sequences, log-probs [R], and for each of
    these the place of the token that predicts it among the former; lengths [B] of the responses."""

    routes: Tensor
    logps: Tensor
    predicted_by: Tensor
    lengths: Tensor


def make_model(path: Path, experts: int, hidden: int, layers: int) -> None:
    """A random Qwen3-MoE in fp32, whose router logits are about as far apart as a trained one's."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"head_dim": hidden // 8}
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2,
        num_experts=experts, num_experts_per_tok=8, moe_intermediate_size=hidden // 2,
        intermediate_size=hidden, norm_topk_prob=True, tie_word_embeddings=False, pad_token_id=None, **options,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.save_pretrained(path)


def make_pairs(count: int, vocabulary: int) -> list[PreferencePair]:
    """Of random tokens: prompts of 40, responses of 60 to 100."""
    rng = np.random.default_rng(0)
    return [
        PreferencePair(
            rng.integers(3, vocabulary, 40),
            rng.integers(3, vocabulary, chosen),
            rng.integers(3, vocabulary, rejected),
            index,
        )
        for index, (chosen, rejected) in enumerate(rng.integers(60, 100, (count, 2)).tolist())
    ]


@torch.no_grad()
def compute(model: LanguageModel, packs: Sequence[PreferenceBatch], noise: int | None = None) -> Result:
    """Runs packs; ``noise`` is the number of a disturbance."""
    recorded: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *arguments: recorded.append(arguments[-1][1]))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    tp, parts, first = model.pg_collection.tp, [], 0
    for pack in packs:
        recorded.clear()
        with nullcontext() if noise is None else rounding_noise([model], _CPU, noise):
            hidden = model(pack.tokens, pack.position_ids, pack.packing)
        logps = model_logps(model, hidden, pack, 0)
        routes = torch.stack([_gathered(each, tp) for each in recorded])
        assert pack.packing.sequences is not None
        of_token = pack.packing.sequences.of_token
        count = len(pack.response_lengths)
        # Tokens sequence after sequence, a shared prompt's in both: the same for all packings.
        places = [(of_token == sequence).any(dim=1).nonzero()[:, 0] for sequence in range(count)]
        starts = torch.tensor([first, *(len(each) for each in places)]).cumsum(0)
        predicted_by = torch.cat(
            [
                torch.arange(int(end) - 1 - int(length), int(end) - 1)
                for end, length in zip(starts[1:], pack.response_lengths, strict=True)
            ]
        )
        first = int(starts[-1])
        parts.append(Result(routes[:, torch.cat(places)], logps, predicted_by, pack.response_lengths))
    for hook in hooks:
        hook.remove()
    return Result(
        torch.cat([part.routes for part in parts], dim=1),
        torch.cat([part.logps for part in parts]),
        torch.cat([part.predicted_by for part in parts]),
        torch.cat([part.lengths for part in parts]),
    )


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return part
    parts = [torch.empty_like(part, dtype=torch.uint8) for _ in range(group.size())]
    dist.all_gather(parts, part.to(torch.uint8).contiguous(), group=group)
    return torch.cat(parts).bool()


def difference(ours: Result, theirs: Result) -> LogpDifference:
    """Of their log-probs."""
    apart = (ours.logps - theirs.logps).double()
    whole = sum_per_sequence(apart, ours.lengths)
    squares = (float(apart.square().sum()), float(whole.square().sum()))
    return LogpDifference.of_sums(len(apart), squares[0], len(whole), squares[1], float(apart.abs().max()))


def results(hf: Path, hf_config: PretrainedConfig, dtype: torch.dtype, pair_count: int) -> dict[str, Result]:
    """Of all variants; collective over two ranks."""
    pairs = make_pairs(pair_count, hf_config.vocab_size)
    tokens = sum(40 + len(pair.chosen) + 40 + len(pair.rejected) for pair in pairs)
    whole = collate(pairs, PackFormat(tokens + tokens % 2, shared_prompts=True))
    twice = collate(pairs, PackFormat(tokens + tokens % 2))
    alone = [collate([pair], PackFormat(320, shared_prompts=True)) for pair in pairs]
    found = {}
    for name, (tensor, expert, expert_tensor) in _LAYOUTS.items():
        layout = make_layout(tensor, 1, 1, tensor > 1, 2, expert=expert, expert_tensor=expert_tensor)
        pg = init_model_parallel(layout, seed=1, timeout_minutes=15)
        model = build_language_model(hf_config, layout, pg, dtype=dtype, device=_CPU)
        load_hf_weights(model, hf, hf_config, pg)
        found[name] = compute(model, [whole])
        if name == "one":
            found["one again"] = compute(model, [whole])
            found["a pack for each pair"] = compute(model, alone)
            found["prompts twice"] = compute(model, [twice])
            found["disturbed"] = compute(model, [whole], noise=0)
        destroy_model_parallel()
    return found


def report(found: dict[str, Result], top_k: int) -> None:
    """Prints a line for each variant, of what differs from ``one``."""
    one = found["one"]
    layers, tokens, _ = one.routes.shape
    allowed = difference(found["disturbed"], one).allowing()
    print(f"{layers} layers, {tokens} tokens, {len(one.logps)} of them predict; the ln 2 check allows {allowed}")
    print(f"{'':>22}  routed otherwise: in a layer, in any; experts   log-probs: rms, moved, others, largest; check")
    for name, other in found.items():
        if name == "one":
            continue
        apart = (other.routes != one.routes).any(dim=2)
        moved = apart.any(dim=0)[one.predicted_by]
        squares = (other.logps - one.logps).double().square()
        rms = [float(part.mean().sqrt()) if len(part) else 0.0 for part in (squares, squares[moved], squares[~moved])]
        chosen = float((other.routes & ~one.routes).sum()) / (layers * tokens * top_k)
        found_difference = difference(other, one)
        in_a_layer, in_any = float(apart.float().mean()), float(apart.any(dim=0).float().mean())
        print(
            f"{name:>22}  {in_a_layer:.4%} {in_any:.4%} {chosen:.4%}   "
            f"{rms[0]:.2e} {rms[1]:.2e} {rms[2]:.2e} {found_difference.largest:.2e} "
            f"{'passes' if found_difference.within(allowed) else 'FAILS'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="HF directory of a model with experts")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--experts", type=int, default=64, help="of the random model")
    parser.add_argument("--hidden", type=int, default=256, help="size of the random model")
    parser.add_argument("--layers", type=int, default=8, help="of the random model")
    parser.add_argument("--pairs", type=int, default=6)
    arguments = parser.parse_args()
    enable_cpu_backend()
    ranks = read_rank_environment()
    init_distributed(ranks, _CPU, 15, connect_store(ranks))
    with tempfile.TemporaryDirectory() as temporary:
        shared: list[str] = [temporary]
        dist.broadcast_object_list(shared)
        hf = arguments.model or Path(shared[0])
        if arguments.model is None and ranks.rank == 0:
            make_model(hf, arguments.experts, arguments.hidden, arguments.layers)
        dist.barrier()
        hf_config = read_hf_config(hf)
        found = results(hf, hf_config, DTYPES[arguments.dtype], arguments.pairs)
        if ranks.rank == 0:
            print(json.dumps({"dtype": arguments.dtype, "experts": hf_config.num_experts}))
            report(found, hf_config.num_experts_per_tok)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
