"""TRL's ``DPOTrainer``, policy and reference, on the same token ids. Imported only where ``trl`` is installed.

As its users run it for a comparable step: one pair per device batch, gradients accumulated over the pairs of a step,
no gradient checkpointing, its default fused AdamW. In bf16 the policy's weights are float32 and autocast, and the
reference is bf16. Loading, saving and reports are outside of the timed steps.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from megatron_tgdpo.data.dataset import PreferenceDataset
from tools.benchmarks.training_step.problem import BETA, CLIP, LEARNING_RATE, LORA_LEARNING_RATE, Problem
from tools.benchmarks.training_step.recorder import Recorder


class _TokenisedDPOTrainer(DPOTrainer):
    """Takes pairs that are token ids already, in their order, and keeps the exact loss of every pair."""

    def __init__(self, **kwargs: Any) -> None:
        self.pair_losses: list[torch.Tensor] = []
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        del args, kwargs
        return dataset

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=self.data_collator)
        result: DataLoader[Any] = self.accelerator.prepare(loader)
        return result

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, **kwargs)
        self.pair_losses.append((result[0] if return_outputs else result).detach())
        return result


class _StepTimes(TrainerCallback):
    """Marks the beginning and the end of every optimizer step."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.trainer: _TokenisedDPOTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        losses, self.trainer.pair_losses = self.trainer.pair_losses, []
        self.recorder.end(torch.stack(losses).mean().item())


def run(problem: Problem, recorder: Recorder, *, lora: bool) -> None:
    """All steps of a problem; with ``lora`` the reference is the policy's adapter as it begins."""
    bf16 = problem.dtype == "bf16"
    policy: torch.nn.Module = _load(problem.policy, torch.float32)
    reference = None
    if lora:
        from peft import PeftModel

        policy = PeftModel.from_pretrained(policy, problem.adapter, is_trainable=True)
    else:
        reference = _load(problem.policy, torch.bfloat16 if bf16 else torch.float32)
    times = _StepTimes(recorder)
    trainer = _TokenisedDPOTrainer(
        model=policy,
        ref_model=reference,
        args=_arguments(problem, bf16, LORA_LEARNING_RATE if lora else LEARNING_RATE),
        train_dataset=_records(problem),
        processing_class=_placeholder_tokenizer(),
        callbacks=[times],
    )
    times.trainer = trainer
    recorder.built([weight for model in (policy, reference) if model is not None for weight in model.parameters()])
    trainer.train()


def _load(path: str, dtype: torch.dtype) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
    )


def _arguments(problem: Problem, bf16: bool, learning_rate: float) -> DPOConfig:
    return DPOConfig(
        output_dir=str(Path(problem.directory) / "run-trl"),
        max_steps=problem.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=problem.global_pairs,
        gradient_checkpointing=False,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        beta=BETA,
        max_length=problem.max_length,
        bf16=bf16,
        use_cpu=problem.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _records(problem: Problem) -> Dataset:
    pairs = PreferenceDataset(problem.data)
    indices = [index for step in range(1, problem.steps + 1) for index in problem.step_indices(step)]
    columns = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}
    return Dataset.from_dict(
        {name: [getattr(pairs[index], part).tolist() for index in indices] for name, part in columns.items()}
    )


def _placeholder_tokenizer() -> PreTrainedTokenizerFast:
    """The trainer asks a tokenizer for its padding token, and nothing else of one."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
