"""Who fetches what of the Hub, and what the config becomes."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.distributed.ranks import RankEnvironment
from megatron_tgdpo.errors import AgreedError, UserError
from megatron_tgdpo.setup import hub_inputs
from megatron_tgdpo.setup.hub_inputs import PINS_FILE, RUN, as_recorded, pin_here, pin_inputs, record_pins
from megatron_tgdpo.storage.hub import DATASET, MODEL, HubName
from tests.unit.config.test_loading import VALID

COMMITS = {"owner/policy": "a" * 40, "owner/guide@v1": "b" * 40, "owner/pairs": "c" * 40, "owner/test": "d" * 40}


def make_config(directory: Path, **data: Any) -> Any:
    model = {"policy": "owner/policy", "guide": "owner/guide@v1"}
    named = {"train": ["owner/pairs", {"path": "owner/pairs", "weight": 2}], "validation": {"one": "owner/test"}}
    return config_from_dict({**VALID, "model": model, "data": {**named, **data}, "output_dir": str(directory)})


class Fetches:
    """Stands for the network; `calls` are kind, name and whether weights were asked for."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str, bool]] = []
        self.by_thread: dict[str, list[str]] = {}
        self.home = home
        monkeypatch.setattr(hub_inputs, "fetch", self.fetch)
        monkeypatch.setattr(hub_inputs, "local_path", lambda text, kind=MODEL: home / text)

    def fetch(self, name: HubName, kind: str, *, weights: bool = True) -> HubName:
        self.calls.append((kind, str(name), weights))
        self.by_thread.setdefault(threading.current_thread().name, []).append(str(name))
        pinned = name if name.pinned else HubName(name.repo, COMMITS[str(name)])
        (self.home / str(pinned)).mkdir(parents=True, exist_ok=True)
        return pinned


def alone(config: Any) -> Any:
    return pin_inputs(config, RankEnvironment(0, 1, 0, None, None), dist.HashStore())


def test_pinned_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = Fetches(tmp_path / "home", monkeypatch)
    pinned, pins = alone(make_config(tmp_path, tokenizer="owner/policy"))
    policy, guide, pairs, test = (f"{name.split('@')[0]}@{commit}" for name, commit in COMMITS.items())
    assert (pinned.model.policy, pinned.model.reference, pinned.model.guide) == (policy, None, guide)
    assert pinned.data.tokenizer == policy
    assert pinned.data.train == [pairs, {"path": pairs, "weight": 2}]
    assert pinned.data.validation == {"one": test}
    assert (MODEL, "owner/policy", True) in fetches.calls
    record_pins(tmp_path, pins)
    fetches.calls.clear()
    assert as_recorded(make_config(tmp_path, tokenizer="owner/policy")) == pinned
    assert fetches.calls == []
    assert alone(make_config(tmp_path))[0].model == pinned.model
    assert {name for _, name, _ in fetches.calls} == {policy, guide, pairs, test}
    # Another revision is another name.
    fetches.calls.clear()
    monkeypatch.setitem(COMMITS, "owner/pairs@v2", "e" * 40)
    changed, pins = alone(make_config(tmp_path, train="owner/pairs@v2"))
    assert changed.data.train == f"owner/pairs@{'e' * 40}"
    record_pins(tmp_path, pins)
    assert alone(make_config(tmp_path))[0].data.train == [pairs, {"path": pairs, "weight": 2}]


def test_paths_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = Fetches(tmp_path / "home", monkeypatch)
    for name in ("policy", "guide@v1"):
        (tmp_path / "owner" / name).mkdir(parents=True)
        (tmp_path / "owner" / name / "config.json").touch()
    (tmp_path / "owner/pairs.manifest.json").touch()
    monkeypatch.chdir(tmp_path)
    config = make_config(tmp_path / "out", validation=None)
    assert alone(config) == (config, {MODEL: {}, DATASET: {}, RUN: {}})
    record_pins(tmp_path / "out", {MODEL: {}, DATASET: {}, RUN: {}})
    assert fetches.calls == []
    assert not (tmp_path / "out").exists()


def test_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = Fetches(tmp_path / "home", monkeypatch)
    pin_here(make_config(tmp_path), weights=False)
    assert not any(weights for _, _, weights in fetches.calls)


def on_ranks(config: Any, local_ranks: list[int]) -> list[Any]:
    """What `pin_inputs` returns, or raises, on ranks that are threads."""
    store, results = dist.HashStore(), [None] * len(local_ranks)

    def work(rank: int, local_rank: int) -> None:
        ranks = RankEnvironment(rank, len(local_ranks), local_rank, None, None)
        try:
            results[rank] = pin_inputs(config, ranks, store)  # type: ignore[call-overload]
        except UserError as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=each, name=f"rank {each[0]}") for each in enumerate(local_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_one_rank_of_every_node_fetches_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = Fetches(tmp_path / "home", monkeypatch)
    config = make_config(tmp_path)
    results = on_ranks(config, [0, 1, 0, 1])
    assert all(result == results[0] for result in results)
    assert sorted(fetches.by_thread) == ["rank 0", "rank 2"]
    # Those of the first rank, by their commits; data are read by the first rank alone.
    assert fetches.by_thread["rank 2"] == [results[0][0].model.policy, results[0][0].model.guide]


def test_a_rank_that_cannot_fetch_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = Fetches(tmp_path / "home", monkeypatch)

    def failing(name: HubName, kind: str, *, weights: bool = True) -> HubName:
        if threading.current_thread().name == "rank 2":
            raise UserError("no network")
        return fetches.fetch(name, kind, weights=weights)

    monkeypatch.setattr(hub_inputs, "fetch", failing)
    assert {str(error) for error in on_ranks(make_config(tmp_path), [0, 1, 0])} == {"rank 2: no network"}

    def nowhere(name: HubName, kind: str, *, weights: bool = True) -> HubName:
        raise UserError("no such model")

    monkeypatch.setattr(hub_inputs, "fetch", nowhere)
    first, *others = on_ranks(make_config(tmp_path), [0, 1, 0])
    assert {str(error) for error in (first, *others)} == {"model.policy: no such model"}
    assert all(isinstance(error, AgreedError) for error in others)


def test_damaged_pins_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fetches(tmp_path / "home", monkeypatch)
    for content in ("{", "[]", '{"model": {"owner/policy": "owner/policy@main"}}', '{"model": {"owner/policy": 3}}'):
        (tmp_path / PINS_FILE).write_text(content)
        with pytest.raises(UserError, match=r"hub\.json: cannot be read .*: remove it"):
            alone(make_config(tmp_path))
