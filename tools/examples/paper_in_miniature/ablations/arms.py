"""What is trained to answer the questions: arms, and the order in which they are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

SEEDS = (1, 2, 3, 4, 5)
TUNING_SEED = 0
RATES = (3e-4, 1e-3, 3e-3)
# Those that seed 0 chose in the miniature (docs/reproduction.md).
_CHOSEN = {("simpo", None): 1e-3, ("dpo", 0.5): 1e-3, ("dpo", 1.0): 3e-4}
_USUAL_RATE = 3e-3


@dataclass(frozen=True)
class Credits:
    """A guide that knows the oracle's credits, as token rewards with noise.

    Attributes:
        correlation: Of the rewards with the credits.
    """

    correlation: float

    @property
    def name(self) -> str:
        return f"credits{self.correlation:g}"


@dataclass(frozen=True)
class Regime:
    """How long an arm is trained.

    Attributes:
        name: In file names; empty for the usual one.
        pairs: How many of the pairs; None for all.
        epochs: Passes over them.
        schedule: Of the learning rate, after the warm-up.
        shown: Epochs after which the model is judged; its last one always.
        validated: Every how many epochs there is a held-out accuracy; 0 for never.
        global_pairs: Pairs of a step.
        tuned: Whether seed 0 chooses the learning rate, by DPO, for all arms of the regime.
    """

    name: str = ""
    pairs: int | None = None
    epochs: int = 2
    schedule: str = "cosine"
    shown: tuple[int, ...] = ()
    validated: int = 0
    global_pairs: int = 32
    tuned: bool = False


USUAL = Regime()
LONG = Regime("long", 300, 20, "constant", (1, 2, 5, 10, 20), 2)
# The guide of a long one: the same pairs, as many steps as in the usual regime.
LONG_GUIDE = Regime("few", 300, 8)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        method: ``dpo``, ``robust`` (DPO with that form), ``simpo`` or ``tgdpo``.
        beta: Of all but SimPO, which has the miniature's.
        alpha: Of TGDPO.
        guide: Of TGDPO.
        unit: What has a reward of its own: ``token``, or ``sentence``, which is four words.
        wrong: Share of labels that are wrong.
        regime: How long.
        deviation: Of TGDPO's weights over the training pairs, in the place of ``alpha``, which follows from it.
    """

    method: str
    beta: float = 0.3
    alpha: float | None = None
    guide: Arm | Credits | None = None
    unit: str = "token"
    wrong: float = 0.0
    regime: Regime = USUAL
    deviation: float | None = None

    @property
    def name(self) -> str:
        """Unique, and a file's."""
        parts = [self.method]
        if self.method != "simpo":
            parts.append(f"beta{self.beta:g}")
        if self.guide is not None:
            strength = f"alpha{self.alpha:g}" if self.deviation is None else f"deviation{self.deviation:g}"
            parts += [strength, f"by-{self.guide.name}"]
        parts += [self.unit] * (self.unit != "token") + [f"wrong{self.wrong:g}"] * (self.wrong > 0)
        return "-".join(parts + [self.regime.name] * bool(self.regime.name))

    @property
    def options(self) -> tuple[str, Mapping[str, Any]]:
        """``loss.method`` and its options."""
        if self.method == "simpo":
            return "simpo", {"beta": 10.0, "gamma": 3.0}
        if self.method == "robust":
            return "dpo", {"beta": self.beta, "form": "robust", "label_smoothing": self.wrong}
        return self.method, {"beta": self.beta} | ({} if self.alpha is None else {"alpha": self.alpha})

    @property
    def rate(self) -> float | None:
        """The learning rate that was chosen before; None where seed 0 has to choose."""
        if self.regime.tuned or isinstance(self.guide, Credits):
            return None
        source = self.guide.method if self.guide is not None else self.method
        if self.guide is None:
            return _CHOSEN.get((source, None), _USUAL_RATE)
        return _CHOSEN.get((source, self.alpha), _USUAL_RATE)


@dataclass(frozen=True)
class Stage:
    """A part of the queue.

    Attributes:
        question: Its letter.
        arms: To be run, each on all seeds before the next.
        seeds: Those.
        rate: For all of them, in the place of their own.
    """

    question: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = SEEDS
    rate: float | None = None


DPO, SIMPO = Arm("dpo"), Arm("simpo")
# Question c: 75 steps as in the usual regime, of fewer pairs, since answers are long.
LONG_ANSWERS = Regime("answers", 300, global_pairs=8, tuned=True)
WORDS = (12, 50, 200)
DEVIATIONS = (0.02, 0.1, 0.3)
ALPHAS = (0.2, 0.5)
SHARES = (0.3, 0.0, 0.2, 0.1)
GUIDE_BETAS = (0.3, 0.1, 0.01)
CORRELATIONS = (1.0, 0.75, 0.5, 0.25, 0.0)
BETAS, GRID_ALPHAS = (0.03, 0.1, 0.3, 1.0), (0.0, 0.1, 0.2, 0.5, 1.0)
CHOOSING, COMPARING = (1, 2), (3, 4, 5, 6, 7)


def guided(guide: Arm | Credits, alpha: float, unit: str = "token", beta: float = 0.3) -> Arm:
    """TGDPO."""
    return Arm("tgdpo", beta, alpha, guide, unit)


def by_credits(*correlations: float, unit: str = "token") -> tuple[Arm, ...]:
    """Question b: the oracle's credits as guide."""
    return tuple(guided(Credits(correlation), alpha, unit) for correlation in correlations for alpha in ALPHAS)


def by_models(*, unit: str = "token") -> tuple[Arm, ...]:
    """Question b: DPO models of several betas as guides."""
    betas = GUIDE_BETAS if unit == "token" else GUIDE_BETAS[:1]
    return tuple(guided(Arm("dpo", beta), alpha, unit) for beta in betas for alpha in ALPHAS)


def long_arms(*alphas: float) -> tuple[Arm, ...]:
    """Question a: the guided ones."""
    guides = [replace(guide, regime=LONG_GUIDE) for guide in (DPO, SIMPO)]
    return tuple(replace(guided(guide, alpha), regime=LONG) for alpha in alphas for guide in guides)


def long_answers() -> tuple[Arm, ...]:
    """Question c: DPO, and TGDPO with it as guide by the deviation of the weights."""
    dpo = replace(DPO, regime=LONG_ANSWERS)
    return (dpo, *(Arm("tgdpo", guide=dpo, regime=LONG_ANSWERS, deviation=deviation) for deviation in DEVIATIONS))


def mislabelled(share: float) -> tuple[Arm, ...]:
    """Question d: DPO, TGDPO and robust DPO on pairs of which that share is wrong; robust DPO of none is DPO."""
    dpo = replace(DPO, wrong=share)
    arms = (dpo, replace(guided(dpo, 0.2), wrong=share))
    return (*arms, Arm("robust", wrong=share)) if share else arms


def cell(beta: float, alpha: float) -> Arm:
    """Question e: TGDPO by the DPO guide of the usual beta; alpha 0 is DPO."""
    return guided(DPO, alpha, beta=beta) if alpha else Arm("dpo", beta)


CELLS = tuple(cell(beta, alpha) for beta in BETAS for alpha in GRID_ALPHAS)
LONG_PLAIN = (replace(DPO, regime=LONG), replace(SIMPO, regime=LONG))
# As registered in docs/reproduction.md; the cells of e that are compared follow from the others.
QUEUE = (
    Stage("b", (DPO, *by_credits(1.0, 0.0, 0.5))),
    Stage("a", (*LONG_PLAIN, *long_arms(0.2))),
    *(Stage("d", mislabelled(share)) for share in SHARES),
    Stage("b", by_models()),
    Stage("b", (*by_credits(1.0, unit="sentence"), *by_models(unit="sentence"))),
    Stage("b", by_credits(0.75, 0.25)),
    Stage("e", CELLS, CHOOSING, 3e-3),
    Stage("a", long_arms(0.5)),
)
