"""What is copied into checkpoints and exports lies in the model directory, or in the Hub's cache that made it."""

import os
from pathlib import Path

import pytest

from megatron_tgdpo.checkpoints.model_directory import copy_hf_files, hf_files
from megatron_tgdpo.errors import UserError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("a private key")
    return tmp_path / "home" / "id_rsa"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "additional_chat_templates").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    return directory


def refuse(model: Path, tmp_path: Path, file: str) -> None:
    target = tmp_path / "target"
    target.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=f"{file}: a link to .*, and links are followed only inside the cache"):
        copy_hf_files(model, target)
    assert not any("private" in path.read_text() for path in target.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer.model", "vocab.txt"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_to_somewhere_else_is_not_followed(
    model: Path, secret: Path, tmp_path: Path, name: str, relative: bool
) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(os.path.relpath(secret, model) if relative else secret)
    refuse(model, tmp_path, name)


def test_a_linked_folder_of_templates_is_not_followed(model: Path, secret: Path, tmp_path: Path) -> None:
    secret.rename(secret.with_suffix(".jinja"))
    folder = model / "additional_chat_templates"
    (folder / "tool.jinja").unlink()
    folder.rmdir()
    folder.symlink_to(secret.parent)
    refuse(model, tmp_path, "id_rsa.jinja")


def test_a_linked_folder_of_a_megatron_checkpoint_is_not_followed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "tgdpo.json").write_text('{"format_version": 1}')
    (tmp_path / "step_00000001" / "hf").symlink_to(model)
    refuse(tmp_path / "step_00000001", tmp_path, "hf/config.json")


def test_a_link_to_another_link_is_followed_to_its_end(model: Path, secret: Path, tmp_path: Path) -> None:
    (model / "other").symlink_to(secret)
    (model / "vocab.txt").symlink_to("other")
    refuse(model, tmp_path, "vocab.txt")


def test_a_model_directory_may_itself_be_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("model")
    assert sorted(hf_files(tmp_path / "current")) == ["additional_chat_templates/tool.jinja", "config.json"]


def hub_repository(tmp_path: Path, name: str = "models--owner--name") -> Path:
    """A snapshot of a repository as huggingface_hub lays it out."""
    snapshot, blobs = (tmp_path / "hub" / name / folder for folder in (f"snapshots/{REVISION}", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "etag").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/etag")
    return snapshot


def test_links_of_the_hub_cache_are_followed(tmp_path: Path, secret: Path) -> None:
    snapshot = hub_repository(tmp_path)
    # Of files that several repositories have, the newer library keeps one.
    shared = tmp_path / "hub" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    shared.write_text("shared")
    (snapshot.parents[1] / "blobs" / "other").symlink_to(f"../../blobs/ab/{shared.name}")
    (snapshot / "tokenizer.model").symlink_to("../../blobs/other")
    (tmp_path / "target").mkdir()
    copy_hf_files(snapshot, tmp_path / "target")
    copied = {path.name: path.read_text() for path in (tmp_path / "target").iterdir() if not path.is_symlink()}
    assert copied == {"config.json": "{}", "tokenizer.model": "shared"}
    for target in ("blobs/stolen", "blobs"):
        (snapshot / "vocab.txt").unlink(missing_ok=True)
        if target == "blobs":
            # All blobs elsewhere: what the links lead to is not in the repository.
            blobs = snapshot.parents[1] / "blobs"
            blobs.rename(snapshot.parents[1] / "moved")
            blobs.symlink_to(secret.parent)
            (snapshot / "config.json").unlink()
            (snapshot / "config.json").symlink_to("../../blobs/id_rsa")
            refuse(snapshot, tmp_path, "config.json")
        else:
            (snapshot.parents[1] / target).symlink_to(secret)
            (snapshot / "vocab.txt").symlink_to("../../blobs/stolen")
            refuse(snapshot, tmp_path, "vocab.txt")


def test_another_repository_of_the_cache_is_not_followed(tmp_path: Path) -> None:
    """Its blobs may be those of a private one."""
    snapshot = hub_repository(tmp_path)
    hub_repository(tmp_path, "models--owner--private")
    (snapshot / "vocab.txt").symlink_to("../../../models--owner--private/blobs/etag")
    refuse(snapshot, tmp_path, "vocab.txt")


def test_a_cache_by_name_alone_is_none(model: Path, secret: Path, tmp_path: Path) -> None:
    directory = tmp_path / "x" / "snapshots" / "y"
    directory.parent.mkdir(parents=True)
    model.rename(directory)
    (tmp_path / "x" / "blobs").mkdir()
    (tmp_path / "x" / "blobs" / "etag").write_text("{}")
    (directory / "vocab.txt").symlink_to("../../blobs/etag")
    refuse(directory, tmp_path, "vocab.txt")
