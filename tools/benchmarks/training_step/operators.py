"""Which part of a step an operator belongs to, by its name and those of the operators and ranges that it runs in."""

from collections.abc import Sequence

STEP = "benchmark step"
PYTHON = "Python and launches"
IDLE = "GPU idle"
GROUPS = (
    "matrix products of layers",
    "matrix products of log-probs",
    "log-probs, the rest",
    "attention",
    "norms, activations, rotary",
    "copies, fills, indexing",
    "gradient accumulation",
    "zeroing, norm, clipping, update",
    "collectives",
)
_LAYERS, _LOGP_PRODUCTS, _LOGPS, _ATTENTION, _ELEMENTWISE, _COPIES, _ACCUMULATION, _UPDATE, _COLLECTIVES = GROUPS

_PRODUCTS = {
    "aten::mm", "aten::mm_out", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::dot",
    "aten::matmul", "aten::linear", "aten::_scaled_mm",
}  # fmt: skip
_MOVES = {
    "aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::stack", "aten::_to_copy", "aten::to",
    "aten::fill_", "aten::zero_", "aten::zeros", "aten::zeros_like", "aten::new_zeros", "aten::full", "aten::index",
    "aten::index_select", "aten::index_put_", "aten::index_add_", "aten::gather", "aten::scatter_add_",
    "aten::embedding", "aten::embedding_dense_backward", "aten::slice_backward", "aten::select_backward",
    "aten::repeat_interleave", "aten::where", "aten::masked_fill", "aten::constant_pad_nd",
}  # fmt: skip
# They only describe memory anew, or ask for it: what they take is the call.
_VIEWS = {
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::permute", "aten::transpose", "aten::t", "aten::slice",
    "aten::select", "aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::expand",
    "aten::expand_as", "aten::unsqueeze", "aten::squeeze", "aten::flatten", "aten::unflatten", "aten::as_strided",
    "aten::narrow", "aten::detach", "aten::detach_", "aten::alias", "aten::empty", "aten::empty_like",
    "aten::empty_strided", "aten::new_empty", "aten::resize_", "aten::set_", "aten::result_type", "aten::is_nonzero",
    "aten::item", "aten::_local_scalar_dense", "aten::lift_fresh", "detach",
}  # fmt: skip
# Ours, TRL's and PyTorch's ranges in which log-probs are computed, forward and backward.
_LOGP_RANGES = ("_TokenLogps", "LogSoftmax", "log_softmax", "FusedLinear", "logsumexp", "LogsumexpBackward")
_UPDATE_RANGES = ("Optimizer.", "tgdpo::zero_gradients", "tgdpo::clip", "tgdpo::update")
_UPDATE_OPERATORS = ("aten::linalg_vector_norm", "aten::_foreach_norm")


def group_of(name: str, within: Sequence[str]) -> str:
    """The group of one operator.

    Args:
        name: Of the operator or range whose own time is to be placed.
        within: Names of what it ran in, outermost first.
    """
    names = (*within, name)

    def inside(marks: Sequence[str]) -> bool:
        return any(mark in one for one in names for mark in marks)

    if inside(("c10d::", "gloo:", "nccl:", "record_param_comms")):
        return _COLLECTIVES
    if inside(_UPDATE_RANGES) or name in _UPDATE_OPERATORS:
        return _UPDATE
    if inside(_LOGP_RANGES):
        return _LOGP_PRODUCTS if name in _PRODUCTS else _LOGPS
    if inside(("scaled_dot_product", "ScaledDotProduct", "_masked_attention")):
        return _ATTENTION
    if inside(("AccumulateGrad",)):
        return _ACCUMULATION
    if name in _PRODUCTS:
        return _LAYERS
    if name in _MOVES:
        return _COPIES
    return _ELEMENTWISE if name.startswith("aten::") and name not in _VIEWS else PYTHON
