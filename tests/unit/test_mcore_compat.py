"""The versions of megatron-core: which are tested, and what differs."""

from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from megatron_tgdpo import mcore_compat


@pytest.mark.parametrize("found", ["0.16.1", "0.17.0", "0.19.2", "0.19.0rc3"])
def test_a_tested_version_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(mcore_compat, "version", {"megatron-core": found}.__getitem__)
    assert mcore_compat.untested_version() is None


@pytest.mark.parametrize("found", ["0.20.0", "0.20.0rc1", "1.0.0"])
def test_a_newer_version_is_accepted_with_a_warning(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(mcore_compat, "version", {"megatron-core": found}.__getitem__)
    assert mcore_compat.untested_version() == (
        f"megatron-core {found} is newer than 0.19, the newest this version was tested with: "
        "install megatron-core<0.20 if anything is amiss"
    )


def test_the_installed_version_is_a_tested_one() -> None:
    major, minor, *_ = version("megatron-core").split(".")
    assert mcore_compat.OLDEST <= (int(major), int(minor)) <= mcore_compat.NEWEST


def test_submodules_of_either_kind_of_spec() -> None:
    submodules = SimpleNamespace()
    assert mcore_compat.submodules_of(SimpleNamespace(submodules=submodules)) is submodules
    assert mcore_compat.submodules_of(partial(dict, submodules=submodules)) is submodules
