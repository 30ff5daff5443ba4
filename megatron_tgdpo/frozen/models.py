"""Reference and guide on one pipeline stage: forward passes without autograd.

Legend: S_local tokens of the pack on this rank, W sum of the frozen models' hidden sizes, R response tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.loss.vocab_parallel_logps import response_hidden, token_logps
from megatron_tgdpo.models.language_model import LanguageModel
from megatron_tgdpo.models.lora import adapter_on


@dataclass(frozen=True)
class FrozenModel:
    """A frozen model on this rank: a model's weights, with one of its adapters or with none.

    Attributes:
        model: This rank's slice.
        adapter: Name of the adapter that is on.
        shared: Whether the weights are those of a model that is cared for elsewhere, as the policy's.
        release: Called when a pass is done, log-probs included; None for nothing.
    """

    model: LanguageModel
    adapter: str | None = None
    shared: bool = False
    release: Callable[[], None] | None = None


class FrozenModels(torch.nn.Module):
    """This rank's slices of the frozen models; they hold no gradient and never leave evaluation mode.

    Args:
        frozen: The reference and, for TGDPO, the guide; none where their log-probs come from elsewhere.

    Attributes:
        frozen: As given.
        models: Their slices; several may be one.
        widths: Their hidden sizes.
    """

    def __init__(self, frozen: Sequence[FrozenModel]) -> None:
        super().__init__()
        self.frozen = tuple(frozen)
        self.models = tuple(each.model for each in frozen)
        self.slices = torch.nn.ModuleList(each.model for each in frozen if not each.shared)
        self.widths = [model.config.hidden_size for model in self.models]
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenModels":
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: PreferenceBatch, incoming: Tensor | None) -> tuple[Tensor, ...]:
        """Runs this stage's layers of all models on one pack.

        Args:
            batch: The pack.
            incoming: [S_local, 1, W] hidden states of the stage before, side by side; None on the first stage.

        Returns:
            One tensor, [S_local, 1, W], for the next stage; on the last stage token log-probs, [R] float32 a model.
        """
        parts = [None] * len(self.frozen) if incoming is None else incoming.split(self.widths, dim=-1)
        states = [self._run(each, batch, part) for each, part in zip(self.frozen, parts, strict=True)]
        if states and not self.models[0].post_process:
            for each in self.frozen:
                _release(each)
            return (torch.cat(states, dim=-1),)
        return tuple(self._logps(each, hidden, batch) for each, hidden in zip(self.frozen, states, strict=True))

    def _logps(self, frozen: FrozenModel, hidden: Tensor, batch: PreferenceBatch) -> Tensor:
        result = model_logps(frozen.model, hidden, batch)
        # Before the next model's output weight is read.
        _release(frozen)
        return result

    def _run(self, frozen: FrozenModel, batch: PreferenceBatch, incoming: Tensor | None) -> Tensor:
        model = frozen.model
        if incoming is not None:
            model.set_input_tensor(incoming.contiguous())
        with adapter_on(model, frozen.adapter) if model.config.adapters else nullcontext():
            result: Tensor = model(batch.tokens, batch.position_ids, batch.packing)
        return result


def _release(frozen: FrozenModel) -> None:
    if frozen.release is not None:
        frozen.release()


def model_logps(model: LanguageModel, hidden: Tensor, batch: PreferenceBatch, keep_bytes: int = 0) -> Tensor:
    """Token log-probs [R] float32 of a model on the last stage, from its hidden states [S_local, 1, H].

    For a model that trains, ``keep_bytes`` of logits are kept for backward.
    """
    tp_group = model.pg_collection.tp
    states = response_hidden(
        hidden, batch.logit_positions, sequence_parallel=model.config.sequence_parallel, tp_group=tp_group
    )
    return token_logps(
        states,
        model.output_weight(),
        batch.targets,
        vocab_size=model.true_vocab_size,
        tp_group=tp_group,
        softcap=model.logit_softcap,
        keep_bytes=keep_bytes,
    )
