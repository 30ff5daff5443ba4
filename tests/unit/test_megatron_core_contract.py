"""What this project relies on in megatron-core that is private or changes between versions, and where.

A new version of megatron-core that breaks one of these fails here, by name, before it fails in a run.
"""

import ast
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.frozen.communicator import ColocatedCommunicator

ROOT = Path(__file__).parents[2]
PACKAGES = ("megatron_tgdpo", "checkpoints_convert", "tgdpo")
# Nothing is promised of these modules. Of others, names without an underscore may be imported anywhere.
FAST_MOVING = (
    "dist_checkpointing.core", "dist_checkpointing.dict_utils", "dist_checkpointing.state_dict_utils",
    "dist_checkpointing.strategies", "dist_checkpointing.utils", "dist_checkpointing.validation",
    "distributed", "extensions", "fp8_utils", "models", "optimizer", "optimizer_param_scheduler", "pipeline_parallel",
    "tensor_parallel.layers", "tensor_parallel.random", "transformer.attention", "transformer.moe",
    "transformer.transformer_block",
    "transformer.utils",
)  # fmt: skip


@dataclass(frozen=True)
class Relied:
    """A name of megatron-core.

    Attributes:
        name: Behind ``megatron.core.``; a class's method or attribute too.
        parameters: That are given to it by name or place, or, of a method that is overridden, taken by it; None for
            what is not called.
        files: The only ones that import it, below ``megatron_tgdpo/``; none for what is reached by way of objects.
        why: What it is relied on for.
    """

    name: str
    parameters: str | None
    files: str
    why: str


_SAVE, _LOAD, _FP8 = "checkpoints/save.py", "checkpoints/load.py", "models/fp8_tensors.py"
_SHARDING = "training/sharded_optimizer_state.py"
_TORCH = "dist_checkpointing.strategies.torch"
_DISTRIBUTED_OPTIMIZER = "optimizer.distrib_optimizer.DistributedOptimizer"
_SCHEDULES = "pipeline_parallel.schedules"
_RANDOM = "tensor_parallel.random"
_BUFFERS = "distributed.param_and_grad_buffer"
_EXPERTS, _EXCHANGE = "models/experts.py", "transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher"

# fmt: off
CONTRACT = [
    # Checkpoints: its save and load in this process, without its forked writers and without free unpickling.
    Relied("dist_checkpointing.core.CheckpointingException", None, _LOAD, "what its checks raise, caught"),
    Relied("dist_checkpointing.dict_utils.extract_matching_values", "x predicate", _SAVE, "tells this rank's part"),
    Relied("dist_checkpointing.dict_utils.merge", "x1 x2", _LOAD, "as its load does"),
    Relied("dist_checkpointing.dict_utils.nested_values", "x", f"{_SAVE} training/engine_state.py {_SHARDING}",
           "goes through a sharded state dict"),
    Relied("dist_checkpointing.state_dict_utils.save_preprocess", "sharded_state_dict", _SAVE,
           "applies factories, parts plain values from sharded ones, checks them over ranks"),
    Relied("dist_checkpointing.state_dict_utils.load_preprocess", "sharded_state_dict", _LOAD,
           "returns sharded state, what is not stored, factories"),
    Relied(f"{_TORCH}.MCoreLoadPlanner", "shapes_validation_sharded_tensors allow_shape_mismatch_sharded_tensors",
           _LOAD, "checks shapes against the checkpoint's"),
    Relied(f"{_TORCH}.MCoreLoadPlanner.create_local_plan", "", "", "overridden: names a missing tensor on all ranks"),
    Relied(f"{_TORCH}.MCoreLoadPlanner.load_bytes", "read_item value", "", "overridden: it unpickles freely"),
    Relied(f"{_TORCH}.MCoreSavePlanner", "dedup_replicated_tensors", _SAVE, "ranks save without duplicates"),
    Relied(f"{_TORCH}._replace_state_dict_keys_with_sharded_keys", "sharded_state_dict keep_only_main_replica",
           f"{_SAVE} {_LOAD}", "flattens a state dict to the names in a checkpoint"),
    Relied(f"{_TORCH}._replace_sharded_keys_with_state_dict_keys", "state_dict flat_mapping rename_mapping", _LOAD,
           "undoes it"),
    Relied(f"{_TORCH}._restore_dict_types", "x keys_template", _LOAD, "keys that were numbers are numbers again"),
    Relied(f"{_TORCH}._unwrap_pyt_sharded_tensor", "sh_ten", _LOAD, "the plain tensors of what DCP has filled"),
    Relied(f"{_TORCH}.mcore_to_pyt_state_dict", "state_dict is_loading", f"{_SAVE} {_LOAD}", "what DCP takes"),
    Relied("dist_checkpointing.utils.extract_sharded_base", "sharded_state_dict", _LOAD, "as its load does"),
    Relied("dist_checkpointing.utils.force_all_tensors_to_non_fp8", "sharded_state_dict", f"{_LOAD} {_FP8}",
           "FP8 becomes bf16, in place"),
    Relied("dist_checkpointing.validation.determine_global_metadata", "sharded_state_dict", _LOAD,
           "returns (this rank's, all ranks') metadata"),
    Relied("dist_checkpointing.validation.validate_sharding_integrity", "global_metadata", _LOAD,
           "every part of every tensor is asked for once"),
    # Gradients and their reduction.
    Relied("distributed.DistributedDataParallel", "config ddp_config module", "gpu/overlap.py setup/engine.py "
           "setup/optimizer.py", "gradient buffers; wraps every chunk"),
    Relied("distributed.DistributedDataParallel.start_param_sync", "force_sync", "", "gathers weights before a save"),
    Relied("distributed.DistributedDataParallel.no_sync", "", "", "given to the schedule as no_sync_func"),
    Relied("distributed.DistributedDataParallelConfig", "grad_reduce_in_fp32 overlap_grad_reduce overlap_param_gather "
           "use_distributed_optimizer bucket_size", "gpu/overlap.py", "its settings"),
    Relied("distributed.finalize_model_grads", None, "setup/models.py", "divides gradients by the global pair count"),
    # The optimizer's state, in tensors whose names do not depend on the layout.
    Relied("optimizer.Adam", None, "gpu/capabilities.py", "which of apex, Transformer Engine and torch it has chosen"),
    Relied("optimizer.clip_grads", None, "gpu/capabilities.py", "which multi-tensor kernels it has chosen"),
    Relied("optimizer.OptimizerConfig", "optimizer lr min_lr adam_beta1 adam_beta2 adam_eps weight_decay clip_grad "
           "bf16 params_dtype use_distributed_optimizer", "setup/optimizer.py", "its settings"),
    Relied("optimizer.get_megatron_optimizer", "config model_chunks use_gloo_process_groups", "setup/optimizer.py",
           "returns a chain of one DistributedOptimizer, with experts on other ranks of two"),
    Relied("optimizer.cpu_offloading.HybridDeviceOptimizer", None, _SHARDING, "tells an optimizer in host memory"),
    Relied("optimizer.cpu_offloading.HybridDeviceOptimizer._sync_hdo_state_to_sub_optimizers", "", "",
           "loaded moments reach the optimizers beneath"),
    Relied("optimizer.ChainedOptimizer", None, "setup/engine.py setup/learning_rate.py setup/optimizer.py "
           f"training/step.py {_SHARDING}", "one norm of the gradients of both optimizers"),
    Relied(_DISTRIBUTED_OPTIMIZER, None, f"setup/optimizer.py {_SHARDING}",
           "fp32 state, split over data ranks; gbuf_ranges says who owns what"),
    Relied(f"{_DISTRIBUTED_OPTIMIZER}._get_main_param_and_optimizer_states", "model_param", "",
           "fp32 weight and moments of the part that this rank owns"),
    Relied(f"{_DISTRIBUTED_OPTIMIZER}._set_main_param_and_optimizer_states", "model_param tensors", "", "sets them"),
    Relied("optimizer_param_scheduler.OptimizerParamScheduler", "optimizer init_lr max_lr min_lr lr_warmup_steps "
           "lr_decay_steps lr_decay_style start_wd end_wd wd_incr_steps wd_incr_style",
           "setup/engine.py setup/learning_rate.py", "learning rate by step"),
    # Schedules, and what travels between stages.
    Relied("pipeline_parallel.get_forward_backward_func", "pp_size vp_size", "frozen/forward_logps.py training/step.py",
           "the schedule"),
    Relied(f"{_SCHEDULES}.forward_backward_pipelining_without_interleaving", "forward_step_func data_iterator model "
           "num_microbatches seq_length micro_batch_size forward_only p2p_communicator pg_collection", "",
           "how it is called; the others take the same"),
    Relied(f"{_SCHEDULES}.forward_step_calc_loss", "output_tensor loss_func config num_microbatches", "",
           "training/forward.py derives the gradient's scale from it"),
    Relied(f"{_SCHEDULES}.get_schedule_table", "num_microbatches num_model_chunks microbatch_group_size_per_vp_stage",
           "", "order of passes of the interleaved schedule, which planning/pipeline_schedule.py repeats"),
    Relied("pipeline_parallel.p2p_communication.P2PCommunicator", "pp_group config", "frozen/communicator.py",
           "base class of ours"),
    Relied("pipeline_parallel.p2p_communication.P2PCommunicator._communicate", "tensor_send_next tensor_send_prev "
           "recv_prev recv_next tensor_shape wait_on_reqs", "", "overridden: frozen hidden states travel too"),
    # FP8.
    Relied("fp8_utils.dequantize_fp8_tensor", "fp8_tensor", _FP8, "bf16 of an FP8 weight"),
    Relied("fp8_utils.get_fp8_recipe", "config", _FP8, "makes the history before the first forward"),
    Relied("fp8_utils.is_float8tensor", "tensor", _FP8, "tells an FP8 weight"),
    Relied("fp8_utils.post_all_gather_processing", "model_params", _FP8, "transposed copies after a gather"),
    # The model.
    Relied("extensions.transformer_engine", None, "models/layer_spec_te.py", "TENorm and the fused linears; HAVE_TE"),
    Relied("models.gpt.gpt_model.GPTModel", "config transformer_layer_spec vocab_size max_sequence_length pre_process "
           "post_process share_embeddings_and_output_weights position_embedding_type",
           "models/experts.py models/language_model.py models/lora.py", "base class of ours"),
    Relied("models.gpt.gpt_layer_specs.get_gpt_layer_local_spec", "num_experts normalization qk_layernorm",
           "models/layer_spec.py", "the skeleton of both layer specs"),
    # Experts.
    Relied("transformer.moe.moe_layer.MoELayer", "config submodules layer_number pg_collection", _EXPERTS,
           "the layer; its router, experts and exchange are finished after it was built"),
    Relied("transformer.moe.router.TopKRouter", "config pg_collection", _EXPERTS, "base class of ours"),
    Relied("transformer.moe.router.TopKRouter.gating", "input", "", "overridden: logits of any PyTorch, in fp32"),
    Relied("transformer.moe.router.TopKRouter._apply_expert_bias", "routing_map", "", "overridden: it compiles"),
    Relied(_EXCHANGE, "num_local_experts local_expert_indices config pg_collection", _EXPERTS,
           "base class of the exchange without a GPU"),
    Relied(f"{_EXCHANGE}._maybe_dtoh_and_synchronize", "point tokens_per_expert", "", "overridden: no streams"),
    Relied(f"{_EXCHANGE}.dispatch_postprocess", "", "", "overridden: gloo gathers equal parts only"),
    Relied(f"{_EXCHANGE}.combine_preprocess", "", "", "overridden, for the same reason"),
    Relied("transformer.moe.moe_utils.sort_chunks_by_idxs", "input split_sizes sorted_idxs probs", _EXPERTS,
           "tokens by expert"),
    Relied("transformer.moe.moe_utils.MoEAuxLossAutoScaler", None, "models/router_losses.py",
           "has backward add the gradient of a router's losses"),
    Relied("transformer.moe.experts.TEGroupedMLP", "num_local_experts config submodules pg_collection",
           "models/layer_spec_te.py", "experts as one product of groups"),
    Relied("tensor_parallel.layers.ColumnParallelLinear", None, "models/language_model.py models/layer_spec.py",
           "the output layer; latent attention's projections"),
    Relied("tensor_parallel.layers.RowParallelLinear", None, "models/language_model.py", "a layer's output"),
    Relied("tensor_parallel.layers.VocabParallelEmbedding", None, "models/embedding.py models/language_model.py",
           "base class of ours, without a GPU"),
    Relied("tensor_parallel.layers.VocabParallelEmbedding.forward", "input_", "", "overridden: gradient by rows"),
    Relied("tensor_parallel.layers.set_tensor_model_parallel_attributes", "tensor is_parallel dim stride",
           "models/attention/base.py models/language_model.py models/lora.py models/norm.py",
           "marks what is split, for norms and checkpoints"),
    Relied("transformer.utils.make_sharded_tensors_for_checkpoint",
           "state_dict prefix tensor_parallel_layers_axis_map sharded_offsets tp_group dp_cp_group",
           "models/attention/base.py models/lora.py models/norm.py",
           "how an adapter, and a norm or sinks split over ranks, lie in a checkpoint"),
    Relied("transformer.attention.Attention", "config submodules layer_number attn_mask_type attention_type",
           "models/attention/latent.py", "base class of latent attention"),
    Relied("transformer.attention.Attention.get_query_key_value_tensors", "hidden_states", "", "what that one makes"),
    Relied("transformer.attention.SelfAttention", "config submodules layer_number",
           "models/attention/self_attention.py", "base class of ours, for families that need more"),
    Relied("transformer.attention.SelfAttention.forward", "hidden_states rotary_pos_emb", "", "overridden: its table"),
    Relied("transformer.attention.SelfAttention.get_query_key_value_tensors", "hidden_states", "",
           "overridden: three tensors where the input is packed"),
    Relied("transformer.transformer_block.TransformerBlockSubmodules", "layer_specs layer_norm", "gpu/kernel_choice.py "
           "gpu/options.py models/language_model.py models/layer_spec.py models/layer_spec_te.py", "a stage's layers"),
    Relied("transformer.utils.is_layer_window_attention", "window_size window_attn_skip_freq layer_number",
           "models/attention/base.py", "which layers have the window"),
    # megatron-core without a GPU.
    Relied(_RANDOM, None, "distributed/cpu_backend.py", "the two functions below are replaced; without Transformer "
           "Engine also what CheckpointWithoutOutput asks of it"),
    Relied(f"{_RANDOM}.HAVE_TE", None, "", "read"),
    Relied(f"{_RANDOM}.CheckpointWithoutOutput", None, "", "norms that are computed again, by the layer"),
    Relied(f"{_RANDOM}._get_cuda_rng_state", "device clone graph_safe", "", "called with these"),
    Relied(f"{_RANDOM}._set_cuda_rng_state", "new_state device graph_safe", "", "called with these"),
    Relied(_BUFFERS, None, "distributed/cpu_backend.py", "the two functions below are replaced"),
    Relied(f"{_BUFFERS}.dist_reduce_scatter_func", "output input", "", "called with these, by place"),
    Relied(f"{_BUFFERS}.dist_all_gather_func", "output_tensor input_tensor", "", "called with these, by place"),
]
# fmt: on


def resolve(name: str) -> Any:
    """The object of a dotted name behind ``megatron.core``: of the last module on the way, an attribute."""
    parts = name.split(".")
    found: Any = importlib.import_module("megatron.core")
    for number, part in enumerate(parts, start=1):
        if not hasattr(found, part):
            importlib.import_module(".".join(("megatron.core", *parts[:number])))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("relied", CONTRACT, ids=lambda relied: relied.name)
def test_megatron_core_has_it(relied: Relied) -> None:
    found = resolve(relied.name)
    if relied.parameters is not None:
        parameters = inspect.signature(found).parameters
        missing = [name for name in relied.parameters.split() if name not in parameters]
        assert not missing, f"megatron.core.{relied.name} takes no {missing}; relied on for: {relied.why}"


def imports() -> dict[str, set[str]]:
    """Files by the name that they import from megatron-core."""
    found: dict[str, set[str]] = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core"):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names if alias.name.startswith("megatron.core")]
                for name in names:
                    key = name.removeprefix("megatron.core.")
                    found.setdefault(key, set()).add(str(file.relative_to(ROOT)).removeprefix("megatron_tgdpo/"))
    return found


def is_fast_moving(name: str) -> bool:
    return name.rpartition(".")[2].startswith("_") or any(
        name == module or name.startswith(f"{module}.") for module in FAST_MOVING
    )


def test_it_is_imported_where_the_table_says_and_nowhere_else() -> None:
    found = {name: files for name, files in imports().items() if is_fast_moving(name)}
    stated = {relied.name: set(relied.files.split()) for relied in CONTRACT if relied.files}
    assert found == stated


def test_the_method_that_is_replaced_takes_what_is_passed() -> None:
    """It is called by megatron-core with any of its own parameters."""
    name = "pipeline_parallel.p2p_communication.P2PCommunicator._communicate"
    overriding = ColocatedCommunicator._communicate
    assert list(inspect.signature(overriding).parameters) == list(inspect.signature(resolve(name)).parameters)
