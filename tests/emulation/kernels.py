"""Transformer Engine's compiled module in plain torch: what its Python calls, by the names it calls it.

Stands in for ``transformer_engine_torch`` of 2.9.0 to 2.20.2. FP8 values are rounded as the kernels round them (torch's
own float8 dtypes, saturated), products are exact in fp32. Layouts are Hopper's, where a product needs its operands
row-wise, so that a weight whose transposed copy is missing or stale fails here too; of MXFP8 and NVFP4 they are
Blackwell's, and NVFP4 is rounded to the nearest and not rotated (a rotation of both operands leaves their product as it
is). What nothing here needs raises NotImplementedError when it is called.

``calls`` counts calls by kernel and operands; a tensor may say by its attribute ``counted_as`` what it is counted as.
"""

import enum
import importlib.metadata
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

calls: Counter[str] = Counter()

_VERSION = tuple(map(int, importlib.metadata.version("transformer_engine").split(".")[:2]))


def _enum(name: str, members: str, start: int = 0) -> Any:
    return enum.IntEnum(name, members, start=start)


# Its Python compares the names with its own from 2.17 on.
DType = enum.IntEnum(
    "DType",
    {
        "kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6, "kFloat8E4M3": 7, "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
)  # fmt: skip
_GEMMS = "GEMM{0}_INPUT GEMM{0}_WEIGHT GEMM{0}_OUTPUT"
FP8FwdTensors = _enum("FP8FwdTensors", " ".join(_GEMMS.format(n) for n in (1, 2, 3)))
FP8BwdTensors = _enum("FP8BwdTensors", " ".join(f"GRAD_OUTPUT{n} GRAD_INPUT{n}" for n in (1, 2, 3)))
Float8BlockScaleTensorFormat = _enum("Float8BlockScaleTensorFormat", "GEMM_READY COMPACT")
CommOverlapType = _enum("CommOverlapType", "RS AG")
CommOverlapAlgo = _enum("CommOverlapAlgo", "NONE")
# Compared too, from 2.19 on, where the second is gone.
NVTE_Fused_Attn_Backend = _enum(
    "NVTE_Fused_Attn_Backend",
    f"NVTE_No_Backend {'NVTE_F16_max512_seqlen ' * (_VERSION < (2, 19))}NVTE_F16_arbitrary_seqlen NVTE_FP8",
    start=-1,
)
NVTEScalingMode = _enum(
    "NVTEScalingMode",
    "NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING NVTE_BLOCK_SCALING_1D NVTE_BLOCK_SCALING_2D "
    "NVTE_NVFP4_1D_SCALING NVTE_INVALID_SCALING",
)
NVTERoutingMapFormat = _enum("NVTERoutingMapFormat", "BYTEMAP BITMAP_U8")
NVTEQBHistogramMode = _enum("NVTEQBHistogramMode", "TWO_KERNEL FUSED_ATOMIC")
NVTE_QKV_Layout = _enum(
    "NVTE_QKV_Layout",
    "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD NVTE_BSH3D NVTE_BSHD_BS2HD "
    "NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD NVTE_THD_TH2D NVTE_THD_THD_THD "
    "NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD NVTE_Paged_KV_BSHD_BSHD_BSHD "
    "NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD NVTE_Paged_KV_SBHD_SBHD_SBHD "
    "NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD NVTE_BHSD_BHSD_BHSD NVTE_QKV_Layout_NOT_SET",
)
NVTE_Bias_Type = _enum("NVTE_Bias_Type", "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI")
NVTE_Mask_Type = _enum(
    "NVTE_Mask_Type",
    "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK NVTE_CAUSAL_BOTTOM_RIGHT_MASK "
    "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
)
NVTE_Softmax_Type = _enum("NVTE_Softmax_Type", "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX")
NVTE_QKV_Format = _enum(
    "NVTE_QKV_Format",
    "NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD NVTE_THD_2BSHD NVTE_THD_2SBHD NVTE_BHSD "
    "NVTE_QKV_Format_NOT_SET",
)


class FP8TensorMeta:
    def __init__(self) -> None:
        self.scale = self.scale_inv = self.amax_history = None


class CommOverlapHelper:
    pass


class CommOverlap:
    pass


class CommOverlapP2P:
    pass


def _missing(name: str) -> Any:
    def missing(*args: Any, **kwargs: Any) -> None:
        del args, kwargs
        raise NotImplementedError(f"transformer_engine_torch.{name} is not emulated")

    return missing


def __getattr__(name: str) -> Any:
    """Other kernels: Transformer Engine's Python takes hold of many when it is imported."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(name)


# Those that its Python takes by way of a star import.
globals().update({name: _missing(name) for name in ("layernorm_fwd", "layernorm_bwd", "rmsnorm_bwd_add")})


def get_cublasLt_version() -> int:
    return 130100


def get_cudnn_version() -> int:
    return 91900


def get_num_cublas_streams() -> int:
    return 4


def device_supports_multicast() -> bool:
    return False


def get_stream_priority_range() -> tuple[int, int]:
    return 0, -5


def get_fused_attn_backend(*args: Any, **kwargs: Any) -> Any:
    del kwargs
    chosen = NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    # Given one description of the case, it also says why there is none.
    return (chosen, "") if len(args) == 1 else chosen


# ---- casts to FP8 and back

_TORCH = {
    DType.kFloat32: torch.float32, DType.kBFloat16: torch.bfloat16, DType.kFloat16: torch.float16,
    DType.kByte: torch.uint8, DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2,
}  # fmt: skip
_LARGEST = {DType.kFloat8E4M3: 448.0, DType.kFloat8E5M2: 57344.0}
_BLOCK = 128


def _cast(x: Tensor, scale: Tensor, dtype: Any) -> Tensor:
    """The bytes of FP8 values."""
    largest = _LARGEST[dtype]
    return (x.float() * scale).clamp(-largest, largest).to(_TORCH[dtype]).view(torch.uint8)


def _values(data: Tensor, dtype: Any) -> Tensor:
    return data.view(_TORCH[dtype]).float()


def _transposed(data: Tensor) -> Tensor:
    """[..., K] -> [K, ...], in memory."""
    flat = data.reshape(-1, data.shape[-1])
    return flat.t().contiguous().view([data.shape[-1], *data.shape[:-1]])


def _scale(amax: Tensor, largest: float, power_of_2: bool, epsilon: float) -> Tensor:
    amax = amax.float().clamp(min=epsilon)
    scale = torch.where((amax == 0) | ~torch.isfinite(amax), torch.ones_like(amax), largest / amax)
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale


def _largest_value(x: Tensor) -> Tensor:
    return x.float().abs().max() if x.numel() else torch.zeros(())


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    assert noop is None
    assert tensor.is_contiguous(), "the kernel takes contiguous tensors"
    kind = type(quantizer).__name__
    calls[f"quantize {getattr(tensor, 'counted_as', kind)}"] += 1
    if output is None:
        output = _internal(quantizer, tensor) if quantizer.internal else _empty_like(quantizer, tensor)
    x = tensor.detach()
    if kind == "Float8BlockQuantizer":
        return _quantize_blocks(x, quantizer, output)
    if kind in ("MXFP8Quantizer", "NVFP4Quantizer"):
        return _quantize_small_blocks(x, quantizer, output)
    if kind == "Float8Quantizer":
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax.view(()), _largest_value(x)).view(quantizer.amax.shape))
        scale = quantizer.scale
    else:
        assert kind == "Float8CurrentScalingQuantizer", kind
        amax = _largest_value(x)
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = _scale(amax, _LARGEST[quantizer.dtype], quantizer.force_pow_2_scales, quantizer.amax_epsilon)
        if hasattr(quantizer, "scale"):
            quantizer.scale.copy_(scale.view(1))
            quantizer.amax.copy_(amax.view(1))
    data = _cast(x, scale, quantizer.dtype)
    if output._data is not None:
        output._data.copy_(data.view(output._data.shape))
    output._scale_inv.copy_((1 / scale).view(output._scale_inv.shape))
    if output._transpose is not None:
        if quantizer.columnwise_usage:
            output._transpose.copy_(_transposed(data).view(output._transpose.shape))
        output._transpose_invalid = not quantizer.columnwise_usage
    output._fp8_dtype = quantizer.dtype
    return output


def split_quantize(
    tensor: Tensor, rows: Sequence[int], quantizers: Sequence[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    """Of experts, whose tokens follow one another, each part by a quantizer of its own."""
    del disable_bulk_allocation
    return [quantize(part, quantizer) for part, quantizer in zip(tensor.split(list(rows)), quantizers, strict=True)]


def fused_multi_row_padding(tokens: Tensor, out: Tensor, rows: Sequence[int], padded: Sequence[int]) -> None:
    """Zeros after the tokens of each expert."""
    for part, target in zip(tokens.split(list(rows)), out.split(list(padded)), strict=True):
        target[: len(part)].copy_(part)
        target[len(part) :].zero_()


def fused_multi_row_unpadding(tokens: Tensor, out: Tensor, padded: Sequence[int], rows: Sequence[int]) -> None:
    for part, target in zip(tokens.split(list(padded)), out.split(list(rows)), strict=True):
        target.copy_(part[: len(target)])


def _empty_like(quantizer: Any, tensor: Tensor) -> Any:
    return quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    """What ``make_empty`` of its quantizers calls from 2.16 on, as the module allocates it on Hopper."""
    del device, pin_memory
    copies = {"row": quantizer.rowwise_usage, "column": quantizer.columnwise_usage}
    transposed = [shape[-1], *shape[:-1]]
    sizes = {"row": shape, "column": transposed}
    data = {name: torch.empty(sizes[name], dtype=torch.uint8) if used else None for name, used in copies.items()}
    whole = {"shape": shape, "dtype": dtype}
    if type(quantizer).__name__ in ("MXFP8Quantizer", "NVFP4Quantizer"):
        return _empty_small_blocks(quantizer, shape, dtype)
    common = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if type(quantizer).__name__ == "Float8BlockQuantizer":
        from transformer_engine.pytorch import Float8BlockwiseQTensor, Float8BlockwiseQTensorStorage

        scales = {
            name: torch.empty(quantizer.get_scale_shape(shape, columnwise=name == "column")) if used else None
            for name, used in copies.items()
        }
        common |= {
            "rowwise_data": data["row"], "rowwise_scale_inv": scales["row"],
            "columnwise_data": data["column"], "columnwise_scale_inv": scales["column"],
            "is_2D_scaled": quantizer.block_scaling_dim == 2,
        }  # fmt: skip
        if quantizer.internal:
            return Float8BlockwiseQTensorStorage(**common, fake_dtype=dtype)
        return Float8BlockwiseQTensor(**whole, **common)
    from transformer_engine.pytorch import Float8Tensor, Float8TensorStorage

    common |= {"data": data["row"], "fp8_scale_inv": torch.empty(1), "data_transpose": data["column"]}
    if quantizer.internal:
        return Float8TensorStorage(**common, fake_dtype=dtype)
    return Float8Tensor(**whole, **common)


def _empty_small_blocks(quantizer: Any, shape: Sequence[int], dtype: torch.dtype) -> Any:
    made, parts = quantizer.storage_metadata(dtype), quantizer.inner_tensor_specs(tuple(shape))
    is_fp4 = type(quantizer).__name__ == "NVFP4Quantizer"
    if is_fp4:
        # Transposed copies are of two dimensions.
        flat = quantizer.inner_tensor_specs((math.prod(shape[:-1]), shape[-1]))
        parts |= {name: part for name, part in flat.items() if "columnwise" in name}
    tensors = {name.removeprefix("_"): torch.empty(size, dtype=kind) for name, (size, kind) in parts.items()}
    absent = dict.fromkeys(f"{side}_{part}" for side in ("rowwise", "columnwise") for part in ("data", "scale_inv"))
    if is_fp4:
        absent |= dict.fromkeys(("amax_rowwise", "amax_columnwise"))
    whole = {} if quantizer.internal else {"shape": shape, "dtype": dtype}
    return made["cls"](**whole, **absent | tensors, **made["nontensor_kwargs"])


def _internal(quantizer: Any, tensor: Tensor) -> Any:
    """A storage without being a tensor, as the module makes for what only its own products read."""
    whole = _empty_like(quantizer, tensor)
    if not isinstance(whole, Tensor):
        return whole
    if type(quantizer).__name__ in _BLOCK_STORAGES:
        import transformer_engine.pytorch

        storage = getattr(transformer_engine.pytorch, _BLOCK_STORAGES[type(quantizer).__name__])
        return storage(**whole.get_metadata())
    from transformer_engine.pytorch import Float8TensorStorage

    return Float8TensorStorage(
        data=whole._data,
        fp8_scale_inv=whole._scale_inv,
        fp8_dtype=quantizer.dtype,
        data_transpose=whole._transpose,
        quantizer=quantizer,
    )


_BLOCK_STORAGES = {
    "Float8BlockQuantizer": "Float8BlockwiseQTensorStorage",
    "MXFP8Quantizer": "MXFP8TensorStorage",
    "NVFP4Quantizer": "NVFP4TensorStorage",
}


def _block_scales(x: Tensor, quantizer: Any, columnwise: bool) -> tuple[Tensor, Tensor]:
    """[M, K] -> the scale of each element [M, K], and the inverse of each block's as the tensor holds it."""
    rows, columns = x.shape
    down, right = -rows % _BLOCK, -columns % _BLOCK
    padded = torch.nn.functional.pad(x.float().abs(), (0, right, 0, down))
    options = (_LARGEST[quantizer.dtype], quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    if quantizer.block_scaling_dim == 2:
        blocks = padded.view((rows + down) // _BLOCK, _BLOCK, (columns + right) // _BLOCK, _BLOCK)
        scale = _scale(blocks.amax(dim=(1, 3)), *options)
        return _over_blocks(scale, rows, columns), 1 / scale
    if columnwise:
        scale = _scale(padded[:, :columns].view((rows + down) // _BLOCK, _BLOCK, columns).amax(dim=1), *options)
        return scale.repeat_interleave(_BLOCK, 0)[:rows], 1 / scale
    scale = _scale(padded[:rows].view(rows, (columns + right) // _BLOCK, _BLOCK).amax(dim=2), *options)
    return scale.repeat_interleave(_BLOCK, 1)[:, :columns], (1 / scale).t()


def _over_blocks(scale: Tensor, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)[:rows, :columns]


def _quantize_blocks(x: Tensor, quantizer: Any, output: Any) -> Any:
    flat = x.reshape(-1, x.shape[-1])
    # To be gathered over ranks: nothing is transposed yet.
    compact = getattr(output, "_data_format", None) == Float8BlockScaleTensorFormat.COMPACT
    if quantizer.rowwise_usage and output._rowwise_data is not None:
        scale, inverse = _block_scales(flat, quantizer, False)
        output._rowwise_data.copy_(_cast(flat, scale, quantizer.dtype).view(output._rowwise_data.shape))
        _put(output._rowwise_scale_inv, inverse.t() if compact else inverse)
    if quantizer.columnwise_usage and output._columnwise_data is not None:
        scale, inverse = _block_scales(flat, quantizer, True)
        data = _cast(flat, scale, quantizer.dtype)
        output._columnwise_data.copy_((data if compact else _transposed(data)).view(output._columnwise_data.shape))
        _put(output._columnwise_scale_inv, inverse.t() if quantizer.block_scaling_dim == 2 else inverse)
    return output


def _put(target: Tensor, source: Tensor) -> None:
    """Scales are padded to what the products read."""
    target.zero_()
    target[tuple(slice(0, n) for n in source.shape)].copy_(source)


# ---- MXFP8 and NVFP4: small blocks of a row, or of a column

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_LARGEST_E2M1 = 6.0


def _amax_of_blocks(x: Tensor, size: int, square: bool = False) -> Tensor:
    """[M, K] -> [M, K / size]; of squares of values the same in ``size`` rows."""
    rows, columns = x.shape
    amax = x.abs().view(rows, columns // size, size).amax(-1)
    if square:
        amax = amax.view(rows // size, size, -1).amax(1).repeat_interleave(size, 0)
    return amax


def _to_mxfp8(x: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """[M, K] -> bytes [M, K], and biased exponents of the scales [M, K / 32] that values are multiplied by."""
    amax = _amax_of_blocks(x, 32)
    exponent = torch.ceil(torch.log2(amax / _LARGEST[quantizer.dtype])).clamp(-127, 127)
    exponent = torch.where(amax == 0, torch.full_like(exponent, -127.0), exponent)
    data = _cast(x, torch.exp2(-exponent).repeat_interleave(32, 1), quantizer.dtype)
    return data, (exponent + 127).to(torch.uint8)


def _from_mxfp8(data: Tensor, scale: Tensor, dtype: Any) -> Tensor:
    values = _values(data, dtype)
    scale = scale[: values.shape[0], : values.shape[1] // 32]
    return values * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)


def _to_nvfp4(x: Tensor, quantizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """[M, K] -> two values a byte [M, K / 2], scales [M, K / 16] in the bytes of E4M3, and the tensor's amax [1]."""
    largest = _largest_value(x)
    if quantizer.with_amax_reduction:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    whole = 448 * _LARGEST_E2M1 / largest if largest > 0 else torch.ones(())
    scale = (_amax_of_blocks(x, 16, quantizer.with_2d_quantization) / _LARGEST_E2M1 * whole).clamp(max=448)
    scale = scale.to(torch.float8_e4m3fn)
    spread = scale.float().repeat_interleave(16, 1)
    scaled = torch.where(spread > 0, x * whole / spread, torch.zeros_like(x))
    code = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    return (code[:, ::2] + 16 * code[:, 1::2]).to(torch.uint8), scale.view(torch.uint8), largest.view(1)


def _from_nvfp4(data: Tensor, scale: Tensor, largest: Tensor) -> Tensor:
    code = torch.stack([data & 15, data >> 4], -1).flatten(-2).long()
    values = _E2M1[code & 7] * (1 - 2.0 * (code >> 3))
    scale = scale[: values.shape[0], : values.shape[1] // 16].contiguous().view(torch.float8_e4m3fn).float()
    return values * scale.repeat_interleave(16, 1) * (largest / (448 * _LARGEST_E2M1))


def _quantize_small_blocks(x: Tensor, quantizer: Any, output: Any) -> Any:
    flat = x.reshape(-1, x.shape[-1]).float()
    for side, used in (("rowwise", quantizer.rowwise_usage), ("columnwise", quantizer.columnwise_usage)):
        data, scale = (getattr(output, f"_{side}_{part}") for part in ("data", "scale_inv"))
        if not used or data is None:
            continue
        own = flat if side == "rowwise" else flat.t().contiguous()
        if hasattr(output, "_fp4_dtype"):
            bytes_, scales, largest = _to_nvfp4(own, quantizer)
            getattr(output, f"_amax_{side}").copy_(largest)
        else:
            bytes_, scales = _to_mxfp8(own, quantizer)
            if side == "columnwise":
                # Scaled by columns, and not transposed.
                bytes_, scales = bytes_.t(), scales.t()
        data.copy_(bytes_.reshape(data.shape))
        _put(scale, scales)
    return output


def _small_block_values(tensor: Any, columnwise: bool) -> Tensor:
    """fp32 values [M, K] in the tensor's own orientation, from either copy."""
    side = "columnwise" if columnwise else "rowwise"
    data, scale = (getattr(tensor, f"_{side}_{part}") for part in ("data", "scale_inv"))
    if hasattr(tensor, "_fp4_dtype"):
        flat = data.reshape(data.shape[0], -1) if columnwise else data.reshape(-1, data.shape[-1])
        values = _from_nvfp4(flat, scale, getattr(tensor, f"_amax_{side}"))
        return values.t() if columnwise else values.view(*data.shape[:-1], -1)
    flat = data.reshape(-1, data.shape[-1])
    if columnwise:
        return _from_mxfp8(flat.t().contiguous(), scale.t().contiguous(), tensor._fp8_dtype).t()
    return _from_mxfp8(flat, scale, tensor._fp8_dtype).view(data.shape)


def _block_values(tensor: Any, columnwise: bool) -> Tensor:
    """fp32 values in the tensor's own orientation, from either copy."""
    if not hasattr(tensor, "_is_2D_scaled"):
        return _small_block_values(tensor, columnwise)
    scale = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
    data = tensor._columnwise_data if columnwise else tensor._rowwise_data
    if not columnwise:
        values = _values(data.reshape(-1, data.shape[-1]), tensor._fp8_dtype)
        rows, columns = values.shape
        spread = (
            _over_blocks(scale, rows, columns)
            if tensor._is_2D_scaled
            else scale.t().repeat_interleave(_BLOCK, 1)[:rows, :columns]
        )
        return (values * spread).view(data.shape)
    values = _values(data.reshape(data.shape[0], -1), tensor._fp8_dtype)
    rows, columns = values.shape
    if tensor._is_2D_scaled:
        return (values * _over_blocks(scale, rows, columns)).t()
    return (values * scale.repeat_interleave(_BLOCK, 0)[:columns, :rows].t()).t()


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    if hasattr(tensor, "_rowwise_data"):
        return _block_values(tensor, tensor._rowwise_data is None).to(_TORCH[dtype])
    return (_values(tensor._data, tensor._fp8_dtype) * tensor._scale_inv).to(_TORCH[dtype])


def fp8_transpose(data: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    del dtype
    result = _transposed(data)
    return result if out is None else out.copy_(result.view(out.shape))


def swap_first_dims(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    result = tensor.transpose(0, 1).contiguous()
    return result if out is None else out.copy_(result)


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.copy_(_largest_value(tensor).view(amax.shape))


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    bias = gradient.reshape(-1, gradient.shape[-1]).float().sum(0).to(gradient.dtype)
    return bias, quantize(gradient, quantizer)


def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, height: int, width: int, start: int, block: int
) -> None:
    whole = torch.zeros(height * width)
    whole[start : start + tensor.numel()] = tensor.float().flatten().abs()
    down, right = -height % block, -width % block
    padded = torch.nn.functional.pad(whole.view(height, width), (0, right, 0, down))
    blocks = padded.view((height + down) // block, block, (width + right) // block, block).amax(dim=(1, 3))
    amax[: blocks.shape[0], : blocks.shape[1]].copy_(blocks)


def fp8_block_scaling_partial_cast(
    tensor: Tensor, out: Tensor, scale: Tensor, height: int, width: int, start: int, block: int, dtype: Any
) -> None:
    assert block == _BLOCK
    own = _over_blocks(scale, height, width).reshape(-1)[start : start + tensor.numel()]
    out.copy_(_cast(tensor.flatten(), own, dtype))


# ---- scales of many tensors


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], largest: float, power_of_2: bool, epsilon: float
) -> None:
    del chunk, noop
    for amax, scale, inverse in zip(*lists, strict=True):
        value = _scale(amax, largest, power_of_2, epsilon)
        scale.copy_(value.view(scale.shape))
        inverse.copy_((1 / value).view(inverse.shape))


def fused_amax_and_scale_update_after_reduction(
    reduced: Tensor, histories: Sequence[Tensor], scales: Sequence[Tensor], algorithm: str, dtype: Any, margin: float
) -> None:
    """Delayed scaling: [history length, tensors] and [tensors] of each module."""
    calls["amax update"] += 1
    at = 0
    for history, scale in zip(histories, scales, strict=True):
        count = history.shape[1]
        history[0] = reduced[at : at + count]
        at += count
        amax = history.amax(0) if algorithm == "max" else history[0].clone()
        history.copy_(torch.roll(history, -1, 0))
        history[0].zero_()
        wanted = _LARGEST[dtype] / amax / 2**margin
        scale.copy_(torch.where((amax > 0) & torch.isfinite(amax), wanted, scale))


# ---- products, norms, attention


def _operand(tensor: Any, columnwise: bool) -> Tensor:
    """fp32 values of what a product reads: FP8 products on Hopper read row-wise data, so the other way round the
    transposed copy."""
    if hasattr(tensor, "_rowwise_data"):
        there = tensor._columnwise_data if columnwise else tensor._rowwise_data
        assert there is not None, "the product needs the other copy"
        return _block_values(tensor, columnwise)
    if not hasattr(tensor, "_scale_inv"):
        return tensor.float()
    if columnwise:
        copy = tensor._transpose
        assert copy is not None, "the product needs the transposed copy"
        assert not tensor._transpose_invalid, "the transposed copy is stale"
        return (_values(copy.reshape(copy.shape[0], -1), tensor._fp8_dtype) * tensor._scale_inv).t()
    assert tensor._data is not None, "the product needs row-wise data"
    return _values(tensor._data, tensor._fp8_dtype) * tensor._scale_inv


def generic_gemm(
    A: Any, transa: bool, B: Any, transb: bool, out: Tensor | None, quantizer: Any, out_dtype: Any,
    bias: Tensor | None, bias_dtype: Any, gelu: bool, gelu_in: Tensor | None, grad: bool, workspace: Tensor,
    workspace_size: int, accumulate: bool, split: bool, comm_overlap: Any = None, comm_type: Any = None,
    extra_output: Any = None, bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, None]:  # fmt: skip
    del bias_dtype, gelu_in, workspace, workspace_size, split, comm_type, extra_output, bulk_overlap, beta
    assert quantizer is None, "outputs are not quantised"
    assert not gelu
    assert comm_overlap is None
    calls[f"gemm {type(A).__name__} {type(B).__name__}"] += 1
    a, b = _operand(A, not transa), _operand(B, transb)
    shape = b.shape
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    if hasattr(A, "_scale_inv") or hasattr(A, "_rowwise_data"):
        assert not any(n % 16 for n in (*a.shape, *b.shape)), f"FP8 kernels take multiples of 16: {a.shape}, {b.shape}"
    result = (b.t() if transb else b) @ (a.t() if transa else a) * alpha
    if not transb:
        result = result.view(*shape[:-1], result.shape[-1])
    bias_gradient = None
    if bias is not None:
        if grad:
            bias_gradient = b.sum(0).to(bias.dtype)
        else:
            result = result + bias.float()
    if out is not None:
        assert out.shape == result.shape, (out.shape, result.shape)
        out.add_(result.to(out.dtype)) if accumulate else out.copy_(result)
        return out, bias_gradient, None, None
    dtype = getattr(A, "dtype", torch.bfloat16) if out_dtype is None else _TORCH[out_dtype]
    return result.to(dtype), bias_gradient, None, None


def te_general_grouped_gemm(
    A: Sequence[Any], transa: bool, B: Sequence[Any], transb: bool, out: Sequence[Tensor], out_dtype: Any,
    m_splits: Sequence[int], bias: Sequence[Tensor], bias_dtype: Any, single_output: bool, gelu_in: Sequence[Tensor],
    grad: bool, workspaces: Sequence[Tensor], workspace_size: int, accumulate: bool, split: bool, sms: int,
) -> Sequence[Tensor]:  # fmt: skip
    """A product for each expert; those of an expert without tokens are skipped, as in ``csrc/extensions/gemm.cpp``."""
    del gelu_in, workspaces, sms
    calls["grouped gemm"] += 1
    targets = out[0].split(list(m_splits)) if single_output else out
    for a, b, target, own, rows in zip(A, B, targets, bias, m_splits, strict=True):
        if rows == 0:
            if not accumulate:
                target.zero_()
            if grad:
                own.zero_()
            continue
        _, bias_gradient, _, _ = generic_gemm(
            a, transa, b, transb, target, None, out_dtype, own if own.numel() else None, bias_dtype, False, None, grad,
            own, workspace_size, accumulate, split,
        )  # fmt: skip
        if bias_gradient is not None:
            own.copy_(bias_gradient)
    return bias


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, zero_centered: bool
) -> tuple[Any, None, Tensor]:
    del margin
    exact = x.float()
    inverse = torch.rsqrt(exact.pow(2).mean(-1) + eps)
    scale = weight.float() + (1 if zero_centered else 0)
    y: Any = (exact * inverse[..., None] * scale).to(_TORCH.get(dtype, dtype))
    if quantizer is not None:
        y = quantize(y, quantizer, out)
    elif out is not None:
        y = out.copy_(y)
    return y, None, inverse


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    del margin
    exact, gradient = x.float(), dy.float()
    inverse = inverse.view(*x.shape[:-1], 1)
    normal, scaled = exact * inverse, gradient * (weight.float() + (1 if zero_centered else 0))
    dx = (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * inverse
    return dx.to(x.dtype), (gradient * normal).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


def fused_rope_forward(t: Tensor, freqs: Tensor, start: None, layout: Any, interleaved: bool, *rest: Any) -> Tensor:
    """Half against half, in fp32."""
    del rest
    assert start is None
    assert layout == NVTE_QKV_Format.NVTE_SBHD
    assert not interleaved
    return _rotated(t, freqs)


def fused_rope_backward(gradient: Tensor, freqs: Tensor, *rest: Any) -> Tensor:
    del rest
    return _rotated(gradient, -freqs)


def _rotated(t: Tensor, angles: Tensor) -> Tensor:
    first, second = t.float().chunk(2, -1)
    return (t.float() * angles.cos() + torch.cat((-second, first), -1) * angles.sin()).to(t.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, scale: float, window: Any) -> Tensor:
    from tests.fake_te import varlen

    return varlen(q.float(), k.float(), v.float(), cu_q, cu_kv, scale, tuple(window)).to(q.dtype)


def _attention_operands(arguments: Sequence[Any]) -> tuple[list[Tensor], Any]:
    """Tensors in their order, and the window. What stands between them differs from version to version."""
    assert NVTE_QKV_Layout.NVTE_THD_THD_THD in [a for a in arguments if isinstance(a, NVTE_QKV_Layout)]
    (mask,) = (a for a in arguments if isinstance(a, NVTE_Mask_Type))
    assert mask == NVTE_Mask_Type.NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK
    window = next(a for a in arguments if isinstance(a, tuple | list) and len(a) == 2)
    return [a for a in arguments if isinstance(a, Tensor)], window


def fused_attn_fwd(max_q: int, max_kv: int, training: bool, scale: float, *rest: Any, **options: Any) -> list[Tensor]:
    del max_q, max_kv, training, options
    (cu_q, cu_kv, q, k, v, *_), window = _attention_operands(rest)
    out = _attend(q, k, v, cu_q, cu_kv, scale, window)
    # What backward is given: softmax statistics and the generator's state, unused here.
    return [out, torch.zeros(*q.shape[:2], 1), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(max_q: int, max_kv: int, scale: float, *rest: Any, **options: Any) -> list[Tensor | None]:
    del max_q, max_kv, options
    (cu_q, cu_kv, q, k, v, _, gradient, *_), window = _attention_operands(rest)
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        again = _attend(*inputs, cu_q, cu_kv, scale, window)
        return [*torch.autograd.grad(again, inputs, gradient), None, None]


# ---- the optimizer


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], scale: Any) -> None:
    del chunk, noop
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor | None]:
    del chunk, noop
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().view(1), norms if per_tensor else None


def multi_tensor_adam(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], lr: float, beta1: float, beta2: float, eps: float,
    step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    del chunk, noop
    assert mode == 1, "AdamW"
    first = 1 - beta1**step if bias_correction else 1
    second = 1 - beta2**step if bias_correction else 1
    # With main weights the parameters are rounded from them.
    for given, parameter, mean, square, *main in zip(*lists, strict=True):
        weight = main[0] if main else parameter
        assert weight.dtype == torch.float32
        gradient, m, v = given.float(), mean.float(), square.float()
        m.mul_(beta1).add_(gradient, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weight.add_((m / first) / ((v / second).sqrt() + eps) + weight_decay * weight, alpha=-lr)
        for moment, updated in ((mean, m), (square, v)):
            if moment.dtype != torch.float32:
                moment.copy_(updated)
        if main:
            parameter.copy_(weight)


def multi_tensor_adam_param_remainder(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], *settings: Any
) -> None:
    """Weights as bf16, rounded to nearest with halves upwards, and int16 remainders (``multi_tensor/adam.cu``)."""
    for given, parameter, mean, square, rest in zip(*lists, strict=True):
        high = parameter.view(torch.int16).to(torch.int32) - (rest < 0).to(torch.int32)
        weight = ((high << 16) | (rest.to(torch.int32) & 0xFFFF)).view(torch.float32)
        multi_tensor_adam(chunk, noop, [[given], [weight], [mean], [square]], *settings)
        bits = weight.view(torch.int32)
        low = (bits & 0xFFFF).to(torch.int16)
        rest.copy_(low)
        parameter.view(torch.int16).copy_(((bits >> 16) + (low < 0)).to(torch.int16))
