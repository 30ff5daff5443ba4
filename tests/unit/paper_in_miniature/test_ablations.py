"""The ablations' forward pass is transformers', their trainings are those of ``tgdpo train``; alpha 0 is DPO; rewards,
labels and answers are what they should be."""

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from megatron_tgdpo.loss.methods import METHODS
from tests.distributed.common import read_metrics
from tests.processes import run_forked
from tools.examples.paper_in_miniature.ablations import __main__ as command
from tools.examples.paper_in_miniature.ablations import answers
from tools.examples.paper_in_miniature.ablations.answers import ANSWERS
from tools.examples.paper_in_miniature.ablations.arms import DEVIATIONS, QUEUE, long_answers
from tools.examples.paper_in_miniature.ablations.figures import FIGURES
from tools.examples.paper_in_miniature.ablations.forward import response_logps
from tools.examples.paper_in_miniature.ablations.laboratory import Laboratory, by_sentence
from tools.examples.paper_in_miniature.ablations.pairs import EOS, IDS, VOCABULARY, Pairs, as_pairs, encode_prompts
from tools.examples.paper_in_miniature.ablations.training import Recipe, order_of, shown_logps, train
from tools.examples.paper_in_miniature.ablations.world import Size, new_model
from tools.examples.paper_in_miniature.base import write_base
from tools.examples.paper_in_miniature.language import Request, draw_answer, draw_request

REQUEST = Request("c", 2, "short", "odd")


def some_pairs() -> Pairs:
    ids = {word: number for number, word in enumerate(VOCABULARY)}
    chosen = ["c1 e3 a5 c3", "c1 e3 a5 c3 e1 a1", "c1"]
    rejected = ["c2 e4", "f1", "c1 e3 a5 c3 e1 a1 c5"]
    responses = [[[ids[word] for word in text.split()] + [EOS] for text in side] for side in (chosen, rejected)]
    return as_pairs(responses[0], responses[1], encode_prompts([REQUEST] * len(chosen)))


def test_forward_is_that_of_transformers() -> None:
    model, pairs = new_model(3), some_pairs()
    found, lengths = response_logps(model, pairs, [2, 0, 1])
    assert lengths.tolist() == pairs.lengths[[2, 0, 1]].flatten().tolist()
    expected = []
    for pair in (2, 0, 1):
        for side in (0, 1):
            row = pairs.ids[pair, side, : pairs.prompt_tokens + pairs.lengths[pair, side]]
            logps = model(row[None, :-1]).logits[0].log_softmax(-1)
            expected.append(logps.gather(1, row[1:, None])[pairs.prompt_tokens - 1 :, 0])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    direction = torch.randn(len(found), generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.autograd.grad((v * direction).sum(), list(model.parameters()), retain_graph=True)
                    for v in (found, torch.cat(expected)))  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_alpha_0_trains_as_dpo() -> None:
    base, pairs = new_model(3), some_pairs()
    reference, guide = shown_logps(base, pairs), shown_logps(new_model(4), pairs)
    recipe = Recipe(epochs=3, rate=3e-3, global_pairs=2)
    losses = {
        alpha: train(
            copy.deepcopy(base),
            pairs,
            METHODS["dpo" if alpha is None else "tgdpo"],
            {"beta": 0.3} | ({} if alpha is None else {"alpha": alpha}),
            {"reference": reference} | ({} if alpha is None else {"guide": guide}),
            recipe,
            order_of(len(pairs), recipe, 0),
        )
        for alpha in (None, 0.0, 2.0)
    }
    assert losses[0.0] == losses[None]
    assert losses[2.0] != losses[None]
    assert losses[None][0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[None][-1] < 0.6


def test_credits_are_the_oracles() -> None:
    credits_ = some_pairs().credits()
    assert credits_[0].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, -1, 0, 0, 0, 0, 0]]


def test_swapped_labels() -> None:
    pairs = some_pairs()
    swapped, wrong = pairs.swapped(1 / 3, 0)
    assert wrong.sum() == 1
    assert torch.equal(swapped.ids[wrong], pairs.ids[wrong].flip(1))
    assert torch.equal(swapped.lengths[~wrong], pairs.lengths[~wrong])


def test_by_sentence_takes_the_mean_of_four_words_and_keeps_the_sum() -> None:
    rewards = torch.tensor([[[1.0, 2, 3, 6, 10, 20, 0], [4, 8, 0, 0, 0, 0, 0]]])
    found = by_sentence(rewards, torch.tensor([[6, 2]]))
    assert found.tolist() == [[[3, 3, 3, 3, 15, 15, 0], [6, 6, 0, 0, 0, 0, 0]]]


def test_names_of_arms_tell_them_apart() -> None:
    arms = {arm for stage in QUEUE for arm in stage.arms}
    assert len({arm.name for arm in arms}) == len(arms)


def test_losses_and_rates_are_those_of_tgdpo_train(tmp_path: Path) -> None:
    """The same pairs, seed and options, over two epochs whose last step is short."""
    rng = Random(1)
    requests = [draw_request(rng, held_out=False) for _ in range(10)]
    texts = [[draw_answer(rng, request) for request in requests] for _ in range(2)]
    records = [
        {
            "prompt": [{"role": "user", "content": request.prompt}],
            **{
                name: [{"role": "assistant", "content": text}]
                for name, text in zip(("chosen", "rejected"), both, strict=True)
            },
        }
        for request, *both in zip(requests, *texts, strict=True)
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    write_base(tmp_path / "policy", 3)
    write_base(tmp_path / "guide", 4)
    ids = [[[IDS[word] for word in text.split()] + [EOS] for text in side] for side in texts]
    pairs = as_pairs(ids[0], ids[1], encode_prompts(requests))
    base = new_model(3)
    logps = {"reference": shown_logps(base, pairs), "guide": shown_logps(new_model(4), pairs)}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "dpo": ("constant", {"beta": 0.3}),
        "tgdpo": ("cosine", {"beta": 0.3, "alpha": 2.0}),
    }
    roles = {"dpo": ("policy",), "tgdpo": ("policy", "guide")}
    configs = [
        {
            "model": {role: str(tmp_path / role) for role in roles[name]},
            "data": {"train": str(tmp_path / "pairs.jsonl"), "max_length": 64, "workers": 1},
            "loss": {"method": name, **options},
            "batch": {"global_pairs": 4, "tokens_per_micro_batch": 256},
            "optimizer": {"lr": 3e-3, "schedule": schedule, "warmup_ratio": 0.3},
            "precision": {"dtype": "fp32"},
            "train": {"epochs": 2, "seed": 7},
            "preflight": {"enabled": False},
            "output_dir": str(tmp_path / name),
        }
        for name, (schedule, options) in cases.items()
    ]
    (tmp_path / "cases.json").write_text(json.dumps([{"config": config} for config in configs]))
    run_forked("tests.distributed.worker_train", [str(tmp_path / "cases.json")])
    for name, (schedule, options) in cases.items():
        recipe = Recipe(epochs=2, rate=3e-3, schedule=schedule, warmup=0.3, global_pairs=4)
        order = order_of(len(pairs), recipe, 7)
        frozen = {role: logps[role] for role in METHODS[name].frozen}
        losses = train(copy.deepcopy(base), pairs, METHODS[name], options, frozen, recipe, order)
        steps = read_metrics(tmp_path / name)
        assert losses[0] == pytest.approx(0.693147, abs=1e-5)
        assert abs(losses[-1] - losses[0]) > 0.05
        # fp32 in two orders of summation, over as many steps of Adam.
        assert [step["train/loss"] for step in steps] == pytest.approx(losses, rel=1e-4)
        rates = [recipe.rate_of(done, order.steps) for done in range(order.steps)]
        assert [step["train/lr"] for step in steps] == pytest.approx(rates, rel=1e-6, abs=1e-12)


TINY = Size(sft_examples=64, prompts=12, samples=3, judged=4, validation=4)


def test_long_answers_have_alphas_by_the_deviation_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laboratory = Laboratory(tmp_path, TINY, (1e-3,))
    for words in (12, 50):
        one = laboratory.of_answers(words)
        mean = one.world(1).pairs.lengths.float().mean().item()
        assert mean < 25 if words == 12 else 25 < mean <= one.size.most_words + 1
        for deviation, arm in zip(DEVIATIONS, long_answers()[1:], strict=True):
            found = one.result(1, arm)
            assert found["weight_std"] == pytest.approx(deviation, rel=1e-4)
            assert found["weight_std"] == pytest.approx(found["alpha"] * found["reward_std"], rel=0.5)
    assert ANSWERS["c"](laboratory) == {"seeds": [], "words": {}}  # 200 words are not done
    answers.report(laboratory, ["c"], tmp_path / "results", tmp_path / "images")
    assert not list(tmp_path.glob("results/*"))
    monkeypatch.setattr(answers, "WORDS", (12, 50))
    found = ANSWERS["c"](laboratory)
    assert found["seeds"] == [1]
    for entry in found["words"].values():
        assert list(entry["arms"]) == ["dpo", *(f"deviation {deviation:g}" for deviation in DEVIATIONS)]
        for deviation in DEVIATIONS:
            arm = entry["arms"][f"deviation {deviation:g}"]
            assert 0 <= arm["over_dpo"]["value"] <= 1
            assert arm["weight_std"]["value"] == pytest.approx(deviation, abs=1e-4)
    FIGURES["c"](found, tmp_path / "c.svg")
    assert "50 words" in (tmp_path / "c.svg").read_text(encoding="utf-8")


def test_every_question_has_an_answer() -> None:
    assert tuple(sorted(ANSWERS)) == command.QUESTIONS
