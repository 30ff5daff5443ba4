"""The names of the Hub in a run's configuration, pinned to commits, and fetched by one rank of every node."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import prepared_prefix
from megatron_tgdpo.distributed.ranks import RankEnvironment, run_on_all_ranks, run_on_rank0
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.signals import leave_if_requested
from megatron_tgdpo.storage.atomic_file import write_atomically
from megatron_tgdpo.storage.files import read_error
from megatron_tgdpo.storage.hub import DATASET, MODEL, HubName, fetch, hub_name, local_path

# In the output directory: names as the config has them, with the commits that they stand for there.
PINS_FILE = "hub.json"

# By kind, names as the config has them with the pinned names that they stand for.
Pins = Mapping[str, Mapping[str, str]]


def pin_inputs(config: Config, ranks: RankEnvironment, store: dist.Store) -> tuple[Config, Pins]:
    """Fetches what the config names of the Hub, before any process group and its time-out exist. Every rank calls.

    The first rank decides which commits; of models one rank of every node fetches these. A name that was pinned in the
    output directory stays with its commit, whatever the Hub has in the meantime.

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
    """The config with pinned names, after fetching them, for a command of one process; ``weights``: of models, too."""
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
        return text if text is None else pinned(MODEL, text)

    def of_data(text: str) -> str:
        return pinned(DATASET, text)

    model, data = config.model, config.data
    models = {role: of_model(getattr(model, role)) for role in ("policy", "reference", "guide")}
    return replace(
        config,
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


def _named(config: Config) -> Iterator[tuple[str, str, bool]]:
    """Kind, name as the config has it, and whether weights are wanted, of each text in the config that is a name."""
    model = config.model
    for path in (model.policy, model.reference, model.guide):
        if path is not None and hub_name(path):
            yield MODEL, path, True
    if config.data.tokenizer is not None and hub_name(config.data.tokenizer):
        yield MODEL, config.data.tokenizer, False
    for sources in config.datasets.values():
        for source in sources:
            if hub_name(source.path) and prepared_prefix(source.path) is None:
                yield DATASET, source.path, False


def _fetch_all(config: Config, *, weights: bool) -> dict[str, dict[str, str]]:
    recorded = _recorded_pins(Path(config.output_dir))
    pins: dict[str, dict[str, str]] = {MODEL: {}, DATASET: {}}
    for kind, text, wanted in _named(config):
        pins[kind][text] = _fetch(recorded[kind].get(text, text), kind, weights=weights and wanted)
    return pins


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
    pins: dict[str, dict[str, str]] = {MODEL: {}, DATASET: {}}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for kind in pins:
            for text, pinned in content.get(kind, {}).items():
                name = hub_name(pinned)
                if not isinstance(name, HubName) or not name.pinned:
                    raise ValueError(f"{pinned!r} is no pinned name")
                pins[kind][text] = pinned
    except FileNotFoundError:
        pass
    except OSError as error:
        raise read_error(file, error) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({error}): remove it to pin the Hub's names anew") from error
    return pins
