from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flexkit.attention import HierarchicalSelfAttention, fractional_positions, rotary_tables
from flexkit.errors import ConfigError, FlexkitError, HighResInputError
from flexkit.selection import AttentionMapSelector, Everything, Nothing, Policy, Schedule, Threshold, TopK
from tests.attention import reference
from tests.attention.cases import DIM, Case, cases

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
LAYOUTS = ["shared", "shared on the grid", "by row", "by row on the grid"]


def random_selection(case: Case, layout: str = "by row", share: float = 0.4) -> Tensor:
    batch, rows = len(case.queries), case.rows
    shape = (batch, rows, *case.size) if layout.startswith("by row") else (batch, *case.size)
    selected = torch.rand(shape) < share
    return selected if layout.endswith("grid") else selected.flatten(-len(case.size))


def at_positions(case: Case, selected: Tensor) -> Tensor:
    """A selection of querying rows as ``(batch, length, tokens)``, spelled out for the reference."""
    tokens = case.high_res.shape[1]
    by_row = selected.numel() == len(case.queries) * case.rows * tokens
    rows = selected.reshape(len(case.queries), -1, tokens) if by_row else selected.reshape(-1, 1, tokens)
    return reference.spread(rows.expand(-1, case.rows, -1), case.queries)


def expected(case: Case, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """What the reference says, given what each position reads."""
    replaced = None
    if case.layer.low_res_keys == "replace":
        length = case.hidden_states.shape[1]
        replaced = reference.cells_around(
            chosen, case.grid, case.zoom, case.layer.replace_dilation, case.image_positions, length
        )
    return reference.hierarchical(
        case.layer, case.hidden_states, case.high_res, chosen, replaced=replaced, **case.for_reference
    )


def own_selection(case: Case, maps: Tensor) -> Tensor:
    """What the layer's selector makes of the reference's maps, ``(batch, querying rows, high-res grid)``.

    A row that does not see all of the image selects nothing.
    """
    weights = torch.stack([maps[b][:, :, where] for b, where in enumerate(case.image_positions)])
    scores, whole = weights.sum(1).reshape(*weights.shape[:1], -1, *case.grid), (weights > 0).any(1).all(-1)
    rows = torch.zeros(len(scores), case.rows, *case.grid, dtype=scores.dtype)
    seeing = torch.zeros(len(scores), case.rows, *[1] * len(case.grid), dtype=torch.bool)
    for b, mask in enumerate(case.queries):
        rows[b, : mask.sum()] = scores[b, mask]
        seeing[b, : mask.sum()] = whole[b, mask].view(-1, *[1] * len(case.grid))
    assert case.layer.selector is not None
    return case.layer.selector.select(rows, case.zoom) & seeing


def queried(case: Case, states: Tensor) -> Tensor:
    """The entries of querying rows that mean something, one after the other."""
    return torch.cat([states[b, : mask.sum()] for b, mask in enumerate(case.queries)])


@given(cases(select_from="previous"), st.sampled_from(LAYOUTS))
def test_equals_the_naive_reference(case: Case, layout: str) -> None:
    selected = random_selection(case, layout)
    output = case.sharp(selected=selected)
    wanted, _ = expected(case, at_positions(case, selected))
    torch.testing.assert_close(output.hidden_states, wanted, **CLOSE)


@given(cases(select_from="same"))
def test_reads_what_its_own_map_selects(case: Case) -> None:
    _, maps = expected(case, torch.zeros(*case.queries.shape, case.high_res.shape[1], dtype=torch.bool))
    selected = own_selection(case, maps)
    output = case.sharp()
    assert torch.equal(queried(case, output.selected), queried(case, selected))
    wanted, _ = expected(case, at_positions(case, selected.flatten(2)))
    torch.testing.assert_close(output.hidden_states, wanted, **CLOSE)


@given(cases())
def test_the_map_is_the_attention_over_low_res_keys(case: Case) -> None:
    output = case.plain(**case.place, return_map=True)
    _, maps = expected(case, torch.zeros(*case.queries.shape, case.high_res.shape[1], dtype=torch.bool))
    for b, where in enumerate(case.image_positions):
        scores = maps[b][:, case.queries[b]][:, :, where].sum(0).reshape(-1, *case.grid)
        torch.testing.assert_close(output.map[b, : len(scores)], scores, **CLOSE)
    assert output.selected.shape == (len(case.queries), case.rows, *case.size)
    if case.layer.select_from == "previous":
        selected = random_selection(case)
        sharp = case.sharp(selected=selected, return_map=True)
        assert torch.equal(sharp.map, output.map), "high-res columns are no part of a map"


@given(cases(select_from="previous"))
def test_everything_selected_is_full_rectangular_attention(case: Case) -> None:
    case = replace(case, queries=torch.ones_like(case.queries))
    everything = torch.ones(len(case.queries), case.high_res.shape[1], dtype=torch.bool)
    output = case.sharp(selected=everything)
    wanted, _ = expected(case, everything[:, None].expand(-1, case.queries.shape[1], -1))
    torch.testing.assert_close(output.hidden_states, wanted, **CLOSE)


@given(cases(), st.sampled_from(["no selection", "empty selection", "masked tokens", "no queries", "gate"]))
def test_nothing_selected_keeps_the_bits_of_plain_attention(case: Case, why: str) -> None:
    layer, tokens = case.layer, case.high_res.shape[1]
    everything = torch.ones(len(case.queries), tokens, dtype=torch.bool)
    options: dict[str, Any] = {"selected": everything}
    layer.select_from = "previous"
    if why == "no selection":
        options = {}
    elif why == "empty selection":
        options = {"selected": ~everything}
        if layer.selector is not None and max(case.zoom) > 1:
            layer.select_from, options = "same", {}
            layer.selector = AttentionMapSelector(Nothing())
    elif why == "masked tokens":
        options["high_res_mask"] = ~everything
    elif why == "no queries":
        options["queries"] = torch.zeros_like(case.queries)
    else:
        layer.gate = 1.0
        options["entropy"] = torch.full(case.queries.shape, 0.99)
    sharp, plain = case.sharp(**options), case.plain()
    assert torch.equal(sharp.hidden_states, plain.hidden_states)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(sharp.past, plain.past, strict=True))


@given(cases(select_from="previous"))
def test_rows_that_do_not_query_keep_the_bits_of_plain_attention(case: Case) -> None:
    sharp = case.sharp(selected=random_selection(case, share=0.8)).hidden_states
    assert torch.equal(sharp[~case.queries], case.plain().hidden_states[~case.queries])


@given(cases(select_from="previous"), st.floats(0, 2))
def test_gate_keeps_certain_rows_low_res(case: Case, gate: float) -> None:
    entropy = 2 * torch.rand(case.queries.shape, dtype=torch.float64)
    selected = random_selection(case, "shared", share=0.8)
    case.layer.gate = gate
    chosen = at_positions(case, selected) & (entropy >= gate)[..., None]
    output = case.sharp(selected=selected, entropy=entropy)
    torch.testing.assert_close(output.hidden_states, expected(case, chosen)[0], **CLOSE)
    certain = entropy < gate
    assert torch.equal(output.hidden_states[certain], case.plain().hidden_states[certain])


@given(cases(select_from="previous"))
def test_masked_high_res_tokens_are_never_read(case: Case) -> None:
    selected, valid = random_selection(case), torch.rand(case.high_res.shape[:2]) < 0.5
    case.high_res[~valid] = torch.nan
    output = case.sharp(selected=selected, high_res_mask=valid)
    clean = replace(case, high_res=case.high_res.nan_to_num(nan=3.0))
    wanted, _ = expected(clean, at_positions(clean, selected) & valid[:, None])
    torch.testing.assert_close(output.hidden_states, wanted, **CLOSE)


@given(cases())
def test_one_selection_for_all_rows_is_that_of_the_last_one(case: Case) -> None:
    case.layer.select_from = "previous"
    own = case.plain(**case.place).selected
    case.layer.share_selection = True
    shared = case.plain(**case.place).selected
    for b, mask in enumerate(case.queries):
        rows = int(mask.sum())
        if rows:
            assert torch.equal(shared[b, :rows], own[b, rows - 1].expand(rows, *case.size))


@given(cases(select_from="previous"))
def test_order_of_high_res_tokens_does_not_matter(case: Case) -> None:
    case.layer.low_res_keys, case.layer.replace_dilation = "keep", 0
    selected, order = random_selection(case), torch.randperm(case.high_res.shape[1])
    options = {}
    if "high_res_rotary" in case.rest:
        tables = case.rest["high_res_rotary"]
        options["high_res_rotary"] = tuple(table[:, order] for table in tables)
    shuffled = replace(case, high_res=case.high_res[:, order])
    torch.testing.assert_close(
        shuffled.sharp(selected=selected[..., order], **options).hidden_states,
        case.sharp(selected=selected).hidden_states,
        **CLOSE,
    )


@given(cases(select_from="previous"))
def test_unselected_tokens_have_no_influence_and_no_gradient(case: Case) -> None:
    selected = random_selection(case)
    read = at_positions(case, selected).any(1)
    features = case.high_res.clone().requires_grad_()
    output = replace(case, high_res=features).sharp(selected=selected).hidden_states
    (gradient,) = torch.autograd.grad(output.square().sum(), features, allow_unused=True)
    if gradient is not None:
        assert not gradient[~read].any()
        assert gradient[read].abs().sum(-1).all() or not read.any()
    poisoned = case.high_res.masked_fill(~read[..., None], torch.nan)
    assert torch.equal(replace(case, high_res=poisoned).sharp(selected=selected).hidden_states, output)


@given(cases(select_from="previous"))
def test_gradients_equal_those_of_the_naive_reference(case: Case) -> None:
    selected = random_selection(case, share=0.6)
    case.hidden_states.requires_grad_()
    case.high_res.requires_grad_()
    leaves = [case.hidden_states, case.high_res, *case.layer.parameters()]
    direction = torch.randn_like(case.hidden_states)
    gradients = []
    for output in (case.sharp(selected=selected).hidden_states, expected(case, at_positions(case, selected))[0]):
        gradients.append(torch.autograd.grad((output * direction).sum(), leaves, allow_unused=True))
    for leaf, ours, theirs in zip(leaves, *gradients, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if ours is None else ours, zero if theirs is None else theirs, **CLOSE)


def step_by_step(case: Case, options: dict[str, Any]) -> Tensor:
    """The case's positions one at a time, each with the cached keys and values of those before."""
    length = case.hidden_states.shape[1]
    past, outputs = None, []
    rotary, mask = case.rest.get("rotary"), case.rest.get("attention_mask")
    for i in range(length):
        now: dict[str, Any] = {"past": past, "queries": case.queries[:, i : i + 1]}
        if rotary is not None:
            now["rotary"] = tuple(table[:, i : i + 1] for table in rotary)
            now["high_res_rotary"] = case.rest["high_res_rotary"]
        if mask is not None:
            now["attention_mask"] = mask[:, :, i : i + 1, : i + 1]
        if i >= case.image_positions.max():
            now |= case.place | {name: value[:, i : i + 1] for name, value in options.items()}
        high_res = case.high_res if i >= case.image_positions.max() else None
        output = case.layer(case.hidden_states[:, i : i + 1], high_res, **now)
        past = output.past
        outputs.append(output.hidden_states)
    return torch.cat(outputs, dim=1)


@given(cases(is_causal=True))
def test_cached_decoding_equals_recomputing(case: Case) -> None:
    # Only positions behind the image may look at all of it.
    after = torch.arange(case.queries.shape[1]) >= case.image_positions.max()
    case = replace(case, queries=after.expand_as(case.queries))
    options: dict[str, Any] = {}
    if case.layer.select_from == "previous":
        selected = torch.rand(*case.queries.shape, case.high_res.shape[1]) < 0.5
        options["selected"] = selected
        whole = case.sharp(selected=selected[:, after]).hidden_states
    else:
        whole = case.sharp().hidden_states
    torch.testing.assert_close(step_by_step(case, options), whole, **CLOSE)


@given(cases(is_causal=True), st.sampled_from(["left", "right"]))
def test_a_padded_batch_equals_its_rows(case: Case, side: str) -> None:
    case = replace(case, rest={key: value for key, value in case.rest.items() if key != "attention_mask"})
    layer, cells = case.layer, case.image_positions.shape[1]
    features, rotates = torch.cat([case.high_res[:1], case.high_res[:1].flip(1)]), "rotary" in case.rest
    width = case.rest["rotary"][0].shape[-1] if rotates else 0
    lengths = [cells + 1, cells + 3]
    rows = [torch.randn(1, length, DIM, dtype=torch.float64) for length in lengths]
    total = max(lengths) + 1
    hidden = torch.randn(2, total, DIM, dtype=torch.float64)
    attention, starts = torch.zeros(2, total, dtype=torch.bool), []
    for b, states in enumerate(rows):
        start = total - lengths[b] if side == "left" else 0
        hidden[b, start : start + lengths[b]] = states
        attention[b, start : start + lengths[b]] = True
        starts.append(start)
    queries = torch.zeros_like(attention)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        queries[b, start + cells : start + length] = True
    positions = torch.stack([torch.arange(start, start + cells) for start in starts])
    options: dict[str, Any] = {"grid": case.grid, "zoom": case.zoom}
    selected = torch.rand(2, features.shape[1]) < 0.5
    previous = layer.select_from == "previous"

    def rotary(first: Tensor, length: int) -> dict[str, Any]:
        if not rotates:
            return {}
        # Positions count from each row's own first token.
        sequence = torch.arange(length, dtype=torch.float64) - first[:, None]
        sharp = fractional_positions(torch.arange(cells, dtype=torch.float64)[None], case.grid, case.zoom)
        return {
            "rotary": rotary_tables(sequence, width),
            "high_res_rotary": rotary_tables(sharp, width),
        }

    together = layer(
        hidden,
        features,
        queries=queries,
        image_positions=positions,
        attention_mask=attention[:, None, None],
        selected=selected if previous else None,
        **rotary(torch.tensor(starts, dtype=torch.float64), total),
        **options,
    )
    for b, states in enumerate(rows):
        alone = layer(
            states,
            features[b : b + 1],
            queries=queries[b : b + 1, starts[b] : starts[b] + lengths[b]],
            image_positions=torch.arange(cells)[None],
            selected=selected[b : b + 1] if previous else None,
            **rotary(torch.zeros(1, dtype=torch.float64), lengths[b]),
            **options,
        )
        own = together.hidden_states[b, attention[b]]
        torch.testing.assert_close(own, alone.hidden_states[0], **CLOSE)
        count = alone.selected.shape[1]
        assert torch.equal(together.selected[b, :count], alone.selected[0])


@pytest.mark.parametrize("low_res_keys", ["keep", "replace"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("policy", [Threshold(0.2), TopK(1), Everything(), Nothing()], ids=repr)
@pytest.mark.parametrize("additive", [False, True])
def test_rows_that_see_nothing_stay_finite(low_res_keys: Any, sinks: bool, policy: Policy, additive: bool) -> None:
    layer = HierarchicalSelfAttention(
        DIM,
        2,
        sinks=sinks,
        selector=AttentionMapSelector(policy),
        select_from="same",
        low_res_keys=low_res_keys,
        replace_dilation=3 if low_res_keys == "replace" else 0,
    )
    hidden, high_res = torch.randn(1, 5, DIM, requires_grad=True), torch.randn(1, 16, DIM, requires_grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = mask[4] = False
    if additive:
        mask = torch.zeros(5, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    place = {"grid": (2, 2), "zoom": 2, "image_positions": torch.arange(4)[None]}
    output = layer(hidden, high_res, attention_mask=mask, return_map=True, **place)
    assert output.hidden_states.isfinite().all() and output.map.isfinite().all()
    gradients = torch.autograd.grad(output.hidden_states.sum(), [hidden, high_res], allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert not output.map[0, 4].any(), "a row without keys has an empty map"
    if isinstance(policy, Threshold):
        assert not output.selected[0, 4].any(), "a constant map selects nothing"
    if isinstance(policy, Nothing):
        assert not output.hidden_states[0, 4].any()


def test_a_row_that_lost_all_its_low_res_keys_reads_high_res_alone() -> None:
    layer = HierarchicalSelfAttention(DIM, 2, low_res_keys="replace").double()
    hidden, high_res = torch.randn(1, 2, DIM).double(), torch.randn(1, 2, DIM).double()
    place = {"grid": (1, 2), "image_positions": torch.arange(2)[None]}
    selected = torch.tensor([[True, True]])
    output = layer(hidden, high_res, selected=selected, **place).hidden_states
    query = layer.q_proj(hidden)
    key, value = (part(high_res) for part in (layer.k_proj_hd, layer.v_proj_hd))
    split = [part.reshape(1, 2, 2, 4).transpose(1, 2) for part in (query, key, value)]
    heads = nn.functional.scaled_dot_product_attention(*split)
    torch.testing.assert_close(output, layer.o_proj(heads.transpose(1, 2).reshape(1, 2, DIM)), **CLOSE)


@pytest.mark.parametrize("low_res_keys", ["keep", "replace"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes_stay_finite(low_res_keys: Any, dtype: torch.dtype) -> None:
    layer = HierarchicalSelfAttention(
        DIM, 2, selector=AttentionMapSelector(TopK(1)), select_from="same", low_res_keys=low_res_keys
    )
    hidden, high_res = (2000 * torch.randn(1, n, DIM).clamp(-1, 1) for n in (5, 4))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.eye(DIM) * 30)
    layer = layer.to(dtype)
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(DIM))
    place = {"grid": (2, 2), "image_positions": torch.arange(4)[None]}
    output = layer(hidden.to(dtype), high_res.to(dtype), return_map=True, **place)
    assert output.hidden_states.dtype == dtype
    assert output.hidden_states.isfinite().all() and output.map.isfinite().all()


def test_dropout_acts_in_training_only() -> None:
    layer = HierarchicalSelfAttention(DIM, 2, dropout=0.5, low_res_keys="replace")
    hidden, high_res = torch.randn(1, 5, DIM), torch.randn(1, 4, DIM)
    options = {
        "grid": (2, 2),
        "image_positions": torch.arange(4)[None],
        "selected": torch.tensor([[True, False, False, True]]),
    }
    quiet = [layer.eval()(hidden, high_res, **options).hidden_states for _ in range(2)]
    loud = [layer.train()(hidden, high_res, **options).hidden_states for _ in range(2)]
    assert torch.equal(*quiet) and not torch.equal(*loud)


def test_a_schedule_needs_and_gets_the_layer() -> None:
    selector = AttentionMapSelector(Schedule({2: TopK(1), 4: TopK(3)}))
    layer = HierarchicalSelfAttention(DIM, 2, selector=selector)
    place = {"grid": (2, 2), "zoom": (1, 2), "image_positions": torch.arange(4)[None]}
    selected = [layer(torch.randn(1, 5, DIM), layer=index, **place).selected for index in (1, 2, 5)]
    seeing = [each[:, 3:].sum((-2, -1)).unique().tolist() for each in selected]  # rows before do not see the image
    assert seeing == [[0], [2], [6]]
    assert not any(bool(each[:, :3].any()) for each in selected)


def test_margins_reach_the_selector() -> None:
    layer = HierarchicalSelfAttention(DIM, 2, is_causal=False, selector=AttentionMapSelector(TopK(1)))
    place = {"grid": (3, 2), "image_positions": torch.arange(6)[None], "margins": torch.tensor([[1, 0]])}
    output = layer(torch.randn(1, 7, DIM), return_map=True, **place)
    assert not output.map[..., [0, 2], :].any() and output.map[..., 1, :].all()


def test_a_map_carries_gradient_when_asked_for() -> None:
    layer = HierarchicalSelfAttention(DIM, 2, selector=AttentionMapSelector())
    place = {"grid": (2, 2), "image_positions": torch.arange(4)[None]}
    output = layer(torch.randn(1, 5, DIM), return_map=True, **place)
    (gradient,) = torch.autograd.grad(output.map[0, 4, 0, 1], [layer.k_proj.weight])
    assert gradient.any()


def test_names_of_the_weights() -> None:
    layer = HierarchicalSelfAttention(DIM, 4, 2, bias=True, qk_norm=True, sinks=True, key_norm=nn.LayerNorm(DIM))
    projections = {f"{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj") for kind in ("weight", "bias")}
    projections |= {f"{name}.{kind}" for name in ("k_proj_hd", "v_proj_hd") for kind in ("weight", "bias")}
    norms = {"q_norm.weight", "k_norm.weight", "key_norm.weight", "key_norm.bias"}
    assert set(layer.state_dict()) == projections | norms | {"o_proj.weight", "sinks"}
    assert layer.k_proj_hd.weight.shape == layer.k_proj.weight.shape == (DIM // 2, DIM)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 0}, "positive"),
        ({"num_heads": 3, "head_dim": 2, "num_kv_heads": 2}, "num_kv_heads=2 must divide num_heads=3"),
        ({"num_heads": 3}, "num_heads=3 does not divide dim=8"),
        ({"head_dim": 0}, "head_dim"),
        ({"softcap": 0.0}, "softcap"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": 2, "is_causal": False}, "window is causal"),
        ({"dropout": 1.0}, "dropout"),
        ({"select_from": "next"}, 'select_from is \'next\', expected "previous" or "same"'),
        ({"low_res_keys": "drop"}, 'low_res_keys is \'drop\', expected "keep" or "replace"'),
        ({"select_from": "same"}, "needs a selector"),
        ({"replace_dilation": -1}, "at least 0"),
        ({"replace_dilation": 1}, 'needs low_res_keys="replace"'),
        ({"gate": -0.1}, "nats"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HierarchicalSelfAttention(DIM, **{"num_heads": 2, **settings})


PLACE = {"grid": (2, 2), "image_positions": torch.arange(4)[None]}
SELECTED = {"selected": torch.ones(1, 4, dtype=torch.bool)}
TABLES = (torch.ones(1, 4, 2), torch.ones(1, 4, 2))
ROTARY = (torch.ones(1, 5, 2), torch.ones(1, 5, 2))
PAST = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("settings", "inputs", "error", "message"),
    [
        ({}, {"hidden_states": torch.zeros(1, 5, 9)}, ConfigError, r"hidden_states .* \(1, 5, 9\).*dim=8"),
        ({}, {"queries": torch.ones(1, 5)}, ConfigError, "queries is torch.float32.*torch.bool"),
        ({}, {"queries": torch.ones(1, 4, dtype=torch.bool)}, ConfigError, "length=5"),
        ({}, {"rotary": TABLES}, ConfigError, "rotary.*positions=5"),
        ({}, {"past": (torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 4))}, ConfigError, "past key.*head_dim=4"),
        ({}, {"attention_mask": torch.ones(3, 5, dtype=torch.bool)}, ConfigError, r"attention_mask.*\(3, 5\)"),
        ({}, {"attention_mask": torch.ones(5, 5, dtype=torch.long)}, ConfigError, "bool or floating"),
        ({}, {"return_map": True}, ConfigError, "return_map needs a selector"),
        ({"selector": 1}, {"return_map": True, "grid": None}, ConfigError, "return_map needs grid"),
        ({}, {"image_positions": None}, ConfigError, "without image_positions"),
        ({}, {"image_positions": torch.arange(3)[None]}, ConfigError, "cells=4"),
        ({}, {"image_positions": torch.arange(2, 6)[None]}, ConfigError, "from 2 to 5, expected 0 to 4"),
        ({}, {"zoom": 0}, ConfigError, "zoom"),
        ({"selector": 1, "select_from": "same"}, {"selected": None, "grid": None}, ConfigError, '"same" needs grid'),
        ({"selector": 1, "select_from": "same"}, {}, ConfigError, "do not hand in"),
        ({"low_res_keys": "replace"}, {"grid": None}, ConfigError, '"replace" needs grid'),
        ({"gate": 1.0}, {}, ConfigError, "gate=1.0 needs the entropy"),
        ({"gate": 1.0}, {"entropy": torch.zeros(5)}, ConfigError, "entropy.*batch=1, length=5"),
        ({}, {"high_res": torch.zeros(2, 4, DIM)}, HighResInputError, "high_res .*batch=1"),
        ({}, {"zoom": 2}, HighResInputError, "high_res has 4 tokens, expected 16"),
        ({}, {"high_res_mask": torch.ones(1, 4)}, HighResInputError, "high_res_mask is torch.float32"),
        ({}, {"high_res_rotary": (TABLES[0], TABLES[1][:, :3])}, ConfigError, "high_res_rotary.*positions=4"),
        ({}, {"selected": torch.ones(1, 4)}, HighResInputError, "selected is torch.float32"),
        ({}, {"selected": torch.ones(2, 4, dtype=torch.bool)}, HighResInputError, "1 batch rows"),
        ({}, {"selected": torch.ones(1, 3, dtype=torch.bool)}, HighResInputError, "4 high-res tokens"),
        ({}, {"selected": torch.ones(1, 2, 4, dtype=torch.bool)}, HighResInputError, "5 querying rows"),
        ({}, {"hidden_states": torch.zeros(1, 5, DIM).half()}, ConfigError, "float16, the weights torch.float32"),
        ({}, {"hidden_states": torch.zeros(1, 5, DIM).long()}, ConfigError, "torch.int64 .*expected floating"),
        ({}, {"hidden_states": [[0.0] * DIM]}, ConfigError, "hidden_states is a list, expected a tensor"),
        ({}, {"rotary": ROTARY}, ConfigError, "rotary and high_res_rotary go together"),
        ({}, {"high_res_rotary": TABLES}, ConfigError, "rotary and high_res_rotary go together"),
        ({}, {"rotary": (), "high_res_rotary": TABLES}, ConfigError, "rotary is a tuple of 0, .*cosines and sines"),
        ({}, {"rotary": (ROTARY[0], ROTARY[1].bool())}, ConfigError, "rotary is torch.bool .*expected floating"),
        ({}, {"rotary": (ROTARY[0], ROTARY[1].repeat(1, 1, 2))}, ConfigError, "rotary .*dim=2"),
        ({}, {"past": ()}, ConfigError, "past is a tuple of 0, expected a pair .*keys and values"),
        ({}, {"past": torch.zeros(2, 1, 2, 3, 4)}, ConfigError, "past is a Tensor, expected a pair"),
        ({}, {"past": (PAST, PAST[:, :, 1:])}, ConfigError, "past value .*keys=3"),
        ({}, {"past": (PAST.to("meta"), PAST)}, ConfigError, "past key lies on meta, the hidden states on cpu"),
        ({}, {"grid": 2}, ConfigError, "grid must be two positive ints"),
        ({}, {"grid": (-2, -2)}, ConfigError, "grid must be two positive ints"),
        ({}, {"queries": [[True] * 5]}, ConfigError, "queries is a list"),
        ({}, {"attention_mask": [[True] * 5] * 5}, ConfigError, "attention_mask is a list"),
        ({}, {"attention_mask": torch.ones(5, 5, device="meta")}, ConfigError, "attention_mask lies on meta"),
        ({}, {"attention_mask": torch.ones(5, 5).to_sparse()}, ConfigError, r"sparse_coo tensor.*to_dense\(\)"),
        ({}, {"image_positions": torch.arange(4, device="meta")[None]}, ConfigError, "image_positions lies on meta"),
        ({}, {"high_res": torch.zeros(1, 4, DIM).long()}, HighResInputError, "high_res is torch.int64"),
        ({}, {"high_res": torch.zeros(1, 4, DIM, device="meta")}, HighResInputError, "high_res lies on meta"),
        ({}, {"high_res": torch.zeros(1, 4, DIM + 1), "selected": None}, HighResInputError, "high_res .*dim=8"),
        ({}, {"selected": SELECTED["selected"].numpy()}, HighResInputError, "selected is a ndarray"),
        ({}, {"selected": SELECTED["selected"].to("meta")}, HighResInputError, "selected lies on meta"),
        ({"selector": 1}, {"margins": [[0, 0]]}, ConfigError, "margins is a list, expected a tensor"),
        (
            {"selector": 1},
            {"margins": torch.zeros(1, 2, device="meta").long()},
            ConfigError,
            "margins lies on meta, the hidden states on cpu",
        ),
    ],
)
def test_inputs_are_checked(
    settings: dict[str, Any], inputs: dict[str, Any], error: type[FlexkitError], message: str
) -> None:
    if "selector" in settings:
        settings = settings | {"selector": AttentionMapSelector()}
    layer = HierarchicalSelfAttention(DIM, 2, **settings)
    base = {"hidden_states": torch.zeros(1, 5, DIM), "high_res": torch.zeros(1, 4, DIM)}
    with pytest.raises(error, match=message):
        layer(**{**base, **PLACE, **SELECTED, **inputs})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_and_cache_of_another_dtype(dtype: torch.dtype) -> None:
    """A tower, or a cache, may be kept in another precision than the layer: it is read in the layer's."""
    layer = HierarchicalSelfAttention(DIM, 2)
    high_res, past = torch.randn(1, 4, DIM).to(dtype), (torch.randn(2, 1, 2, 3, 4).to(dtype)).unbind()
    given = {"high_res": high_res, "past": past}
    cast = {"high_res": high_res.float(), "past": tuple(each.float() for each in past)}
    states = torch.randn(1, 5, DIM)
    ours, theirs = (layer(states, **each, **SELECTED).hidden_states for each in (given, cast))
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_autocast_brings_dtypes_together() -> None:
    layer, states, high_res = HierarchicalSelfAttention(DIM, 2), torch.randn(1, 5, DIM), torch.randn(1, 4, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(states.bfloat16(), high_res.half(), **SELECTED).hidden_states
    assert mixed.dtype == torch.bfloat16 and mixed.isfinite().all()


@given(cases(select_from="previous", low_res_keys="keep"))
def test_a_selection_can_be_read_without_a_grid(case: Case) -> None:
    selected = random_selection(case)
    without = case.sharp(selected=selected, grid=None, image_positions=None)
    assert torch.equal(without.hidden_states, case.sharp(selected=selected).hidden_states)
    assert without.selected is None and without.map is None


@pytest.mark.parametrize(
    "settings",
    [{}, {"softcap": 5.0}, {"sinks": True}, {"sliding_window": 4}, {"num_kv_heads": 1, "qk_norm": True}],
    ids=str,
)
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_own_states_are_those_of_tokens_in_the_sequence(settings: dict[str, Any], rotates: bool, masked: bool) -> None:
    own = {"high_res_states": "own", "selector": AttentionMapSelector(Everything()), "select_from": "same"}
    layer = HierarchicalSelfAttention(8, 2, **own, **settings).double()
    hidden, tokens = torch.randn(2, 7, 8).double(), torch.randn(2, 16, 8).double()
    image = torch.arange(1, 5).expand(2, -1)
    positions = torch.cat([torch.arange(7.0), fractional_positions(torch.arange(1.0, 5.0), (2, 2), 2)])
    tables = tuple(table.double()[None] for table in rotary_tables(positions, 4))
    rotary, finer = (tuple(table[:, part] for table in tables) for part in (slice(7), slice(7, None)))
    places = {"rotary": rotary, "high_res_rotary": finer} if rotates else {}
    seen = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    seen[0, :, :, 0] = not masked
    found = layer(hidden, tokens, grid=(2, 2), zoom=2, image_positions=image, attention_mask=seen, **places)

    distance = torch.arange(7)[:, None] - torch.arange(7)
    mask = torch.zeros(2, 1, 23, 23, dtype=torch.bool)
    mask[:, :, :7, :7] = seen & (distance >= 0) & (distance < settings.get("sliding_window", 7))
    mask[:, :, 7:, :7] = mask[:, :, 4:5, :7]
    mask[:, :, 4:7, 7:] = True
    mask[:, :, 7:, 7:] = torch.eye(16, dtype=torch.bool)
    whole = HierarchicalSelfAttention(8, 2, is_causal=False, **settings | {"sliding_window": None}).double()
    whole.load_state_dict(layer.state_dict(), strict=False)
    expected = whole(torch.cat([hidden, tokens], 1), attention_mask=mask, rotary=tables if rotates else None)
    together = torch.cat([found.hidden_states, found.high_res], 1)
    blind = ~mask.any(-1)[:, 0]  # the first position of a row without it
    torch.testing.assert_close(together[~blind], expected.hidden_states[~blind])
    assert not any("_hd" in name for name in layer.state_dict())
