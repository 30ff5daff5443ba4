"""What TensorBoard shows of a run, in the order in which a person asks: is it learning, is it drifting, what does the
guide do, how fast is it."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_tgdpo.config import Config, to_dict
from megatron_tgdpo.metrics import WEIGHT_EDGES, StepMetrics

# The sections of a config that a run's result follows from.
_HYPERPARAMETERS = ("model", "data", "loss", "batch", "optimizer", "precision", "train")
_RESULTS = ("train/loss", "rewards/accuracies", "rewards/margins")
_EVALUATION_RESULTS = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins")
WEIGHT_HISTOGRAM = "eval/guidance/weights"

_Charts = dict[str, list[Any]]


def chart_layout(guided: bool) -> dict[str, _Charts]:
    """Charts by question, for the Custom Scalars tab.

    Args:
        guided: Whether there is a guide.
    """
    learning: _Charts = {
        "loss (nats; ln 2 at the start)": _lines("train/loss", "eval/loss"),
        "accuracy: pairs where chosen gained more than rejected": _lines(
            "rewards/accuracies", "eval/rewards/accuracies"
        ),
        "margin: chosen less rejected, beta x log-ratio": _lines("rewards/margins", "eval/rewards/margins"),
        "margin that the loss sees": _lines("margins/weighted", "eval/margins/weighted"),
    }
    drifting: _Charts = {
        "rewards: how far from the reference": _lines("rewards/chosen", "rewards/rejected"),
        "log-probs of chosen": _lines("logps/chosen", "logps/reference_chosen"),
        "log-probs of rejected": _lines("logps/rejected", "logps/reference_rejected"),
        "gradient norm before clipping": _lines("train/grad_norm"),
        "learning rate": _lines("train/lr"),
    }
    guide: _Charts = {
        "token weights: mean, smallest, largest": [
            "Margin",
            ["guidance/weight_mean", "guidance/weight_min", "guidance/weight_max"],
        ],
        "spread of the token weights": _lines("guidance/weight_std", "eval/guidance/weight_std"),
        "share of negative weights": _lines("guidance/negative_fraction", "eval/guidance/negative_fraction"),
        "guide's own accuracy (0.5 is chance)": _lines("guidance/guide_accuracy", "eval/guidance/guide_accuracy"),
    }
    speed: _Charts = {
        "tokens per second": _lines("perf/tokens_per_second", "perf/tokens_per_second_per_gpu"),
        "pairs per second": _lines("perf/pairs_per_second"),
        "seconds per step": _lines("perf/step_seconds"),
        "share of row tokens that are not padding": _lines("perf/packing_efficiency"),
        "peak memory of a rank (GiB)": _lines("perf/peak_memory_gib"),
        "saving: waited, and took (seconds)": _lines("perf/checkpoint_wait_seconds", "perf/checkpoint_seconds"),
    }
    return {
        "Is it learning?": learning,
        "Is it drifting?": drifting,
        **({"What does the guide do?": guide} if guided else {}),
        "How fast is it?": speed,
    }


def _lines(*names: str) -> list[Any]:
    # The tab takes regular expressions, and matches them with the beginning of a name.
    return ["Multiline", [f"{name}$" for name in names]]


def hyperparameters(config: Config) -> dict[str, str | float]:
    """Dotted keys and their values, for the HParams tab; keys that are null are left out."""
    sections = to_dict(config)
    return {
        f"{section}.{key}": value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
        for section in _HYPERPARAMETERS
        for key, value in sections[section].items()
        if value is not None
    }


class TensorBoard:
    """Writes a run's event files (first rank only).

    Args:
        directory: Of the event files.
        config: The run.
        step: Last completed step; what an interrupted run wrote after it is hidden, so no step appears twice.
    """

    def __init__(self, directory: Path, config: Config, step: int) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=step + 1)
        self._writer.add_custom_scalars(chart_layout(config.loss.method == "tgdpo"))
        results = (*_RESULTS, *(_EVALUATION_RESULTS if config.data.validation else ()))
        experiment, session, _ = hparams(hyperparameters(config), dict.fromkeys(results, 0.0))
        # Not SummaryWriter.add_hparams: it would begin a run of its own beside this one.
        for summary in (experiment, session):
            self._writer.file_writer.add_summary(summary)

    def write(self, step: int, values: dict[str, float], evaluation: StepMetrics | None) -> None:
        """Writes a step's figures and, where it was followed by an evaluation, the histogram of that."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if evaluation is not None and evaluation.weight_counts:
            self._write_weights(step, evaluation.values, evaluation.weight_counts)
        self._writer.flush()

    def _write_weights(self, step: int, values: dict[str, float], counts: list[int]) -> None:
        tokens, mean = sum(counts), values["guidance/weight_mean"]
        largest = values["guidance/weight_max"]
        self._writer.add_histogram_raw(
            WEIGHT_HISTOGRAM,
            min=values["guidance/weight_min"],
            max=largest,
            num=tokens,
            sum=tokens * mean,
            sum_squares=tokens * (values["guidance/weight_std"] ** 2 + mean**2),
            bucket_limits=[*WEIGHT_EDGES, max(largest, WEIGHT_EDGES[-1])],
            bucket_counts=counts,
            global_step=step,
        )

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
