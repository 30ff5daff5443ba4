"""What one comparison is about: the models, the pairs and the settings that every side shares."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.benchmarking.models import ParameterCount

BETA, ALPHA, CLIP = 0.1, 0.5, 1.0
# Large enough that each step changes the losses by much more than sides may differ.
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Problem:
    """Everything a side needs, as plain values that travel to its process.

    Attributes:
        policy: HF directory of the policy, which is also the reference.
        guide: HF directory of the guide.
        cache: Directory of the guidance cache.
        data: Prefix of the preprocessed pairs.
        max_length: Most tokens of prompt plus response.
        pairs: Pairs that a round times.
        global_pairs: Pairs of a step; divides ``pairs``.
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32`` or ``bf16``.
        threads: Of each process.
        parameters: Of the policy.
    """

    policy: str
    guide: str
    cache: str
    data: str
    max_length: int
    pairs: int
    global_pairs: int
    device: str
    dtype: str
    threads: int
    parameters: ParameterCount

    @property
    def timed_steps(self) -> int:
        return self.pairs // self.global_pairs

    @property
    def all_steps(self) -> int:
        """With the warm-up step, which comes first."""
        return 1 + self.timed_steps

    def step_indices(self, step: int) -> list[int]:
        """The pairs of a step, counted from 0: in order, again from the first after the last."""
        return [index % self.pairs for index in range(step * self.global_pairs, (step + 1) * self.global_pairs)]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Problem":
        values = json.loads(path.read_text())
        return cls(**{**values, "parameters": ParameterCount(**values["parameters"])})
