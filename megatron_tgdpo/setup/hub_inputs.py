"""What a run's configuration names without saying which version, pinned: names of the Hub to commits, which one rank of
every node fetches, and output directories of other runs to one of their checkpoints."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tgdpo.checkpoints.adapter_directory import is_adapter
from megatron_tgdpo.checkpoints.find_model import find_local_model, is_best, is_output_dir, naming
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import prepared_prefix
from megatron_tgdpo.distributed.ranks import RankEnvironment, run_on_all_ranks, run_on_rank0
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.output.directory import DONE_FILE
from megatron_tgdpo.setup.trained_guide import check_trained, is_trained
from megatron_tgdpo.signals import leave_if_requested
from megatron_tgdpo.storage.atomic_file import write_atomically
from megatron_tgdpo.storage.files import read_error
from megatron_tgdpo.storage.hub import DATASET, MODEL, HubName, fetch, hub_name, local_path

# In the output directory: names as the config has them, with the commits that they stand for there.
PINS_FILE = "hub.json"

# Beside the kinds of the Hub: output directories, with the checkpoint that each stands for.
RUN = "run"
# By kind, names as the config has them with what they are pinned to.
Pins = Mapping[str, Mapping[str, str]]

logger = logging.getLogger(__name__)


def pin_inputs(config: Config, ranks: RankEnvironment, store: dist.Store) -> tuple[Config, Pins]:
    """Fetches what the config names of the Hub, before any process group and its time-out exist. Every rank calls.

    The first rank decides which commits; of models one rank of every node fetches these. A name that was pinned in the
    output directory stays with its commit, whatever the Hub has in the meantime; so does another run's output directory
    with its checkpoint, while that is there.

    Args:
        config: The run.
        ranks: This process's place.
        store: Joins all ranks; its keys must be unused.

    Returns:
        The config with pinned names, and the pins; the same on every rank.

    Raises:
        UserError: On every rank: something is not there, or cannot be reached; a StorageError where that may pass.
        StoppedEarly: On every rank: some rank was asked to stop.
    """
    first = dist.PrefixStore("pins", store)
    pins = run_on_rank0(lambda: _fetch_all(config, weights=True), first, ranks.rank)
    models = pins[MODEL]
    if models:

        def fetch_here() -> None:
            if ranks.local_rank == 0 and ranks.rank != 0:
                for pinned in models.values():
                    _fetch(pinned, MODEL, weights=True)

        run_on_all_ranks(fetch_here, dist.PrefixStore("fetched", store), ranks)
        run_on_all_ranks(lambda: _check_there(models), dist.PrefixStore("there", store), ranks)
    return with_pins(config, pins), pins


def pin_here(config: Config, *, weights: bool) -> Config:
    """The config with pinned names, after fetching them, for a command of one process; ``weights``: of models, too.

    Without weights, a guide that is still to be trained has the shape of what it starts from, the policy.
    """
    if not weights and not is_trained(config):
        config = replace(config, model=replace(config.model, guide=config.model.policy))
    return with_pins(config, _fetch_all(config, weights=weights))


def as_recorded(config: Config) -> Config:
    """The config with those names pinned that were pinned in the output directory, without asking the Hub.

    Raises:
        UserError: What was left there cannot be read; a StorageError where that may pass.
    """
    return with_pins(config, _recorded_pins(Path(config.output_dir)))


def record_pins(output_dir: Path, pins: Pins) -> None:
    """Leaves in the output directory which commits names stand for there. First rank only.

    Raises:
        UserError: It cannot be written; a StorageError where that may pass.
    """
    if any(pins.values()):
        merged = {kind: {**names, **pins.get(kind, {})} for kind, names in _recorded_pins(output_dir).items()}
        write_atomically(output_dir / PINS_FILE, json.dumps(merged, indent=2) + "\n")


def with_pins(config: Config, pins: Pins) -> Config:
    """The config with names replaced by those that they are pinned to."""

    def pinned(kind: str, text: str) -> str:
        return pins[kind].get(text, text)

    def of_model(text: str | None) -> Any:
        return text if text is None else pinned(RUN, pinned(MODEL, text))

    def of_data(text: str) -> str:
        return pinned(DATASET, text)

    model, data = config.model, config.data
    models = {role: of_model(getattr(model, role)) for role in ("policy", "reference", "guide")}
    return replace(
        config,
        lora=replace(config.lora, adapter=of_model(config.lora.adapter)),
        model=replace(model, **models),
        data=replace(
            data,
            tokenizer=of_model(data.tokenizer),
            train=_mapped(data.train, of_data),
            validation=_mapped(data.validation, of_data),
        ),
    )


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value of ``data.train`` or ``data.validation`` (``data/sources.py``) with every path changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        if "path" in value:
            return {**value, "path": change(value["path"])}
        return {name: _mapped(entry, change) for name, entry in value.items()}
    return [_mapped(entry, change) for entry in value] if isinstance(value, Sequence) else value


def _fetch_all(config: Config, *, weights: bool) -> dict[str, dict[str, str]]:
    if weights:
        check_trained(config)
    recorded = _recorded_pins(Path(config.output_dir))
    pins: dict[str, dict[str, str]] = {MODEL: {}, DATASET: {}, RUN: {}}
    model, data = config.model, config.data
    models = {"model.policy": model.policy, "model.reference": model.reference, "model.guide": model.guide}
    models["lora.adapter"] = config.lora.adapter
    for key, text in models.items():
        if text is not None:
            _pin_model(key, text, recorded, pins, weights=weights)
    # Where it is not of a model, it is looked at with the data.
    if data.tokenizer is not None and (
        hub_name(data.tokenizer) or is_best(data.tokenizer) or is_output_dir(Path(data.tokenizer))
    ):
        _pin_model("data.tokenizer", data.tokenizer, recorded, pins, weights=False)
    for name, sources in config.datasets.items():
        for source in sources:
            if hub_name(source.path) and prepared_prefix(source.path) is None:
                with naming(f"data.{name.replace('/', '.')}"):
                    pinned = _fetch(recorded[DATASET].get(source.path, source.path), DATASET, weights=False)
                pins[DATASET][source.path] = pinned
    return pins


def _pin_model(key: str, text: str, recorded: Pins, pins: dict[str, dict[str, str]], *, weights: bool) -> None:
    """Finds what a key names, and adds a pin where that may be another thing tomorrow."""
    if hub_name(text) and not is_best(text):
        if text not in pins[MODEL]:
            with naming(key):
                pins[MODEL][text] = _fetch(recorded[MODEL].get(text, text), MODEL, weights=weights)
        return
    before = recorded[RUN].get(text)
    there = before if before is not None and Path(before).is_dir() else text
    found = find_local_model(there, key, adapter=key != "model.policy")
    if key == "lora.adapter" and not is_adapter(found):
        raise UserError(f"{key} {text}: a whole model, no adapter: name it as model.policy, and set lora.rank")
    if found != Path(text):
        pins[RUN][text] = str(found)
        unfinished = "" if (Path(text) / DONE_FILE).exists() else ", of a run that is not finished"
        logger.info("%s %s: the checkpoint %s%s", key, text, found.name, unfinished)


def _fetch(text: str, kind: str, *, weights: bool) -> str:
    leave_if_requested("fetching models and data")
    name = hub_name(text)
    assert name is not None, "a name of the Hub"
    return str(fetch(name, kind, weights=weights))


def _check_there(models: Mapping[str, str]) -> None:
    for pinned in models.values():
        path = local_path(pinned)
        if not path.is_dir():
            raise UserError(f"{path}: not there: HF_HOME must be the same on all nodes, and each needs a local rank 0")


def _recorded_pins(output_dir: Path) -> dict[str, dict[str, str]]:
    file = output_dir / PINS_FILE
    pins: dict[str, dict[str, str]] = {MODEL: {}, DATASET: {}, RUN: {}}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for kind in pins:
            for text, pinned in content.get(kind, {}).items():
                name = None if kind == RUN else hub_name(pinned)
                if not (isinstance(pinned, str) if kind == RUN else isinstance(name, HubName) and name.pinned):
                    raise ValueError(f"{pinned!r} is no pinned name")
                pins[kind][text] = pinned
    except FileNotFoundError:
        pass
    except OSError as error:
        raise read_error(file, error) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({error}): remove it to pin the Hub's names anew") from error
    return pins
