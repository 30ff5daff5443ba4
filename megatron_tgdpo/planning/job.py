"""What is to be planned: the models and the batch."""

import math
from dataclasses import dataclass, field, replace

from transformers import PretrainedConfig

from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.planning.activations import Pack, gathered_keys
from megatron_tgdpo.planning.memory import Sources


@dataclass(frozen=True)
class Batch:
    """What one optimizer step works on.

    Attributes:
        global_pairs: Pairs per step, over all ranks.
        pair_tokens: Mean tokens of a pair, both sequences with their prompts.
        response_share: Part of those tokens that are response tokens, of which log-probs are taken.
        shared_prompts: Whether a pack holds a pair's prompt once.
    """

    global_pairs: int
    pair_tokens: int
    response_share: float
    shared_prompts: bool

    @property
    def packed_pair_tokens(self) -> float:
        """Mean tokens that a pair takes in a pack."""
        return self.pair_tokens * ((1 + self.response_share) / 2 if self.shared_prompts else 1)

    @property
    def packed_response_share(self) -> float:
        """Part of a pack's tokens that are response tokens."""
        return self.response_share * self.pair_tokens / self.packed_pair_tokens

    @property
    def gathered_keys(self) -> float:
        """Keys, per token of a pack, that are gathered for the segments of shared prompts; 0 without them."""
        return self.pair_tokens / self.packed_pair_tokens if self.shared_prompts else 0.0

    def packs(self, seq_length: int) -> int:
        """Packs that the pairs fill, if none has room left; pairs of varied lengths leave little."""
        return math.ceil(self.global_pairs * self.packed_pair_tokens / seq_length)

    def micro_batches(self, seq_length: int, data: int) -> int:
        """Packs per data-parallel rank and step; ranks short of one run an empty pack."""
        return math.ceil(self.packs(seq_length) / data)


@dataclass(frozen=True)
class Job:
    """A training run on paper.

    Attributes:
        policy: HF config of the policy.
        frozen: HF configs of the reference and, for TGDPO, the guide.
        pack: One micro batch.
        batch: One step.
        pack_given: Whether its tokens are the user's; else a layout that they do not divide by has them rounded up.
        sources: What the models are made of.
    """

    policy: PretrainedConfig
    frozen: tuple[PretrainedConfig, ...]
    pack: Pack
    batch: Batch
    pack_given: bool = True
    sources: Sources = field(default_factory=Sources)

    def under(self, layout: ParallelLayout) -> "Job":
        """The job with a pack that the layout takes.

        Raises:
            UserError: The tokens are given, and do not divide.
        """
        tokens, ranks = self.pack.tokens, layout.tensor if layout.sequence_parallel else 1
        parts = ranks if layout.context == 1 else layout.context * math.lcm(2, ranks)
        if tokens % parts == 0:
            return self
        rounded = -(-tokens // parts) * parts
        if self.pack_given and layout.context == 1:
            raise UserError(
                f"packs of {tokens} tokens are not divisible by {ranks} tensor ranks: take {rounded} "
                "(batch.tokens_per_micro_batch, or --pack-tokens), or do without sequence parallelism"
            )
        if self.pack_given:
            raise UserError(
                f"packs of {tokens} tokens are not divisible by {parts}, two chunks for each of {layout.context} "
                f"context ranks over {ranks} tensor ranks: take {rounded} "
                "(batch.tokens_per_micro_batch, or --pack-tokens)"
            )
        return replace(self, pack=replace(self.pack, tokens=rounded))

    def local_pack(self, layout: ParallelLayout) -> Pack:
        """The part of a pack that one of its context ranks holds."""
        if layout.context == 1:
            return self.pack
        keys = gathered_keys(layout.context, max(0.0, self.batch.gathered_keys - 1))
        return replace(self.pack, tokens=self.pack.tokens // layout.context, gathered_keys=keys)

    @property
    def models(self) -> tuple[PretrainedConfig, ...]:
        return (self.policy, *self.frozen)

    def micro_batches(self, layout: ParallelLayout) -> int:
        """Packs per data rank and step; with chunks they are filled up to whole groups of as many as stages."""
        packs = self.batch.micro_batches(self.pack.tokens, layout.data)
        return packs if layout.virtual == 1 else -(-packs // layout.pipeline) * layout.pipeline
