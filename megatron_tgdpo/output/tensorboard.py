"""What TensorBoard shows of a run, in the order in which a person asks: is it learning, is it drifting, what does the
guide do, how fast is it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_tgdpo.config.loading import to_dict
from megatron_tgdpo.config.resume_compatibility import POLICY_OF, ChangePolicy, flatten
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.output.logger import LoggedStep, Logger
from megatron_tgdpo.output.metrics import WEIGHT_EDGES, eval_group

_RESULTS = ("train/loss", "rewards/accuracies", "rewards/margins")
_EVALUATION_RESULTS = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins")
# In the group of a validation set's metrics.
WEIGHT_HISTOGRAM = "guidance/weights"

# Charts of the Custom Scalars tab, by question and title, each with the metrics that it draws.
_CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Is it learning?": {
        "loss (nats)": ("train/loss", "eval/loss"),
        "accuracy: pairs with more reward on chosen": (
            "rewards/accuracies",
            "eval/rewards/accuracies",
        ),
        "margin: reward of chosen less that of rejected": ("rewards/margins", "eval/rewards/margins"),
        "margin that the loss sees": ("margins/weighted", "eval/margins/weighted"),
    },
    "Is it drifting?": {
        "rewards": ("rewards/chosen", "rewards/rejected"),
        "log-probs of chosen": ("logps/chosen", "logps/reference_chosen"),
        "log-probs of rejected": ("logps/rejected", "logps/reference_rejected"),
        "gradient norm before clipping": ("train/grad_norm",),
        "learning rate": ("train/lr",),
    },
    "What does the guide do?": {
        "token weights: mean, smallest, largest": (
            "guidance/weight_mean",
            "guidance/weight_min",
            "guidance/weight_max",
        ),
        "spread of the token weights": ("guidance/weight_std", "eval/guidance/weight_std"),
        "share of negative weights": ("guidance/negative_fraction", "eval/guidance/negative_fraction"),
        "guide's own accuracy (0.5 is chance)": ("guidance/guide_accuracy", "eval/guidance/guide_accuracy"),
    },
    "How fast is it?": {
        "tokens per second": ("perf/tokens_per_second", "perf/tokens_per_second_per_gpu"),
        "pairs per second": ("perf/pairs_per_second",),
        "seconds per step": ("perf/step_seconds",),
        "share of pack tokens that are not padding": ("perf/packing_efficiency",),
        "peak memory of a rank (GiB)": ("perf/peak_memory_gib",),
        "saving: seconds waited, writing, exporting": (
            "perf/checkpoint_wait_seconds",
            "perf/checkpoint_seconds",
            "perf/export_seconds",
        ),
    },
}


def chart_layout(without: Sequence[str], sets: Sequence[str] = ("",)) -> dict[str, dict[str, list[Any]]]:
    """Charts by question and title, as ``SummaryWriter.add_custom_scalars`` takes them.

    Args:
        without: Beginnings of the names of metrics that the run does not have.
        sets: Names of its validation sets.
    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for question, charts in _CHARTS.items():
        for title, names in charts.items():
            there = _of_run(names, without, sets)
            if there:
                # Regular expressions, matched with the beginning of a name.
                layout.setdefault(question, {})[title] = ["Multiline", [f"{name}$" for name in there]]
    return layout


def _of_run(names: Iterable[str], without: Sequence[str], sets: Iterable[str]) -> list[str]:
    """The metrics that a run has, with those of ``eval`` once for each validation set."""
    there = [name for name in names if not name.removeprefix("eval/").startswith(tuple(without))]
    groups = [eval_group(name) for name in sets]
    return [
        each
        for name in there
        for each in ([name.replace("eval", group, 1) for group in groups] if name.startswith("eval/") else [name])
    ]


def hyperparameters(config: Config) -> dict[str, str | float]:
    """Dotted keys that a run's result follows from and that are not null, with their values, for the HParams tab."""
    return {
        key: value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
        for key, value in flatten(to_dict(config)).items()
        if value is not None and POLICY_OF[key] in (ChangePolicy.ASKED, ChangePolicy.FIXED)
    }


class TensorBoard(Logger):
    """Writes a run's event files; of a step that an interrupted run wrote, too, the first are hidden."""

    def __init__(self, config: Config, step: int) -> None:
        self._writer = SummaryWriter(str(Path(config.output_dir) / "tensorboard"), purge_step=step + 1)
        without, sets = config.method.without, tuple(config.validation_sets)
        self._writer.add_custom_scalars(chart_layout(without, sets or ("",)))
        there = _of_run((*_RESULTS, *_EVALUATION_RESULTS), without, sets)
        experiment, session, _ = hparams(hyperparameters(config), dict.fromkeys(there, 0.0))
        # Not SummaryWriter.add_hparams: it would begin another run next to this one.
        events = self._writer.file_writer
        assert events is not None, "the writer was just opened"
        for summary in (experiment, session):
            events.add_summary(summary)
        self._writer.flush()

    def write(self, step: LoggedStep) -> None:
        """Writes a step's metrics and, where it was followed by evaluations, the histograms of those, by group."""
        for name, value in step.values.items():
            self._writer.add_scalar(name, value, step.number)
        for group, evaluation in step.evaluations.items():
            if "guidance/weight_mean" in evaluation.values:
                name = f"{group}/{WEIGHT_HISTOGRAM}"
                self._write_weights(name, step.number, evaluation.values, evaluation.weight_counts)
        self._writer.flush()

    def _write_weights(self, name: str, step: int, values: dict[str, float], counts: list[int]) -> None:
        tokens, mean = sum(counts), values["guidance/weight_mean"]
        least, most = values["guidance/weight_min"], values["guidance/weight_max"]
        filled = [k for k, count in enumerate(counts) if count]
        first, last = filled[0], filled[-1]
        self._writer.add_histogram_raw(
            name,
            min=least,
            max=most,
            num=tokens,
            sum=tokens * mean,
            sum_squares=tokens * (values["guidance/weight_std"] ** 2 + mean**2),
            # From the smallest weight to the largest: the page would draw empty bins.
            bucket_limits=[least, *WEIGHT_EDGES[first:last], most],
            bucket_counts=[0, *counts[first : last + 1]],
            global_step=step,
        )

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
