"""What is run: splits of the pairs, and for each split the commands of this project that train and evaluate on it."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from shutil import rmtree
from typing import Any

from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.records import detect_format, read_records, where
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.atomic_file import write_atomically

GUIDES = ("dpo", "simpo")
_HERE = Path(__file__).parent
CONFIG, QUESTIONS = _HERE / "preference.yaml", _HERE / "questions.json"
STUDY_FILE = "study.json"


@dataclass(frozen=True)
class Settings:
    """What every split has in common.

    Attributes:
        model: HF directory or a model of the Hub.
        pairs: File of preference pairs.
        train: Pairs that a split trains on.
        held_out: Others, that it evaluates on.
        overrides: Of ``preference.yaml``.
    """

    model: str
    pairs: str
    train: int
    held_out: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: Of its split and purpose.
        words: After ``tgdpo``.
        result: The file that is there once it has succeeded.
    """

    name: str
    words: tuple[str, ...]
    result: Path

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "tgdpo", *self.words]


@dataclass(frozen=True)
class Study:
    """A study in a directory.

    Attributes:
        root: Absolute path; everything is written below it.
        settings: Its own.
        ranks: Of each training, on this machine; None for as many as GPUs, or 1.
    """

    root: Path
    settings: Settings
    ranks: int | None = None

    def open(self) -> None:
        """Begins the study, or checks that the one that is there has the same settings.

        Raises:
            UserError: It has others, or something else is there.
        """
        file, wanted = self.root / STUDY_FILE, json.loads(json.dumps(asdict(self.settings)))
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                if any(self.root.iterdir()):
                    raise UserError(f"{self.root}: not empty, and holds no study: name another directory")
                write_atomically(file, json.dumps(wanted, indent=2) + "\n")
            found = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{self.root}: cannot write there: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{file}: not readable: name another directory") from error
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UserError(f"{file}: this study has {name} {found.get(name)}, not {value}: name another directory")

    def directory(self, split: int) -> Path:
        """Of a split."""
        return self.root / f"split{split}"

    def run(self, split: int, guide: str) -> Path:
        """``output_dir`` of TGDPO with that guide; the guide's is ``guide`` in it."""
        return self.directory(split) / guide

    def evaluation(self, split: int, guide: str) -> Path:
        """Of reference, guide and policy on the held-out pairs."""
        return self.run(split, guide) / "evaluation.json"

    def answers(self, model: str) -> Path:
        """Of a model of the first split to :data:`QUESTIONS`; ``before`` is the reference."""
        return self.directory(1) / f"answers_{model}.json"

    def prepare(self, split: int) -> None:
        """Draws the split's pairs, with a seed of its own.

        Raises:
            UserError: The file has fewer pairs than are asked for, or cannot be read.
        """
        settings, here = self.settings, self.directory(split)
        if (here / "heldout.jsonl").exists():
            return
        kind = detect_format(settings.pairs)
        records = list(read_records(settings.pairs, kind))
        wanted = settings.train + settings.held_out
        if len(records) < wanted:
            raise UserError(f"{settings.pairs}: has {len(records)} pairs, not {wanted}: lower --train or --held-out")
        Random(f"split {split}").shuffle(records)
        here.mkdir(parents=True, exist_ok=True)
        parts = {"train": records[: settings.train], "heldout": records[settings.train : wanted]}
        options = PreprocessOptions(settings.model)
        for name, part in parts.items():
            decoded = (_decoded(one, kind, where(settings.pairs, kind, one.number), options) for one in part)
            write_atomically(here / f"{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in decoded))

    def trainings(self, split: int) -> list[Step]:
        """Those of a split."""
        return [self._training(split, guide) for guide in GUIDES]

    def illustrations(self) -> Iterator[Step]:
        """What is shown of the first split, when it is trained: token reports and answers."""
        for guide in GUIDES:
            yield self._token_report(guide)
        yield self._sample("before", self.settings.model)
        for guide in GUIDES:
            yield self._sample(guide, self.run(1, guide) / "guide")
            yield self._sample(f"tgdpo_{guide}", self.run(1, guide))

    def remove_weights(self, split: int) -> None:
        """Frees the disk of a split whose steps are done: gigabytes that nothing reads any more."""
        for guide in GUIDES:
            run = self.run(split, guide)
            for part in (run / "checkpoints", run / "hf", run / "guide" / "checkpoints"):
                if part.exists():
                    rmtree(part)

    def _overrides(self, split: int, guide: str) -> tuple[str, ...]:
        here = self.directory(split)
        return (
            f"model.policy={self.settings.model}", f"data.train={here / 'train.jsonl'}",
            f"data.test={here / 'heldout.jsonl'}", f"train.seed={split}", f"guide.method={guide}",
            f"output_dir={self.run(split, guide)}", *self.settings.overrides,
        )  # fmt: skip

    def _training(self, split: int, guide: str) -> Step:
        ranks = () if self.ranks is None else ("--nproc", str(self.ranks))
        words = ("pipeline", str(CONFIG), *self._overrides(split, guide), "--prompts", "0", *ranks)
        return Step(f"split {split}: {guide} guide, TGDPO with it", words, self.evaluation(split, guide))

    def _token_report(self, guide: str) -> Step:
        out = self.directory(1) / f"report_{guide}.html"
        words = ("report", str(CONFIG), *self._overrides(1, guide), "--out", str(out), "--pairs", "16")
        return Step(f"split 1: token report of the {guide} guide", words, out)

    def _sample(self, name: str, model: Path | str) -> Step:
        out = self.answers(name)
        words = (
            "generate", "--benchmark", "alpaca_eval", "--questions", str(QUESTIONS), "--model", str(model),
            "--name", name, "--out", str(out), "--temperature", "0", "--max-new-tokens", "64",
        )  # fmt: skip
        return Step(f"split 1: answers, {name}", words, out)


def _decoded(record: Any, kind: str, place: str, options: PreprocessOptions) -> Any:
    from megatron_tgdpo.data.encode import decode_record

    return decode_record(record.payload, kind, place, options)


def default_overrides(given: Sequence[str]) -> tuple[str, ...]:
    """A user's, after the precision that this machine trains in."""
    import torch

    return (f"precision.dtype={'bf16' if torch.cuda.device_count() else 'fp32'}", *given)
