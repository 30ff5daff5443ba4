"""Greedy answers of the policy to fixed prompts, from the pipeline that trains.

For every token the whole sequences run through the very forward of training, without a cache: so it holds under every
layout, and with whatever attention and precision training has. All ranks know all sequences, and decide alike.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.batching.packer import plan_packs
from megatron_tgdpo.checkpoints.model_directory import hf_directory
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.frozen.communicator import ColocatedCommunicator, P2PBuffer
from megatron_tgdpo.frozen.forward_logps import forward_only
from megatron_tgdpo.loss.vocab_parallel_logps import greedy_tokens, response_hidden
from megatron_tgdpo.output.logger import Sample
from megatron_tgdpo.output.metrics import eval_group
from megatron_tgdpo.setup.engine import Engine, policy_chunks, unwrapped
from megatron_tgdpo.storage.files import read_error
from megatron_tgdpo.storage.hub import local_path
from megatron_tgdpo.storage.json_text import parse_json
from megatron_tgdpo.training.run_data import RunData

_NOTHING = np.zeros(0, dtype=np.int64)


class PolicySamples:
    """Answers of the policy to ``eval.generate.prompts`` prompts of each validation set, spread evenly over it.

    Args:
        config: The run.
        layout: The parallel layout.
        engine: With the policy.
        data: With the validation sets.

    Raises:
        AgreedError: On every rank: the tokenizer, or the ids that end an answer, cannot be read.
    """

    def __init__(self, config: Config, layout: ParallelLayout, engine: Engine, data: RunData) -> None:
        self._layout, self._engine = layout, engine
        self._settings, self._longest = config.eval.generate, config.longest_sequence
        self._pairs: list[tuple[str, int, str, PreferencePair]] = []
        for name, dataset in data.validation.items():
            count = min(self._settings.prompts, len(dataset))
            for number, index in enumerate(np.linspace(0, len(dataset) - 1, count).astype(int).tolist(), start=1):
                self._pairs.append((eval_group(name), number, dataset.source(index), dataset[index]))
        policy = hf_directory(Path(local_path(config.model.policy)))
        opened = raise_on_all_ranks(lambda: _opened(config, policy) if dist.get_rank() == 0 else None)
        self._tokenizer = None if opened is None else opened[0]
        stops: list[list[int]] = [[] if opened is None else opened[1]]
        dist.broadcast_object_list(stops, src=0)
        self._stops = stops[0]

    def make(self) -> list[Sample]:
        """The answers of this moment. Collective over all ranks.

        Returns:
            On the first rank; nothing elsewhere.
        """
        prompts = [pair.prompt.tolist() for *_, pair in self._pairs]
        answers = greedy_answers(
            self._engine, self._layout, prompts, self._stops, self._settings.max_tokens, self._longest
        )
        if self._tokenizer is None:
            return []
        return [
            Sample(
                group=group,
                number=number,
                source=source,
                prompt=self._tokenizer.decode(prompt, special=True),
                answer=self._tokenizer.decode(answer),
                tokens=len(answer),
                ended=answer[-1:] != [] and answer[-1] in self._stops,
            )
            for (group, number, source, _), prompt, answer in zip(self._pairs, prompts, answers, strict=True)
        ]


def greedy_answers(
    engine: Engine,
    layout: ParallelLayout,
    prompts: Sequence[Sequence[int]],
    stops: Collection[int],
    max_tokens: int,
    longest: int,
) -> list[list[int]]:
    """Token ids of the policy's greedy answers, the same on every rank. Collective over all ranks.

    Args:
        engine: With the policy.
        layout: The parallel layout.
        prompts: Token ids.
        stops: Ids that end an answer, and are its last.
        max_tokens: Of an answer.
        longest: Most tokens of prompt and answer together.
    """
    sequences = [list(prompt) for prompt in prompts]
    limits = [min(len(prompt) + max_tokens, longest) for prompt in prompts]
    going = [i for i, limit in enumerate(limits) if len(sequences[i]) < limit]
    while going:
        for i, token in zip(going, _next_tokens(engine, layout, [sequences[i] for i in going]), strict=True):
            sequences[i].append(token)
        going = [i for i in going if sequences[i][-1] not in stops and len(sequences[i]) < limits[i]]
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]


@torch.no_grad()
def _next_tokens(engine: Engine, layout: ParallelLayout, sequences: Sequence[Sequence[int]]) -> list[int]:
    """The most likely next token of each sequence; each data rank computes a part of them."""
    pg, pack_format = engine.pg, replace(engine.pack_format, shared_prompts=False, chosen_only=True)
    # A token that stands for the next one: its place is asked for, nobody looks at it.
    pairs = [
        PreferencePair(np.array(ids, dtype=np.int64), np.zeros(1, dtype=np.int64), _NOTHING, index)
        for index, ids in enumerate(sequences)
    ]
    tokens = pack_format.pair_tokens(np.array([[len(ids), 1, 0] for ids in sequences])).tolist()
    multiple = layout.pipeline if layout.virtual > 1 else 1
    packs = plan_packs(range(len(pairs)), tokens, pack_format.tokens, layout.data, multiple)[pg.dp.rank()]
    batches = [collate([pairs[i] for i in pack], pack_format).to(engine.device) for pack in packs]
    communicator = None
    if engine.communicator is not None:
        # Of the policy alone: the frozen models do not run.
        config = policy_chunks(engine)[0].config
        communicator = ColocatedCommunicator(pg.pp, config, P2PBuffer(0, config.params_dtype), engine.device)
    results: list[Tensor] = forward_only(
        _policy_step, list(engine.chunks), batches, communicator, pg, pack_format.tokens
    )
    found = torch.full((len(pairs),), -1, dtype=torch.int64, device=engine.device)
    for pack, batch, chosen in zip(packs, batches, results, strict=False):
        found[torch.tensor(pack, dtype=torch.int64)[batch.response_order].to(engine.device)] = chosen
    # From the last stages, and of context ranks from those that hold a sequence's end.
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [int(token) for token in found.tolist()]


def _policy_step(batches: Iterator[PreferenceBatch], model: Any) -> tuple[Tensor, Callable[[Tensor, bool], Tensor]]:
    batch, colocated = next(batches), unwrapped(model)
    policy, hidden = colocated.policy, colocated.run_policy(batch)

    def collect(hidden: Tensor, non_loss_data: bool) -> Tensor:
        assert non_loss_data
        tp_group = policy.pg_collection.tp
        states = response_hidden(
            hidden, batch.logit_positions, sequence_parallel=policy.config.sequence_parallel, tp_group=tp_group
        )
        return greedy_tokens(states, policy.output_weight(), vocab_size=policy.true_vocab_size, tp_group=tp_group)

    return hidden, collect


def _opened(config: Config, policy: Path) -> tuple[Tokenizer, list[int]]:
    """The tokenizer, and the ids that end an answer as transformers has them: of the generation config, if any."""
    tokenizer = load_tokenizer(str(local_path(config.data.tokenizer)) if config.data.tokenizer else str(policy))
    files = [policy / name for name in ("generation_config.json", "config.json")]
    file = next((file for file in files if file.is_file()), files[-1])
    try:
        given = parse_json(file.read_text(encoding="utf-8")).get("eos_token_id")
    except OSError as error:
        raise read_error(file, error) from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    ids = given if isinstance(given, list) else [given]
    return tokenizer, [number for number in ids if isinstance(number, int)]
