"""Sampled answers: the right distribution, seeds of their own, and where they end."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tgdpo.errors import UserError
from tests.tiny_models import make_llama
from tgdpo.generation.models import stop_ids
from tgdpo.generation.sampling import Answer, Request, request_seed
from tgdpo.generation.transformers_sampler import TransformersSampler

PROMPTS = [[1, 5, 9], [7], [3, 4, 5, 6, 7, 8, 9, 10], [12, 11]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("sampling") / "model", vocab_size=13, layers=2)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(str(directory))


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def requests(temperature: float, prompts: list[list[int]] = PROMPTS, seed: int = 0) -> list[Request]:
    return [Request(ids, request_seed(seed, row), temperature, f"prompt {row}") for row, ids in enumerate(prompts)]


def sample(directory: Path, tokenizer: Tokenizer, asked: list[Request], limit: int = 9, top_p: float = 1.0):
    return TransformersSampler(load(directory), tokenizer, top_p=top_p, max_new_tokens=limit).sample(asked)


def probabilities(model: PreTrainedModel, ids: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)


def frequencies(answers: list[Answer]) -> torch.Tensor:
    return torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=13)


def test_samples_follow_the_softmax_at_the_temperature(directory: Path, tokenizer: Tokenizer) -> None:
    draws = 4000
    answers = sample(directory, tokenizer, requests(1.7, [PROMPTS[0]] * draws), limit=1)
    expected = draws * probabilities(load(directory), PROMPTS[0], 1.7)
    assert expected.min() > 0.5
    chi_square = ((frequencies(answers) - expected) ** 2 / expected).sum().item()
    assert chi_square < 39.1  # 12 degrees of freedom: above it once in ten thousand


def test_top_p_keeps_the_nucleus(directory: Path, tokenizer: Tokenizer) -> None:
    answers = sample(directory, tokenizer, requests(1.7, [PROMPTS[0]] * 500), limit=1, top_p=0.6)
    likely, order = probabilities(load(directory), PROMPTS[0], 1.7).sort(descending=True)
    size = int((likely.cumsum(0) < 0.6).sum()) + 1
    assert set(frequencies(answers).nonzero()[:, 0].tolist()) == set(order[:size].tolist())


def test_an_answer_does_not_depend_on_its_batch(directory: Path, tokenizer: Tokenizer) -> None:
    together = sample(directory, tokenizer, requests(1.0))
    alone = [sample(directory, tokenizer, [request])[0] for request in requests(1.0)]
    assert together == alone
    assert together != sample(directory, tokenizer, requests(1.0, seed=1))


def test_temperature_zero_is_greedy(directory: Path, tokenizer: Tokenizer) -> None:
    model = load(directory)
    for ids, answer in zip(PROMPTS, sample(directory, tokenizer, requests(0.0)), strict=True):
        expected: list[int] = []
        while len(expected) < 9 and expected[-1:] != [2]:
            expected.append(int(probabilities(model, ids + expected, 1.0).argmax()))
        assert answer.ids == expected
        assert answer.finished == (expected[-1] == 2)


def test_the_models_own_sampling_settings_are_not_used(directory: Path, tokenizer: Tokenizer) -> None:
    plain = sample(directory, tokenizer, requests(1.0))
    model = load(directory)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, repetition_penalty=3.0, eos_token_id=2
    )
    assert TransformersSampler(model, tokenizer, top_p=1.0, max_new_tokens=9).sample(requests(1.0)) == plain


def test_answers_end_behind_any_of_the_models_stop_tokens(directory: Path, tokenizer: Tokenizer) -> None:
    model = load(directory)
    model.generation_config.eos_token_id = [2, 7]
    assert stop_ids(model.generation_config, tokenizer) == [2, 7]
    answers = TransformersSampler(model, tokenizer, top_p=1.0, max_new_tokens=40).sample(requests(2.0))
    assert any(answer.ids[-1] == 7 for answer in answers)
    for answer in answers:
        assert answer.finished == (answer.ids[-1] in (2, 7))
        assert not {2, 7} & set(answer.ids[:-1])
        assert "w7" not in answer.text


def test_a_prompt_that_leaves_no_room_is_named(directory: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"prompt 1: the prompt has 2045 tokens.*2048 positions"):
        sample(directory, tokenizer, requests(0.0, [[5], [5] * 2045]))
