"""The GPU core attentions beside the block-wise one, with their kernels replaced by plain softmax attention.

FlexAttention runs as it is, but torch has its backward for GPUs only, so only its forward is compared here.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch._dynamo.testing import CompileCounterWithBackend

from megatron_tgdpo.batching.packed_sequence import PackedSequence
from megatron_tgdpo.models.attention import flex
from megatron_tgdpo.models.attention.base import PackCache, PackedAttention, Segments
from megatron_tgdpo.models.attention.flex import FlexPackedAttention
from megatron_tgdpo.models.attention.sdpa import PackedCausalAttention
from megatron_tgdpo.models.attention.transformer_engine import TransformerEngineAttention
from megatron_tgdpo.models.attention.varlen import VarlenAttention
from megatron_tgdpo.models.config import LanguageModelConfig
from tests import fake_te

ROW, HEADS, GROUPS, SIZE = 23, 4, 2, 8
# A prompt of 5 and two responses of 4 and 6 that both follow it; a sequence of its own; four tokens of padding.
SHARED_Q, SHARED_KV = [0, 9, 15, 19], [0, 9, 20, 24]
SHARED_INDEX = [*range(9), *range(5), *range(9, 15), *range(15, 19)]


def bounds(ends: list[int]) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def shared_prompts() -> PackedSequence:
    return PackedSequence(
        qkv_format="sbhd",
        cu_seqlens_q=bounds(SHARED_Q),
        cu_seqlens_kv=bounds(SHARED_KV),
        kv_index=torch.tensor(SHARED_INDEX),
    )


def own_keys(ends: list[int]) -> PackedSequence:
    return PackedSequence(qkv_format="sbhd", cu_seqlens_q=bounds(ends), cu_seqlens_kv=bounds(ends))


def inputs(requires_grad: bool = True, tokens: int = ROW, value_size: int = SIZE) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(tokens, 1, n, size) for n, size in ((HEADS, SIZE), (GROUPS, SIZE), (GROUPS, value_size))]
    return [torch.randn(s, generator=random, dtype=torch.float64).requires_grad_(requires_grad) for s in shapes]


def build(kind: type[PackedAttention], layer: int = 1, **options) -> PackedAttention:
    arguments = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": HEADS, "num_query_groups": GROUPS}
    config = LanguageModelConfig(**{**arguments, "attention_dropout": 0.0, "use_cpu_initialization": True, **options})
    scale = config.softmax_scale
    return kind(config, layer, AttnMaskType.causal, "self", softmax_scale=scale, cache=PackCache())


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: PackedSequence, window: int, softcap: float | None
) -> torch.Tensor:
    """Every output from its definition: the last query of a segment sees all its keys, each query before it one less.

    A query sees the ``window`` keys that end with the last one it may see.
    """
    out = torch.zeros(ROW, HEADS, v.shape[-1], dtype=q.dtype)
    index = torch.arange(ROW) if packing.kv_index is None else packing.kv_index
    assert packing.cu_seqlens_q is not None
    assert packing.cu_seqlens_kv is not None
    q_ends, kv_ends = packing.cu_seqlens_q.tolist(), packing.cu_seqlens_kv.tolist()
    for segment in range(len(q_ends) - 1):
        for pack in range(q_ends[segment], q_ends[segment + 1]):
            last = kv_ends[segment + 1] - (q_ends[segment + 1] - pack)
            keys = index[max(kv_ends[segment], last + 1 - window) : last + 1]
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = k[keys, 0, group] @ q[pack, 0, head] * SIZE**-0.5
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[pack, head] = scores.softmax(0) @ v[keys, 0, group]
    return out.flatten(1)[:, None]


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention on the CPU makes whole score matrices."""
    monkeypatch.setattr("megatron_tgdpo.models.attention.flex._BLOCK", 32)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformer Engine importable, and torch's variable-length call replaced: it has no CPU kernel."""

    def varlen_attn(q, k, v, cu_q, cu_kv, max_q, max_kv, *, scale, window_size, enable_gqa):
        assert enable_gqa == (HEADS != GROUPS)
        assert cu_q.diff().max() <= max_q <= max_kv
        return fake_te.varlen(q, k, v, cu_q, cu_kv, scale, window_size)

    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    with fake_te.importable():
        yield


def test_varlen_of_a_torch_that_takes_grouped_heads_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 has no argument for them."""

    def varlen_attn(q, k, v, cu_q, cu_kv, max_q, max_kv, *, scale, window_size):
        return fake_te.varlen(q, k, v, cu_q, cu_kv, scale, window_size)

    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    tensors, packing = inputs(requires_grad=False), own_keys([0, 5, 14])
    out = build(VarlenAttention)(*tensors, packed_seq_params=packing)
    assert torch.allclose(out, written_out(*tensors, packing, ROW, None), atol=1e-12)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", [TransformerEngineAttention, VarlenAttention, FlexPackedAttention])
@pytest.mark.parametrize("packing", [shared_prompts, lambda: own_keys([0, 5, 6, 6, 14]), lambda: own_keys([0, ROW])])
@pytest.mark.parametrize("window", [None, 4])
def test_equals_the_definition(kind: type[PackedAttention], packing: Callable, window: int | None) -> None:
    with_backward = kind is not FlexPackedAttention
    ours, theirs = inputs(with_backward), inputs(with_backward)
    options = {} if window is None else {"window_size": (window - 1, 0)}
    packed = packing()
    out = build(kind, **options)(*ours, packed_seq_params=packed)
    wanted = written_out(*theirs, packed, window or ROW, None)
    assert out.shape == (ROW, 1, HEADS * SIZE)
    assert torch.allclose(out, wanted, atol=1e-12)
    if not with_backward:
        return
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    (out * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        assert torch.allclose(mine.grad, reference.grad, atol=1e-12)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "kind", [TransformerEngineAttention, VarlenAttention, FlexPackedAttention, PackedCausalAttention]
)
def test_values_may_be_smaller_than_keys(kind: type[PackedAttention]) -> None:
    with_backward = kind is not FlexPackedAttention
    ours, theirs = (inputs(with_backward, value_size=5) for _ in range(2))
    out = build(kind)(*ours, packed_seq_params=shared_prompts())
    wanted = written_out(*theirs, shared_prompts(), ROW, None)
    assert out.shape == (ROW, 1, HEADS * 5)
    assert torch.allclose(out, wanted, atol=1e-12)
    assert build(kind)(*ours, packed_seq_params=own_keys([0])).shape == out.shape
    if with_backward:
        gradients = (
            torch.autograd.grad(each.square().sum(), tensors) for each, tensors in ((out, ours), (wanted, theirs))
        )
        assert all(torch.allclose(mine, reference, atol=1e-12) for mine, reference in zip(*gradients, strict=True))


def test_flex_is_compiled_for_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch stops compiling a function after some versions of it, and would go on without a fused kernel."""
    torch.compiler.reset()
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", True)
    versions = CompileCounterWithBackend("eager")
    real = torch.compile
    monkeypatch.setattr("torch.compile", lambda function, **options: real(function, backend=versions, **options))
    for name in ("create_block_mask", "flex_attention"):
        monkeypatch.setattr(flex, name, flex._compiled.__wrapped__(getattr(flex, name)))
    # A layer with a window and one without; packs of every fill and, as packs are cut, of many lengths, with shared
    # prompts and without; with and without gradients, as the policy and the frozen models.
    modules = [build(FlexPackedAttention, layer, window_size=(3, 0), window_attn_skip_freq=2) for layer in (1, 2)]
    assert {module.window for module in modules} == {None, 4}
    cases = [(own_keys([0, *ends]), ROW) for ends in ([3], [3, 4, 9], [7, 20], [ROW])] + [(shared_prompts(), ROW)]
    cases += [(own_keys([0, 17, length]), length) for length in range(20, 32 * 8, 12)]
    for packing, length in cases:
        for module in modules:
            for with_grad in (True, False):
                with torch.set_grad_enabled(with_grad):
                    module(*inputs(requires_grad=False, tokens=length), packed_seq_params=packing)
    torch.compiler.reset()
    # Four lengths, or five: the mask once each, the kernel once a grad mode each; for keys that outgrow the pack more.
    assert 12 <= versions.frame_count <= 18


@pytest.mark.parametrize("window", [None, 4])
def test_flex_caps_scores(window: int | None) -> None:
    features = {"attn_logit_softcapping": 1.5} | ({} if window is None else {"window_size": (window - 1, 0)})
    packed, tensors = shared_prompts(), inputs(requires_grad=False)
    out = build(FlexPackedAttention, **features)(*tensors, packed_seq_params=packed)
    assert torch.allclose(out, written_out(*tensors, packed, window or ROW, 1.5), atol=1e-12)
    assert not torch.allclose(out, written_out(*tensors, packed, window or ROW, None), atol=1e-3)


@pytest.mark.parametrize("window", [None, 4])
def test_flex_has_sinks(window: int | None) -> None:
    features = {"softmax_type": "learnable"} | ({} if window is None else {"window_size": (window - 1, 0)})
    packed, tensors = shared_prompts(), inputs(requires_grad=False)
    flex_module, blocks = (build(kind, **features) for kind in (FlexPackedAttention, PackedCausalAttention))
    for module in (flex_module, blocks):
        module.softmax_offset.data = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    out, wanted = (module(*tensors, packed_seq_params=packed) for module in (flex_module, blocks))
    assert torch.allclose(out, wanted, atol=1e-12)
    assert not torch.allclose(out, written_out(*tensors, packed, window or ROW, None), atol=1e-3)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", [TransformerEngineAttention, VarlenAttention])
def test_sinks_are_refused_elsewhere(kind: type[PackedAttention]) -> None:
    with pytest.raises(ValueError, match="sinks"):
        build(kind, softmax_type="learnable")(*inputs(), packed_seq_params=shared_prompts())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", [TransformerEngineAttention, VarlenAttention, FlexPackedAttention])
def test_a_row_of_padding_reaches_queries_keys_and_values(kind: type[PackedAttention]) -> None:
    tensors = inputs()
    out = build(kind)(*tensors, packed_seq_params=own_keys([0]))
    assert not out.any()
    out.sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_layers_share_what_a_row_needs_and_the_next_row_is_new() -> None:
    cache, made = PackCache(), []
    first, second = own_keys([0, 4]), own_keys([0, 4])
    for packing in (first, first, second, first):
        cache.get(packing, "x", lambda packing=packing: made.append(packing))
    assert [made[0] is first, made[1] is second, made[2] is first, len(made)] == [True, True, True, 3]


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        (own_keys([0, ROW + 1]), "do not fit"),
        (own_keys([1, 5]), "from 0 on"),
        (own_keys([0, 9, 4]), "as many keys"),
        (PackedSequence(qkv_format="sbhd"), "every pipeline stage"),
        (
            PackedSequence(cu_seqlens_q=bounds([0, 9]), cu_seqlens_kv=bounds([0, 5]), kv_index=torch.arange(5)),
            "as many keys",
        ),
        (
            PackedSequence(cu_seqlens_q=bounds([0, 4]), cu_seqlens_kv=bounds([0, 5]), kv_index=torch.arange(4)),
            "keys are amiss",
        ),
    ],
)
def test_impossible_packings_are_refused(packing: PackedSequence, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments.of(packing, ROW, torch.device("cpu"))


@pytest.mark.usefixtures("kernels")
def test_softcaps_are_refused_where_they_would_be_ignored() -> None:
    with pytest.raises(ValueError, match="cannot cap"):
        build(TransformerEngineAttention, attn_logit_softcapping=1.5)
    with pytest.raises(ValueError, match="cannot cap"):
        build(VarlenAttention, attn_logit_softcapping=1.5)(*inputs(), packed_seq_params=own_keys([0, 4]))


def test_masks_dropout_and_missing_packings_are_refused() -> None:
    with pytest.raises(ValueError, match="without dropout"):
        build(FlexPackedAttention, attention_dropout=0.1)
    with pytest.raises(ValueError, match="packed_seq_params"):
        build(FlexPackedAttention)(*inputs())
    with pytest.raises(ValueError, match="neither a mask"):
        build(FlexPackedAttention)(*inputs(), attention_mask=torch.ones(1), packed_seq_params=own_keys([0, 4]))
