"""Which key was meant by one that does not exist: spelled otherwise, of another section, or of another project."""

import difflib
from collections.abc import Sequence

_BATCH = "batch.global_pairs, pairs over all ranks and accumulation steps"
_PACK = "batch.tokens_per_micro_batch, tokens of one pack"
_STATE = "always divided among data ranks"
_DROPOUT = "none: dropout is off, as in every DPO"

# Names of Hugging Face's Trainer, TRL, LLaMA-Factory and the TGDPO authors' code, NeMo-RL and Megatron-LM. Behind the
# key, or instead of it, what else is different here.
ELSEWHERE = {
    # models
    "model_name_or_path": "model.policy",
    "model_name": "model.policy",
    "model_path": "model.policy",
    "model": "model.policy",
    "policy": "model.policy",
    "load": "model.policy",
    "pretrained_checkpoint": "model.policy",
    "actor": "model.policy",
    "ref_model": "model.reference",
    "ref_model_name_or_path": "model.reference",
    "ref_model_path": "model.reference",
    "reference_model": "model.reference",
    "ref": "model.reference",
    "ref_load": "model.reference",
    "tgdpo_reward_model": "model.guide",
    "reward_model": "model.guide",
    "guide_model": "model.guide",
    "transformer_impl": "model.layer_spec",
    "attn_implementation": "model.layer_spec",
    "attention_backend": "model.layer_spec",
    # adapters
    "use_lora": "lora.rank",
    "use_peft": "lora.rank",
    "peft": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "r": "lora.rank",
    "dropout": _DROPOUT,
    "lora_target": "lora.targets",
    "lora_target_modules": "lora.targets",
    "target_modules": "lora.targets",
    "use_rslora": "lora.rslora",
    "adapter_name_or_path": "lora.adapter",
    "lora_dropout": _DROPOUT,
    "finetuning_type": "lora.rank, which trains all weights if it is null",
    # data
    "dataset": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "train_dataset": "data.train",
    "train_data_path": "data.train",
    "data_path": "data.train",
    "eval_dataset": "data.validation",
    "val_dataset": "data.validation",
    "validation_file": "data.validation",
    "valid_data_path": "data.validation",
    "val_data_path": "data.validation",
    "test_dataset": "data.test",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_total_sequence_length": "data.max_length",
    "seq_length": "data.max_length",
    "sequence_length": "data.max_length",
    "model_max_length": "data.max_length",
    "encoder_seq_length": "data.max_length",
    "max_prompt_len": "data.max_prompt_length",
    "truncation_mode": "data.overlong_prompt",
    "tokenizer_name_or_path": "data.tokenizer",
    "tokenizer_name": "data.tokenizer",
    "tokenizer_model": "data.tokenizer",
    "tokenizer_path": "data.tokenizer",
    "template": "data.chat_template, a Jinja file; by default the tokenizer's own",
    "chat_template_path": "data.chat_template",
    "preprocessing_num_workers": "data.workers",
    "dataset_num_proc": "data.workers",
    "dataloader_num_workers": "data.workers, which tokenise; batches need none",
    "num_workers": "data.workers",
    "shuffle_dataset": "data.shuffle",
    "packing": "none: packs are always packed (batch.tokens_per_micro_batch)",
    "padding_free": "none: packs are always packed (batch.tokens_per_micro_batch)",
    # loss
    "pref_beta": "loss.beta",
    "dpo_beta": "loss.beta",
    "reference_policy_kl_penalty": "loss.beta",
    "ref_policy_kl_penalty": "loss.beta",
    "tgdpo_alpha": "loss.alpha",
    "stage": "loss.method",
    "loss_type": "loss.form",
    "pref_loss": "loss.form, or loss.method for simpo, orpo and sft",
    "preference_loss": "loss.form",
    "rlhf_type": "loss.method",
    "type": "loss.method",
    "dpo_label_smoothing": "loss.label_smoothing",
    "label_smoothing_factor": "loss.label_smoothing",
    "pref_ftx": "loss.sft_weight",
    "rpo_alpha": "loss.sft_weight",
    "sft_loss_weight": "loss.sft_weight",
    "ftx_gamma": "loss.sft_weight",
    "simpo_gamma": "loss.gamma",
    "gamma_beta_ratio": "loss.gamma, in nats: the ratio times loss.beta",
    "precompute_ref_log_probs": "guidance.mode, with the value cached",
    "precompute_ref_logprobs": "guidance.mode, with the value cached",
    # layout
    "tensor_model_parallel_size": "parallel.tensor",
    "tensor_parallel_size": "parallel.tensor",
    "tp": "parallel.tensor",
    "tp_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "pipeline_parallel_size": "parallel.pipeline",
    "pp": "parallel.pipeline",
    "pp_size": "parallel.pipeline",
    "pipeline_model_parallel_layout": "parallel.pipeline_layers, a list for each model",
    "decoder_first_pipeline_num_layers": "parallel.pipeline_layers, a list for each model",
    "decoder_last_pipeline_num_layers": "parallel.pipeline_layers, a list for each model",
    "num_layers_in_first_pipeline_stage": "parallel.pipeline_layers, a list for each model",
    "num_layers_in_last_pipeline_stage": "parallel.pipeline_layers, a list for each model",
    "context_parallel_size": "parallel.context",
    "cp": "parallel.context",
    "cp_size": "parallel.context",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "num_layers_per_virtual_pipeline_stage": "parallel.virtual_pipeline, in chunks a stage",
    "num_virtual_stages_per_pipeline_rank": "parallel.virtual_pipeline",
    "vpp": "parallel.virtual_pipeline",
    "expert_model_parallel_size": "parallel.expert",
    "expert_parallel_size": "parallel.expert",
    "ep": "parallel.expert",
    "ep_size": "parallel.expert",
    "expert_tensor_parallel_size": "parallel.expert_tensor",
    "etp": "parallel.expert_tensor",
    "moe_aux_loss_coeff": "moe.aux_loss_coeff",
    "moe_aux_loss_coef": "moe.aux_loss_coeff",
    "router_aux_loss_coef": "moe.aux_loss_coeff, of another scale: docs/experts.md",
    "moe_z_loss_coeff": "moe.z_loss_coeff",
    "sp": "parallel.sequence_parallel",
    "data_parallel_size": "none: the ranks that tensor, pipeline and context leave are data ranks",
    "dp": "none: the ranks that tensor, pipeline and context leave are data ranks",
    "distributed_timeout_minutes": "parallel.timeout_minutes",
    "ddp_timeout": "parallel.timeout_minutes, in minutes",
    "no_cuda": "parallel.device",
    "use_cpu": "parallel.device",
    "deepspeed": f"none: weights' and optimizer's state are {_STATE}",
    "fsdp": f"none: weights' and optimizer's state are {_STATE}",
    "use_distributed_optimizer": f"none: it is {_STATE}",
    # batch
    "per_device_train_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "global_batch_size": _BATCH,
    "train_global_batch_size": _BATCH,
    "batch_size": _BATCH,
    "micro_batch_size": _PACK,
    "train_micro_batch_size": _PACK,
    "per_device_eval_batch_size": _PACK,
    "max_tokens_per_microbatch": _PACK,
    "max_token_len_per_gpu": _PACK,
    # optimizer
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "lr": "optimizer.lr",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "betas": "optimizer.beta1 and optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "adam_eps": "optimizer.eps",
    "epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip_grad",
    "gradient_clip_val": "optimizer.clip_grad",
    "gradient_clipping": "optimizer.clip_grad",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_scheduler": "optimizer.schedule",
    "lr_decay_style": "optimizer.schedule",
    "scheduler": "optimizer.schedule",
    "lr_warmup_fraction": "optimizer.warmup_ratio",
    "warmup_steps": "optimizer.warmup_steps",
    "lr_warmup_iters": "optimizer.warmup_steps",
    "min_lr": "none: schedules end at zero",
    "optim": "none: it is always Adam with decoupled weight decay",
    # precision
    "bf16": "precision.dtype, with the value bf16",
    "fp16": "precision.dtype, bf16 or fp32",
    "torch_dtype": "precision.dtype",
    "params_dtype": "precision.dtype",
    "fp8_recipe": "precision.fp8",
    "fp8_amax_compute_algo": "precision.fp8_amax_algorithm",
    "fp8_amax_history_len": "precision.fp8_amax_history",
    "fp8_param_gather": "precision.fp8_params",
    "fp8_param": "precision.fp8_params",
    "fp4_recipe": "precision.fp4",
    "fp4_format": "precision.fp4, with the value nvfp4",
    "first_last_layers_bf16": "precision.first_last_layers_bf16",
    # overlap, offload
    "overlap_grad_reduce": "overlap.grad_reduce",
    "overlap_param_gather": "overlap.param_gather",
    "tp_comm_overlap": "overlap.tensor",
    "fine_grained_activation_offloading": "offload.activations",
    "cpu_offloading": "offload.activations",
    "optimizer_cpu_offload": "offload.optimizer, a fraction",
    "optimizer_offload_fraction": "offload.optimizer",
    # train
    "max_steps": "train.steps",
    "max_num_steps": "train.steps",
    "train_iters": "train.steps",
    "total_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "total_epochs": "train.epochs",
    "n_epochs": "train.epochs",
    "exit_interval": "train.exit_step",
    "data_seed": "train.seed",
    "random_seed": "train.seed",
    "resume_from_checkpoint": "output_dir: a run with the same one continues (docs/checkpoints.md)",
    "gradient_checkpointing": "train.recompute",
    "activation_checkpointing": "train.recompute",
    "recompute_granularity": "train.recompute",
    "recompute_activations": "train.recompute",
    # evaluation, checkpoints, logs
    "eval_steps": "eval.every_steps",
    "eval_interval": "eval.every_steps",
    "val_period": "eval.every_steps",
    "val_check_interval": "eval.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_interval": "checkpoint.every_steps",
    "save_period": "checkpoint.every_steps",
    "save_freq": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "keep_top_k": "checkpoint.keep",
    "metric_for_best_model": "checkpoint.best_metric",
    "metric_name": "checkpoint.best_metric",
    "monitor": "checkpoint.best_metric",
    "greater_is_better": "checkpoint.best_mode",
    "higher_is_better": "checkpoint.best_mode",
    "load_best_model_at_end": "export.hf, best exports that model",
    "async_save": "checkpoint.background",
    "logging_steps": "log.every_steps",
    "log_interval": "log.every_steps",
    "report_to": "log.wandb",
    "wandb_enabled": "log.wandb",
    "save": "output_dir",
    "save_dir": "output_dir",
    "checkpoint_dir": "output_dir",
    "log_dir": "output_dir",
    "logging_dir": "output_dir",
    "default_local_dir": "output_dir",
    "run_name": "output_dir",
    # what there is not
    "disable_dropout": _DROPOUT,
    "hidden_dropout": _DROPOUT,
    "attention_dropout": _DROPOUT,
}


def suggestion(unknown: str, keys: Sequence[str]) -> str:
    """What to say behind an unknown key: ``"; did you mean ...?"``, or what there is.

    Args:
        unknown: Dotted, as it was given.
        keys: All that there are, dotted.
    """
    if unknown in keys:
        section, _, key = unknown.partition(".")
        return f"; write {section}: and, indented below it, {key}:"
    sections = list(dict.fromkeys(key.split(".")[0] for key in keys))
    *above, leaf = unknown.lower().strip().lstrip("-").replace("-", "_").split(".")
    inner = [_leaf(key) for key in keys if key.startswith(f"{'.'.join(above)}.")]
    near = _closest(leaf, inner)
    if near:
        return f"; did you mean {'.'.join(above)}.{near}?"
    meant = _named(leaf, keys) or (None if above else _closest(leaf, sections))
    if meant is None and (near := _closest(leaf, [*map(_leaf, keys), *ELSEWHERE])):
        meant = _named(near, keys)
    if meant is None:
        return f"; {'.'.join(above)} has {', '.join(inner)}" if inner else f"; there are {', '.join(sections)}"
    there_is_none = meant.removeprefix("none: ")
    return f"; did you mean {meant}?" if meant == there_is_none else f"; there is none here: {there_is_none}"


def _named(leaf: str, keys: Sequence[str]) -> str | None:
    """What has this name elsewhere, or here in another section."""
    return ELSEWHERE.get(leaf) or " or ".join(key for key in keys if _leaf(key) == leaf) or None


def _leaf(key: str) -> str:
    return key.split(".")[-1]


def _closest(word: str, words: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word[:64], words, n=1, cutoff=0.75)), None)
