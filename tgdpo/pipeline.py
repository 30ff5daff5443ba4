"""Runs a config from the guide to the evaluation: each stage a process of its own, those that are finished skipped.

    tgdpo pipeline CONFIG.yaml [--nproc N] [--prompts N] [section.key=value ...]

    guide      where section guide has one trained: tgdpo train --guide
    guidance   where guidance.mode is cached: tgdpo guidance
    train      tgdpo train
    export     the trained policy as an HF directory in output_dir/hf, where export.hf has not had training write it: of
               the last checkpoint, or with export.hf=best of the best one: tgdpo convert to-hf; of a LoRA run as a
               whole model (export.merge)
    evaluate   policy and guide against the reference on data.test, or without it data.validation,
               output_dir/evaluation.json: tgdpo evaluate; a guide that is a PEFT directory is left out

Start the same command again to continue after an interruption. Ctrl-C, TERM or USR1 has the stage that runs save and
end. A stage whose inputs have changed since says so, or is made again where nothing is lost by that. On Slurm:
launch/pipeline.sh.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tgdpo import console
from megatron_tgdpo.errors import UserError
from tgdpo.child_processes import Commands
from tgdpo.command_line import check_ranks, not_negative, positive

if TYPE_CHECKING:
    from megatron_tgdpo.config.schema import ParallelConfig
    from megatron_tgdpo.setup.model_sources import ModelSource

# In the output directory: of stages that leave no record of their inputs themselves, a digest of these.
RECORD_FILE = "pipeline.json"
LOCK_FILE = "pipeline_running.json"


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: As in the module's table.
        arguments: The words after ``tgdpo``, once the stages before it are complete.
        is_complete: Whether it need not run; raises a UserError where it must not.
        launches_ranks: Whether it runs on all ranks.
        inputs: A digest of what goes into it, to be recorded when it is complete; None where its command does that.
    """

    name: str
    arguments: Callable[[], list[str]]
    is_complete: Callable[[], bool]
    launches_ranks: bool = False
    inputs: Callable[[], str] | None = None


class Pipeline:
    """The stages of a config.

    Args:
        file: The YAML file.
        overrides: Of it, for every stage.
        sampling: Further words for ``tgdpo evaluate``.

    Raises:
        UserError: The config is wrong.
    """

    def __init__(self, file: str, overrides: Sequence[str], sampling: Sequence[str] = ()) -> None:
        from megatron_tgdpo.config.loading import load_config

        self.config = load_config(file, overrides)
        self.output_dir = Path(self.config.output_dir)
        self._run = [file, *overrides]
        if self.config.lora.trains:
            # What follows the training takes whole models.
            self._run.append("export.merge=true")
            self.config = load_config(file, self._run[1:])
        self._sampling = list(sampling)
        for source in (source for found in self.config.test_sets.values() for source in found):
            # Training does not read it, and would not miss it for hours.
            if self.config.data.test is not None and not _is_there(source.path):
                raise UserError(f"data.test {source.path}: no such file, nor a preprocessed dataset")

    def stages(self) -> list[Stage]:
        """In their order."""
        config = self.config
        found = []
        if config.guide.method is not None:
            found.append(Stage("guide", lambda: ["train", "--guide", *self._run], self._has_guide, launches_ranks=True))
        if config.guidance.mode == "cached":
            found.append(Stage("guidance", lambda: ["guidance", *self._run], self._has_cache, launches_ranks=True))
        found.append(Stage("train", lambda: ["train", *self._run], self._is_trained, launches_ranks=True))
        found.append(Stage("export", self._export, self._is_exported))
        found += [self._evaluation(name, path) for name, path in self._test_files().items()]
        return found

    def record(self, stage: Stage) -> None:
        """Notes what went into a stage that is complete."""
        from megatron_tgdpo.storage.atomic_file import write_atomically

        if stage.inputs is not None:
            content = {**self._recorded(), stage.name: stage.inputs()}
            write_atomically(self.output_dir / RECORD_FILE, json.dumps(content, indent=2) + "\n")

    def _recorded(self) -> dict[str, Any]:
        from megatron_tgdpo.storage.files import read_error
        from megatron_tgdpo.storage.json_text import parse_json

        file = self.output_dir / RECORD_FILE
        try:
            content = parse_json(file.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise read_error(file, error) from error
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{file}: not readable: remove it, and evaluation*.json")
        return content

    def _is_trained(self) -> bool:
        # Before the imports, which take seconds.
        if not self.output_dir.exists():
            return False
        from megatron_tgdpo.output.directory import is_done
        from megatron_tgdpo.setup.hub_inputs import as_recorded

        return is_done(as_recorded(self.config))

    def _has_guide(self) -> bool:
        if not Path(self.config.guide_dir).exists():
            return self._is_trained()
        from megatron_tgdpo.setup.trained_guide import check_trained, is_trained

        if is_trained(self.config):
            check_trained(self.config)
            return True
        return self._is_trained()

    def _has_cache(self) -> bool:
        cache = Path(str(self.config.guidance.cache))
        if not cache.exists():
            return self._is_trained()
        from megatron_tgdpo.guidance.cache import MANIFEST_FILE

        # Whether it is of these models and data, training checks.
        return all((cache / name / MANIFEST_FILE).exists() for name in self.config.datasets) or self._is_trained()

    def _checkpoint(self) -> Path:
        from megatron_tgdpo.checkpoints.find_model import find_local_model
        from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint

        best = self.config.export.hf == "best"
        where = self.output_dir / "best" if best else self.output_dir
        checkpoint = find_local_model(where, "output_dir", adapter=self.config.lora.trains)
        if not is_megatron_checkpoint(checkpoint):
            raise UserError(f"output_dir {self.output_dir}: holds an HF model: name another directory for the run")
        return checkpoint

    def hf(self) -> Path:
        """The HF directory of the trained policy."""
        from megatron_tgdpo.training.export import export_path

        return export_path(self.output_dir, self._checkpoint())

    def _export(self) -> list[str]:
        if not self._is_trained():
            raise UserError(f"{self.output_dir}: the training is not finished, so that there is nothing to export yet")
        words = ["convert", "to-hf", "--megatron", str(self._checkpoint()), "--out", str(self.hf())]
        return words + (["--merge"] if self.config.export_kind == "merged" else [])

    def _is_exported(self) -> bool:
        if not self._is_trained():
            return False
        from megatron_tgdpo.training.export import is_current

        out = self.hf()
        if out.exists() and not is_current(out, self._checkpoint(), self.config.export_kind):
            whole = " as a whole model" if self.config.export_kind == "merged" else ""
            raise UserError(f"{out}: not an export of {self._checkpoint()}{whole}: remove it, or move it, to have one")
        return out.exists()

    def _test_files(self) -> dict[str, str]:
        """Sets to evaluate on that are one file each, or one preprocessed dataset; none without a whole reference."""
        if self._begins_with_adapter():
            return {}
        sets = self.config.test_sets.items()
        return {name: s[0].path for name, s in sets if len(s) == 1 and not (s[0].split or s[0].subset)}

    def _begins_with_adapter(self) -> bool:
        """Whether the reference is the policy's beginning, and that no whole model."""
        config = self.config
        return "reference" in config.method.frozen and config.model.reference is None and bool(config.lora.adapter)

    def left_out(self) -> list[str]:
        """Sets that are not evaluated, by name, with the reason."""
        reason = "several files or a split, not evaluated: tgdpo evaluate takes one file, or preprocessed data"
        if self._begins_with_adapter():
            reason = (
                "not evaluated: the reference is lora.adapter on its base: tgdpo evaluate takes that as --reference"
            )
        key = "data.validation" if self.config.data.test is None else "data.test"
        names = [name for name in self.config.test_sets if name not in self._test_files()]
        return [f"{name or key}: {reason}" for name in names]

    def chosen_by(self) -> str | None:
        """The metric that chose the evaluated checkpoint, if the pairs that it is evaluated on are those of that."""
        config = self.config
        return config.checkpoint.best_metric if config.export.hf == "best" and config.data.test is None else None

    def _evaluation(self, name: str, pairs: str) -> Stage:
        out = self.output_dir / f"evaluation{f'_{name}' if name else ''}.json"

        def arguments() -> list[str]:
            from megatron_tgdpo.setup.hub_inputs import as_recorded
            from megatron_tgdpo.setup.model_sources import model_sources

            config = as_recorded(self.config)
            data, guide = config.data, model_sources(config).get("guide")
            options = {
                "--reference": config.reference_path,
                "--model": f"{config.loss.method}={self.hf()}",
                "--guide": _that_runs(guide),
                "--pairs": pairs,
                "--out": str(out),
                "--beta": config.loss.beta,
                "--max-length": data.max_length,
                "--max-prompt-length": data.max_prompt_length,
                "--overlong-prompt": data.overlong_prompt,
                "--chat-template": data.chat_template,
                "--template-kwargs": json.dumps(data.template_kwargs) if data.template_kwargs else None,
                "--columns": json.dumps(data.columns) if data.columns else None,
            }
            given = [word for option, value in options.items() if value is not None for word in (option, str(value))]
            return ["evaluate", *given, *self._sampling]

        def inputs() -> str:
            from megatron_tgdpo.checkpoints.manifest import METADATA_FILE

            file = Path(pairs)
            state = [file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else []
            made_of = sha256((self._checkpoint() / METADATA_FILE).read_bytes()).hexdigest()
            return sha256(json.dumps([made_of, arguments(), state]).encode()).hexdigest()

        stage = f"evaluate/{name}" if name else "evaluate"

        def is_complete() -> bool:
            # A table of other models or pairs is made again: it costs no more than the first.
            return out.exists() and self._is_exported() and self._recorded().get(stage) == inputs()

        return Stage(stage, arguments, is_complete, inputs=inputs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module. Exit status: 0, that of the stage that failed, or 75 where it was asked to stop."""
    parser = argparse.ArgumentParser(
        prog="tgdpo pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all stages")
    parser.add_argument(
        "--nproc", type=positive, metavar="N", help="ranks on this machine; default: as many as GPUs, or 1"
    )
    parser.add_argument(
        "--prompts", type=not_negative, help="prompts that evaluate has answered (default 200); 0: none"
    )
    parser.add_argument("--max-new-tokens", type=positive, help="limit of such an answer (default 512)")
    parser.add_argument("--only", metavar="STAGE", help="run this stage alone, if it is not complete")
    parser.add_argument("--list", action="store_true", help="say which stages are complete, and run none")
    args = parser.parse_intermixed_args(arguments)
    console.configure()
    try:
        _main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _main(args: argparse.Namespace) -> None:
    options = {"--prompts": args.prompts, "--max-new-tokens": args.max_new_tokens}
    sampling = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    pipeline = Pipeline(args.config, args.overrides, sampling)
    stages = pipeline.stages()
    if args.list:
        print(f"output_dir\t{pipeline.output_dir.absolute()}")
        for stage in stages:
            print(f"{stage.name}\t{'complete' if stage.is_complete() else 'to do'}")
        return
    if args.only is not None:
        stages = [stage for stage in stages if stage.name == args.only]
        if not stages:
            names = ", ".join(stage.name for stage in pipeline.stages())
            raise UserError(f"--only {args.only}: {args.config} has no such stage: choose one of {names}")
    # Before the first runs for hours: what the last would refuse now.
    for stage in stages:
        stage.is_complete()
    from megatron_tgdpo.resilience.run_lock import RunLock

    lock = None
    with Commands() as commands, ExitStack() as stack:
        for number, stage in enumerate(stages, start=1):
            title = f"=== {number}/{len(stages)} {stage.name}"
            if stage.is_complete():
                print(f"{title}: complete, skipped", flush=True)
                continue
            words = _command(stage, args, pipeline.config.parallel)
            if lock is None:
                lock = RunLock(pipeline.output_dir, name=LOCK_FILE)
                lock.acquire()
                stack.callback(lock.release)
            print(f"{title}\n{shlex.join(['tgdpo', *words])}", flush=True)
            status = commands.run([sys.executable, "-m", "tgdpo", *words])
            if commands.asked and status:
                print("asked to stop; start the same command again to continue", file=sys.stderr)
            if status:
                sys.exit(status)
            pipeline.record(stage)
            if not stage.is_complete():
                raise UserError(f"{stage.name}: ended before its end, as with train.exit_step: the rest is not begun")
    if (metric := pipeline.chosen_by()) is not None:
        print(
            f"the checkpoint was chosen by {metric} on data.validation, on which it was evaluated, too: the figures "
            "flatter it; set data.test to pairs that chose nothing"
        )
    for line in pipeline.left_out():
        print(line)
    if args.only is None:
        print(f"aligned model (HF): {pipeline.hf()}")


def _that_runs(source: "ModelSource | None") -> Path | None:
    """A model that evaluate takes: a whole one, or a checkpoint of a LoRA run; None for others."""
    from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint

    if source is None or source.adapter is None:
        return None if source is None else source.base
    return source.adapter if is_megatron_checkpoint(source.adapter) else None


def _is_there(path: str) -> bool:
    from megatron_tgdpo.data.dataset import prepared_prefix
    from megatron_tgdpo.storage.hub import hub_name

    return Path(path).exists() or hub_name(path) is not None or prepared_prefix(path) is not None


def _ranks(stage: Stage, args: argparse.Namespace, parallel: "ParallelConfig") -> int:
    if not stage.launches_ranks:
        return 1
    if args.nproc is None:
        import torch

        args.nproc = max(1, torch.cuda.device_count())
    nproc: int = args.nproc
    check_ranks(parallel, nproc)
    return nproc


def _command(stage: Stage, args: argparse.Namespace, parallel: "ParallelConfig") -> list[str]:
    """The words after ``tgdpo``."""
    ranks, (name, *others) = _ranks(stage, args, parallel), stage.arguments()
    return [name, *(["--nproc", str(ranks)] if ranks > 1 else []), *others]


if __name__ == "__main__":
    main()
