"""What one comparison is about: the models, the pairs and the settings that all variants share."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

BETA, ALPHA, CLIP = 0.1, 0.5, 1.0
# Each step then changes the losses by far more than the variants may differ.
LEARNING_RATE = 1e-5
# Of adapters.
LORA_RANK, LORA_ALPHA, LORA_LEARNING_RATE = 16, 32, 1e-3


@dataclass(frozen=True)
class Problem:
    """All that a variant needs to know, as plain values that travel to its process.

    The first step warms up; the following ones are timed, and take every pair once.

    Attributes:
        directory: Scratch space.
        policy: HF directory of the policy, which is the reference too.
        guide: HF directory of the guide.
        adapter: ``peft`` directory of the adapter that the policy begins with, in variants with LoRA.
        guide_adapter: That of the guide, there.
        data: Prefix of the preprocessed pairs.
        tokenizer: That they were made with.
        max_length: Most tokens of prompt plus response.
        pairs: Pairs of the dataset.
        global_pairs: Pairs of a step; divides ``pairs``.
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32`` or ``bf16``.
        threads: Of a variant's process.
    """

    directory: str
    policy: str
    guide: str
    adapter: str
    guide_adapter: str
    data: str
    tokenizer: str
    max_length: int
    pairs: int
    global_pairs: int
    device: str
    dtype: str
    threads: int

    @property
    def steps(self) -> int:
        """The warm-up step and the timed ones."""
        return 1 + self.pairs // self.global_pairs

    def step_indices(self, step: int) -> list[int]:
        """Dataset indices of the pairs of a step, counted from 1, in order and again from the first after the last."""
        stream = range((step - 1) * self.global_pairs, step * self.global_pairs)
        return [index % self.pairs for index in stream]

    @property
    def cache(self) -> str:
        """Directory of the guidance cache."""
        return str(Path(self.directory) / "cache")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Problem":
        return cls(**json.loads(path.read_text(encoding="utf-8")))
