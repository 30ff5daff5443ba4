"""Names of the Hugging Face Hub: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``, for models, tokenizers and datasets.

A name is first fetched into the Hub's own cache and pinned to the commit that it stands for (:func:`fetch`). A pinned
name, ``OWNER/NAME@COMMIT``, then means a directory of that cache, without asking anyone (:func:`local_path`). A path
that exists is always that path. HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they mean to
huggingface_hub. No code of a repository is fetched.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_tgdpo.errors import StorageError, UserError, one_line

MODEL, DATASET = "model", "dataset"

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# A path with one of these endings that is not there is a file that is missing, not a repository.
_FILE_ENDINGS = (
    ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".gz", ".zst", ".bz2", ".model",
    ".bin", ".idx", ".safetensors",
)  # fmt: skip
# Config, tokenizer and templates of a model.
_SMALL = ("*.json", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt")
_DATA = (
    "*.json", "*.jsonl", "*.ndjson", "*.parquet", "*.arrow", "*.gz", "*.zst", "*.bz2", "*.csv", "*.tsv", "README.md",
    ".huggingface.yaml",
)  # fmt: skip
# A second copy of the weights, in the layout of some authors' own code.
_NOT_MODEL = ("original/*", "consolidated*", "onnx/*", "openvino/*", "gguf/*")


@dataclass(frozen=True)
class HubName:
    """A repository of the Hub.

    Attributes:
        repo: ``OWNER/NAME``.
        revision: a branch, tag or commit; None for the default branch.
    """

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which always has the same content."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def hub_name(text: str) -> HubName | None:
    """The name that a text is; None if it is a path, that is: one that exists, or no ``OWNER/NAME``."""
    match = _NAME.fullmatch(text)
    if match is None or os.path.lexists(text) or match["repo"].endswith(_FILE_ENDINGS):
        return None
    return HubName(match["repo"], match["revision"])


def local_path(text: str, kind: str = MODEL) -> Path:
    """The directory that a pinned name has in the Hub's cache, whether it is there or not; any other text as a path."""
    name = hub_name(text)
    if name is None or not name.pinned:
        return Path(text)
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=name.repo, repo_type=kind)
    return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / str(name.revision)


def fetch(name: HubName, kind: str, *, weights: bool = True) -> HubName:
    """Brings a repository into the Hub's cache, unless it is there, and pins its name to the commit.

    May take hours: call it before process groups and their time-out exist. Any number of processes may call it at a
    time, also on storage that they share: the library locks each file.

    Args:
        name: the repository.
        kind: `MODEL` or `DATASET`.
        weights: whether a model's weights are wanted; else its config and tokenizer alone.

    Raises:
        UserError: there is no such repository or revision, or it asks for rights; or it is not in the cache and the Hub
            cannot be reached; the message says how to fetch it.
        StorageError: the Hub failed, or the cache cannot be written; the same may work later.
    """
    from huggingface_hub import errors, snapshot_download

    patterns = list(_DATA if kind == DATASET else (*_SMALL, *(("*.safetensors",) if weights else ())))
    try:
        found = snapshot_download(
            name.repo, repo_type=kind, revision=name.revision, allow_patterns=patterns,
            ignore_patterns=[] if kind == DATASET else list(_NOT_MODEL),
        )  # fmt: skip
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name}: a gated {kind} of the Hub: accept its conditions there, and set HF_TOKEN to your token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: no such file or directory, and no such {kind} on the Hub (or a private one: set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: the {kind} {name.repo} of the Hub has no revision {name.revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(_not_cached(name, kind)) from error
    except errors.HFValidationError as error:
        raise UserError(f"{name}: no such file or directory, and no name of the Hub: {one_line(error)}") from error
    except Exception as error:  # of many libraries' own types
        raise StorageError(f"{name}: cannot be fetched from the Hub: {one_line(error)}") from error
    return HubName(name.repo, Path(found).name)


def _not_cached(name: HubName, kind: str) -> str:
    from huggingface_hub import constants

    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
    options = " --repo-type dataset" if kind == DATASET else ""
    options += f" --revision {name.revision}" if name.revision else ""
    return (
        f"{name}: no such file or directory, not (or not all of it) in the Hub's cache {constants.HF_HUB_CACHE}, and "
        f"{offline}: fetch it where there is a network, with the same HF_HOME: hf download {name.repo}{options}; or "
        "name a directory that has it"
    )
