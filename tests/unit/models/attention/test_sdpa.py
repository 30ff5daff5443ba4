"""Packed causal attention against a written-out softmax, one sequence at a time."""

import itertools

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_tgdpo.batching.packed_sequence import ContextSplit, PackedSequence, PackFormat, Segment, pack_segments
from megatron_tgdpo.models.attention.sdpa import PackedCausalAttention
from megatron_tgdpo.models.config import LanguageModelConfig

ROW, HEADS, GROUPS, SIZE = 17, 4, 2, 8


SINKS = [0.5, -1.0, 2.0, 0.0]


def attention(layer: int = 1, **overrides) -> PackedCausalAttention:
    arguments = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": HEADS, "attention_dropout": 0.0}
    config = LanguageModelConfig(use_cpu_initialization=True, **{**arguments, **overrides})
    module = PackedCausalAttention(config, layer, AttnMaskType.causal, "self", softmax_scale=config.softmax_scale)
    if module.softmax_offset is not None:
        module.softmax_offset.data = torch.tensor(SINKS, dtype=torch.float64)
    return module


def packing(ends: list[int]) -> PackedSequence:
    return pack_segments([Segment(*bounds) for bounds in itertools.pairwise(ends)])


def inputs() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(ROW, 1, n, SIZE) for n in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(s, generator=random, dtype=torch.float64, requires_grad=True) for s in shapes]


def written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: list[int],
    window: int = ROW,
    softcap: float | None = None,
    scale: float = SIZE**-0.5,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each output token from its definition: softmax over itself and the ``window - 1`` before it in its sequence, and
    over the head's sink."""
    out = torch.zeros(ROW, 1, HEADS * SIZE, dtype=q.dtype)
    for start, end in itertools.pairwise(ends):
        for t in range(start, end):
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                first = max(start, t + 1 - window)
                scores = k[first : t + 1, 0, group] @ q[t, 0, head] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head, None]))
                mixed = scores.softmax(0)[: t + 1 - first] @ v[first : t + 1, 0, group]
                out[t, 0, head * SIZE : (head + 1) * SIZE] = mixed
    return out


@pytest.mark.parametrize("ends", [[0, ROW], [0, 5, 6, 14], [0, 3, 3, ROW], [0]])
def test_equals_the_definition(ends: list[int]) -> None:
    ours, theirs = inputs(), inputs()
    upstream = torch.randn(ROW, 1, HEADS * SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream[ends[-1] :] = 0
    out = attention()(*ours, packed_seq_params=packing(ends))
    wanted = written_out(*theirs, ends)
    assert torch.allclose(out, wanted, atol=1e-12)
    assert not out[ends[-1] :].any()
    (out * upstream).sum().backward()
    if len(ends) > 1:
        (wanted * upstream).sum().backward()
    # A pack that is all padding still has gradients (zero), so that no data-parallel hook waits for ever.
    assert ours[0].grad is not None
    for mine, reference in zip(ours, theirs, strict=True):
        expected = torch.zeros_like(mine) if reference.grad is None else reference.grad
        actual = torch.zeros_like(mine) if mine.grad is None else mine.grad
        assert torch.allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        ({"window_size": (3, 0)}, {"window": 4}),
        ({"window_size": (0, 0)}, {"window": 1}),
        ({"attn_logit_softcapping": 1.5}, {"softcap": 1.5}),
        (
            {"window_size": (3, 0), "attn_logit_softcapping": 1.5, "softmax_scale": 0.7},
            {"window": 4, "softcap": 1.5, "scale": 0.7},
        ),
    ],
)
def test_windows_and_softcaps_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, features: dict, wanted: dict, block: int
) -> None:
    monkeypatch.setattr("megatron_tgdpo.models.attention.sdpa._QUERY_BLOCK", block)
    ends = [0, 10, 12, ROW]
    ours, theirs = inputs(), inputs()
    upstream = torch.randn(ROW, 1, HEADS * SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = attention(**features)(*ours, packed_seq_params=packing(ends))
    expected = written_out(*theirs, ends, **wanted)
    assert torch.allclose(out, expected, atol=1e-12)
    assert not torch.allclose(out, written_out(*theirs, ends), atol=1e-3)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        assert torch.allclose(mine.grad, reference.grad, atol=1e-12)


@pytest.mark.parametrize("window", [ROW, 4])
@pytest.mark.parametrize("block", [3, 1024])
def test_sinks_equal_the_definition(monkeypatch: pytest.MonkeyPatch, window: int, block: int) -> None:
    monkeypatch.setattr("megatron_tgdpo.models.attention.sdpa._QUERY_BLOCK", block)
    ends = [0, 10, 12, ROW]
    ours, theirs = inputs(), inputs()
    module = attention(softmax_type="learnable", window_size=(window - 1, 0))
    sinks = torch.tensor(SINKS, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(ROW, 1, HEADS * SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = module(*ours, packed_seq_params=packing(ends))
    expected = written_out(*theirs, ends, window, sinks=sinks)
    assert torch.allclose(out, expected, atol=1e-12)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for mine, reference in zip((*ours, module.softmax_offset), (*theirs, sinks), strict=True):
        assert torch.allclose(mine.grad, reference.grad, atol=1e-12)


def test_a_pack_of_padding_reaches_the_sinks() -> None:
    module = attention(softmax_type="learnable")
    module(*inputs(), packed_seq_params=packing([0])).sum().backward()
    assert module.softmax_offset is not None
    assert not module.softmax_offset.grad.any()


def test_windows_are_on_the_marked_layers_only() -> None:
    features = {"window_size": (3, 0), "window_attn_skip_freq": [0, 1]}
    assert [attention(layer, **features).window for layer in (1, 2)] == [None, 4]


@pytest.mark.parametrize(
    ("ends", "message"), [([0, 18], "do not fit"), ([1, 5], "from 0 on"), ([0, 9, 4], "from 0 on")]
)
def test_impossible_lengths_are_refused(ends: list[int], message: str) -> None:
    bounds = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        attention()(*inputs(), packed_seq_params=PackedSequence("sbhd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds))


SHAPES = [
    {},
    {"window_size": (2, 0)},
    {"attn_logit_softcapping": 1.5},
    {"window_size": (4, 0), "attn_logit_softcapping": 2.0},
    {"window_size": (4, 0), "softmax_type": "learnable"},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("block", [2, 1024])
def test_a_shared_prompt_gives_what_a_prompt_for_each_response_gives(
    monkeypatch: pytest.MonkeyPatch, options: dict, block: int
) -> None:
    """Pack: prompt 0-4, chosen 5-9, rejected 10-15, padding 16. The unshared pack repeats the prompt."""
    monkeypatch.setattr("megatron_tgdpo.models.attention.sdpa._QUERY_BLOCK", block)
    shared = inputs()
    packing = pack_segments([Segment(0, 10), Segment(10, 16, 0, 5)])
    upstream = torch.randn(ROW, 1, HEADS * SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    module = attention(**options)
    out = module(*shared, packed_seq_params=packing)
    (out * upstream).sum().backward()
    assert torch.count_nonzero(out[16:]) == 0

    repeated = [*range(10), *range(5), *range(10, 16)]
    whole = inputs()
    unshared = [tensor[repeated] for tensor in whole]
    wanted = module(*unshared, packed_seq_params=pack_segments([Segment(0, 10), Segment(10, 21)]))
    # The second copy of the prompt says nothing new.
    (wanted[:10] * upstream[:10]).sum().add((wanted[15:] * upstream[10:16]).sum()).backward()
    assert torch.allclose(out[:10], wanted[:10], atol=1e-12)
    assert torch.allclose(out[10:16], wanted[15:], atol=1e-12)
    for ours, theirs in zip(shared, whole, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_the_parts_of_a_context_split_give_the_whole(options: dict) -> None:
    """Sequences of 8 and 4 tokens and a tail of 4, on two ranks; the gathered keys are put together by hand."""
    bounds, tokens = [0, 8, 12, 16], 16
    whole = [tensor[:tokens] for tensor in inputs()]
    module = attention(**options)
    segments = [Segment(0, 8), Segment(8, 12)]
    wanted = module(*whole, packed_seq_params=pack_segments(segments))
    for rank in range(2):
        split = ContextSplit(bounds, PackFormat(tokens, context=2, context_rank=rank))
        gathered = [tensor[split.held.ravel()] for tensor in whole]
        out = module(whole[0][split.mine], *gathered[1:], packed_seq_params=split.packing(segments))
        assert torch.allclose(out, wanted[split.mine], atol=1e-12)


def test_missing_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="takes packed_seq_params"):
        attention()(*inputs())


def test_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        attention()(*inputs(), attention_mask=torch.ones(1), packed_seq_params=packing([0, ROW]))


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout"):
        attention(attention_dropout=0.1)


def test_has_nothing_to_save() -> None:
    module = attention()
    assert module.sharded_state_dict() == {}
    assert not list(module.parameters())
