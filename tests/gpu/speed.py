"""The speed part of ``prove.py``: memory, MFU and pairs/s of whole steps, beside plain HF on the same device."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.training.step import train_step
from tests.gpu.bench import Bench, packs_of, random_weights
from tests.gpu.figures import Figure, at_least, at_most, mfu, random_pairs, skipped, step_flops, write_shape

# What the issue asks of one H100, at the 3B shape and 8,192-token packs.
WANTED = {"mfu": 0.45, "fp8": 1.25, "colocated": 1.75, "hf": 2.0}


def speed(bench: Bench, tiny: bool, peak: float | None, time_left: Callable[[], float]) -> Iterator[Figure]:
    """Every shape and pack length; the 3B shape at 8,192 tokens first, with the limits."""
    cells = [("tiny", 256)] if tiny else [("3B", 8192), ("1B", 8192), ("3B", 2048), ("1B", 2048)]
    for shape, pack in cells:
        judged = (shape, pack) == cells[0] and not tiny
        if time_left() < (0 if tiny else 60):
            reason = "no time left: raise --minutes, or --parts speed"
            yield skipped("speed", f"{shape}, packs of {pack}", reason, judged=judged)
            continue
        yield from cell(bench, shape, pack, peak, judged=judged)


def cell(bench: Bench, shape: str, pack: int, peak: float | None, *, judged: bool) -> Iterator[Figure]:
    """One shape at one sequence length: bf16 and FP8, cached and co-located, and plain HF."""
    directory = bench.root / f"shape-{shape}"
    hf_config = write_shape(directory, shape)
    pairs = random_pairs(16, pack // 4, hf_config.vocab_size, 0)
    lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs])
    seconds: dict[str, float] = {}
    precisions: dict[str, dict[str, Any]] = {
        "bf16": {}, "FP8": {"fp8": "tensorwise"}, "FP8 with FP8 weights": {"fp8": "tensorwise", "fp8_params": True},
    }  # fmt: skip
    for name, precision in precisions.items():
        for mode in ("cached", "colocated"):
            what = f"{shape}, packs of {pack}, {name}, {mode}"
            guidance = {"mode": mode, "cache": "unused" if mode == "cached" else None}
            try:
                config = bench.config(directory, directory, pack, pack // 2, precision=precision, guidance=guidance)
                with random_weights():
                    engine = bench.engine(config)
                packs = packs_of(pairs, engine.pack_format, cached=mode == "cached")
                taken, memory = bench.timed(partial(train_step, engine, packs), 2, 3)
            except (UserError, torch.cuda.OutOfMemoryError) as error:
                yield skipped("speed", what, str(error), judged=judged)
                continue
            finally:
                engine = None
                bench.forget()
            frozen = (hf_config, hf_config) if mode == "colocated" else ()
            flops = step_flops(hf_config, frozen, lengths, pack, shared=config.shared_prompts)
            seconds[f"{name} {mode}"] = taken
            yield Figure(
                "speed", f"{what}: pairs", len(pairs) / taken, "pairs/s", note=f"{flops / taken / 1e12:.0f} TFLOP/s"
            )
            if bench.device.type == "cuda":
                yield Figure("speed", f"{what}: peak memory", memory, "GiB")
            if peak is not None:
                used = mfu(flops, taken, peak)
                judge = judged and (name, mode) == ("bf16", "cached")
                figure = at_least("speed", f"{what}: MFU", used, WANTED["mfu"]) if judge else None
                yield figure or Figure("speed", f"{what}: MFU of the bf16 peak", used)
    yield from ratios(f"{shape}, packs of {pack}", seconds, judged=judged)
    try:
        plain = bench.timed(plain_step(hf_config, pairs[:4], bench.device), 1, 1)[0] * len(pairs) / 4
    except torch.cuda.OutOfMemoryError as error:
        yield skipped("speed", f"{shape}, packs of {pack}: plain HF", str(error), judged=judged)
        return
    finally:
        bench.forget()
    if "bf16 colocated" in seconds:
        faster, what = plain / seconds["bf16 colocated"], f"{shape}, packs of {pack}: pairs/s over plain HF"
        yield at_least("speed", what, faster, WANTED["hf"]) if judged else Figure("speed", what, faster)


def ratios(where: str, seconds: dict[str, float], *, judged: bool) -> Iterator[Figure]:
    """Of step times, as far as both were taken."""
    if {"bf16 cached", "bf16 colocated"} <= seconds.keys():
        value, what = seconds["bf16 colocated"] / seconds["bf16 cached"], f"{where}: co-located over cached step time"
        yield at_most("speed", what, value, WANTED["colocated"]) if judged else Figure("speed", what, value)
    if {"bf16 cached", "FP8 cached"} <= seconds.keys():
        value, what = seconds["bf16 cached"] / seconds["FP8 cached"], f"{where}: FP8 over bf16 tokens/s, cached"
        yield at_least("speed", what, value, WANTED["fp8"]) if judged else Figure("speed", what, value)


def plain_step(hf_config: PretrainedConfig, pairs: Sequence[PreferencePair], device: torch.device) -> Callable[[], Any]:
    """The reference step in plain transformers: a pair at a time, chosen and rejected padded, full logits, bf16.

    Three models on the device, AdamW on bf16 weights (half the state of ours).
    """
    # Made on the device: random numbers for three models of 3B take a CPU minutes.
    with device:
        policy, reference, guide = (
            AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16, attn_implementation="sdpa")
            for _ in range(3)
        )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

    def logps(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]

    def step() -> None:
        for pair in pairs:
            sequences = [np.concatenate((pair.prompt, response)) for response in (pair.chosen, pair.rejected)]
            longest = max(len(sequence) for sequence in sequences)
            tokens = torch.zeros(2, longest, dtype=torch.int64)
            for i, sequence in enumerate(sequences):
                tokens[i, : len(sequence)] = torch.from_numpy(sequence)
            lengths = torch.tensor([len(sequence) for sequence in sequences])[:, None]
            place = torch.arange(longest)[None]
            mask = (place < lengths).long().to(device)
            response = ((place >= len(pair.prompt)) & (place < lengths))[:, 1:].to(device)
            tokens = tokens.to(device)
            with torch.no_grad():
                of_reference, of_guide = logps(reference, tokens, mask), logps(guide, tokens, mask)
                sign = torch.tensor([[1.0], [-1.0]], device=device)
                weights = 1 + sign * 0.5 * 0.1 * (of_guide - of_reference)
            scores = 0.1 * (weights * (logps(policy, tokens, mask) - of_reference) * response).sum(1)
            (-torch.nn.functional.logsigmoid(scores[0] - scores[1]) / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
