"""The model card of an export, README.md: what the model was trained from, on and with, and what that came to.

Names of files and directories stand in it without their paths.
"""

import importlib.metadata
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_tgdpo import __version__
from megatron_tgdpo.checkpoints.best import Best, best_of_record, read_best
from megatron_tgdpo.data.sources import read_sets, read_sources
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.loss.methods import METHODS, Method
from megatron_tgdpo.output.directory import SUMMARY_FILE
from megatron_tgdpo.output.metrics_file import logged_steps
from megatron_tgdpo.storage.hub import HubName, hub_name, local_path
from megatron_tgdpo.storage.json_text import parse_json
from megatron_tgdpo.storage.yaml_text import read_yaml

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
_PACKAGES = ("megatron-core", "torch", "transformers")
# Of training; of each validation set the same, with ``loss`` for ``train/loss``.
_SHOWN = ("train/loss", "rewards/accuracies", "rewards/margins", "guidance/weight_mean", "guidance/guide_accuracy")
_PEFT_IMPORTS = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
_LICENCE_KEYS = ("license", "license_name", "license_link")
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)\r?\n---\s", re.DOTALL)
_LONGEST_CARD = 1 << 20


def model_card(checkpoint: Path, metadata: Mapping[str, Any], *, whole: bool = True) -> str | None:
    """The card of a training checkpoint, in Markdown with the Hub's front matter; None if it is not of training.

    What is said of data and metrics comes from the run's directory, if the checkpoint still lies there.

    Args:
        checkpoint: The checkpoint.
        metadata: Of its manifest.
        whole: Of a whole model; else of a LoRA run's adapter alone.
    """
    config, step = metadata.get("config"), metadata.get("step")
    if not isinstance(config, Mapping) or step is None:
        return None
    run = checkpoint.absolute().parent.parent
    model, loss = _section(config, "model"), _section(config, "loss")
    method = str(loss.get("method"))
    front = {
        **_licence(model.get("policy")),
        "library_name": "transformers" if whole else "peft",
        "pipeline_tag": "text-generation",
    }
    tags = [tag for tag in ("tgdpo", "dpo", "simpo", "sft") if tag == method] + ["megatron-core"]
    base = _pinned(model.get("policy"))
    if base is not None:
        front["base_model"] = base.repo
    name = Path(str(config.get("output_dir"))).name or "a run"
    lines = [
        "---",
        yaml.safe_dump({**front, "tags": tags}, sort_keys=False).strip(),
        "---",
        "",
        f"# {_plain(name)}",
        "",
    ]
    lines += [
        f"The policy after step {step} of a training with {method}, by megatron-tgdpo {__version__}.",
        "",
        *_table(("", ""), _facts(config, method, step, _summary(run), _section(metadata, "lora"))),
        "",
        *_metrics(run, step, best_of_record(metadata.get("best"))),
        "## Use",
        "",
        "```python",
        *(["from transformers import AutoModelForCausalLM, AutoTokenizer"] if whole else _PEFT_IMPORTS),
        "",
        'directory = "."  # where this file lies',
        f"model = {'AutoModelForCausalLM' if whole else 'AutoPeftModelForCausalLM'}.from_pretrained(directory)",
        "tokenizer = AutoTokenizer.from_pretrained(directory)",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _facts(
    config: Mapping[str, Any],
    method: str,
    step: int,
    summary: Mapping[str, list[Mapping[str, Any]]],
    lora: Mapping[str, Any],
) -> Iterable[tuple[str, str]]:
    model, loss, data = (_section(config, name) for name in ("model", "loss", "data"))
    row = METHODS.get(method, Method(""))
    told = {key: value for key, value in loss.items() if key != "method" and value is not None}
    # A word as usual, and a number that is off, go without saying.
    told = {
        key: value
        for key, value in told.items()
        if value != row.options.get(key) or (value and not isinstance(value, str))
    }
    yield "method", ", ".join([method, *(f"{key} {value}" for key, value in told.items())])
    policy = _model_name(model.get("policy"))
    yield "began as", policy
    frozen = row.given(loss).frozen
    if "reference" in frozen:
        yield "reference", _model_name(model["reference"]) if model.get("reference") else policy
    if "guide" in frozen:
        yield "guide", _model_name(model.get("guide"))
    yield from _data(data, summary)
    if lora:
        targets = ", ".join(map(str, lora.get("targets") or []))
        yield "LoRA", f"rank {lora.get('rank')}, alpha {lora.get('alpha'):g}, on {targets}"
    if data.get("chat_template"):
        yield "chat template", _file_name(data["chat_template"])
    if data.get("template_kwargs"):
        yield "chat template's variables", ", ".join(map(str, data["template_kwargs"]))
    optimizer, train = _section(config, "optimizer"), _section(config, "train")
    batch, precision = _section(config, "batch"), _section(config, "precision")
    yield "steps", f"{step}, of {batch.get('global_pairs')} pairs each; seed {train.get('seed')}"
    adam = [f"{key} {optimizer.get(key)}" for key in ("lr", "beta1", "beta2", "weight_decay", "clip_grad")]
    yield "optimizer", ", ".join(["Adam", *adam, f"{optimizer.get('schedule')} schedule"])
    yield "most tokens of prompt and response", str(data.get("max_length"))
    low = [f"{key.upper()} {precision[key]}" for key in ("fp8", "fp4") if precision.get(key, "none") != "none"]
    yield "precision", ", ".join([str(precision.get("dtype")), *low])
    found = [f"{package} {importlib.metadata.version(package)}" for package in _PACKAGES]
    yield "versions", ", ".join([f"megatron-tgdpo {__version__}", *found])


def _data(data: Mapping[str, Any], summary: Mapping[str, list[Mapping[str, Any]]]) -> Iterable[tuple[str, str]]:
    """Each dataset by its name, with the names of its files and, where the run's directory has them, its pairs."""
    try:
        named = {f"validation {name}".strip(): found for name, found in read_sets(data.get("validation"), "").items()}
        datasets = {"training": read_sources(data.get("train"), ""), **named}
    except UserError:  # of another version
        return
    for name, sources in datasets.items():
        parts = summary.get(name.replace("training", "train").replace(" ", "/"), [])
        counts = [part.get("pairs") for part in parts]
        told = counts if len(counts) == len(sources) else [None] * len(sources)
        texts = []
        for source, pairs in zip(sources, told, strict=True):
            which = [text for text in (source.subset, source.split) if text]
            count = f"{pairs:,} {'pairs' if pairs != 1 else 'pair'}" if isinstance(pairs, int) else ""
            weight = f"weight {source.weight:g}" if source.weight != 1 else ""
            hub = _pinned(source.path)
            file = _file_name(source.path) if hub is None else str(hub)
            texts.append(", ".join(part for part in (" ".join([file, *which]), count, weight) if part))
        yield f"{name} data", "; ".join(texts)


def _metrics(run: Path, step: int, best: Best | None) -> list[str]:
    """The section on metrics: those of the step, those of the run's last step, and which step is the best."""
    at_step, last = _logged(run, step)
    if not at_step:
        return []
    columns = {f"step {step}": at_step}
    if last["step"] != at_step["step"]:
        columns[f"step {last['step']:.0f}, the last so far"] = last
    groups = sorted(name.removesuffix("/loss") for name in at_step if re.fullmatch("eval(/.+)?/loss", name))
    names = [*_SHOWN, *(f"{group}/{name.removeprefix('train/')}" for group in groups for name in _SHOWN)]
    rows = [
        (name, *(f"{found[name]:.4g}" if name in found else "" for found in columns.values()))
        for name in names
        if name in at_step
    ]
    lines = ["## Metrics", "", *_table(("metric", *columns), rows), ""]
    try:
        recorded = read_best(run) or best
    except UserError:
        recorded = best
    if recorded is not None:
        which = "this step" if recorded.step == step else f"step {recorded.step}"
        lines += [f"Best by {_plain(recorded.metric)} ({recorded.mode}): {which}, {recorded.value:.4g}."]
        if recorded.step == step:
            lines.append("It was chosen by this figure, which therefore flatters it: compare it on other data.")
        lines.append("")
    return lines


def _logged(run: Path, step: int) -> tuple[dict[str, float], dict[str, float]]:
    """What a run logged at a step and at its last, with the newest evaluation up to each; nothing without a log."""
    at_step: dict[str, float] = {}
    last: dict[str, float] = {}
    try:
        for record in logged_steps(run):
            last = {**{name: value for name, value in last.items() if name.startswith("eval/")}, **record}
            if record["step"] == step:
                at_step = last
    except UserError:
        return {}, {}
    return at_step, last


def _summary(run: Path) -> dict[str, list[Mapping[str, Any]]]:
    """What became of the records of each dataset; nothing where the run's directory does not say it."""
    try:
        content = parse_json((run / SUMMARY_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        name: parts
        for name, parts in content.items()
        if isinstance(parts, list) and all(isinstance(part, Mapping) for part in parts)
    }


def _licence(policy: Any) -> dict[str, str]:
    """What the card of the model that the policy began as says of its licence, if that has one."""
    try:
        with (local_path(str(policy)) / CARD_FILE).open(encoding="utf-8") as file:
            found = _FRONT_MATTER.match(file.read(_LONGEST_CARD))
        front = read_yaml(found[1], CARD_FILE) if found else {}
    except (OSError, ValueError, UserError):
        return {}
    values = front if isinstance(front, dict) else {}
    return {key: str(values[key]) for key in _LICENCE_KEYS if isinstance(values.get(key), str)}


def _model_name(text: Any) -> str:
    """A model as it may be told to others: its name on the Hub, or the end of its path."""
    hub = _pinned(text)
    if hub is not None:
        return str(hub)
    parts = Path(str(text)).absolute().parts
    cached = next((part for part in parts if part.startswith("models--")), None)
    if cached is not None:
        return cached.removeprefix("models--").replace("--", "/", 1)
    if parts[-1].startswith("step_") and len(parts) > 3:
        return "/".join(parts[-3:])  # RUN/checkpoints/step_N
    return _file_name(text)


def _pinned(text: Any) -> HubName | None:
    """A name of the Hub as runs record it, with its commit; a path that is not here may look like one without."""
    name = hub_name(str(text))
    return name if name is not None and name.pinned else None


def _file_name(text: Any) -> str:
    return Path(str(text)).absolute().name or "a local directory"


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in cells]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`<>|\[\]!*])", r"\\\1", " ".join(text.split()))
