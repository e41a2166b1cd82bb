import pytest
import torch
from torch import Tensor

import flexkit
from flexkit import Everything, FlexConfig, Nothing, TopK
from flexkit.errors import ConfigError
from flexkit.patching import get_patch
from tests.patching.ways import assert_close, families, generate, inputs_of, logits_of, patched
from tests.zoo import FAMILIES, Row, low_res


def attention_map(model: object, inputs: dict[str, Tensor], layer: int, columns: Tensor) -> Tensor:
    """Attention of the last position on some keys, summed over heads, by the eager kernel."""
    model.set_attn_implementation("eager")  # type: ignore[attr-defined]
    with torch.no_grad(), flexkit.disabled(model):  # type: ignore[arg-type]
        attentions = model(**low_res(inputs), output_attentions=True).attentions  # type: ignore[operator]
    model.set_attn_implementation("sdpa")  # type: ignore[attr-defined]
    return attentions[layer][0, :, -1, columns].sum(0)


@families
def test_shapes_of_a_generation(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    rows, columns = FAMILIES[name].grid
    with flexkit.trace(model) as trace:
        generate(model, inputs, 3)
        assert len(trace) == 3
    length = inputs["input_ids"].shape[1]
    for step in range(3):
        place = length - 1 + step
        assert trace.steps[step].queries.tolist() == [[place], [place], [-1]]
        for layer in trace.layers:
            mask, scores = trace.mask(step, layer), trace.scores(step, layer)
            assert mask.shape == (3, 2 * rows, 2 * columns) and mask.dtype == torch.bool
            assert scores.shape == (3, rows, columns) and scores.is_floating_point()
            assert not mask[2].any() and not scores[2].any()
    assert trace.layers == [0, 1, 2, 3]
    assert torch.equal(trace.mask(-1, 0), trace.mask(2, 0))


@families
def test_only_patched_layers_are_recorded(name: str) -> None:
    model = patched(name, start_layer=3)
    with flexkit.trace(model) as trace:
        logits_of(model, inputs_of(name))
    assert trace.layers == [2, 3]


@families
def test_masks_and_scores_are_those_of_the_map(name: str) -> None:
    rows, columns = FAMILIES[name].grid
    model, inputs = patched(name, policy=TopK(2)), inputs_of(name, (Row((None,), 2),))
    with flexkit.trace(model) as trace:
        logits_of(model, inputs)
    tokens = (inputs["input_ids"][0] == 90).nonzero().flatten()
    expected = attention_map(model, inputs, 0, tokens).view(rows, columns)
    torch.testing.assert_close(trace.scores(0, 0)[0], expected, rtol=0, atol=1e-6)
    best = torch.zeros(rows * columns, dtype=torch.bool)
    best[trace.scores(0, 0)[0].flatten().topk(2).indices] = True
    cells = best.view(rows, columns).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(trace.mask(0, 0)[0], cells)


@families
def test_every_image_has_its_own_mask(name: str) -> None:
    rows = (Row((None, None), 2), Row((None,), 2), Row((), 2))
    model, inputs = patched(name), inputs_of(name, rows)
    with flexkit.trace(model) as trace:
        logits_of(model, inputs)
    first, second, third = (trace.mask(0, 0, image=index) for index in range(3))
    assert first[:2].any(-1).any(-1).all() and second[0].any()
    assert not torch.equal(trace.scores(0, 0)[0], trace.scores(0, 0, image=1)[0])
    assert not second[1:].any() and not third.any()


def test_images_of_different_grids_are_padded() -> None:
    rows = (Row(((2, 4),), 2), Row(((3, 2),), 2))
    model, inputs = patched("qwen2_5_vl", policy=Everything()), inputs_of("qwen2_5_vl", rows)
    with flexkit.trace(model) as trace:
        logits_of(model, inputs)
    mask = trace.mask(0, 1)
    assert mask.shape == (2, 6, 8)
    assert mask[0, :4, :8].all() and mask[1, :6, :4].all()
    assert int(mask.sum()) == 4 * 8 + 6 * 4
    assert trace.scores(0, 1).shape == (2, 3, 4)


def test_fraction_of_an_image_smaller_than_the_others() -> None:
    rows = (Row(((2, 4),), 2), Row(((3, 2),), 2))
    model, inputs = patched("qwen2_5_vl", policy=Everything()), inputs_of("qwen2_5_vl", rows)
    with flexkit.trace(model) as trace:
        logits_of(model, inputs)
    assert trace.selected_fraction(0, 1).tolist() == [1.0, 1.0]


@families
def test_fractions(name: str) -> None:
    cells = FAMILIES[name].grid[0] * FAMILIES[name].grid[1]
    for policy, fraction in ((Everything(), 1.0), (Nothing(), 0.0), (TopK(2), 2 / cells)):
        model = patched(name, policy=policy)
        with flexkit.trace(model) as trace:
            logits_of(model, inputs_of(name))
        found = trace.selected_fraction(0, 0)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.tensor([fraction, fraction, 0.0]))


@families
def test_queries_of_a_step_in_order(name: str) -> None:
    rows = (Row((None,), 8), Row((None,), 8))
    model, inputs = patched(name), inputs_of(name, rows)
    length = inputs["input_ids"].shape[1]
    queries = torch.zeros(2, length, dtype=torch.bool)
    queries[0, [-4, -2, -1]] = queries[1, [-3]] = True
    with flexkit.trace(model) as trace:
        logits_of(model, inputs, hd_queries=queries)
    assert trace.steps[0].queries.tolist() == [[length - 4, length - 2, length - 1], [length - 3, -1, -1]]
    by_place = [trace.scores(0, 0, query=query) for query in range(3)]
    assert torch.equal(trace.scores(0, 0, query=-1)[0], by_place[2][0])
    assert torch.equal(trace.scores(0, 0, query=-1)[1], by_place[0][1])
    assert not by_place[1][1].any() and by_place[1][0].any()
    single = torch.zeros_like(queries)
    single[0, -2] = True
    with flexkit.trace(model) as alone:
        logits_of(model, inputs, hd_queries=single)
    assert_close(alone.scores(0, 0)[0], by_place[1][0])
    assert not trace.mask(0, 0, query=3).any() and not trace.mask(0, 0, query=-4).any()


@families
def test_margins_score_zero(name: str) -> None:
    rows, columns = FAMILIES[name].grid
    model, inputs = patched(name, policy=Everything()), inputs_of(name, (Row((None,), 2),))
    # Twice as wide as high: a quarter of the rows on either side is padding, in whole cells.
    with flexkit.trace(model) as trace:
        logits_of(model, inputs, hd_image_sizes=torch.tensor([[10, 1000]]))
    margin = int(495 / 1000 * rows)
    scores = trace.scores(0, 0)[0]
    assert margin > 0 or name == "gemma3"
    assert not scores[:margin].any() and not scores[rows - margin :].any()
    assert scores.shape == (rows, columns) and bool(scores[margin : rows - margin].any()) == (2 * margin < rows)


@families
def test_tracing_changes_nothing(name: str) -> None:
    model, inputs = patched(name, start_layer=2), inputs_of(name)
    before = logits_of(model, inputs)
    with flexkit.trace(model) as outer, flexkit.trace(model) as inner:
        assert torch.equal(logits_of(model, inputs), before)
    assert len(outer) == len(inner) == 1
    assert torch.equal(outer.mask(0, 1), inner.mask(0, 1))


@families
def test_nested_traces_end_for_themselves(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    with flexkit.trace(model) as outer:
        logits_of(model, inputs)
        with flexkit.trace(model) as inner:
            logits_of(model, inputs)
        logits_of(model, inputs)
    logits_of(model, inputs)
    assert (len(outer), len(inner)) == (3, 1)
    assert get_patch(model).recorders == []


@families
def test_a_trace_ends_with_an_error(name: str) -> None:
    model = patched(name)
    with pytest.raises(RuntimeError, match="inside"), flexkit.trace(model):
        raise RuntimeError("inside")
    assert get_patch(model).recorders == []


@families
def test_calls_without_high_res_tokens_leave_no_step(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    with flexkit.trace(model) as trace:
        logits_of(model, low_res(inputs))
        with flexkit.disabled(model):
            logits_of(model, inputs)
    assert len(trace) == 0 and trace.layers == []


@families
def test_disabled_blocks_nest(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    base, ours = logits_of(model, low_res(inputs)), logits_of(model, inputs)
    with flexkit.disabled(model):
        with flexkit.disabled(model):
            assert torch.equal(logits_of(model, inputs), base)
        assert torch.equal(logits_of(model, inputs), base)
        with pytest.raises(RuntimeError, match="inside"), flexkit.disabled(model):
            raise RuntimeError("inside")
        assert torch.equal(logits_of(model, inputs), base)
    assert torch.equal(logits_of(model, inputs), ours)


@families
@pytest.mark.parametrize(("step", "layer"), [(1, 0), (-2, 0), (0, 4), (0, -1)])
def test_no_such_step_or_layer(name: str, step: int, layer: int) -> None:
    model = patched(name)
    with flexkit.trace(model) as trace:
        logits_of(model, inputs_of(name))
    for ask in (trace.mask, trace.scores, trace.selected_fraction):
        with pytest.raises(ConfigError, match=rf"no step {step} with layer {layer}; recorded are 1 steps"):
            ask(step, layer)


def test_an_empty_trace() -> None:
    with flexkit.trace(patched("llava")) as trace:
        pass
    with pytest.raises(ConfigError, match="recorded are 0 steps"):
        trace.mask(0, 0)


@families
def test_beams_are_rows_of_the_trace(name: str) -> None:
    model = patched(
        name, FlexConfig.training_free(select_layers=None, gate=None, zoom=2, start_layer=1, policy=TopK(1))
    )
    with flexkit.trace(model) as trace:
        generate(model, inputs_of(name), 3, num_beams=2)
    assert [len(trace.mask(step, 1)) for step in range(3)] == [6, 6, 6]
    assert len(trace) == 3


def test_representations_are_short() -> None:
    model, inputs = patched("llava"), inputs_of("llava")
    with flexkit.trace(model) as trace:
        generate(model, inputs, 3)
    assert repr(trace) == "Trace(3 steps, layers [0, 1, 2, 3])"
    assert repr(trace.steps[0]).startswith("Step(layers=[0, 1, 2, 3], reading positions (1, 1, 0), gated (0, 0, 0)")
    assert len(repr(trace.steps[0].layers[0])) < 60
    assert not any(bool(step.shut.any()) for step in trace.steps)
