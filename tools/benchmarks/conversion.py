"""Time and peak memory of converting a model both ways, beside transformers' load and save and a plain file copy.

    python -m tools.benchmarks.conversion [--directory DIR] [--layers 10] [--dtype fp32|bf16] [--runs 2]
    python -m tools.benchmarks.conversion --bounded          two sizes, the same layers: the peaks must not differ
    python -m tools.benchmarks.conversion --experts 128      a layer of experts beside dense ones: seconds a byte

A random Llama (with experts a Qwen3-MoE as well) is made in a scratch directory and removed afterwards. Every
measurement is a process of its own. Its time is the whole process's and, as "work", without imports; its peak memory is
what it needs beyond a process that only imports. ``transformers`` and ``copy`` are measured as they are, and with a
sync of what they wrote: a conversion always syncs.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from checkpoints_convert.safetensors_file import SafetensorsFile
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import global_parameters
from megatron_tgdpo.storage.dtypes import DTYPES
from tgdpo.child_processes import run_captured

_Tensor = tuple[str, tuple[int, ...]]
_FILE_BYTES = 5e9
# What the commands import only when they are asked for work, as transformers does a model's config class.
_IMPORTS = (
    "import transformers.models.llama.configuration_llama, transformers.models.qwen3_moe.configuration_qwen3_moe, "
    "checkpoints_convert.import_hf, checkpoints_convert.export"
)
_COMMANDS = {
    "base": _IMPORTS,
    "import": f"{_IMPORTS}; from checkpoints_convert.hf_to_megatron import main; start(); main()",
    "export": f"{_IMPORTS}; from checkpoints_convert.megatron_to_hf import main; start(); main()",
    "base transformers": "from transformers import LlamaForCausalLM",
    "transformers": "from transformers import LlamaForCausalLM; start(); "
    "LlamaForCausalLM.from_pretrained(source, dtype='auto').save_pretrained(target)",
    "copy": "import shutil; start(); shutil.copytree(source, target)",
}
# Runs in the child: `start` marks the end of imports; the last line of stdout is the measurement.
_CHILD = """
import json, os, sys, time
begun = time.perf_counter()
def start():
    global begun
    begun = time.perf_counter()
source, target, synced = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1) == "synced"
{code}
if synced:
    for name in os.listdir(target):
        descriptor = os.open(os.path.join(target, name), os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
work = time.perf_counter() - begun
# Not ru_maxrss: a child begins with its parent's.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(json.dumps([work, int(peak) * 1024]))
"""


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, or a Qwen3-MoE's, whose experts have ``mlp`` columns each."""

    vocabulary: int
    hidden: int
    mlp: int
    heads: int
    groups: int
    layers: int
    experts: int = 0


@dataclass(frozen=True)
class Measurement:
    """Seconds of the whole process and without imports; ``peak`` is its largest resident set in bytes."""

    whole: float
    work: float
    peak: int


def make_model(path: Path, shape: Shape, dtype: torch.dtype) -> int:
    """Writes a random HF model a tensor at a time, and returns the bytes of its weights."""
    path.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "num_hidden_layers": shape.layers,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if shape.experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": shape.hidden // shape.heads,
            "moe_intermediate_size": shape.mlp,
            "num_experts": shape.experts,
            "num_experts_per_tok": min(8, shape.experts),
        }
    (path / "config.json").write_text(json.dumps(config))
    tensors = [tensor for parameter in global_parameters(read_hf_config(path)) for tensor in parameter.hf_tensors]
    generator, weight_map, total = torch.Generator().manual_seed(0), {}, 0
    for number, group in enumerate(_groups(tensors, dtype.itemsize), start=1):
        name = f"model-{number:05d}.safetensors"
        with SafetensorsFile(path / name, dict(group), dtype) as file:
            for tensor_name, tensor_shape in group:
                tensor = torch.empty(tensor_shape, dtype=dtype).uniform_(-0.05, 0.05, generator=generator)
                file.write_rows(tensor_name, 0, tensor)
                weight_map[tensor_name] = name
                total += tensor.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _groups(
    tensors: list[tuple[str, tuple[int, ...]]], element_size: int
) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    group: list[tuple[str, tuple[int, ...]]] = []
    used = 0
    for name, shape in tensors:
        group.append((name, shape))
        used += torch.Size(shape).numel() * element_size
        if used >= _FILE_BYTES:
            yield group
            group, used = [], 0
    if group:
        yield group


def measure(name: str, source: Path, target: Path, arguments: list[str], *, synced: bool = False) -> Measurement:
    """Runs one variant in a process of its own; ``target`` is removed first."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    code = _CHILD.format(code=_COMMANDS[name])
    started = time.perf_counter()
    done = run_captured([sys.executable, "-c", code, str(source), str(target), "synced" if synced else "", *arguments])
    whole = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr[-4000:]}")
    work, peak = json.loads(done.stdout.splitlines()[-1])
    return Measurement(whole, work, peak)


def _best(runs: list[Measurement]) -> Measurement:
    return Measurement(*(min(getattr(run, field) for run in runs) for field in ("whole", "work", "peak")))


def measure_all(directory: Path, source: Path, runs: int) -> dict[str, Measurement]:
    """All variants, each the best of ``runs``."""
    megatron, back = directory / "megatron", directory / "back"
    variants: dict[str, tuple[str, Path, Path, list[str], bool]] = {
        "base": ("base", source, back, [], False),
        "import": ("import", source, megatron, ["--hf", str(source), "--out", str(megatron)], False),
        "export": ("export", megatron, back, ["--megatron", str(megatron), "--out", str(back)], False),
        "base transformers": ("base transformers", source, back, [], False),
        "transformers": ("transformers", source, back, [], False),
        "transformers, synced": ("transformers", source, back, [], True),
        "copy": ("copy", source, back, [], False),
        "copy, synced": ("copy", source, back, [], True),
    }
    measured: dict[str, list[Measurement]] = {variant: [] for variant in variants}
    for _ in range(runs):
        # In turn, so that the state of the page cache favours none of them.
        for variant, (name, origin, target, arguments, synced) in variants.items():
            measured[variant].append(measure(name, origin, target, arguments, synced=synced))
    results = {variant: _best(runs_of_variant) for variant, runs_of_variant in measured.items()}
    for variant, best in results.items():
        print(f"{variant:>22}: whole {best.whole:7.2f} s  work {best.work:7.2f} s  peak {best.peak / 1e9:6.3f} GB")
    shutil.rmtree(back)
    return results


def report(results: dict[str, Measurement]) -> None:
    """Prints peaks above a process that only imports, and the ratios of times."""
    base, theirs = results["base"].peak, results["base transformers"].peak
    for variant in ("import", "export"):
        print(f"{variant} peak above imports: {(results[variant].peak - base) / 1e9:.3f} GB")
    print(f"transformers peak above imports: {(results['transformers'].peak - theirs) / 1e9:.3f} GB")
    for field in ("whole", "work"):
        ours = sum(getattr(results[variant], field) for variant in ("import", "export"))
        for variant in ("transformers", "transformers, synced"):
            print(f"import + export over {variant}, {field}: {ours / getattr(results[variant], field):.2f}")
    both = results["import"].work + results["export"].work
    for variant in ("copy", "copy, synced"):
        print(f"import + export over twice {variant}, work: {both / (2 * results[variant].work):.2f}")


def bounded(directory: Path, shape: Shape, dtype: torch.dtype, layer_counts: tuple[int, int]) -> None:
    """Prints the peaks of import and export for two depths."""
    for layers in layer_counts:
        source, megatron, back = (directory / f"{name}-{layers}" for name in ("hf", "megatron", "back"))
        size = make_model(source, Shape(**{**asdict(shape), "layers": layers}), dtype)
        base = measure("base", source, back, [])
        there = measure("import", source, megatron, ["--hf", str(source), "--out", str(megatron)])
        again = measure("export", megatron, back, ["--megatron", str(megatron), "--out", str(back)])
        peaks = [(run.peak - base.peak) / 1e9 for run in (there, again)]
        print(f"{size / 1e9:.2f} GB: peak above imports {peaks[0]:.3f} GB import, {peaks[1]:.3f} GB export")
        for path in (source, megatron, back):
            shutil.rmtree(path)


def beside_dense(directory: Path, shape: Shape, dtype: torch.dtype, experts: int, expert_mlp: int, runs: int) -> None:
    """Prints seconds a GB of a model with one layer of experts, and of a dense one whose MLPs have as many bytes."""
    shapes = {
        "dense": replace(shape, layers=max(1, round(experts * expert_mlp / shape.mlp))),
        "experts": replace(shape, layers=1, mlp=expert_mlp, experts=experts),
    }
    sizes = {name: make_model(directory / name, each, dtype) for name, each in shapes.items()}
    work: dict[tuple[str, str], list[float]] = {}
    for _ in range(runs):
        # In turn, so that another load of the machine favours neither.
        for name in shapes:
            source, megatron, back = directory / name, directory / "megatron", directory / "back"
            there = measure("import", source, megatron, ["--hf", str(source), "--out", str(megatron)])
            again = measure("export", megatron, back, ["--megatron", str(megatron), "--out", str(back)])
            work.setdefault((name, "import"), []).append(there.work)
            work.setdefault((name, "export"), []).append(again.work)
    for name, each in shapes.items():
        print(f"{name:>8}: {sizes[name] / 1e9:.2f} GB, {each}")
    for way in ("import", "export"):
        dense, sparse = (min(work[name, way]) / sizes[name] * 1e9 for name in shapes)
        print(f"{way}: dense {dense:.2f} s/GB, experts {sparse:.2f} s/GB, ratio {sparse / dense:.2f}")


def main() -> None:
    """Runs the measurements and prints them."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.conversion", description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, help="on the disk to measure (default: the system's for temporaries)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--runs", type=int, default=2, help="of which the best counts")
    parser.add_argument("--bounded", action="store_true", help="compare the peaks of two depths instead")
    parser.add_argument("--bounded-layers", type=int, nargs=2, default=(2, 19), metavar=("FEW", "MANY"))
    parser.add_argument("--expert-mlp", type=int, default=768, help="columns of an expert")
    for name, value in asdict(Shape(32000, 2048, 5632, 32, 8, 9)).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    shape = Shape(**{name: getattr(arguments, name) for name in Shape.__dataclass_fields__})
    dtype = DTYPES[arguments.dtype]
    if arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        directory = Path(scratch)
        if arguments.bounded:
            bounded(directory, shape, dtype, tuple(arguments.bounded_layers))
            return
        if shape.experts:
            dense = replace(shape, experts=0)
            beside_dense(directory, dense, dtype, shape.experts, arguments.expert_mlp, arguments.runs)
            return
        size = make_model(directory / "hf", shape, dtype)
        print(f"{size / 1e9:.2f} GB in {arguments.dtype}: {shape}")
        report(measure_all(directory, directory / "hf", arguments.runs))


if __name__ == "__main__":
    main()
