"""The dtypes that weights are stored in, by name."""

from collections.abc import Mapping

import torch

# In configs, on command lines and in a checkpoint's metadata.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# In the header of a safetensors file.
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def dtype_name(dtype: torch.dtype, names: Mapping[str, torch.dtype] = DTYPES) -> str:
    """The name of a dtype in one of the tables above.

    Raises:
        KeyError: It has none.
    """
    for name, named in names.items():
        if named == dtype:
            return name
    raise KeyError(dtype)
