"""How far two right computations of the same log-probs are apart, measured on the model itself.

Another layout, pack or kernel rounds at other places. What that does to a log-prob depends on the weights. So it is
measured, as Monte Carlo arithmetic does (D. S. Parker, 1997): the outputs of every layer are disturbed at random by one
unit of rounding, and the log-probs are compared with the undisturbed ones. On models of eight layers and three families
in bf16 this response was 1.0 to 1.2 times the error against fp32; other layouts were up to 0.9 times it apart, and 1.6
times in the largest difference of a token.

Legend: R response tokens, B responses. Differences are in nats.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tgdpo.loss.preference import sum_per_sequence
from megatron_tgdpo.models.language_model import LanguageModel

# How many times the response to one unit of rounding two computations may be apart.
_FACTOR = 4.0
# How often it is measured: of a few pairs alone, one time could be small by chance.
DRAWS = 4
# One bit of mantissa; torch has no finfo of FP4.
_E2M1_EPS = 0.5


@dataclass(frozen=True)
class LogpDifference:
    """How far two computations of the same log-probs are apart, the same on every rank.

    Attributes:
        token: Root mean square over response tokens.
        largest: Of any response token.
        response: Root mean square over responses of the sum over their tokens: what leans to one side adds up here.
    """

    token: float
    largest: float
    response: float

    @classmethod
    def of_sums(
        cls, tokens: float, squares: float, responses: float, response_squares: float, largest: float
    ) -> "LogpDifference":
        """From the numbers of tokens and responses, the sums of their squared differences, and the largest."""
        token, response = squares / max(tokens, 1.0), response_squares / max(responses, 1.0)
        return cls(math.sqrt(token), max(largest, 0.0), math.sqrt(response))

    def within(self, allowed: "LogpDifference") -> bool:
        """Whether nothing is larger than allowed; false where something is not a number."""
        return all(found <= limit for found, limit in zip(astuple(self), astuple(allowed), strict=True))

    def allowing(self) -> "LogpDifference":
        """What two right computations may be apart, where ``self`` is the response to a unit of rounding."""
        return LogpDifference(
            *(max(_FACTOR * own, floor) for own, floor in zip(astuple(self), astuple(NEGLIGIBLE), strict=True))
        )

    def __str__(self) -> str:
        return f"{self.largest:.3g} (root mean square {self.token:.3g}, of whole responses {self.response:.3g})"


# What is never looked into: sums over a vocabulary in fp32 leave as much.
NEGLIGIBLE = LogpDifference(token=1e-4, largest=1e-4, response=1e-3)


def logp_difference(
    parts: Sequence[tuple[Tensor, Tensor]], device: torch.device, cp_group: dist.ProcessGroup | None = None
) -> LogpDifference:
    """Combines what all ranks have. Collective over all ranks.

    Args:
        parts: Differences [R] and response lengths [B] of some packs. A rank that has nothing, or the same as another
            rank, brings none.
        device: Of the collectives.
        cp_group: The ranks that hold parts of the same responses, if there are such.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    largest = torch.zeros((), dtype=torch.float64, device=device)
    for differences, lengths in parts:
        values = differences.to(device, torch.float64)
        totals = sum_per_sequence(values, lengths.to(device))
        if cp_group is not None and cp_group.size() > 1:
            dist.all_reduce(totals, group=cp_group)
            totals = totals if cp_group.rank() == 0 else totals[:0]
        squares = [part.square().sum() for part in (values, totals)]
        sums += torch.stack([sums.new_tensor(len(values)), squares[0], sums.new_tensor(len(totals)), squares[1]])
        if values.numel():
            largest = torch.maximum(largest, values.abs().max())
    dist.all_reduce(sums)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    tokens, token_squares, responses, response_squares = sums.tolist()
    return LogpDifference.of_sums(tokens, token_squares, responses, response_squares, float(largest))


@contextmanager
def rounding_noise(models: Sequence[LanguageModel], device: torch.device, draw: int) -> Iterator[None]:
    """Disturbs every layer of these models, or chunks of one, by one unit of rounding while it lasts.

    Attention, MLP and the layer as a whole are disturbed; under FP8 the first two by its unit, since they are products.
    The noise follows from ``draw`` and the pipeline stage alone, so ranks with the same hidden states keep them the
    same. ``device`` is where the models compute.
    """
    with ExitStack() as hooks:
        for number, model in enumerate(models):
            place = model.pg_collection.pp.rank() * len(models) + number
            generator = torch.Generator(device).manual_seed(place * DRAWS + draw)
            plain = torch.finfo(model.config.params_dtype).eps / 2
            product = _product_unit(model.config, plain)
            for layer in model.decoder.layers:
                for module, unit in ((layer.self_attention, product), (layer.mlp, product), (layer, plain)):
                    hooks.callback(module.register_forward_hook(_disturbing(unit, generator)).remove)
        yield


def _product_unit(config: TransformerConfig, plain: float) -> float:
    """What one operand of a product of the layers is rounded by, relative to it."""
    if config.fp4:
        return _E2M1_EPS / 2
    return torch.finfo(torch.float8_e4m3fn).eps / 2 if config.fp8 else plain


def _disturbing(unit: float, generator: torch.Generator) -> Callable[..., tuple[Tensor, ...]]:
    def hook(module: torch.nn.Module, arguments: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module, arguments
        hidden, *rest = output
        noise = torch.rand(hidden.shape, generator=generator, device=hidden.device) * 2 - 1
        return ((hidden.float() * (1 + unit * noise)).to(hidden.dtype), *rest)

    return hook
