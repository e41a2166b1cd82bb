import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexkit.attention.plain
from flexkit.attention import (
    attend,
    attention_logits,
    attention_map,
    base_attention,
    joint_attention,
    key_mask,
    log_normaliser,
    merge_high_res,
    replaced_keys,
)
from tests.attention import reference

SEEDS = st.integers(0, 2**31).map(torch.manual_seed)
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
HEADS = st.sampled_from([(2, 2), (4, 2), (3, 1)])
COUNTS = st.integers(0, 5)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def naive(logits: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, map and log-normaliser, one row at a time."""
    batch, heads, queries, keys = logits.shape
    output = normal(batch, heads, queries, value.shape[-1]).zero_()
    weights, normaliser = torch.zeros_like(logits), torch.full((batch, heads, queries, 1), -math.inf).double()
    for b, h, q in product(range(batch), range(heads), range(queries)):
        seen = [j for j in range(keys) if logits[b, h, q, j] > -math.inf]
        sink = None if sinks is None else sinks[h]
        for j, weight in zip(seen, reference.softmax([logits[b, h, q, j] for j in seen], sink), strict=True):
            weights[b, h, q, j] = weight
            output[b, h, q] += weight * value[b, h // (heads // value.shape[1]), j]
        total = sum(math.exp(logits[b, h, q, j]) for j in seen) + (0 if sink is None else math.exp(sink))
        normaliser[b, h, q] = math.log(total) if total else -math.inf
    return output, weights, normaliser


@given(
    HEADS,
    COUNTS,
    COUNTS,
    st.sampled_from([None, 0.7]),
    st.sampled_from([0.0, -2.0]),
    st.sampled_from(["none", "bool", "lowest", "infinite"]),
    SEEDS,
)
def test_logits_one_by_one(
    heads: tuple[int, int], queries: int, keys: int, softcap: float | None, bias: float, kind: str, seed: object
) -> None:
    query, key = normal(2, heads[0], queries, 4), normal(2, heads[1], keys, 4)
    seen, added = torch.rand(2, 1, queries, keys) < 0.7, normal(2, 1, queries, keys)
    hiding = torch.finfo(torch.float64).min if kind == "lowest" else -math.inf
    mask = {"none": None, "bool": seen}.get(kind, added.masked_fill(~seen, hiding))
    logits = attention_logits(query, key, scaling=0.3, mask=mask, softcap=softcap, bias=bias)
    assert logits.shape == (2, heads[0], queries, keys)
    for b, h, q, k in product(range(2), range(heads[0]), range(queries), range(keys)):
        expected = 0.3 * sum(query[b, h, q, c].item() * key[b, h * heads[1] // heads[0], k, c].item() for c in range(4))
        if softcap is not None:
            expected = softcap * math.tanh(expected / softcap)
        expected += bias
        if kind in ("lowest", "infinite"):
            expected += added[b, 0, q, k].item()
        if kind != "none" and not seen[b, 0, q, k]:
            expected = -math.inf
        assert logits[b, h, q, k].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@given(HEADS, COUNTS, COUNTS, st.booleans(), st.sampled_from([1.0, 0.5, 0.0]), SEEDS)
def test_softmax_of_masked_rows(
    heads: tuple[int, int], queries: int, keys: int, with_sinks: bool, share: float, seed: object
) -> None:
    logits = 5 * normal(2, heads[0], queries, keys)
    logits = logits.masked_fill(torch.rand(logits.shape) >= share, -math.inf)
    value, sinks = normal(2, heads[1], keys, 3), normal(heads[0]) if with_sinks else None
    output, weights, normaliser = naive(logits, value, sinks)
    ours = attend(logits, value, sinks)
    torch.testing.assert_close(ours[0], output, **CLOSE)
    torch.testing.assert_close(ours[1], normaliser, **CLOSE)
    torch.testing.assert_close(log_normaliser(logits, sinks), normaliser, **CLOSE)
    torch.testing.assert_close(attention_map(logits, sinks), weights, **CLOSE)


@given(HEADS, COUNTS, COUNTS, COUNTS, st.booleans(), st.booleans(), SEEDS)
def test_merging_is_one_softmax_over_both_sets_of_keys(
    heads: tuple[int, int], queries: int, keys: int, tokens: int, with_sinks: bool, replaces: bool, seed: object
) -> None:
    low, high = 3 * normal(2, heads[0], queries, keys), 3 * normal(2, heads[0], queries, tokens)
    low = low.masked_fill(torch.rand(low.shape) < 0.3, -math.inf)
    low_value, high_value = normal(2, heads[1], keys, 3), normal(2, heads[1], tokens, 3)
    selected = torch.rand(2, queries, tokens) < 0.4
    replaced = torch.rand(2, queries, keys) < 0.4 if replaces else None
    sinks = normal(heads[0]) if with_sinks else None
    base, normaliser = attend(low, low_value, sinks)
    joint = joint_attention(base, low, low_value, high, high_value, selected, replaced=replaced, sinks=sinks)
    left = low
    if replaced is not None:
        left = low.masked_fill((replaced & selected.any(-1, keepdim=True))[:, None], -math.inf)
    both = torch.cat([left, high.masked_fill(~selected[:, None], -math.inf)], dim=-1)
    output, _, _ = naive(both, torch.cat([low_value, high_value], dim=2), sinks)
    torch.testing.assert_close(joint, output, **CLOSE)
    unread = ~selected.any(-1)[:, None].expand(joint.shape[:3])
    assert torch.equal(joint[unread], base[unread])
    if replaced is None:
        assert torch.equal(joint, merge_high_res(base, normaliser, high, high_value, selected))


@pytest.mark.parametrize("sees_base", [True, False])
def test_gradients_of_merging(sees_base: bool) -> None:
    low, high = 3 * normal(1, 2, 3, 4), 3 * normal(1, 2, 3, 5)
    low = low if sees_base else low.masked_fill(torch.tensor([True, False, True])[:, None], -math.inf)
    selected = torch.tensor([[[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]]).bool()
    visible = low > -math.inf

    def merged(low: Tensor, high: Tensor, low_value: Tensor, high_value: Tensor, sinks: Tensor) -> Tensor:
        low = low.masked_fill(~visible, -math.inf)
        base, normaliser = attend(low, low_value, sinks)
        return merge_high_res(base, normaliser, high, high_value, selected)

    leaves = [low.nan_to_num(neginf=0.0), high, normal(1, 1, 4, 3), normal(1, 1, 5, 3), normal(2)]
    assert torch.autograd.gradcheck(merged, [leaf.requires_grad_() for leaf in leaves])


def test_base_keys_in_another_kernels_dtype() -> None:
    low, high, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5), torch.randn(1, 2, 5, 3).half()
    base, normaliser = attend(low, torch.randn(1, 2, 4, 3))
    selected = torch.tensor([[[True] * 5, [False] * 5, [True] * 5]])
    merged = merge_high_res(base.half(), normaliser, high, value, selected)
    assert merged.dtype == torch.float16 and torch.equal(merged[:, :, 1], base.half()[:, :, 1])
    wide = merge_high_res(base, normaliser, high, value.float(), selected)
    torch.testing.assert_close(merged.float(), wide, rtol=2e-3, atol=2e-3)


def test_half_precision_extremes() -> None:
    top = torch.finfo(torch.float16).max
    query = torch.full((1, 1, 2, 4), top, dtype=torch.float16)
    query[0, 0, 1] *= -1
    key = torch.tensor([top, -top, 0, 1]).half()[:, None].expand(1, 1, 4, 4)
    mask = torch.zeros(1, 1, 2, 4).half().masked_fill(torch.eye(2, 4).bool(), torch.finfo(torch.float16).min)
    logits = attention_logits(query, key, scaling=1.0, mask=mask)
    assert logits.dtype == torch.float32 and (logits == -math.inf).sum() == 2
    output, normaliser = attend(logits, key)
    merged = merge_high_res(output, normaliser, logits, key, torch.ones(1, 2, 4).bool())
    assert output.isfinite().all() and normaliser.isfinite().all() and merged.isfinite().all()
    assert attention_map(logits).sum(-1).allclose(torch.ones(1, 1, 2))


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(1)
    logits, value = torch.randn(1, 1, 1, 6), torch.rand(1, 1, 6, 1) + 1
    quiet, normaliser = attend(logits, value)
    many = attend(logits.expand(4000, -1, -1, -1), value.expand(4000, -1, -1, -1), dropout=0.5)
    assert torch.equal(many[1][0], normaliser[0])
    assert many[0].std() > 0.1 and abs(many[0].mean() - quiet).item() < 5 * many[0].std().item() / 4000**0.5


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("sliding_window", [None, 1, 3])
@pytest.mark.parametrize("additive", [True, False, None])
def test_who_sees_whom(is_causal: bool, sliding_window: int | None, additive: bool | None) -> None:
    positions, seen = torch.tensor([[5, 0], [3, 4]]), torch.rand(2, 1, 2, 6) < 0.7
    mask = None if additive is None else seen
    if additive:
        mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    visible = key_mask(positions, 6, is_causal=is_causal, sliding_window=sliding_window, mask=mask)
    if visible is None:
        assert mask is None and not is_causal
        return
    for b, q, k in product(range(2), range(2), range(6)):
        distance = int(positions[b, q]) - k
        sees = (not is_causal or (distance >= 0 and distance < (sliding_window or 99))) and (
            mask is None or bool(seen[b, 0, q, k])
        )
        assert visible[b, 0, q, k].item() == (sees if visible.dtype == torch.bool else [-math.inf, 0.0][sees])


@pytest.mark.parametrize("special", [{}, {"softcap": 2.0}, {"with_sinks": True}], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "causal", "none"])
def test_base_attention_equals_attention_from_logits(special: dict[str, object], kind: str) -> None:
    query, key, value = normal(2, 4, 5, 6), normal(2, 2, 5, 6), normal(2, 2, 5, 6)
    softcap = special.get("softcap")
    sinks = normal(4) if special else None
    if softcap is not None:
        sinks = None
    mask: Tensor | None = torch.rand(2, 1, 5, 5) < 0.5
    mask[:, :, 3] = False  # type: ignore[index]
    bias = normal(2, 4, 5, 5).masked_fill(~mask, -math.inf)  # type: ignore[operator]
    mask = {"bool": mask, "additive": bias}.get(kind)
    output = base_attention(
        query, key, value, scaling=0.4, mask=mask, is_causal=kind == "causal", softcap=softcap, sinks=sinks
    )
    seen = torch.ones(5, 5).tril().bool() if kind == "causal" else mask
    logits = attention_logits(query, key, scaling=0.4, mask=seen, softcap=softcap)
    torch.testing.assert_close(output, naive(logits, value, sinks)[0], **CLOSE)
    if mask is not None:
        assert not output[:, :, 3].any()


@pytest.mark.parametrize("additive", [True, False])
def test_rows_without_keys_are_zero_whatever_the_kernel_says(monkeypatch: pytest.MonkeyPatch, additive: bool) -> None:
    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *_: object) -> Tensor:
        logits = query @ key.transpose(-1, -2)
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(-1) @ value

    monkeypatch.setattr(flexkit.attention.plain, "_fused", kernel)
    query, key, value = (normal(1, 2, 3, 4).requires_grad_() for _ in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])[None, None]
    if additive:
        mask = torch.zeros(1, 1, 3, 3).double().masked_fill(~mask, -math.inf)
    output = base_attention(query, key, value, scaling=1.0, mask=mask)
    assert not output[:, :, 1].any() and output[:, :, [0, 2]].all()
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert all(gradient.isfinite().all() for gradient in gradients) and not gradients[0][:, :, 1].any()


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 5),
    SEEDS,
)
def test_replaced_keys_are_those_of_selected_cells(
    grid: tuple[int, int], zoom: tuple[int, int], reach: int, seed: object
) -> None:
    cells, tokens = math.prod(grid), math.prod(grid) * math.prod(zoom)
    selected = torch.rand(2, 3, tokens) < 0.1
    positions = torch.stack([torch.randperm(cells + 2)[:cells] for _ in range(2)])
    ours = replaced_keys(selected, grid, zoom, positions, cells + 2, dilation=reach)
    assert torch.equal(ours, reference.cells_around(selected, grid, zoom, reach, positions, cells + 2))
