"""Fills a model's LoRA adapters from whole tensors by their names in ``peft``."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_tgdpo.models.hf_weights.adapter_layout import of_expert, peft_name
from megatron_tgdpo.models.hf_weights.mapping import Heads, qkv_runs
from megatron_tgdpo.models.language_model import LanguageModel
from megatron_tgdpo.models.lora import ExpertAdapter, LoraAdapter, adapters_of


@torch.no_grad()
def fill_adapter(model: LanguageModel, name: str, tensors: Mapping[str, Tensor], hf_config: PretrainedConfig) -> None:
    """Sets this rank's part of an adapter from whole tensors by their names in ``peft``."""
    heads, rank, expert_rank = Heads.of(hf_config), model.pg_collection.tp.rank(), model.pg_collection.expt_tp.rank()
    for layer, adapter in adapters_of(model, name):
        if isinstance(adapter, ExpertAdapter):
            (part,) = adapter.fused.parts
            key = peft_name(adapter.fused, part, layer, adapter.lora)
            a, b = of_expert(tensors, key, adapter.fused.experts, adapter.expert)
            _fill_expert(adapter, a, b, expert_rank)
            continue
        for number, part in enumerate(adapter.fused.parts):
            key = part.format(layer=layer)
            if f"{key}.lora_A.weight" in tensors:
                a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
                _fill(adapter, number, a, b, heads, rank)


def _fill_expert(adapter: ExpertAdapter, a: Tensor, b: Tensor, rank: int) -> None:
    if adapter.fused.row_parallel:
        columns = adapter.a.shape[1]
        adapter.a.copy_(a[:, rank * columns : (rank + 1) * columns])
        adapter.b.copy_(b)
        return
    adapter.a.copy_(a)
    rows = adapter.b.shape[1]
    for ours, theirs in zip(adapter.b, b.chunk(2), strict=True):
        ours.copy_(theirs[rank * rows : (rank + 1) * rows])


def _fill(adapter: LoraAdapter, part: int, a: Tensor, b: Tensor, heads: Heads, rank: int) -> None:
    ours = adapter.a[part]
    adapter.a[part].copy_(a[:, rank * ours.shape[1] : (rank + 1) * ours.shape[1]] if adapter.fused.row_parallel else a)
    match adapter.fused.kind:
        case "glu":
            rows = adapter.b.shape[1]
            adapter.b[part].copy_(b[rank * rows : (rank + 1) * rows])
        case "fused_glu":
            rows = adapter.b.shape[1]
            for ours, theirs in zip(adapter.b, b.chunk(2), strict=True):
                ours.copy_(theirs[rank * rows : (rank + 1) * rows])
        case "qkv" | "fused_qkv":
            rows, position = adapter.b.shape[0], 0
            # A tensor of all three has the rows of query, key and value one after another.
            whole = dict(enumerate(b.split(heads.rows))) if adapter.fused.kind == "fused_qkv" else {part: b}
            for owner, start, end in qkv_runs(rank * rows, (rank + 1) * rows, heads):
                if owner in whole:
                    adapter.b[position : position + end - start].copy_(whole[owner][start:end])
                position += end - start
        case "column":
            rows = adapter.b.shape[0]
            adapter.b.copy_(b[rank * rows : (rank + 1) * rows])
        case _:
            adapter.b.copy_(b)
