"""The choices on a command line, and the models and pairs that follow from them."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tgdpo.config.loading import to_yaml
from megatron_tgdpo.distributed.cpu_backend import resolve_device
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.dtypes import DTYPES
from tools.benchmarks.training_step.measure import run_tool
from tools.benchmarks.training_step.models import SHAPES, ParameterCount, llama_config, write_adapter, write_model
from tools.benchmarks.training_step.our_step import our_config
from tools.benchmarks.training_step.preference_pairs import Pairs
from tools.benchmarks.training_step.problem import Problem


@dataclass(frozen=True)
class Settings:
    """Of the models and of the machine.

    Attributes:
        size: Name of the model's shape.
        vocabulary: Its vocabulary.
        tied: Whether the output weight is the embedding.
        global_pairs: Pairs of a step.
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32`` or ``bf16``.
        threads: Of each process.
    """

    size: str
    vocabulary: int
    tied: bool
    global_pairs: int
    device: str
    dtype: str
    threads: int

    @classmethod
    def from_arguments(cls, given: argparse.Namespace) -> "Settings":
        """Fills in what depends on the machine.

        Raises:
            UserError: The device is not there.
        """
        device = resolve_device(given.device).type
        dtype = given.dtype or ("bf16" if device == "cuda" else "fp32")
        return cls(given.size, given.vocabulary, given.tied, given.global_pairs, device, dtype, given.threads)


def write_models(directory: Path, settings: Settings, max_length: int) -> ParameterCount:
    """Writes ``policy`` and ``guide``, which differ in their seed, and adapters; returns the policy's parameters."""
    config = llama_config(SHAPES[settings.size], settings.vocabulary, tied=settings.tied, max_length=max_length)
    counts = [
        write_model(directory / role, config, dtype=DTYPES[settings.dtype], seed=seed)
        for seed, role in enumerate(("policy", "guide"))
    ]
    for seed, role in enumerate(("adapter", "guide_adapter")):
        write_adapter(directory / role, directory / "policy", seed)
    return counts[0]


def make_problem(directory: Path, models: Path, pairs: Pairs, settings: Settings) -> Problem:
    """The problem of these models and pairs, which make whole steps, in a directory of its own.

    Raises:
        UserError: The pairs hold a token id that the models do not have.
    """
    manifest = pairs.dataset.manifest
    if manifest["max_token_id"] >= settings.vocabulary:
        raise UserError(
            f"--vocabulary is {settings.vocabulary} and the pairs hold token id {manifest['max_token_id']}: raise it"
        )
    return Problem(
        directory=str(directory),
        policy=str(models / "policy"),
        guide=str(models / "guide"),
        adapter=str(models / "adapter"),
        guide_adapter=str(models / "guide_adapter"),
        data=pairs.dataset.prefix,
        tokenizer=pairs.tokenizer,
        max_length=manifest["options"]["max_length"],
        pairs=len(pairs.dataset),
        global_pairs=settings.global_pairs,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
    )


def fill_cache(problem: Problem) -> None:
    """Runs ``tgdpo.guidance`` for a problem."""
    path = Path(problem.directory) / "precompute.yaml"
    path.write_text(to_yaml(our_config(problem, guided=True, mode="colocated")), encoding="utf-8")
    run_tool("tgdpo.guidance", [str(path)], problem)


def describe_model(settings: Settings, parameters: ParameterCount) -> str:
    """One line on the policy."""
    tied = "tied" if settings.tied else "untied"
    return (
        f"Llama {settings.size}, vocabulary {settings.vocabulary:,} ({tied}): {parameters.layers / 1e6:.1f}M "
        f"parameters without embeddings, {parameters.total / 1e6:.1f}M with them; {settings.dtype} on "
        f"{settings.device}, {settings.threads} threads, torch {torch.__version__}"
    )
