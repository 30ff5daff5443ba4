"""The step of the TGDPO authors' code in plain Hugging Face, written from its description.

Source of the facts: dvlab-research/TGDPO (a LLaMA-Factory fork), arXiv 2506.14574. One pair at a time: chosen and
rejected are padded on the right to one length, a multiple of 8, and go through the policy and, without gradient, the
reference and the guide, as a batch of two. The logits of all positions are float32 and go through a log-softmax;
gradients accumulate over the pairs of a step, are clipped, and AdamW updates.

Where there was a choice it is the faster one: SDPA attention, fused AdamW, and none of the original's metrics, nor the
cross-entropy that transformers computes on the side when it is given labels. In bf16, as there, the policy's weights
are float32 and its forward is autocast, and the frozen models are bf16.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_tgdpo.data.dataset import PreferenceDataset, PreferencePair
from tools.benchmarks.training_step.problem import ALPHA, BETA, CLIP, LEARNING_RATE, Problem
from tools.benchmarks.training_step.recorder import Recorder

_PAD_MULTIPLE = 8


class ReferenceStep:
    """Three models and an optimizer, and their step.

    Args:
        policy: HF directory of the policy, and of the reference.
        guide: HF directory of the guide; None for DPO.
        dtype: ``fp32`` or ``bf16``.
        device: Of everything.
    """

    def __init__(self, policy: str | Path, guide: str | Path | None, dtype: str, device: torch.device) -> None:
        self.device, self.autocast = device, dtype == "bf16"
        frozen_dtype = torch.bfloat16 if self.autocast else torch.float32
        self.policy = self._load(policy, torch.float32).train()
        self.reference = self._load(policy, frozen_dtype).eval().requires_grad_(False)
        self.guide = None
        if guide is not None:
            self.guide = self._load(guide, frozen_dtype).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def weights(self) -> list[Tensor]:
        """Parameters of all models."""
        models = [model for model in (self.policy, self.reference, self.guide) if model is not None]
        return [parameter for model in models for parameter in model.parameters()]

    def pair_loss(self, pair: PreferencePair) -> Tensor:
        """-log sigmoid(score_chosen - score_rejected) of one pair, with the policy's gradient."""
        tokens, attention_mask, response_mask = _padded(pair)
        batch = tokens.to(self.device), attention_mask.to(self.device), response_mask.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            policy = _response_logps(self.policy, *batch)
            with torch.no_grad():
                reference = _response_logps(self.reference, *batch)
                guide = reference if self.guide is None else _response_logps(self.guide, *batch)
        signs = torch.tensor([[1.0], [-1.0]], device=self.device)
        weights = 1 + signs * ALPHA * BETA * (guide - reference)
        chosen, rejected = (BETA * weights * (policy - reference)).sum(dim=1)
        return -F.logsigmoid(chosen - rejected)

    def step(self, pairs: list[PreferencePair]) -> float:
        """One optimizer step; returns the mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for pair in pairs:
            loss = self.pair_loss(pair) / len(pairs)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), CLIP)
        self.optimizer.step()
        return total.item()

    def _load(self, path: str | Path, dtype: torch.dtype) -> LlamaForCausalLM:
        model = LlamaForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
        )
        torch.nn.Module.to(model, device=self.device)
        return model


def _padded(pair: PreferencePair) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and response mask of a pair: [2, T] int64 each, chosen first."""
    width = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
    tokens = torch.zeros(2, -(-width // _PAD_MULTIPLE) * _PAD_MULTIPLE, dtype=torch.int64)
    attention_mask, response_mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    start = len(pair.prompt)
    for row, response in enumerate((pair.chosen, pair.rejected)):
        end = start + len(response)
        tokens[row, :start], tokens[row, start:end] = torch.from_numpy(pair.prompt), torch.from_numpy(response)
        attention_mask[row, :end] = 1
        response_mask[row, start:end] = 1
    return tokens, attention_mask, response_mask


def _response_logps(model: LlamaForCausalLM, tokens: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    """[2, T - 1] float32: log p of each token after the first, zero outside of the responses."""
    logits = model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits.to(torch.float32)
    logps = logits[:, :-1].log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[:, :, 0]
    return logps * response_mask[:, 1:]


def run(problem: Problem, recorder: Recorder, *, guided: bool) -> None:
    """All steps of a problem."""
    dataset = PreferenceDataset(problem.data)
    variant = ReferenceStep(
        problem.policy, problem.guide if guided else None, problem.dtype, torch.device(problem.device)
    )
    recorder.built(variant.weights())
    for step in range(1, problem.steps + 1):
        recorder.begin()
        recorder.end(variant.step([dataset[index] for index in problem.step_indices(step)]))
