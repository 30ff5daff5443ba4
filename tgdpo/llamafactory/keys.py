"""Keys of LLaMA-Factory, of the TGDPO authors' fork and of transformers' TrainingArguments: which can be carried over.

A key is read (:class:`Reference`), has the one value that this project computes (``ONLY``), or changes nothing that is
trained (``HARMLESS``). There is no fourth kind: what is not named here is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.yaml_text import Text, is_null


@dataclass
class Reference:
    """Keys that are translated, with their types. A key that is null or absent has the reference code's default."""

    model_name_or_path: str | None = None
    ref_model: str | None = None
    tgdpo_reward_model: str | None = None
    stage: str | None = None
    finetuning_type: str | None = None
    pref_loss: str | None = None
    pref_beta: float | None = None
    pref_ftx: float | None = None
    dpo_label_smoothing: float | None = None
    simpo_gamma: float | None = None
    tgdpo_alpha: float | None = None
    dataset: str | None = None
    eval_dataset: str | None = None
    template: str | None = None
    cutoff_len: int | None = None
    max_prompt_length: int | None = None
    preprocessing_num_workers: int | None = None
    output_dir: str | None = None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    learning_rate: float | None = None
    lr_scheduler_type: str | None = None
    warmup_ratio: float | None = None
    warmup_steps: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_epsilon: float | None = None
    num_train_epochs: float | None = None
    max_steps: int | None = None
    seed: int | None = None
    bf16: bool | None = None
    logging_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = None
    eval_steps: int | None = None


@dataclass
class LoraReference:
    """Those that are translated where ``finetuning_type`` is lora; beside full they change nothing."""

    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_target: str | None = None
    use_rslora: bool | None = None
    adapter_name_or_path: str | None = None


READ = tuple(field.name for field in fields(Reference))
LORA_READ = tuple(field.name for field in fields(LoraReference))
_OFF = (None, False)
_NONE = (None,)
_NEXT = "; prepare the file and give it with --train"
# The values with which a key means what is computed here, and what else to do.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "do_train": ((True,), "this run would not train"),
    # precision, optimizer, schedule
    "fp16": (_OFF, "use bf16"),
    "pure_bf16": (_OFF, "bf16 has fp32 optimizer state and master weights here: set bf16"),
    "tf32": (_OFF, ""),
    "fp8": (_OFF, "set precision.fp8 afterwards"),
    "optim": ((None, "adamw_torch", "adamw_torch_fused", "adamw_apex_fused"), "the optimizer is always AdamW"),
    "optim_args": (_NONE, ""),
    "optim_target_modules": (_NONE, ""),
    "lr_scheduler_kwargs": ((None, {}, "{}"), ""),
    "label_smoothing_factor": ((None, 0), ""),
    "neftune_noise_alpha": (_NONE, ""),
    "load_best_model_at_end": (_OFF, "checkpoint.best_metric keeps the best model, export.hf=best exports it"),
    "early_stopping_steps": (_NONE, ""),
    "auto_find_batch_size": (_OFF, ""),
    "resume_from_checkpoint": (_OFF, "its checkpoints are not read here: export the model, and begin from that"),
    "accelerator_config": (_NONE, ""),
    "parallelism_config": (_NONE, ""),
    **dict.fromkeys(("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon"), (_OFF, "only AdamW is")),
    # which weights
    **dict.fromkeys(("adapter_name_or_path", "ref_model_adapters"), (_NONE, "merge the adapter into the model")),
    **dict.fromkeys(("quantization_bit", "ref_model_quantization_bit"), (_NONE, "models are not quantised here")),
    **dict.fromkeys(("resize_vocab", "train_from_scratch", "use_llama_pro", "use_mca"), (_OFF, "")),
    **dict.fromkeys(
        ("new_special_tokens", "add_tokens", "add_special_tokens", "new_special_tokens_config"), (_NONE, "")
    ),
    **dict.fromkeys(("train_mm_proj_only", "freeze_language_model", "use_unsloth", "use_kt"), (_OFF, "")),
    **dict.fromkeys(("use_hyper_parallel", "use_megatron_bridge"), (_OFF, "")),
    "use_fast_tokenizer": ((None, True), "tokenizers are the fast ones here"),
    "split_special_tokens": (_OFF, ""),
    "model_revision": ((None, "main"), "give the directory of that revision as model_name_or_path"),
    # the model's maths
    "rope_scaling": (_NONE, "set rope_scaling in the model's config.json"),
    "shift_attn": (_OFF, ""),
    "mixture_of_depths": (_NONE, ""),
    "moe_aux_loss_coef": ((None, 0), ""),
    "upcast_layernorm": (_OFF, ""),
    # the loss
    "pref_bco_weight": ((None, 0), ""),
    "ld_alpha": (_NONE, ""),
    **dict.fromkeys(("use_dft_loss", "use_asft_loss", "use_eaft_loss"), (_OFF, "")),
    "ignore_pad_token_for_loss": ((None, True), ""),
    # the data
    "max_samples": (_NONE, f"take that many records from the beginning{_NEXT}"),
    "val_size": ((None, 0), f"split the file{_NEXT} and --validation"),
    "tokenized_path": (_NONE, "tokenised data is made anew here"),
    "streaming": (_OFF, "its order is another, and max_steps means other data"),
    "mix_strategy": ((None, "concat"), f"mix the files{_NEXT}"),
    "interleave_probs": (_NONE, f"mix the files{_NEXT}"),
    "eval_on_each_dataset": (_OFF, ""),
    "train_on_prompt": (_OFF, ""),
    "mask_history": (_OFF, ""),
    "packing": (_OFF, "rows are always packed here, without attention between pairs"),
    "neat_packing": (_OFF, "rows are always packed here, without attention between pairs"),
    "tool_format": (_NONE, ""),
    "default_system": (_NONE, "write it into the records, or into a template that data.chat_template names"),
    "enable_thinking": ((None, True), ""),
    "preserve_thinking": (_OFF, ""),
    "disable_shuffling": (_OFF, "set data.shuffle=false afterwards"),
    "group_by_length": (_OFF, ""),
    "train_sampling_strategy": ((None, "random"), ""),
    "sortish_sampler": (_OFF, ""),
    "dataloader_drop_last": (_OFF, ""),
}
# The same where finetuning_type is lora.
LORA_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "lora_dropout": ((None, 0), "adapters have no dropout here, so that the first loss is ln 2"),
    "use_dora": (_OFF, "only plain LoRA is"),
    "pissa_init": (_OFF, "it changes the base model: only plain LoRA is"),
    "loraplus_lr_ratio": (_NONE, "A and B have one learning rate"),
    "additional_target": (_NONE, "only linears of the layers have adapters"),
    "create_new_adapter": (_OFF, "merge adapter_name_or_path into the model first"),
}
# Without effect on what is trained: how it is computed, saved, logged and evaluated, and options of what ONLY refuses.
HARMLESS = frozenset({
    "accelerator", "activation_checkpointing", "activation_checkpointing_kwargs", "adapter_folder",
    "additional_target", "average_tokens_across_devices", "batch_eval_metrics", "bf16_full_eval", "buffer_size",
    "cache_dir", "compute_accuracy", "create_new_adapter", "data_seed", "data_shared_file_system",
    "dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_dir",
    "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph",
    "ddp_timeout", "debug", "deepspeed", "disable_gradient_checkpointing", "disable_tqdm", "dispatch_batches",
    "do_eval", "do_predict", "do_sample", "double_quantization", "enable_jit_checkpoint", "enable_liger_kernel",
    "eval_accumulation_steps", "eval_delay", "eval_do_concat_batches", "eval_num_beams", "eval_on_start",
    "eval_strategy", "eval_use_gather_object", "evaluation_strategy", "flash_attn", "fp16_backend", "fp16_full_eval",
    "fp16_opt_level", "freeze_extra_modules", "freeze_multi_modal_projector", "freeze_trainable_layers",
    "freeze_trainable_modules", "freeze_vision_tower", "fsdp", "fsdp_config", "fsdp_min_num_params",
    "fsdp_transformer_layer_cls_to_wrap", "full_determinism", "generation_config", "generation_max_length",
    "generation_num_beams", "gradient_checkpointing", "gradient_checkpointing_kwargs", "greater_is_better",
    "half_precision_backend", "hf_hub_token", "ignore_data_skip", "image_dir", "include_effective_tokens_per_second",
    "include_for_metrics", "include_inputs_for_metrics", "include_num_input_tokens_seen", "include_tokens_per_second",
    "infer_backend", "infer_dtype", "jit_mode_eval", "label_names", "length_column_name", "length_penalty",
    "liger_kernel_config", "local_rank", "log_level", "log_level_replica", "log_on_each_node", "logging_dir",
    "logging_first_step", "logging_nan_inf_filter", "logging_strategy", "low_cpu_mem_usage", "max_length",
    "max_new_tokens", "media_dir", "metric_for_best_model", "module_dropout", "ms_hub_token", "no_cuda", "num_beams",
    "offload_folder", "om_hub_token", "overwrite_cache", "overwrite_output_dir", "past_index",
    "per_device_eval_batch_size", "per_gpu_eval_batch_size", "plot_loss", "predict_with_generate",
    "prediction_loss_only", "preprocessing_batch_size", "print_param_status", "project", "push_to_hub",
    "quantization_device_map", "quantization_method", "quantization_type", "ray_init_kwargs", "ray_num_workers",
    "ray_run_name", "ray_scope", "ray_storage_path", "remove_unused_columns", "repetition_penalty", "report_to",
    "restore_callback_states_from_checkpoint", "reward_model", "reward_model_adapters",
    "reward_model_quantization_bit", "reward_model_type", "run_name", "save_on_each_node", "save_only_model",
    "save_safetensors", "save_strategy", "skip_memory_metrics", "split_batches", "temperature", "top_k", "top_p",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "tpu_metrics_debug",
    "tpu_num_cores", "trackio_bucket_id", "trackio_space_id", "trust_remote_code", "upcast_lmhead_output",
    "use_cache", "use_cpu", "use_dora", "use_ipex", "use_kv_cache", "use_legacy_prediction_loop", "use_liger_kernel",
    "use_mps_device", "use_ray", "use_reentrant_gc", "use_rslora", "use_swanlab", "use_unsloth_gc",
})  # fmt: skip
# Options of what is refused, or of what happens beside training.
_HARMLESS_BEGINNINGS = (
    "apollo_", "asft_", "audio_", "badam_", "crop_to_", "eaft_", "export_", "galore_", "hub_", "hyper_parallel_",
    "image_", "kto_", "kt_", "lora_", "loraplus_", "oft_", "pissa_", "ppo_", "profile", "push_to_hub_", "sglang_",
    "swanlab_", "use_audio_", "video_", "vllm_",
)  # fmt: skip


def is_lora(reference: Mapping[str, Any], ignore: Sequence[str] = ()) -> bool:
    """Whether an adapter trains, as by default."""
    given = reference.get("finetuning_type")
    return "finetuning_type" not in ignore and (is_null(given) or str(given) == "lora")


def harmless(key: str, *, lora: bool) -> bool:
    """Whether a key changes nothing that is trained, whatever its value."""
    if lora and (key in LORA_READ or key in LORA_ONLY or key.startswith("lora_")):
        return False
    return key not in ONLY and key not in READ and (key in HARMLESS or key.startswith(_HARMLESS_BEGINNINGS))


def refuse_unknown(reference: Mapping[str, Any], source: str, ignore: Sequence[str] = ()) -> None:
    """Refuses keys that cannot be carried over.

    Raises:
        UserError: It names all of them.
    """
    refused, lora = [], is_lora(reference, ignore)
    only, read = ({**ONLY, **LORA_ONLY}, (*READ, *LORA_READ)) if lora else (ONLY, READ)
    for key, value in reference.items():
        if key in ignore or key in read or harmless(key, lora=lora):
            continue
        line = f" in line {key.line}" if isinstance(key, Text) and key.line else ""
        if key not in only:
            refused.append(f"{key}{line} (not a key that is known)")
        elif _plain(value) not in only[key][0]:
            hint = only[key][1]
            refused.append(f"{key}: {_plain(value)}{line}" + (f" ({hint})" if hint else ""))
    if refused:
        raise UserError(
            f"{source}: without a counterpart here: {'; '.join(refused)}: take out what the run does not need, or "
            "leave it out of the import with --ignore KEY"
        )


def _plain(value: Any) -> Any:
    """A scalar as the reference code reads it, which is by YAML 1.1."""
    if is_null(value):
        return None
    if isinstance(value, Text) and not value.quoted:
        try:
            plain = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            return str(value)
        return plain if isinstance(plain, (bool, int, float)) else str(value)
    return value
