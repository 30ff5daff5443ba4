"""RMSNorm for the local layer spec: PyTorch only, and usable with sequence parallelism.

megatron-core's own fallback (``WrappedTorchNorm``) refuses sequence parallelism. Under it every tensor-parallel rank
normalises its slice of the sequence, so the weight's gradient is a partial sum; marking the parameter
``sequence_parallel`` makes megatron-core add those sums over the tensor group (``finalize_model_grads.py``).
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, with the constructor that megatron-core gives its norms.

    Args:
        config: The model's configuration; ``params_dtype``, ``sequence_parallel``, ``use_cpu_initialization`` and
            ``layernorm_zero_centered_gamma`` (the scale is 1 + weight) count.
        hidden_size: Size of the normalised dimension.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises ``hidden`` [..., hidden_size]; same shape and dtype out."""
        if not self.zero_centered:
            return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)
        # In float32 until the end: 1 + weight would lose most of a bf16 weight's digits.
        scale = 1.0 + self.weight.float()
        return F.rms_norm(hidden.float(), (hidden.shape[-1],), scale, self.eps).type_as(hidden)
