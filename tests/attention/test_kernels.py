"""Fused kernels, listened in on, are the slow and obvious way."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flexkit.attention import attend, attention_logits, log_normaliser, merge_high_res
from flexkit.attention.kernels import Listening, merge_fused
from flexkit.attention.layer import HighResKeys, look, read
from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.visible import ImageGroup, visibility
from tests.attention.test_core import CLOSE, HEADS, SEEDS, normal

COUNTS = st.integers(1, 5)
WIDTH, SCALING = 4, 0.6
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Some units in the last place: of a weight, of what it weighs and of their sum."""


def states(heads: tuple[int, int], queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(2, heads[0], queries, WIDTH), normal(2, heads[1], keys, WIDTH), normal(2, heads[1], keys, WIDTH)


def mask_of(kind: str, queries: int, keys: int) -> Tensor | None:
    shown = torch.rand(2, 1, queries, keys) < 0.6
    shown[..., 0] = True
    return {"none": None, "bool": shown, "added": normal(2, 1, queries, keys).masked_fill(~shown, -torch.inf)}[kind]


@given(HEADS, COUNTS, COUNTS, st.sampled_from(["none", "bool", "added"]), SEEDS)
@torch.no_grad()
def test_what_is_heard(heads: tuple[int, int], queries: int, keys: int, kind: str, seed: object) -> None:
    query, key, value = states(heads, queries, keys)
    mask = mask_of(kind, queries, keys)
    options: dict[str, Any] = {"attn_mask": mask, "scale": SCALING, "enable_gqa": heads[0] != heads[1]}
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    with Listening() as heard:
        found = F.scaled_dot_product_attention(query, key, value, **options)
    assert torch.equal(found, expected)
    assert heard.normaliser is not None
    logits = attention_logits(query, key, scaling=SCALING, mask=mask)
    torch.testing.assert_close(heard.normaliser[..., None], log_normaliser(logits), **CLOSE)


@torch.no_grad()
def test_a_choice_is_of_a_layout() -> None:
    """Keys whose numbers do not lie side by side go another way than keys of the same shape that do."""
    torch.manual_seed(0)
    query, key, value = states((4, 4), 3, 5)
    for own in (key, key.transpose(-1, -2).contiguous().transpose(-1, -2), key):
        with Listening() as heard:
            found = F.scaled_dot_product_attention(query, own, value, scale=SCALING)
        assert torch.equal(found, F.scaled_dot_product_attention(query, own, value, scale=SCALING))
        assert (heard.normaliser is None) == (own.stride(-1) != 1)


@given(HEADS, COUNTS, COUNTS, SEEDS)
def test_nothing_is_heard_while_gradients_are_recorded(
    heads: tuple[int, int], queries: int, keys: int, seed: object
) -> None:
    query, key, value = (each.requires_grad_() for each in states(heads, queries, keys))
    options = {"scale": SCALING, "enable_gqa": heads[0] != heads[1]}
    with Listening() as heard:
        found = F.scaled_dot_product_attention(query, key, value, **options)
    assert heard.normaliser is None
    gradients = torch.autograd.grad(found.sum(), (query, key, value))
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    for own, other in zip(gradients, torch.autograd.grad(expected.sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(own, other, **CLOSE)


@given(HEADS, COUNTS, COUNTS, SEEDS)
@torch.no_grad()
def test_a_kernel_that_says_no_normaliser_is_let_be(
    heads: tuple[int, int], queries: int, keys: int, seed: object
) -> None:
    query, key, value = states(heads, queries, keys)
    wide = torch.cat([value, value], dim=-1)  # no fused kernel of the CPU takes values of another width
    options = {"scale": SCALING, "enable_gqa": heads[0] != heads[1]}
    with Listening() as heard:
        found = F.scaled_dot_product_attention(query, key, wide, **options)
    assert heard.normaliser is None
    assert torch.equal(found, F.scaled_dot_product_attention(query, key, wide, **options))
    normaliser, visible = normal(2, heads[0], queries, 1), torch.ones(2, queries, keys, dtype=torch.bool)
    assert merge_fused(found, normaliser, query, key, wide, visible, scaling=SCALING) is None


@given(HEADS, COUNTS, COUNTS, st.integers(0, 5), SEEDS)
@torch.no_grad()
def test_merging_is_the_joint_softmax(
    heads: tuple[int, int], queries: int, keys: int, tokens: int, seed: object
) -> None:
    query, key, value = states(heads, queries, keys)
    _, own_key, own_value = states(heads, queries, tokens)
    selected = torch.rand(2, queries, tokens) < 0.5
    base, normaliser = attend(attention_logits(query, key, scaling=SCALING), value)
    logits = attention_logits(query, own_key, scaling=SCALING, bias=-0.5)
    expected = merge_high_res(base, normaliser, logits, own_value, selected)
    merge = partial(merge_fused, base, normaliser, query, own_key, own_value, selected, scaling=SCALING, bias=-0.5)
    merged, part = merge(), merge(share=0.25)
    if merged is None or part is None:
        assert not tokens
        return
    torch.testing.assert_close(merged, expected, **CLOSE)
    blind = ~selected.any(-1)[:, None, :, None].expand_as(base)
    assert torch.equal(merged[blind], base[blind])
    torch.testing.assert_close(part, torch.lerp(base, expected, 0.25), **CLOSE)


class Settings:
    low_res_keys, replace_dilation, logit_bias, alpha = "keep", 0, -0.5, 0.75


@pytest.mark.parametrize("dtype", [torch.float64, *TOLERANCES])
@given(
    HEADS,
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from(["begin", "scattered"]),
    st.booleans(),
    st.sampled_from([None, 8, 3]),
    SEEDS,
)
@torch.no_grad()
def test_a_look_that_heard_and_one_that_did_not(
    dtype: torch.dtype,
    heads: tuple[int, int],
    queries: int,
    text: int,
    places: str,
    dense: bool,
    most: int | None,
    seed: object,
) -> None:
    """A layer with a 1 x 2 grid, zoomed 2 x 2: fused, plain, gathered and masked are one."""
    keys, tokens = 2 + text + queries, 8
    query, key, value = (each.to(dtype) for each in states(heads, queries, keys))
    _, own_key, own_value = (each.to(dtype) for each in states(heads, queries, tokens))
    columns = torch.tensor([[0, 1]] * 2) if places == "begin" else torch.tensor([[0, 1 + text], [text, 1 + text]])
    begin = 0 if places == "begin" else None
    rows = torch.arange(2)
    group = ImageGroup(
        (1, 2), (2, 2), rows, columns, torch.zeros(2, dtype=torch.long), is_batch=True, begin=begin, end=2
    )
    positions = torch.full((2, queries), keys - 1)
    seen = visibility(None, (group,), positions, keys, before=keys - queries if begin == 0 else None)
    all_of_them = torch.ones(2, tokens, dtype=torch.bool)
    held = HighResKeys(own_key, own_value, RaggedIndex.all(all_of_them) if dense else RaggedIndex(all_of_them))
    selected = torch.rand(2, queries, tokens) < 0.4
    if most is not None:
        selected &= selected.cumsum(-1) <= most
    options = {"enable_gqa": heads[0] != heads[1], "scale": SCALING}
    with Listening() as heard:
        base = F.scaled_dot_product_attention(query, key, value, **options)
    assert heard.normaliser is not None
    outcomes = []
    for normaliser in (None, heard.normaliser[..., None]):
        looked = look(query, key, value, seen, scaling=SCALING, normaliser=normaliser)
        outcome = read(base, looked, selected, lambda wanted: held, Settings(), most=most)
        assert torch.equal(outcome.tokens.among(selected).sum(-1), selected.sum(-1))
        outcomes.append((outcome.output, looked.map_of(seen.images[0]), outcome.attention()))
    tolerance = CLOSE if dtype == torch.float64 else {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    for own, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(own, other, **tolerance)


@given(st.integers(1, 6), st.integers(0, 6), SEEDS)
def test_bounded_entries_are_those_of_the_mask(length: int, most: int, seed: object) -> None:
    mask = torch.rand(2, length) < 0.5
    mask &= mask.cumsum(-1) <= most
    entries = RaggedIndex.bounded(mask, most)
    for row, index, valid in zip(mask, entries.index, entries.valid, strict=True):
        assert index[valid].tolist() == row.nonzero().flatten().tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize("queries", [1, 7])
@torch.no_grad()
def test_what_is_heard_of_kernels_of_a_gpu(dtype: torch.dtype, kind: str, queries: int) -> None:
    torch.manual_seed(queries)
    shapes = (2, 4, queries, 64), (2, 4, 37, 64), (2, 4, 37, 64)
    query, key, value = (normal(*shape).to("cuda", dtype) for shape in shapes)
    mask = mask_of(kind, queries, 37)
    if mask is not None:
        mask = mask.to("cuda", None if mask.dtype == torch.bool else dtype)
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=SCALING)
    with Listening() as heard:
        found = F.scaled_dot_product_attention(query, key, value, mask, scale=SCALING)
    assert torch.equal(found, expected)
    assert heard.normaliser is not None
    logits = attention_logits(query, key, scaling=SCALING, mask=mask)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(heard.normaliser[..., None], log_normaliser(logits), rtol=tolerance, atol=tolerance)
