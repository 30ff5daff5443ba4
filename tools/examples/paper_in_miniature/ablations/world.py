"""What a seed consists of: texts as token ids, the SFT model, and preference pairs of its answers.

The same language, model and sizes as ``study.py``, but all in one process: trainings here last seconds, and starting
processes would take most of the time. Legend: N pairs, T tokens of a row, W tokens of the longest response.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_tgdpo.loss.methods import METHODS
from tools.examples.paper_in_miniature.ablations.pairs import EOS, IDS, VOCABULARY, Pairs, as_pairs, encode_prompts
from tools.examples.paper_in_miniature.ablations.sampling import Answer, sample
from tools.examples.paper_in_miniature.ablations.training import Recipe, order_of, shown_logps, train
from tools.examples.paper_in_miniature.base import write_base
from tools.examples.paper_in_miniature.language import (
    LENGTHS,
    MAX_WORDS,
    Lengths,
    Request,
    draw_answer,
    draw_request,
    score,
)

# By about how many words an answer has: those of each length, and where sampling cuts.
ANSWERS: Mapping[int, tuple[Lengths, int]] = {
    12: (LENGTHS, MAX_WORDS),
    50: ({"short": (40, 44), "medium": (48, 52), "long": (56, 60)}, 72),
    200: ({"short": (180, 188), "medium": (196, 204), "long": (212, 220)}, 240),
}


@dataclass(frozen=True)
class Size:
    """How large a seed is; the defaults are those of ``study.py``.

    Attributes:
        sft_examples: Answers that the SFT model learns from.
        prompts: Prompts for preference pairs.
        samples: Answers a prompt, of which the best and the worst make the pair.
        judged: Held-out prompts that a model is judged by.
        validation: Held-out prompts for validation pairs.
        temperature: Of all sampling.
        words: About as many has an answer; a key of :data:`ANSWERS`.
        sft_batch: Answers of a step of the SFT model.
    """

    sft_examples: int = 6000
    prompts: int = 1200
    samples: int = 5
    judged: int = 500
    validation: int = 300
    temperature: float = 0.8
    words: int = 12
    sft_batch: int = 64

    @property
    def lengths(self) -> Lengths:
        """Least and most words of each length that a prompt asks for."""
        return ANSWERS[self.words][0]

    @property
    def most_words(self) -> int:
        """Where sampling cuts an answer."""
        return ANSWERS[self.words][1]

    def of_answers(self, words: int) -> "Size":
        """For question c: the SFT model learns from as many tokens in as many steps, whatever the length."""
        return replace(
            self,
            words=words,
            sft_examples=self.sft_examples * 12 // words,
            sft_batch=round(self.sft_batch * 12 / words),
            prompts=min(self.prompts, 340),
            samples=3,
            judged=min(self.judged, 200),
            validation=8,
        )


@dataclass(frozen=True)
class World:
    """A seed.

    Attributes:
        seed: Its number.
        base: The SFT model.
        pairs: To train on.
        validation: Pairs of held-out prompts.
        reference: [N, 2, W] float32 token log-probs of ``base`` on ``pairs``, zeros behind.
        validation_reference: The same on ``validation``.
        prompts: Held-out prompts to judge by.
        size: Its size.
    """

    seed: int
    base: LlamaForCausalLM
    pairs: Pairs
    validation: Pairs
    reference: Tensor
    validation_reference: Tensor
    prompts: list[Request]
    size: Size

    def judge(self, model: LlamaForCausalLM) -> list[float]:
        """The oracle's score of one answer to each held-out prompt, drawn with the same random numbers every time."""
        answers = sample(
            model, encode_prompts(self.prompts), self.size.temperature, self.size.most_words, EOS, self.seed
        )
        return [
            round(_score(request, answer, self.size), 4) for request, answer in zip(self.prompts, answers, strict=True)
        ]


def new_model(seed: int) -> LlamaForCausalLM:
    """The untrained model of ``base.py``."""
    with TemporaryDirectory() as directory:
        write_base(Path(directory), seed)
        return LlamaForCausalLM.from_pretrained(directory)


def open_world(directory: Path, seed: int, size: Size) -> World:
    """A seed's world; made and written where it is not there yet. The same numbers follow from the same seed."""
    file = directory / "world.safetensors"
    model = new_model(seed)
    rng = Random(f"{seed} heldout")
    prompts = [draw_request(rng, held_out=True) for _ in range(size.judged)]
    if not file.exists():
        directory.mkdir(parents=True, exist_ok=True)
        _learn(model, seed, size)
        pairs = _draw_pairs(model, seed, size, held_out=False)
        validation = _draw_pairs(model, seed, size, held_out=True)
        found = {f"base.{name}": value.contiguous() for name, value in model.state_dict().items()}
        for name, part in (("pairs", pairs), ("validation", validation)):
            found |= {f"{name}.ids": part.ids, f"{name}.lengths": part.lengths,
                      f"{name}.reference": shown_logps(model, part)}  # fmt: skip
        aside = file.with_suffix(".new")
        save_file(found, aside)
        aside.replace(file)
    found = load_file(file)
    model.load_state_dict({name[5:]: value for name, value in found.items() if name.startswith("base.")})
    prompt_tokens = encode_prompts(prompts[:1]).shape[1]
    pairs, validation = (
        Pairs(found[f"{name}.ids"], found[f"{name}.lengths"], prompt_tokens) for name in ("pairs", "validation")
    )
    reference, validation_reference = found["pairs.reference"], found["validation.reference"]
    return World(seed, model.eval(), pairs, validation, reference, validation_reference, prompts, size)


def _learn(model: LlamaForCausalLM, seed: int, size: Size) -> None:
    """Supervised training with the values of ``sft.yaml``, in place."""
    rng = Random(f"{seed} sft")
    requests, responses = [], []
    for _ in range(size.sft_examples):
        requests.append(draw_request(rng, held_out=False))
        responses.append([IDS[word] for word in draw_answer(rng, requests[-1], size.lengths).split()] + [EOS])
    # Rejected responses have no part in it.
    pairs = as_pairs(responses, [[]] * len(responses), encode_prompts(requests))
    recipe = Recipe(epochs=4, rate=3e-3, schedule="cosine", warmup=0.05, global_pairs=size.sft_batch)
    train(model, pairs, METHODS["sft"], {}, {}, recipe, order_of(len(pairs), recipe, seed))


def _draw_pairs(model: LlamaForCausalLM, seed: int, size: Size, *, held_out: bool) -> Pairs:
    """The best and the worst of the model's answers to each prompt; prompts whose answers are all as good are left."""
    rng = Random(f"{seed} {'validation' if held_out else 'prompts'}")
    count = size.validation if held_out else size.prompts
    requests = [draw_request(rng, held_out=held_out) for _ in range(count)]
    repeated = [request for request in requests for _ in range(size.samples)]
    # Random numbers of its own: not those that models are judged by.
    key = (seed + 1) * 1_000_003 + held_out
    answers = sample(model, encode_prompts(repeated), size.temperature, size.most_words, EOS, key)
    kept, chosen, rejected = [], [], []
    for number, request in enumerate(requests):
        mine = answers[number * size.samples : (number + 1) * size.samples]
        scores = [_score(request, answer, size) for answer in mine]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        if scores[best] > scores[worst]:
            kept.append(request)
            chosen.append(mine[best].tokens)
            rejected.append(mine[worst].tokens)
    return as_pairs(chosen, rejected, encode_prompts(kept))


def _score(request: Request, answer: Answer, size: Size) -> float:
    text = [VOCABULARY[token] for token in answer.tokens[: len(answer.tokens) - answer.finished]]
    return score(request.prompt, " ".join(text), answer.finished, size.lengths)
