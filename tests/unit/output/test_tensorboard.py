"""Event files read with TensorBoard's own reader, and the running page in a browser."""

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tensorboard import program
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import list_session_groups
from tensorboard.plugins.hparams.api_pb2 import STATUS_UNKNOWN, ListSessionGroupsRequest
from tensorboard.plugins.hparams.backend_context import Context as BackendContext
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.output.metrics import WEIGHT_EDGES, StepMetrics
from megatron_tgdpo.output.metrics_log import MetricsLog
from megatron_tgdpo.output.tensorboard import WEIGHT_HISTOGRAM, chart_layout, hyperparameters, tag_of
from tests.browser import CHROMIUM, NO_CHROMIUM, chromium
from tests.unit.config.test_loading import VALID
from tests.unit.output.test_metrics import pack, reduced

QUESTIONS = tuple(chart_layout(()))
DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"


def make_config(directory: Path, **sections: dict[str, Any]) -> Config:
    data = {**VALID["data"], "validation": "more.jsonl"}
    return config_from_dict({**VALID, "data": data, "output_dir": str(directory), **sections})


def evaluation(group: dist.ProcessGroup) -> StepMetrics:
    return reduced(group, [pack(1, [2, 3, 4, 1], [0, 1]), pack(2, [5, 6], [2])])


def log_steps(config: Config, done: int, steps: range, evaluated: StepMetrics) -> None:
    log = MetricsLog(config, done)
    for step in steps:
        values = {"train/loss": float(step)} | {k: v for k, v in evaluated.values.items() if k != "loss"}
        if step % 2 == 0:
            values |= {f"eval/{name}": value for name, value in evaluated.values.items()}
        log.write(step, values, {"eval": evaluated} if step % 2 == 0 else None)
    log.close()


def read(directory: Path, run: str = "") -> EventAccumulator:
    board = EventAccumulator(str(directory / "tensorboard" / run), size_guidance={"histograms": 0})  # 0: all of them
    board.Reload()
    return board


def test_weight_histograms_are_the_counts_and_steps_appear_once(
    tmp_path: Path, single_rank_group: dist.ProcessGroup
) -> None:
    config, evaluated = make_config(tmp_path), evaluation(single_rank_group)
    log_steps(config, 0, range(1, 7), evaluated)
    log_steps(config, 3, range(4, 9), evaluated)  # killed after step 6, its newest checkpoint was of step 3
    assert [event.step for event in read(tmp_path, "train").Scalars("1_learning/loss")] == list(range(1, 9))
    board = read(tmp_path, "eval")
    assert [event.step for event in board.Scalars("1_learning/loss")] == [2, 4, 6, 8]
    histograms = board.Histograms(WEIGHT_HISTOGRAM)
    assert [event.step for event in histograms] == [2, 4, 6, 8]
    shown = histograms[0].histogram_value
    least, most = (evaluated.values[f"guidance/weight_{name}"] for name in ("min", "max"))
    inner = [edge for edge in WEIGHT_EDGES if least < edge <= most]
    assert shown.bucket_limit == pytest.approx([least, *inner, most])
    first = WEIGHT_EDGES.index(inner[0])
    assert shown.bucket == [0, *evaluated.weight_counts[first : first + len(inner) + 1]]
    assert (shown.num, sum(shown.bucket), shown.min, shown.max) == (21, 21, least, most)
    assert shown.sum / shown.num == pytest.approx(evaluated.values["guidance/weight_mean"])


def test_layout_asks_four_questions_of_documented_metrics(tmp_path: Path, single_rank_group: dist.ProcessGroup) -> None:
    log_steps(make_config(tmp_path), 0, range(1, 2), evaluation(single_rank_group))
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(QUESTIONS)
    used = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert all(tag.endswith("$") for tag in used)
    documented = documented_metrics()
    assert len(used) > 20
    assert {tag[:-1] for tag in used} <= {tag_of(name) for name in documented}


def test_layout_leaves_out_what_the_method_does_not_have() -> None:
    assert QUESTIONS == ("Is it learning?", "Is it drifting?", "What does the guide do?", "How fast is it?")
    layout = chart_layout(METHODS["sft"].without)
    assert list(layout) == [QUESTIONS[0], QUESTIONS[1], QUESTIONS[3]]
    assert list(layout[QUESTIONS[0]].values()) == [["Multiline", ["1_learning/loss$"]]]
    assert layout[QUESTIONS[1]]["log-probs of chosen"] == ["Multiline", ["logps/chosen$"]]


def test_training_and_evaluation_have_the_same_tags_loss_accuracy_and_margin_first(
    tmp_path: Path, single_rank_group: dist.ProcessGroup
) -> None:
    log_steps(make_config(tmp_path), 0, range(1, 5), evaluation(single_rank_group))
    train, evaluated = (read(tmp_path, run).Tags()["scalars"] for run in ("train", "eval"))
    assert set(evaluated) <= set(train)
    assert not any(tag.startswith("eval") for tag in train)
    assert sorted(train)[:3] == ["1_learning/accuracy", "1_learning/loss", "1_learning/margin"]
    assert read(tmp_path).Tags()["scalars"] == []


def test_each_validation_set_is_a_run(tmp_path: Path, single_rank_group: dist.ProcessGroup) -> None:
    sets = {**VALID["data"], "validation": {"short": "a.jsonl", "long": "b.jsonl"}}
    log = MetricsLog(make_config(tmp_path, data=sets), 0)
    evaluated = evaluation(single_rank_group)
    groups = ("eval/short", "eval/long")
    values = {f"{group}/{name}": value for group in groups for name, value in evaluated.values.items()}
    log.write(1, values | {"eval/short/loss": 0.25}, dict.fromkeys(groups, evaluated))
    log.close()
    assert [event.value for event in read(tmp_path, "eval/short").Scalars("1_learning/loss")] == [0.25]
    assert WEIGHT_HISTOGRAM in read(tmp_path, "eval/long").Tags()["histograms"]


def test_a_sweep_is_side_by_side(tmp_path: Path, single_rank_group: dist.ProcessGroup) -> None:
    """What the HParams tab gets of its backend."""
    for alpha in (0.25, 0.5):
        (tmp_path / f"alpha_{alpha}").mkdir()
        config = make_config(tmp_path / f"alpha_{alpha}", loss={"alpha": alpha})
        log_steps(config, 0, range(1, 5), evaluation(single_rank_group))
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    backend = BackendContext(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(tmp_path))))
    context = RequestContext()
    experiment = backend.experiment_from_metadata(context, "", True, backend.hparams_metadata(context, ""), [])
    assert [info.name for info in experiment.hparam_infos][:3] == ["loss.alpha", "loss.beta", "optimizer.lr"]
    asked = ListSessionGroupsRequest(start_index=0, slice_size=10, allowed_statuses=[STATUS_UNKNOWN])
    found = list_session_groups.Handler(context, backend, "", asked).run().session_groups
    values = {group.name: group.hparams["loss.alpha"].number_value for group in found}
    assert values == {"alpha_0.25": 0.25, "alpha_0.5": 0.5}
    last = {(value.name.group, value.name.tag): value.value for value in found[0].metric_values}
    assert last["train", "1_learning/loss"] == 4.0
    names = ("loss", "accuracy", "margin")
    assert set(last) == {(run, f"1_learning/{name}") for run in ("train", "eval") for name in names}


def documented_metrics() -> set[str]:
    """Names in the first column of the table, ``{a,b}`` spelled out."""
    rows = DOCUMENT.read_text().split("## Metrics")[1].splitlines()
    found = set()
    for name in re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in rows if row.startswith("| `"))):
        parts = [part.split(",") for part in re.split(r"[{}]", name)]
        found |= {"".join(choice) for choice in product(*parts)}
    return found


def test_hyperparameters_are_the_configs(tmp_path: Path, single_rank_group: dist.ProcessGroup) -> None:
    config = make_config(tmp_path)
    log_steps(config, 0, range(1, 2), evaluation(single_rank_group))
    content = read(tmp_path).PluginTagToContent("hparams")
    session = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert session.hparams["loss.alpha"].number_value == 0.5
    assert session.hparams["loss.method"].string_value == "tgdpo"
    assert session.hparams["data.shuffle"].string_value == "True"
    assert set(session.hparams) == set(hyperparameters(config))
    assert not {"train.exit_step", "log.wandb", "data.workers"} & set(session.hparams)
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert experiment.metric_infos[-1].name.group == "eval"
    assert experiment.metric_infos[-1].display_name == "eval margin"
    assert session.group_name == tmp_path.name


def test_without_a_guide_there_is_no_histogram(tmp_path: Path, single_rank_group: dist.ProcessGroup) -> None:
    plain = reduced(single_rank_group, [pack(1, [2, 3], [0])], without=METHODS["dpo"].without)
    log_steps(make_config(tmp_path), 0, range(1, 3), plain)
    assert read(tmp_path, "eval").Tags()["histograms"] == []


# All text of a page that is built of web components, whose insides innerText does not see.
ALL_TEXT = """(() => {
  const collect = (node) => node.nodeType === Node.TEXT_NODE ? node.textContent
    : [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes].map(collect).join(' ');
  return collect(document.body);
})()"""


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_the_running_page_shows_the_layout(tmp_path: Path, single_rank_group: dist.ProcessGroup) -> None:
    (tmp_path / "run").mkdir()
    log_steps(make_config(tmp_path / "run"), 0, range(1, 5), evaluation(single_rank_group))
    server = program.TensorBoard()
    server.configure(argv=["", "--logdir", str(tmp_path / "run"), "--host", "localhost", "--port", "0"])
    url = server.launch()
    with chromium(tmp_path / "profile") as page:
        page.open(url + "#custom_scalars")
        for title in QUESTIONS:
            page.wait_for(f"{ALL_TEXT}.includes({title!r})")
        page.screenshot(tmp_path / "tensorboard.png")
