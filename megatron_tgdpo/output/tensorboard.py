"""What TensorBoard shows of a run, in the order in which a person asks: is it learning, is it drifting, what does the
guide do, how fast is it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import indent, wrap
from typing import Any

from tensorboard.plugins.hparams.api_pb2 import MetricName
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_tgdpo.config.loading import to_dict
from megatron_tgdpo.config.resume_compatibility import POLICY_OF, ChangePolicy, flatten
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.output.logger import LoggedStep, Logger, Sample
from megatron_tgdpo.output.metrics import WEIGHT_EDGES, StepMetrics, eval_group

# What a person looks at first; Time Series shows groups in the order of their names. Other names are the metrics' own.
_FIRST = {
    "loss": "1_learning/loss",
    "rewards/accuracies": "1_learning/accuracy",
    "rewards/margins": "1_learning/margin",
}
# The first columns of the HParams tab.
_FIRST_HYPERPARAMETERS = ("loss.alpha", "loss.beta", "optimizer.lr")
_TRAIN = "train"
_TEXT_COLUMNS = 100
WEIGHT_HISTOGRAM = "guidance/weights"

# Charts of the Custom Scalars tab, by question and title, each with the metrics that it draws of every run.
_CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Is it learning?": {
        "loss (nats)": ("loss",),
        "accuracy: pairs with more reward on chosen": ("rewards/accuracies",),
        "margin: reward of chosen less that of rejected": ("rewards/margins",),
        "margin that the loss sees": ("margins/weighted",),
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
        "spread of the token weights": ("guidance/weight_std",),
        "share of negative weights": ("guidance/negative_fraction",),
        "guide's own accuracy (0.5 is chance)": ("guidance/guide_accuracy",),
    },
    "How fast is it?": {
        "tokens per second": ("perf/tokens_per_second", "perf/tokens_per_second_per_gpu"),
        "pairs per second": ("perf/pairs_per_second", "perf/pairs_per_second_per_gpu"),
        "model TFLOP/s of a rank": ("perf/tflops_per_gpu",),
        "share of the GPU's peak": ("perf/mfu",),
        "seconds per step, and of them waiting for data": ("perf/step_seconds", "perf/data_seconds"),
        "seconds of a watched step: in collectives, between stages": (
            "perf/collective_seconds",
            "perf/exchange_seconds",
        ),
        "joules per pair": ("perf/joules_per_pair",),
        "share of pack tokens that are not padding": ("perf/packing_efficiency",),
        "peak memory of a rank (GiB)": ("perf/peak_memory_gib",),
        "saving: seconds waited, writing, exporting": (
            "perf/checkpoint_wait_seconds",
            "perf/checkpoint_seconds",
            "perf/export_seconds",
        ),
    },
}


def tag_of(name: str) -> str:
    """The tag of a metric, by its name without ``eval/`` in front; the same in training and evaluation."""
    return _FIRST.get("loss" if name == "train/loss" else name, name)


def chart_layout(without: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Charts by question and title, as ``SummaryWriter.add_custom_scalars`` takes them.

    Args:
        without: Beginnings of the names of metrics that the run does not have.
    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for question, charts in _CHARTS.items():
        for title, names in charts.items():
            there = [tag_of(name) for name in names if not name.startswith(tuple(without))]
            if there:
                # Regular expressions, matched with the beginning of a tag.
                layout.setdefault(question, {})[title] = ["Multiline", [f"{tag}$" for tag in there]]
    return layout


def hyperparameters(config: Config) -> dict[str, str | float]:
    """Dotted keys that a run's result follows from and that are not null, with their values, for the HParams tab."""
    return {
        key: value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
        for key, value in flatten(to_dict(config)).items()
        if value is not None and POLICY_OF[key] in (ChangePolicy.ASKED, ChangePolicy.FIXED)
    }


def hparams_summaries(config: Config) -> list[Any]:
    """The summaries that put a run on the HParams tab, under the name of its directory.

    They belong to the directory in which ``train`` and ``eval`` are: where a metric is, is said from there.
    """
    experiment, session, _ = hparams(hyperparameters(config), {})
    shown = [tag for name, tag in _FIRST.items() if not name.startswith(tuple(config.method.without))]

    def described(plugin_data: HParamsPluginData) -> None:
        for info in plugin_data.experiment.hparam_infos:
            # TensorBoard shows those first that are said to differ between runs, all by name.
            info.differs = info.name in _FIRST_HYPERPARAMETERS
        for group in (_TRAIN, *map(eval_group, config.validation_sets)):
            for tag in shown:
                name = f"{group} {tag.rpartition('/')[2]}"
                plugin_data.experiment.metric_infos.add(name=MetricName(group=group, tag=tag), display_name=name)

    def named(plugin_data: HParamsPluginData) -> None:
        plugin_data.session_start_info.group_name = Path(config.output_dir).resolve().name

    return [_with_plugin_data(experiment, described), _with_plugin_data(session, named)]


def _with_plugin_data(summary: Any, change: Callable[[HParamsPluginData], None]) -> Any:
    held = summary.value[0].metadata.plugin_data
    plugin_data = HParamsPluginData.FromString(held.content)
    change(plugin_data)
    held.content = plugin_data.SerializeToString()
    return summary


def _as_markdown(sample: Sample) -> str:
    """Prompt and answer as they are, but for long lines: the page would take what is in them for markup, and not break
    them."""
    end = "" if sample.ended else f" (cut after {sample.tokens} tokens)"
    parts = {f"Prompt of {sample.source}": sample.prompt, f"Answer{end}": sample.answer}
    shown = {title: "\n".join(map(_broken, text.split("\n"))) for title, text in parts.items()}
    return "\n\n".join(f"{title}\n\n" + indent(text, "    ", lambda line: True) for title, text in shown.items())


def _broken(line: str) -> str:
    """A line in pieces that a window shows whole."""
    return "\n".join(wrap(line, _TEXT_COLUMNS, replace_whitespace=False, expand_tabs=False)) or line


class TensorBoard(Logger):
    """Writes the event files of a run's training and of each validation set, each a run of TensorBoard's, and beside
    them those that say what they are about. Of a step that an interrupted run wrote, too, the first are hidden."""

    def __init__(self, config: Config, step: int) -> None:
        directory = Path(config.output_dir) / "tensorboard"
        self._writers: dict[str, SummaryWriter] = {}
        for group in ("", _TRAIN, *map(eval_group, config.validation_sets)):
            self._writers[group] = SummaryWriter(str(directory / group), purge_step=step + 1)
        about = self._writers.pop("")
        about.add_custom_scalars(chart_layout(config.method.without))
        # Not SummaryWriter.add_hparams: it would begin another run next to this one.
        events = about.file_writer
        assert events is not None, "the writer was just opened"
        for summary in hparams_summaries(config):
            events.add_summary(summary)
        about.close()

    def write(self, step: LoggedStep) -> None:
        """Writes a step's metrics and, where it was followed by evaluations, the histograms of those."""
        of_evaluations: set[str] = set()
        for group, evaluation in step.evaluations.items():
            for name in evaluation.values:
                self._writers[group].add_scalar(tag_of(name), step.values[f"{group}/{name}"], step.number)
                of_evaluations.add(f"{group}/{name}")
            if "guidance/weight_mean" in evaluation.values:
                self._write_weights(group, step.number, evaluation)
        for name, value in step.values.items():
            if name not in of_evaluations:
                self._writers[_TRAIN].add_scalar(tag_of(name), value, step.number)
        for sample in step.samples:
            self._writers[sample.group].add_text(f"samples/{sample.number}", _as_markdown(sample), step.number)
        for writer in self._writers.values():
            writer.flush()

    def _write_weights(self, group: str, step: int, evaluation: StepMetrics) -> None:
        values, counts = evaluation.values, evaluation.weight_counts
        tokens, mean = sum(counts), values["guidance/weight_mean"]
        least, most = values["guidance/weight_min"], values["guidance/weight_max"]
        filled = [k for k, count in enumerate(counts) if count]
        first, last = filled[0], filled[-1]
        self._writers[group].add_histogram_raw(
            WEIGHT_HISTOGRAM,
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
        for writer in self._writers.values():
            writer.close()
