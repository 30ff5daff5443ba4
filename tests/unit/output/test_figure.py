"""The picture of a run's metrics, and of several runs': what is drawn, and what is said where nothing can be."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.output.figure import draw, read_records
from megatron_tgdpo.training.finish import draw_metrics
from tgdpo import plot

Lines = dict[str, tuple[list[float], list[float]]]


def make_run(directory: Path, steps: int, *, sets: tuple[str, ...] = ("eval",), guide: bool = True) -> Path:
    """Metrics of which each is a line of its own; the loss of step 2 is not a number."""
    directory.mkdir(parents=True)
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            values: dict[str, float] = {"step": step, "train/loss": 1 / step, "rewards/accuracies": 0.5, "train/lr": 0}
            values |= {"rewards/margins": 2.0 * step, "train/grad_norm": 1.0}
            values |= {"guidance/weight_mean": 1.0, "guidance/weight_std": 0.25} if guide else {}
            if step % 2 == 0:
                values |= {f"{group}/loss": 3.0 * step + number for number, group in enumerate(sets)}
            file.write(json.dumps(values | ({"train/loss": math.nan} if step == 2 else {})) + "\n")
        file.write('{"step": 99, "train/lo')  # where a run was killed
    return directory


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []
    save = Figure.savefig

    def keeping(self: Any, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keeping)
    return figures


def lines_of(axes: Any) -> Lines:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def legend(of: Any) -> list[str]:
    return [text.get_text() for text in of.legends[0].get_texts()]


def test_one_run(tmp_path: Path, drawn: list[Any]) -> None:
    run = make_run(tmp_path / "run", 6)
    draw({"a name": read_records(run)}, run / "metrics.png")
    assert (run / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "metrics.png"]
    (shown,) = drawn
    titles = [axes.get_title(loc="left") for axes in shown.axes]
    assert [title.split(":")[0].split(" ")[0] for title in titles] == ["loss", "accuracy", "margin", "token"]
    loss = lines_of(shown.axes[0])
    assert loss == {
        "training": ([1, 3, 4, 5, 6], [1, 1 / 3, 1 / 4, 1 / 5, 1 / 6]),
        "evaluation": ([2, 4, 6], [6.0, 12.0, 18.0]),
    }
    assert shown.get_suptitle() == "a name"
    assert legend(shown) == ["training", "evaluation"]
    (band,) = shown.axes[3].collections
    assert band.get_datalim(shown.axes[3].transData).intervaly.tolist() == [0.75, 1.25]


def test_what_a_method_does_not_have_gives_its_place_to_something_else(tmp_path: Path, drawn: list[Any]) -> None:
    draw({"dpo": read_records(make_run(tmp_path / "run", 4, guide=False))}, tmp_path / "x.png")
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert len(titles) == 4
    assert titles[3] == "gradient norm before clipping"


def test_many_steps_are_smoothed(tmp_path: Path, drawn: list[Any]) -> None:
    draw({"long": read_records(make_run(tmp_path / "run", 400))}, tmp_path / "x.png")
    margin = lines_of(drawn[0].axes[2])
    steps, values = margin["training (mean of 10 steps)"]
    assert steps == list(range(1, 401))
    assert values[0] == 2.0
    assert values[99] == pytest.approx(2 * sum(range(91, 101)) / 10)


def test_runs_are_compared_by_colour_and_sets_by_line(tmp_path: Path, drawn: list[Any]) -> None:
    one = make_run(tmp_path / "one" / "run", 4)
    two = make_run(tmp_path / "two" / "run", 4, sets=("eval/code", "eval/chat"))
    out = tmp_path / "compared.svg"
    assert plot.main([str(one), str(two), "--out", str(out)]) == 0
    assert "<svg" in out.read_text()
    lines = drawn[0].axes[0].get_lines()
    colours = [line.get_color() for line in lines]
    assert colours == [colours[0]] * 2 + [colours[2]] * 3
    assert colours[0] != colours[2]
    assert lines[3].get_linestyle() != lines[4].get_linestyle()
    assert legend(drawn[0]) == ["one/run", "two/run", "two/run, evaluation code", "two/run, evaluation chat"]


def test_the_picture_of_one_run_is_beside_its_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 3)
    assert plot.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'metrics.png'}: written\n"
    assert (run / "metrics.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/empty"], "{tmp}/empty/metrics.jsonl: no step is in it yet"),
        (["{tmp}"], "{tmp}: no metrics.jsonl there: name the output directory of a training"),
        (["{tmp}/run", "--out", "{tmp}/x.gif"], "--out {tmp}/x.gif: the name must end in one of .png, .svg, .pdf"),
        (["{tmp}/run", "--out", "{tmp}/no/x.png"], "--out {tmp}/no/x.png: cannot be written"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    make_run(tmp_path / "run", 3)
    make_run(tmp_path / "empty", 0)
    assert plot.main([argument.format(tmp=tmp_path) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message.format(tmp=tmp_path)}")


def test_names_are_drawn_as_they_are(tmp_path: Path, drawn: list[Any]) -> None:
    runs = {name: read_records(make_run(tmp_path / name, 3)) for name in ("_a", "a$\\bad$b")}
    draw(runs, tmp_path / "compared.png")
    (shown,) = drawn
    assert [text.replace("\N{ZERO WIDTH SPACE}", "") for text in legend(shown)] == list(runs)


def test_numbers_that_axes_cannot_show_are_left_out(tmp_path: Path, drawn: list[Any]) -> None:
    run = make_run(tmp_path / "run", 3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 4, "train/loss": 10**400}))
        file.write("\n" + json.dumps({"step": 10**400, "train/loss": 1.0}) + "\n")
    draw({"run": read_records(run)}, tmp_path / "run.png")
    (shown,) = drawn
    assert max(step for steps, _ in lines_of(shown.axes[0]).values() for step in steps) <= 3
    with pytest.raises(UserError, match="no step has any of the metrics"):
        draw({"run": [{"step": 1, "other": 2.0}]}, tmp_path / "other.png")


@pytest.mark.parametrize(("steps", "drawn"), [(19, False), (20, True)])
def test_a_finished_run_draws_itself_if_it_has_steps_enough(
    tmp_path: Path, steps: int, drawn: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = make_run(tmp_path / "run", steps)
    draw_metrics(run)
    assert (run / "metrics.png").exists() is drawn
    (said,) = caplog.messages
    reason = f"metrics.png is drawn of 20 steps and more; of these 19: tgdpo plot {run}"
    assert said == (f"the course of the run: {run / 'metrics.png'}" if drawn else reason)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    records = read_records(make_run(tmp_path / "run", 3))
    with pytest.raises(UserError, match=r"missing/x\.png"):
        draw({"run": records}, tmp_path / "missing" / "x.png")


def tiny_font(path: Path, character: str) -> str:
    """Makes a font of one character, a square; returns its family's name."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(point)
    pen.closePath()
    names = [".notdef", "one"]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(character): "one"})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Tiny", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return "Tiny"


def test_names_are_drawn_in_a_font_that_has_them_or_escaped(
    tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private-use character, which no other font on any machine is likely to have, in the place of a CJK one."""
    character = "\U000f0f1a"
    runs = {f"{name}{character}": read_records(make_run(tmp_path / name, 4)) for name in ("a", "b")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(runs, tmp_path / "without.png")
        monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist])
        fontManager.addfont(tmp_path / f"{tiny_font(tmp_path / 'Tiny.ttf', character)}.ttf")
        draw(runs, tmp_path / "with.png")
    without, found = ([text for text in figure.legends[0].get_texts()[:2]] for figure in drawn)
    assert [text.get_text() for text in without] == ["a\\U000f0f1a", "b\\U000f0f1a"]
    assert [text.get_text() for text in found] == [*runs]
    assert [text.get_fontfamily()[-1] for text in found] == ["Tiny", "Tiny"]
