"""The ablations' own forward pass is transformers'; alpha 0 is DPO; rewards and labels are what they should be."""

import copy

import pytest
import torch

from megatron_tgdpo.loss.methods import METHODS
from tools.examples.paper_in_miniature.ablations.arms import QUEUE
from tools.examples.paper_in_miniature.ablations.forward import response_logps
from tools.examples.paper_in_miniature.ablations.laboratory import by_sentence
from tools.examples.paper_in_miniature.ablations.pairs import EOS, VOCABULARY, Pairs, as_pairs, encode_prompts
from tools.examples.paper_in_miniature.ablations.training import Recipe, order_of, shown_logps, train
from tools.examples.paper_in_miniature.ablations.world import new_model
from tools.examples.paper_in_miniature.language import Request

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
