"""Metrics of the final table, each against a slower or hand-made computation."""

import math
from random import Random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools.examples.quickstart.evaluate import format_table, guide_metrics, preference_metrics, sampling_metrics
from tools.examples.quickstart.scoring import Response, auc, response_logps


def brute_force_auc(scores: list[float], labels: list[bool]) -> float:
    positives = [s for s, label in zip(scores, labels, strict=True) if label]
    negatives = [s for s, label in zip(scores, labels, strict=True) if not label]
    wins = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [2, 7, 10**9])
def test_auc_counts_pairs_and_ties(seed: int, levels: int) -> None:
    rng = Random(seed)
    labels = [rng.random() < 0.3 for _ in range(150)]
    scores = [float(rng.randrange(levels)) + 2 * label for label in labels]
    assert auc(scores, labels) == pytest.approx(brute_force_auc(scores, labels), abs=1e-12)


def test_auc_at_its_ends() -> None:
    assert auc([1.0, 2.0, 3.0], [False, False, True]) == 1.0
    assert auc([1.0, 2.0, 3.0], [True, False, False]) == 0.0
    assert auc([5.0, 5.0, 5.0], [True, False, True]) == 0.5
    assert math.isnan(auc([1.0, 2.0], [True, True]))


def test_response_logps_equal_one_by_one() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rng = Random(0)
    responses = []
    for prompt_length, length in [(3, 5), (1, 1), (6, 2), (2, 9), (4, 4)]:
        ids = [[rng.randrange(3, 31) for _ in range(n)] for n in (prompt_length, length)]
        responses.append(Response(ids[0], ids[1], [False] * length, [False] * length))
    results = response_logps(model, responses)
    for response, values in zip(responses, results, strict=True):
        context = list(response.prompt_ids)
        for token, value in zip(response.response_ids, values.tolist(), strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context])).logits[0, -1]
            expected = logits[token].item() - math.log(sum(math.exp(x) for x in logits.tolist()))
            assert value == pytest.approx(expected, abs=1e-5)
            context.append(token)
        assert values.shape == (len(response.response_ids),)


def test_preference_metrics() -> None:
    logps = [torch.tensor([-1.0, -2.0]), torch.tensor([-4.0]), torch.tensor([-6.0]), torch.tensor([-2.0])]
    base = [torch.tensor([-2.0, -2.0]), torch.tensor([-3.0]), torch.tensor([-7.0]), torch.tensor([-4.0])]
    # Log-ratios: chosen +1, rejected -1; then chosen +1, rejected +2.
    metrics = preference_metrics(logps, base, beta=0.5)
    assert metrics["accuracy"] == 0.5
    assert metrics["margin"] == pytest.approx(0.5 * (2 - 1) / 2)
    # By itself: -3 against -4, then -6 against -2.
    assert preference_metrics(logps, None, beta=0.5) == {"accuracy": 0.5, "margin": None}


def test_sampling_metrics() -> None:
    prompt = "write two sentences about the harbor"
    answers = [("the salty sailor rows the boat. every fool moors the tidal net.", 14), ("", 1)]
    metrics = sampling_metrics([prompt, prompt], answers)
    assert metrics["bad_words"] == pytest.approx(1 / 8)
    assert metrics["quality"] == pytest.approx((7 / 8 + 0) / 2)
    assert metrics["well_formed"] == 0.5
    assert metrics["right_count"] == 0.5
    assert metrics["tokens"] == 7.5


def test_guide_that_lowers_bad_tokens_finds_them() -> None:
    response = Response([1], [5, 6, 7, 2], [False, True, False, False], [True, True, True, False])
    base = [torch.tensor([-1.0, -1.0, -3.0, -1.0])]
    guide = [torch.tensor([-0.5, -3.0, -3.0, -1.0])]
    metrics = guide_metrics(guide, base, [response], beta=0.1)
    assert metrics["auc"] == metrics["auc_content"] == 1.0
    # By surprisal the bad token ties with two others and is below one: (0 + 0.5 + 0.5) / 3; among content words 0.25.
    assert metrics["surprisal_auc"] == pytest.approx(1 / 3)
    assert metrics["surprisal_auc_content"] == pytest.approx(0.25)
    assert metrics["reward_bad"] == pytest.approx(-0.2)
    assert metrics["reward_good"] == pytest.approx((0.05 + 0 + 0) / 3)
    assert (metrics["tokens"], metrics["bad_tokens"]) == (4, 1)


def test_table_columns_line_up() -> None:
    row = {"accuracy": 0.5, "quality": 0.25, "bad_words": 0.1, "well_formed": 1.0, "right_count": 0.9, "tokens": 31.25}
    table = format_table({"base": {**row, "margin": None}, "tgdpo": {**row, "margin": 1.5}}).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[1].split() == ["base", "50.0%", "-", "0.250", "10.0%", "100.0%", "90.0%", "31.2"]
    assert table[2].split()[2] == "+1.500"
