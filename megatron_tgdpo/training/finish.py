"""What a run does and says when it has made its last step: the export, and where the model is and how to use it."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tgdpo.checkpoints.adapter_directory import read_lora
from megatron_tgdpo.checkpoints.best import checkpoint_of, read_best
from megatron_tgdpo.checkpoints.listing import newest_checkpoint
from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import one_line
from megatron_tgdpo.output.directory import mark_done
from megatron_tgdpo.output.figure import FIGURE_FILE, draw, read_records
from megatron_tgdpo.setup.model_sources import model_sources
from megatron_tgdpo.storage.hub import local_path
from megatron_tgdpo.training.export import Exporter, export, export_command, export_path

logger = logging.getLogger(__name__)

_DRAWN_STEPS = 20  # the fewest that a picture shows more of than the last lines of the log


def finish(
    config: Config, exporter: Exporter | None, step: int, steps: int, guide_of: Sequence[str] | None = None
) -> None:
    """Leaves ``DONE`` after the schedule's last step, draws the metrics, exports what ``export.hf`` asks for, and logs
    where the model is. Collective over all ranks.

    Args:
        config: The run.
        exporter: Writes HF directories; not needed with ``export.hf: none``.
        step: The last step that is done and saved.
        steps: Of the whole run; more than ``step`` where it ends with ``train.exit_step``.
        guide_of: Of the training of a guide: what the user gave ``tgdpo`` for the TGDPO run, the config first.

    Raises:
        AgreedError: On every rank: the export failed, or a checkpoint cannot be read. The run itself is whole.
    """
    output_dir, done = Path(config.output_dir), step >= steps
    if done:
        raise_on_all_ranks(lambda: mark_done(output_dir, step) if dist.get_rank() == 0 else None)
    found = [raise_on_all_ranks(lambda: _checkpoints(output_dir) if dist.get_rank() == 0 else (None, None, ""))]
    dist.broadcast_object_list(found, src=0)
    newest, best, best_by = found[0]
    exported = None
    if newest is None:
        return
    if done and dist.get_rank() == 0:
        draw_metrics(output_dir)
    chosen = best if config.export.hf == "best" else newest
    if done and config.export.hf != "none" and exporter is not None and chosen is not None:
        verify, kind = config.checkpoint.verify, config.export_kind
        exported = export(exporter, output_dir, chosen, verify=verify, kind=kind)
    if dist.get_rank() == 0:
        if config.export.hf == "best" and best is None:
            logger.warning("export.hf is best, but there is no best checkpoint: nothing is exported")
        logger.info("the model: %s", newest)
        if best is not None:
            logger.info("the best model, %s: %s", best_by, best)
        used = chosen or newest
        # Shorter, and the same while nothing is trained on.
        run = output_dir if used == newest else output_dir / "best"
        for line in _uses(config, used, run, exported) if guide_of is None else _uses_of_guide(guide_of):
            logger.info("%s", line)


def draw_metrics(output_dir: Path) -> None:
    """The run's picture, if it has steps enough. Never fails: a picture is not worth a run."""
    out = output_dir / FIGURE_FILE
    try:
        records = read_records(output_dir)
        if len(records) < _DRAWN_STEPS:
            logger.info(
                "%s is drawn of %d steps and more; of these %d: tgdpo plot %s",
                FIGURE_FILE, _DRAWN_STEPS, len(records), shlex.quote(str(output_dir)),
            )  # fmt: skip
            return
        draw({output_dir.resolve().name: records}, out)
    except Exception as error:
        logger.warning("%s is not drawn: %s", out, one_line(error))
    else:
        logger.info("the course of the run: %s", out)


def _checkpoints(output_dir: Path) -> tuple[Path | None, Path | None, str]:
    """The newest checkpoint, and the best one with what makes it that."""
    best = read_best(output_dir)
    path = None if best is None else checkpoint_of(output_dir, best)
    return newest_checkpoint(output_dir), path, "" if best is None else f"by {best.metric} {best.value:.4g}"


def _uses(config: Config, checkpoint: Path, run: Path, exported: Path | None) -> list[str]:
    """What to type next, a line each; ``run`` names the checkpoint, too."""
    output_dir = Path(config.output_dir)
    name = output_dir.resolve().name
    out = export_path(output_dir, checkpoint)
    kind = config.export_kind
    if kind == "adapter":
        lines = _uses_of_adapter(config, run, out, read_lora(checkpoint).rank, exported=exported is not None)
    elif exported is None:
        lines = [f"for transformers and vLLM: {export_command(run, out, kind)}"]
    else:
        lines = [
            f"in Python: AutoModelForCausalLM.from_pretrained({str(exported)!r})",
            f"as a server: vllm serve {shlex.quote(str(exported))}",
        ]
    # Of an adapter the run, which says what its base is.
    model = run if kind == "adapter" or exported is None else exported
    pairs = next((source.path for found in config.test_sets.values() for source in found), "HELDOUT.jsonl")
    reference = model_sources(config).get("reference")
    adapter = None if reference is None else reference.adapter
    compared = config.reference_path if adapter is None else str(adapter)
    guide = model_sources(config).get("guide")
    with_guide = guide is not None and (guide.adapter is None or is_megatron_checkpoint(guide.adapter))
    words = ["--reference", compared, "--model", f"{name}={model}"]
    words += ["--guide", str(config.model.guide)] if with_guide else []
    words += ["--pairs", str(pairs), "--max-length", str(config.data.max_length)]
    # 200 long answers of each model take hours without a GPU.
    words += [] if torch.cuda.is_available() else ["--prompts", "8", "--max-new-tokens", "64"]
    lines.append(f"compare it: tgdpo evaluate {shlex.join([*words, '--out', str(output_dir / 'evaluation.json')])}")
    lines.append(
        "answer a benchmark: tgdpo generate --benchmark alpaca_eval --questions alpaca_eval.json "
        f"--model {shlex.quote(str(model))} --name {shlex.quote(name)} --out {shlex.quote(f'{name}.json')}"
    )
    return lines


def _uses_of_guide(guide_of: Sequence[str]) -> list[str]:
    """What to type next where a guide was trained; ``guide_of`` as for :func:`finish`."""
    words, ranks = shlex.join(guide_of), dist.get_world_size()
    processes = shlex.join([*(["--nproc", str(ranks)] if ranks > 1 else []), *guide_of])
    return [
        f"see what it rewards: tgdpo report {words} --out report.html",
        f"train with it: tgdpo train {processes}",
    ]


def _uses_of_adapter(config: Config, run: Path, out: Path, rank: int, *, exported: bool) -> list[str]:
    """How an adapter is used, and how it becomes a whole model."""
    if exported:
        name, base = Path(config.output_dir).resolve().name, local_path(config.model.policy)
        # vLLM takes few numbers: from 8 on these powers of two.
        rank = max(8, 1 << (rank - 1).bit_length())
        words = ["vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", str(rank)]
        lines = [f"the adapter: {out}"]
        if not is_megatron_checkpoint(base):
            lines = [
                f"in Python, with peft: AutoPeftModelForCausalLM.from_pretrained({str(out)!r})",
                f"as a server: {shlex.join([*words, '--lora-modules', f'{name}={out}'])}",
            ]
    else:
        lines = [f"the adapter for peft and vLLM: {export_command(run, out, 'adapter')}"]
    whole = out.with_name(f"{out.name}-merged")
    return [*lines, f"a whole model of it: {export_command(run, whole, 'merged')}"]
