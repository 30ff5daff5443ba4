"""A Megatron-Core language model from an HF config, on either layer spec.

Legend: S tokens of this context-parallel rank's part of the pack, S_local = S / tp under sequence parallelism (else S),
H hidden, V padded vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from transformers import PretrainedConfig

from megatron_tgdpo.batching.packed_sequence import PackedSequence
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.models.config import LanguageModelConfig, transformer_config_kwargs
from megatron_tgdpo.models.embedding import RowGradientEmbedding
from megatron_tgdpo.models.experts import prepare_experts
from megatron_tgdpo.models.fp8_tensors import load_without, without_content
from megatron_tgdpo.models.hf_config import padded_vocab_size
from megatron_tgdpo.models.layer_spec import local_block_spec
from megatron_tgdpo.models.rotary import RotaryFrequencies

# Makes a chunk from the config and its layers, counted from 0 through the model.
BlockSpec = Callable[[LanguageModelConfig, Sequence[int]], TransformerBlockSubmodules]


class LanguageModel(GPTModel):
    """This rank's slice of a language model: embedding, decoder layers, final norm and output weight, without logits.

    With the interleaved schedule a rank has several, its chunks; the first chunk of the first stage has the embedding,
    the last chunk of the last stage the final norm and the output weight.

    Attributes:
        true_vocab_size: The vocabulary of the HF model; columns beyond it are padding and must not enter a log-prob.
        padded_vocab_size: V, over all tensor-parallel ranks.
        logit_softcap: c of logits = c * tanh(hidden @ weight / c), None for no cap; whoever makes logits applies it.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        block: TransformerBlockSubmodules,
        hf_config: PretrainedConfig,
        pg: ProcessGroupCollection,
        device: torch.device,
        chunk: int,
    ) -> None:
        vocabulary = padded_vocab_size(hf_config, config.tensor_model_parallel_size)
        chunks = config.virtual_pipeline_model_parallel_size
        super().__init__(
            config=config,
            transformer_layer_spec=block,
            vocab_size=vocabulary,
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=pg.pp.rank() == 0 and chunk == 0,
            post_process=pg.pp.rank() == pg.pp.size() - 1 and chunk == (chunks or 1) - 1,
            share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
            # megatron-core would build rotary embeddings of its own; ours are gathered by position id.
            position_embedding_type="none",
            pg_collection=pg,
            vp_stage=None if chunks is None else chunk,
        )
        self.true_vocab_size: int = hf_config.vocab_size
        self.padded_vocab_size: int = vocabulary
        self.logit_softcap = config.final_logit_softcapping
        self._embedding_scale = config.embedding_scale
        if config.embedding_scale_rounded:
            self._embedding_scale = float(torch.tensor(config.embedding_scale).to(config.params_dtype))
        if self.pre_process and device.type == "cpu":
            self.embedding.word_embeddings = RowGradientEmbedding.in_place_of(self.embedding.word_embeddings)
        self.rotary = RotaryFrequencies(hf_config, device, interleaved=config.rotary_interleaved)
        _mark_tensor_parallel(self)

    def forward(self, tokens: Tensor, position_ids: Tensor, packing: PackedSequence) -> Tensor:  # type: ignore[override]
        """Runs this stage; on every stage but the first the input is what ``set_input_tensor`` was given.

        Args:
            tokens: [1, S] int64; read on the first stage only.
            position_ids: [1, S] int64, counted from 0 in each sequence; needed on every stage.
            packing: Which tokens attend to which; needed on every stage.

        Returns:
            [S_local, 1, H] hidden states, after the final norm on the last stage, times the logits' factor.
        """
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids=tokens, position_ids=position_ids)
            if self._embedding_scale != 1.0:
                embedded = embedded * self._embedding_scale
            if self.config.adapters and self.config.recompute_granularity and torch.is_grad_enabled():
                # What is recomputed has gradients of its weights only if its input has one.
                embedded = embedded.detach().requires_grad_()
        result: Tensor = self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=self.rotary(position_ids),
            packed_seq_params=packing,
        )
        return result * self.config.logit_scale if self.post_process and self.config.logit_scale != 1.0 else result

    def sharded_state_dict(  # type: ignore[override]
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As megatron-core's, with names and shapes that do not depend on the layer spec; FP8 weights are in FP8.

        Adapters have a state of their own (``models/lora.py: adapter_state``).
        """
        return without_content(super().sharded_state_dict(prefix, sharded_offsets, metadata))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        """Takes a state that :meth:`sharded_state_dict` asked for, from a checkpoint of either layer spec."""
        if not strict or assign:
            raise NotImplementedError("only strict copies")
        load_without(self, state_dict)

    def output_weight(self) -> Tensor:
        """The output projection [V / tp, H] of this rank; the embedding's own weight if tied on a single stage.

        Raises:
            ValueError: Called on a stage that is not the last.
        """
        if not self.post_process:
            raise ValueError("only the last pipeline stage has an output weight")
        weight = self.output_layer.weight
        result: Tensor = self.embedding.word_embeddings.weight if weight is None else weight
        return result


def _mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Marks sharded weights, as megatron-core's initialisation would.

    Without the mark the gradient norm would count the shards of tensor rank 0 only (``clip_grads.py``).
    """
    dimensions = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        for kind, dimension in dimensions.items():
            weight = getattr(module, "weight", None) if isinstance(module, kind) else None
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, dimension, getattr(module, "stride", 1))


def build_language_model(
    hf_config: PretrainedConfig,
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    *,
    dtype: torch.dtype,
    device: torch.device,
    transformer_overrides: Mapping[str, Any] | None = None,
    block_spec: BlockSpec = local_block_spec,
    chunk: int = 0,
) -> LanguageModel:
    """Builds this rank's slice with uninitialised weights: load a checkpoint into it before use.

    Collective over all ranks of the layout (tied embeddings over more than one stage use the embedding group).

    Args:
        hf_config: From :func:`read_hf_config`.
        layout: The parallel layout, already initialised (``init_model_parallel``), with this model's layers first
            (``layout.of_model``).
        pg: Its process groups.
        dtype: Of parameters and activations.
        device: CPU needs the CPU backend (``enable_cpu_backend``).
        transformer_overrides: Extra or different arguments of LanguageModelConfig, e.g. recomputation.
        block_spec: Makes one chunk's layers from the config and their numbers.
        chunk: Which of the stage's ``layout.virtual`` chunks.

    Raises:
        UserError: The model does not divide by the layout, or its config is not supported.
    """
    kwargs = transformer_config_kwargs(hf_config, layout, dtype=dtype, device=device, overrides=transformer_overrides)
    config = LanguageModelConfig(**kwargs)
    sizes, part = layout.part_layers(config.num_layers), chunk * layout.pipeline + pg.pp.rank()
    first = sum(sizes[:part])
    layers = range(first, first + sizes[part])
    model = LanguageModel(config, block_spec(config, layers), hf_config, pg, device, chunk)
    prepare_experts(model, layout, device)
    return model
