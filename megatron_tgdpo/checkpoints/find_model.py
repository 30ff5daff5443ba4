"""What a text means as a model, the same in every key and argument that takes one.

In this order: a directory that is there, which is a Megatron checkpoint, an HF directory, or the output directory of a
run (its newest complete checkpoint is taken), or ``best`` in one (its best checkpoint, by ``checkpoint.best_metric``);
else a name of the Hub (``storage/hub.py``).
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tgdpo.errors import DamageError, UserError
from megatron_tgdpo.storage.hub import MODEL, fetch, hub_name, local_path

# In an output directory: its best checkpoint, as if that were its name.
BEST = "best"


def find_model(text: str | Path, what: str, *, weights: bool = True, adapter: bool = False) -> Path:
    """The HF directory or Megatron checkpoint that a text means; one of the Hub is fetched, which may take hours.

    Args:
        text: A path or a name of the Hub.
        what: The key or the argument that has it, as ``model.guide`` or ``--model``, for errors.
        weights: Whether weights are wanted of a model of the Hub; else its config and tokenizer alone.
        adapter: Whether it may be a LoRA adapter as well.

    Raises:
        UserError: There is nothing there, no model, or no complete one; or the Hub has no such model, or cannot be
            reached. One line that begins with ``what``.
        StorageError: Storage or the Hub failed, which may pass.
    """
    name = None if is_best(text) else hub_name(str(text))
    if name is None:
        return find_local_model(text, what, adapter=adapter)
    with naming(what, _near(Path(text))):
        pinned = fetch(name, MODEL, weights=weights)
    return find_local_model(str(pinned), what, adapter=adapter)


def find_local_model(text: str | Path, what: str, *, adapter: bool = False) -> Path:
    """As :func:`find_model`, without asking the Hub: of its names, only those that are pinned to a commit are known.

    Args:
        text: A path, or a pinned name of the Hub.
        what: For errors.
        adapter: Whether it may be a LoRA adapter as well.
    """
    path = local_path(str(text))
    if is_best(path):
        return _asked_for(_best_of_run(path.parent, what), what, adapter=adapter)
    if not is_there(path):
        raise UserError(f"{what} {path}: no such directory{_near(path)}")
    if not path.is_dir():
        raise UserError(f"{what} {path}: a file: name the directory of the model")
    # Only now: a wrong path should not take the seconds of torch's import.
    from megatron_tgdpo.checkpoints.manifest import check_files
    from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint, is_peft_adapter, refuse_adapter

    if is_megatron_checkpoint(path):
        try:
            check_files(path)
        except DamageError as error:
            raise DamageError(
                f"{what}: {error}: name another checkpoint, or its run's output directory for the newest complete one"
            ) from error
        return _asked_for(path, what, adapter=adapter)
    if adapter and is_peft_adapter(path):
        return path
    with naming(what):
        refuse_adapter(path)
    if (path / "config.json").is_file():
        return path
    if not is_output_dir(path):
        raise UserError(
            f"{what} {path}: neither an HF directory (no config.json) nor a Megatron checkpoint nor a training output "
            "directory: name one of these, or a model of the Hub as OWNER/NAME"
        )
    from megatron_tgdpo.checkpoints.listing import newest_checkpoint, newest_damage

    with naming(what):
        checkpoint = newest_checkpoint(path)
        damage = newest_damage(path) if checkpoint is None else None
    if damage is not None:
        raise DamageError(
            f"{what} {path}: {damage}: no undamaged checkpoint is left there: put one back, or name another model"
        )
    if checkpoint is None:
        raise UserError(
            f"{what} {path}: a training output directory without a complete checkpoint: start its run again to "
            "continue it, or name another model"
        )
    return _asked_for(checkpoint, what, adapter=adapter)


def _asked_for(checkpoint: Path, what: str, *, adapter: bool) -> Path:
    from megatron_tgdpo.checkpoints.adapter_directory import is_adapter

    if not adapter and is_adapter(checkpoint):
        raise UserError(
            f"{what} {checkpoint}: an adapter, of a LoRA run, no whole model: training takes it as lora.adapter, "
            "model.reference or model.guide; tgdpo convert to-hf --merge makes a whole model of it"
        )
    return checkpoint


def is_best(text: str | Path) -> bool:
    """Whether a text means the best checkpoint of a run on this machine, whatever else has such a name."""
    path = Path(text)
    return path.name == BEST and is_there(path.parent) and is_output_dir(path.parent)


def is_there(path: Path) -> bool:
    """Whether there is such a file or directory; not where its name is longer than names can be."""
    try:
        return path.exists()
    except OSError:
        return False


def _best_of_run(output_dir: Path, what: str) -> Path:
    from megatron_tgdpo.checkpoints.best import checkpoint_of, read_best

    with naming(what):
        best = read_best(output_dir)
        path = None if best is None else checkpoint_of(output_dir, best)
    if path is None:
        gone = (
            "no best checkpoint (checkpoint.best_metric)" if best is None else f"lost its best one, of step {best.step}"
        )
        raise UserError(f"{what} {output_dir / BEST}: the run has {gone}: name {output_dir} for its newest one")
    return path


def is_output_dir(path: Path) -> bool:
    """Whether a directory is the output directory of a run, whatever became of the run."""
    return (path / "checkpoints").is_dir() or (path / "config.yaml").is_file()


@contextmanager
def naming(what: str, hint: str = "") -> Iterator[None]:
    """Has bad input say which key or argument it is of."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{what}: {error}{hint}") from error


def _near(path: Path) -> str:
    """A question after the nearest name that is there, if one is near."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f": did you mean {path.parent / near[0]}?" if near else ""
