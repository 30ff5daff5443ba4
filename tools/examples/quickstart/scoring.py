"""What the final table is made of: token log-probs under an HF model, sampled answers, and a ranking measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from tgdpo.generation import logps
from tools.examples.quickstart.language import token_labels
from tools.examples.quickstart.tokenizer import chat_ids


@dataclass(frozen=True)
class Response:
    """One answer as token ids: those of the prompt's chat turn, then those of the answer with its end-of-turn token.

    bad and content hold one bool a response token: does it belong to a bad word, and to a content word at all.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    bad: list[bool]
    content: list[bool]


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Response:
    """Tokenizes an answer in its chat turn and labels its tokens; the end-of-turn token is neither bad nor content.

    Raises:
        ValueError: the template's ids of prompt and answer are not the prompt's, the answer's and one end token.
    """
    user = [{"role": "user", "content": prompt}]
    prompt_ids = chat_ids(tokenizer, user, add_generation_prompt=True)
    whole = chat_ids(tokenizer, [*user, {"role": "assistant", "content": answer}])
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    if whole != [*prompt_ids, *encoded["input_ids"], tokenizer.eos_token_id]:
        raise ValueError(f"the chat template does not keep the ids of the answer {answer!r}")
    bad, content = token_labels(prompt, answer, encoded["offset_mapping"])
    return Response(prompt_ids, whole[len(prompt_ids) :], [*bad, False], [*content, False])


def response_logps(model: LlamaForCausalLM, responses: Sequence[Response]) -> list[torch.Tensor]:
    """Returns log p of each response token, in nats: one fp32 CPU tensor of shape (len(response_ids),) a response."""
    return logps.response_logps(model, [(response.prompt_ids, response.response_ids) for response in responses])


@torch.inference_mode()
def sample_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seed: int,
    max_new_tokens: int,
    batch: int = 64,
) -> list[tuple[str, int]]:
    """Samples one answer a prompt at temperature 1 from the model's whole distribution.

    Returns:
        (text, length) a prompt; length counts response tokens, the end-of-turn token included where there is one.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    answers = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(
            texts[start : start + batch],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(device)
        output = model.generate(  # type: ignore[misc]  # transformers annotates self with a class that models lack
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens
        )
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            length = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            answers.append((str(tokenizer.decode(row[:length], skip_special_tokens=True)), length))
    return answers


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Area under the ROC curve: the chance that a random positive scores above a random negative, ties counting half.

    Computed from the ranks of the scores, tied ones sharing their mean rank (Mann-Whitney U). NaN if a class is empty.
    """
    positives = sum(labels)
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    order = sorted(range(len(scores)), key=scores.__getitem__)
    rank_sum, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        mean_rank = (start + 1 + end) / 2
        rank_sum += mean_rank * sum(labels[index] for index in order[start:end])
        start = end
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
