"""Runs an arm on a seed, once: its result is a file, and what is there is not run again."""

import copy
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.guidance.sentences import means_within
from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.loss.token_weights import toward_label
from megatron_tgdpo.storage.atomic_file import write_atomically
from tools.examples.paper_in_miniature.ablations.arms import DPO, RATES, TUNING_SEED, Arm, Credits
from tools.examples.paper_in_miniature.ablations.pairs import Pairs, turned
from tools.examples.paper_in_miniature.ablations.training import (
    Diverged,
    Recipe,
    losses_of,
    order_of,
    shown_logps,
    train,
    within,
)
from tools.examples.paper_in_miniature.ablations.world import Size, World, open_world
from tools.examples.paper_in_miniature.credit import correlation

# Words that stand for a sentence.
SENTENCE = 4
VALIDATED = 200


@dataclass
class Laboratory:
    """A directory of results.

    Attributes:
        root: Where; a folder a seed.
        size: Of every seed.
        rates: Learning rates that seed 0 may choose from.
    """

    root: Path
    size: Size = field(default_factory=Size)
    rates: tuple[float, ...] = RATES
    _worlds: dict[int, World] = field(default_factory=dict)

    def open(self) -> None:
        """Checks that the directory is new, or of this size.

        Raises:
            UserError: It is of another.
        """
        file, wanted = self.root / "size.json", asdict(self.size)
        self.root.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_atomically(file, json.dumps(wanted) + "\n")
        if json.loads(file.read_text(encoding="utf-8")) != wanted:
            raise UserError(f"{file}: these results are of another size: name another directory")

    def of_answers(self, words: int) -> "Laboratory":
        """That of question c for answers of about so many words, in a folder of this one."""
        found = Laboratory(self.root / f"words{words}", self.size.of_answers(words), self.rates)
        found.open()
        return found

    def world(self, seed: int) -> World:
        """A seed's."""
        if seed not in self._worlds:
            self._worlds[seed] = open_world(self.root / f"seed{seed}", seed, self.size)
        return self._worlds[seed]

    def sft_scores(self, seed: int) -> list[float]:
        """The oracle's scores of the SFT model."""
        file = self.root / f"seed{seed}" / "sft.json"
        if not file.exists():
            world = self.world(seed)
            _write(file, world.judge(world.base))
        scores: list[float] = _read(file)
        return scores

    def result(self, seed: int, arm: Arm, rate: float | None = None) -> dict[str, Any]:
        """What came out, from its file or by running it.

        Args:
            rate: Learning rate, in the place of the arm's own.

        Returns:
            ``scores`` by epoch, one a judged prompt; ``losses``, their mean in an epoch; ``accuracy`` on validation
            pairs by epoch; ``best_scores``, of the epoch with the best accuracy; of guided arms ``weight_std``,
            ``negative_fraction`` and ``correlation`` of the rewards with the oracle's credits.
        """
        file = self._file(seed, arm, rate)
        if not file.exists():
            start = time.process_time()
            found = self._run(seed, arm, self.rate(arm) if rate is None else rate)
            _write(file, {**found, "cpu_seconds": round(time.process_time() - start, 1)})
        found_there: dict[str, Any] = _read(file)
        return found_there

    def is_there(self, seed: int, arm: Arm, rate: float | None = None) -> bool:
        """Whether it has been run."""
        return self._file(seed, arm, rate).exists()

    def rate(self, arm: Arm) -> float:
        """The arm's learning rate; seed 0 chooses it for credits without noise, and by token, or for DPO."""
        if arm.rate is not None:
            return arm.rate
        dpo = replace(DPO, regime=arm.regime)
        clean = dpo if arm.regime.tuned else replace(arm, guide=Credits(1.0), unit="token")
        judged = {rate: _mean(self.result(TUNING_SEED, clean, rate)) for rate in self.rates}
        return max(judged, key=lambda rate: judged[rate])

    def _file(self, seed: int, arm: Arm, rate: float | None) -> Path:
        suffix = "" if rate is None or rate == arm.rate else f"-lr{rate:g}"
        return self.root / f"seed{seed}" / f"{arm.name}{suffix}.json"

    def _run(self, seed: int, arm: Arm, rate: float) -> dict[str, Any]:
        world = self.world(seed)
        pairs, frozen, known = self._inputs(seed, arm)
        name, options = arm.options
        regime, model = arm.regime, copy.deepcopy(world.base)
        options = {**options, **({} if arm.deviation is None else {"alpha": known["alpha"]})}
        recipe = Recipe(regime.epochs, rate, regime.schedule, global_pairs=regime.global_pairs)
        found: dict[str, Any] = {"rate": rate, "scores": {}, "losses": {}, "accuracy": {}, **known}
        best: dict[str, Any] = {"accuracy": -1.0}

        def after_epoch(epoch: int, loss: float) -> None:
            found["losses"][epoch] = round(loss, 5)
            if epoch in regime.shown or epoch == regime.epochs:
                found["scores"][epoch] = world.judge(model)
            if regime.validated and epoch % regime.validated == 0:
                accuracy = found["accuracy"][epoch] = self._accuracy(world, model, arm)
                if accuracy > best["accuracy"]:
                    best.update(accuracy=accuracy, epoch=epoch, weights=copy.deepcopy(model.state_dict()))

        try:
            train(model, pairs, METHODS[name], options, frozen, recipe, order_of(len(pairs), recipe, seed), after_epoch)
        except Diverged:
            # Counts as the model that it began from.
            model.load_state_dict(world.base.state_dict())
            found |= {"diverged": True}
            missing = {*regime.shown, regime.epochs} - found["scores"].keys()
            found["scores"] |= dict.fromkeys(sorted(missing), self.sft_scores(seed))
        if arm.guide is None:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, self._weights(seed, arm, rate))
        if "weights" in best:
            model.load_state_dict(best["weights"])
            found |= {"best_epoch": best["epoch"], "best_scores": world.judge(model)}
        return found

    @torch.no_grad()
    def _accuracy(self, world: World, model: LlamaForCausalLM, arm: Arm) -> float:
        """Share of validation pairs whose chosen response has the larger reward, as ``rewards/accuracies`` has it."""
        name, options = arm.options
        # Rewards do not depend on weights: the reference stands for the guide.
        frozen = {role: world.validation_reference for role in METHODS[name].frozen}
        right = []
        for start in range(0, min(VALIDATED, len(world.validation)), 100):
            rows = list(range(start, min(start + 100, VALIDATED, len(world.validation))))
            rewards = losses_of(model, world.validation, rows, METHODS[name], options, frozen).rewards
            right += (rewards[0::2] > rewards[1::2]).tolist()
        return statistics.fmean(right)

    def _inputs(self, seed: int, arm: Arm) -> tuple[Pairs, dict[str, Tensor], dict[str, float]]:
        """Pairs, log-probs of the frozen models on them, and what is known of the guide."""
        world = self.world(seed)
        pairs, wrong = world.pairs.swapped(arm.wrong, seed)
        count = arm.regime.pairs or len(pairs)
        pairs = Pairs(pairs.ids[:count], pairs.lengths[:count], pairs.prompt_tokens)
        reference = turned(world.reference, wrong)[:count]
        if arm.method == "simpo":
            return pairs, {}, {}
        if arm.guide is None:
            return pairs, {"reference": reference}, {}
        rewards = self._log_ratios(seed, arm, pairs, reference)
        if arm.unit == "sentence":
            rewards = by_sentence(rewards, pairs.lengths)
        inside = within(pairs.lengths.flatten(), rewards.shape[2])
        flat = arm.beta * rewards.flatten(0, 1)[inside]
        toward = toward_label(flat, pairs.lengths.flatten())
        alpha = (arm.alpha or 0.0) if arm.deviation is None else arm.deviation / toward.std().item()
        weights = 1.0 + alpha * toward
        known = {
            "alpha": alpha,
            "reward_std": flat.std().item(),
            "weight_std": weights.std().item(),
            "negative_fraction": (weights < 0).float().mean().item(),
            "correlation": correlation(flat, pairs.credits(world.size.lengths).flatten(0, 1)[inside]),
        }
        return pairs, {"reference": reference, "guide": reference + rewards}, known

    def _log_ratios(self, seed: int, arm: Arm, pairs: Pairs, reference: Tensor) -> Tensor:
        """[N, 2, W] log pi_guide - log pi_reference, zeros behind the responses."""
        if isinstance(arm.guide, Arm):
            return shown_logps(self._trained(seed, arm.guide), pairs) - reference
        assert arm.guide is not None
        inside = within(pairs.lengths.flatten(), reference.shape[2]).unflatten(0, (-1, 2))
        spread = (shown_logps(self._trained(seed, DPO), pairs) - reference)[inside].std()
        credits_ = pairs.credits(self.size.lengths)
        # The same noise whatever the correlation.
        noise = torch.randn(credits_.shape, generator=torch.Generator().manual_seed(seed))
        part = arm.guide.correlation
        mixed = part * credits_ / credits_[inside].std() + (1.0 - part**2) ** 0.5 * noise
        return torch.where(inside, spread * mixed, 0.0)

    def _trained(self, seed: int, arm: Arm) -> LlamaForCausalLM:
        self.result(seed, arm)
        model = copy.deepcopy(self.world(seed).base)
        model.load_state_dict(load_file(self._weights(seed, arm, self.rate(arm))))
        model.eval()
        return model

    def _weights(self, seed: int, arm: Arm, rate: float) -> Path:
        return self.root / f"seed{seed}" / f"{arm.name}-lr{rate:g}.safetensors"


def by_sentence(rewards: Tensor, lengths: Tensor) -> Tensor:
    """[N, 2, W] rewards with the mean of every ``SENTENCE`` tokens in their place; the end is in the last of them."""
    result = torch.zeros_like(rewards)
    for pair in range(len(rewards)):
        for side in range(2):
            count = int(lengths[pair, side])
            groups = (torch.arange(count) // SENTENCE).clamp(max=max(count - 2, 0) // SENTENCE)
            means = means_within(rewards[pair, side, :count].double().numpy(), groups.numpy())
            result[pair, side, :count] = torch.from_numpy(means).float()
    return result


def final_scores(result: Mapping[str, Any]) -> list[float]:
    """Those of the last epoch."""
    scores: list[float] = result["scores"][max(result["scores"], key=int)]
    return scores


def _mean(result: Mapping[str, Any]) -> float:
    return statistics.fmean(final_scores(result))


def _write(file: Path, found: Any) -> None:
    write_atomically(file, json.dumps(found) + "\n")


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
