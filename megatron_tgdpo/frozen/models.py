"""Reference and guide on one pipeline stage: forward passes without autograd.

Legend: S_local tokens of the pack on this rank, W sum of the frozen models' hidden sizes, R response tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.loss.vocab_parallel_logps import response_hidden, token_logps
from megatron_tgdpo.models.language_model import LanguageModel


class FrozenModels(torch.nn.Module):
    """This rank's slices of the frozen models; they hold no gradient and never leave evaluation mode.

    Args:
        models: The reference and, for TGDPO, the guide; none where their log-probs come from elsewhere.

    Attributes:
        models: As given.
        widths: Their hidden sizes.
    """

    def __init__(self, models: Sequence[LanguageModel]) -> None:
        super().__init__()
        self.models = tuple(models)
        self.slices = torch.nn.ModuleList(models)
        self.widths = [model.config.hidden_size for model in models]
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
        if incoming is not None:
            for model, part in zip(self.models, incoming.split(self.widths, dim=-1), strict=True):
                model.set_input_tensor(part.contiguous())
        states = [model(batch.tokens, batch.position_ids, batch.packing) for model in self.models]
        if states and not self.models[0].post_process:
            return (torch.cat(states, dim=-1),)
        return tuple(model_logps(model, hidden, batch) for model, hidden in zip(self.models, states, strict=True))


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
