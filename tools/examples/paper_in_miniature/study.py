"""What is trained: seeds, arms, learning rates, and the commands for each.

Seed 0 is for choices (learning rates); seeds 1 and up are what is reported. A seed has its own texts, its own model
from random weights on, its own preference pairs and its own held-out prompts.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tools.examples.paper_in_miniature.jobs import Command, Job
from tools.examples.paper_in_miniature.language import MAX_WORDS

_PACKAGE = __package__
_CONFIGS = Path(__file__).parent
TUNING_SEED = 0


@dataclass(frozen=True)
class Scale:
    """How large a study is.

    Attributes:
        seeds: Reported seeds.
        sft_examples: Answers that the SFT model learns from.
        prompts: Prompts for preference pairs.
        samples: Answers a prompt, of which the best and the worst make the pair.
        judged: Prompts that a model is judged by.
        beta: Of DPO and TGDPO.
        simpo_beta: Of SimPO.
        simpo_gamma: Of SimPO.
        alphas: Of TGDPO, 0 left out: it is always there.
        rates: Learning rates that every arm chooses from.
        temperature: Of all sampling.
    """

    seeds: int = 5
    sft_examples: int = 6000
    prompts: int = 1200
    samples: int = 5
    judged: int = 500
    beta: float = 0.3
    simpo_beta: float = 10.0
    simpo_gamma: float = 3.0
    alphas: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0)
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    temperature: float = 0.8

    def as_json(self) -> dict[str, Any]:
        """Plain values, as they come back from a JSON file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


SHORT = Scale(seeds=1, sft_examples=256, prompts=64, samples=3, judged=24, alphas=(0.5,), rates=(3e-4, 1e-3))


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        method: ``loss.method``.
        guide: Arm whose model guides it, if any.
        alpha: ``loss.alpha``, of ``tgdpo`` only.
    """

    method: str
    guide: str | None = None
    alpha: float | None = None

    @property
    def name(self) -> str:
        return self.method if self.guide is None else f"tgdpo-{self.guide}-alpha{self.alpha:g}"

    @property
    def title(self) -> str:
        """For people."""
        titles = {"dpo": "DPO", "simpo": "SimPO"}
        return titles[self.method] if self.guide is None else f"TGDPO, {titles[self.guide]} guide, alpha {self.alpha:g}"


DPO, SIMPO = Arm("dpo"), Arm("simpo")


@dataclass(frozen=True)
class Study:
    """A study in a directory.

    Attributes:
        root: Absolute path; everything is written below it.
        scale: Its size.
    """

    root: Path
    scale: Scale

    @cached_property
    def guided(self) -> list[Arm]:
        """The TGDPO arms. Alpha 0 is DPO whatever the guide, so it has one arm; it checks just that."""
        return [Arm("tgdpo", "dpo", 0.0)] + [
            Arm("tgdpo", guide.name, alpha) for guide in (DPO, SIMPO) for alpha in self.scale.alphas
        ]

    @property
    def arms(self) -> list[Arm]:
        return [DPO, SIMPO, *self.guided]

    def directory(self, seed: int, arm: Arm | None = None, rate: float | None = None) -> Path:
        """Of a seed, or of one training of it."""
        seed_directory = self.root / f"seed{seed}"
        return seed_directory if arm is None else seed_directory / f"{arm.name}-lr{rate:g}"

    def model(self, seed: int, arm: Arm | None, rate: float | None) -> Path:
        """HF directory of a trained model; of the SFT model without an arm."""
        return (self.directory(seed) / "sft" if arm is None else self.directory(seed, arm, rate)) / "hf"

    def judged(self, seed: int, arm: Arm | None = None, rate: float | None = None) -> Path:
        """The oracle's scores of a model's answers."""
        return self.model(seed, arm, rate).parent / "judged.json"

    def credit(self, seed: int, guide: Arm) -> Path:
        """Agreement of a guide's token rewards with the oracle's credits."""
        return self.directory(seed) / f"credit-{guide.name}.json"

    def preparation(self, seed: int) -> Job:
        """Texts, SFT model, its answers, and pairs of them."""
        here, scale = self.directory(seed), self.scale
        data, sft = here / "data", here / "sft"
        counts = {"sft": scale.sft_examples, "prompts": scale.prompts, "heldout": scale.judged}
        sizes = [part for name, count in counts.items() for part in (f"--{name}", str(count))]
        pairs = self._pairs(seed)
        commands = (
            _command(f"{_PACKAGE}.make_data", data / "DONE", "--out", data, "--seed", seed, *sizes),
            *self._training(
                sft, "sft", {"model.policy": data / "base", "data.train": data / "sft.jsonl", "train.seed": seed}
            ),
            _command(
                "tgdpo.build_preferences", pairs, "--prompts", data / "prompts.jsonl", "--model", sft / "hf",
                "--score", f"{_PACKAGE}.language:score_answers", "--out", pairs, "--samples", scale.samples,
                "--temperature", scale.temperature, "--max-new-tokens", MAX_WORDS, "--batch", 64, "--seed", seed,
            ),
            self._judging(seed, None, None),
        )  # fmt: skip
        return Job(f"seed {seed}: SFT model and pairs", commands, here / "preparation.log")

    def training(self, seed: int, arm: Arm, rate: float, guide_rate: float | None = None) -> Job:
        """One arm with one learning rate: train, export, judge.

        Args:
            guide_rate: Learning rate of the guide, if the arm has one.
        """
        here = self.directory(seed, arm, rate)
        values = {
            "model.policy": self.model(seed, None, None),
            "data.train": self._pairs(seed),
            "loss.method": arm.method,
            "optimizer.lr": rate,
            "train.seed": seed,
        }
        if arm.method == "simpo":
            values |= {"loss.beta": self.scale.simpo_beta, "loss.gamma": self.scale.simpo_gamma}
        else:
            values["loss.beta"] = self.scale.beta
        if arm.guide is not None:
            values |= {"model.guide": self.model(seed, Arm(arm.guide), guide_rate), "loss.alpha": arm.alpha}
        commands = (*self._training(here, "preference", values), self._judging(seed, arm, rate))
        return Job(f"seed {seed}: {arm.title}, lr {rate:g}", commands, here.with_suffix(here.suffix + ".log"))

    def crediting(self, seed: int, guide: Arm, rate: float) -> Job:
        """Compares a guide's token rewards with the oracle's credits."""
        out = self.credit(seed, guide)
        command = _command(
            f"{_PACKAGE}.credit", out, "--guide", self.model(seed, guide, rate),
            "--reference", self.model(seed, None, None), "--answers", self.judged(seed), "--out", out,
        )  # fmt: skip
        return Job(f"seed {seed}: token rewards of {guide.title}", (command,), self.directory(seed) / "credit.log")

    def _pairs(self, seed: int) -> Path:
        return self.directory(seed) / "pairs.jsonl"

    def _training(self, here: Path, config: str, values: dict[str, Any]) -> tuple[Command, Command]:
        run, hf = here / "run", here / "hf"
        overrides = [f"{key}={value}" for key, value in {**values, "output_dir": run}.items()]
        return (
            _command("megatron_tgdpo.train", run / "DONE", _CONFIGS / f"{config}.yaml", *overrides),
            _command("checkpoints_convert.megatron_to_hf", hf, "--megatron", run, "--out", hf),
        )

    def _judging(self, seed: int, arm: Arm | None, rate: float | None) -> Command:
        out = self.judged(seed, arm, rate)
        return _command(
            f"{_PACKAGE}.judge", out, "--model", self.model(seed, arm, rate),
            "--prompts", self.directory(seed) / "data" / "heldout.jsonl", "--out", out,
            "--temperature", self.scale.temperature, "--seed", seed,
        )  # fmt: skip


def _command(module: str, result: Path, *arguments: object) -> Command:
    return Command(module, tuple(map(str, arguments)), result)
