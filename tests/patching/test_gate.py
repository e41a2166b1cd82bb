import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import flexkit
from flexkit.errors import ConfigError
from flexkit.patching import get_patch
from tests.patching.ways import (
    ROWS,
    assert_close,
    decoding,
    families,
    generate,
    inputs_of,
    logits_of,
    new_tokens,
    patched,
    plain,
)
from tests.zoo import Row, low_res

MANY = (Row((None,), 7), Row((None, None), 2), Row((), 6), Row((None,), 5), Row((None,), 3))
CACHES = ("dynamic", "lazy", "static")


def gated(name: str, gate: float | None, **settings: Any) -> tf.PreTrainedModel:
    """A patched model whose rows read high-res tokens where they are unsure by ``gate`` nats."""
    preset = {"start_layer": 1, "zoom": 2, "policy": flexkit.TopK(3)}
    return patched(name, flexkit.FlexConfig.training_free(high_res_states="features", gate=gate, **(preset | settings)))


def cache_of(kind: str, model: tf.PreTrainedModel) -> tf.Cache:
    text = model.config.get_text_config()
    if kind == "static":
        return tf.StaticCache(config=text, max_cache_len=64)
    return tf.DynamicCache(config=text) if kind == "dynamic" else tf.DynamicCache()


def held(cache: tf.Cache) -> list[Tensor]:
    """Keys and values of the decoder layers."""
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def entropy(logits: Tensor) -> Tensor:
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def between(entropies: Tensor) -> float:
    """A gate that parts the rows with an image in two halves."""
    ordered = entropies.sort().values
    middle = len(ordered) // 2
    return float(ordered[middle - 1 : middle + 1].mean())


@families
def test_gate_zero_is_no_gate(name: str) -> None:
    inputs = inputs_of(name)
    open_always, without = gated(name, 0.0), gated(name, None)
    assert torch.equal(logits_of(open_always, inputs), logits_of(without, inputs))
    ours, theirs = generate(open_always, inputs), generate(without, inputs)
    assert all(torch.equal(*steps) for steps in zip(ours.logits, theirs.logits, strict=True))


@families
@pytest.mark.parametrize("kind", CACHES)
def test_a_gate_that_never_opens_leaves_the_base_model(name: str, kind: str) -> None:
    model, inputs = gated(name, 1e9), inputs_of(name)
    caches = [cache_of(kind, model) for _ in range(2)]
    ours = logits_of(model, inputs, past_key_values=caches[0])
    assert torch.equal(ours, logits_of(model, low_res(inputs), past_key_values=caches[1]))
    assert all(torch.equal(*pair) for pair in zip(*map(held, caches), strict=True))
    assert torch.equal(generate(model, inputs).sequences, generate(model, low_res(inputs)).sequences)


@families
def test_exactly_the_uncertain_rows_change(name: str) -> None:
    inputs = inputs_of(name, MANY)
    model = gated(name, None)
    base, opened = logits_of(model, low_res(inputs))[:, -1], logits_of(model, inputs)[:, -1]
    entropies, has_image = entropy(base), torch.tensor([bool(row.images) for row in MANY])
    gate = between(entropies[has_image])
    ours = logits_of(gated(name, gate), inputs)[:, -1]
    is_open = (entropies >= gate) & has_image
    assert 0 < int(is_open.sum()) < int(has_image.sum())
    for row, logits in enumerate(ours):
        if is_open[row]:
            assert_close(logits, opened[row])
            assert not torch.equal(logits, base[row])
        else:
            assert torch.equal(logits, base[row])


@families
@pytest.mark.parametrize("kind", CACHES)
def test_every_decoded_row_decides_for_itself(name: str, kind: str) -> None:
    """Each step, from the cache as it is: the low-res answer where that is sure, the open one where it is not."""
    inputs = inputs_of(name, MANY)
    model = gated(name, None)
    entropies = entropy(logits_of(model, low_res(inputs))[:, -1])
    config = get_patch(model).config
    gate, has_image = between(entropies), torch.tensor([bool(row.images) for row in MANY])
    cache, seen = cache_of(kind, model), []
    call = dict(inputs)
    for step in range(4):
        runs = {}
        for way in ("base", "open", "gated"):
            get_patch(model).config = config.replace(gate=gate if way == "gated" else None)
            own = copy.deepcopy(cache)
            if way == "base":
                with flexkit.disabled(model):
                    runs[way] = logits_of(model, call, past_key_values=own)[:, -1], own
            else:
                runs[way] = logits_of(model, call, past_key_values=own)[:, -1], own
        is_open = (entropy(runs["base"][0]) >= gate) & has_image
        seen += is_open[has_image].tolist()
        expected = torch.where(is_open[:, None], runs["open"][0], runs["base"][0])
        assert_close(runs["gated"][0], expected)
        for ours, base, opened in zip(*(held(runs[way][1]) for way in ("gated", "base", "open")), strict=True):
            assert_close(ours, torch.where(is_open[:, None, None, None], opened, base))
        cache = runs["gated"][1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(MANY), step + 1, dtype=torch.long)], dim=1)
        tokens = torch.arange(len(MANY))[:, None] + 10 + step
        call = decoding(tokens, mask, getattr(model.model, "rope_deltas", None))
    assert {True, False} <= set(seen)


@families
def test_trace_shows_which_rows_opened(name: str) -> None:
    inputs = inputs_of(name)
    entropies = entropy(logits_of(plain(name), low_res(inputs))[:, -1])[:2]
    model = gated(name, between(entropies))
    last = inputs["input_ids"].shape[1] - 1
    with flexkit.trace(model) as trace:
        logits_of(model, inputs)
    rows = [[last] if value == entropies.max() else [-1] for value in entropies]
    assert trace.steps[0].queries.tolist() == [*rows, [-1]]
    kept = [[-1] if value == entropies.max() else [last] for value in entropies]
    assert trace.steps[0].gated.tolist() == [*kept, [-1]]  # a row without an image has nothing to read
    assert trace.steps[0].shut.tolist() == [*(value != entropies.max() for value in entropies), False]
    closed = gated(name, 1e9)
    with flexkit.trace(closed) as trace:
        generate(closed, inputs, 3)
    assert len(trace) == 3
    assert all(step.queries.shape == (3, 0) for step in trace.steps)
    assert not trace.mask(0, 1).any()
    assert all(step.shut.tolist() == [True, True, False] for step in trace.steps)


@families
def test_several_rows_of_one_prompt(name: str) -> None:
    inputs = inputs_of(name, (Row((None,), 8),))
    model = gated(name, None)
    base = logits_of(model, low_res(inputs))[0, -4:]
    gate = between(entropy(base))
    with flexkit.trace(shut := gated(name, gate)) as trace:
        logits_of(shut, inputs, logits_to_keep=4)
    first = inputs["input_ids"].shape[1] - 4
    assert trace.steps[0].queries.tolist() == [[first + int(row) for row in (entropy(base) >= gate).nonzero()]]


@families
def test_tuples_with_a_loss_in_front(name: str) -> None:
    model, inputs = gated(name, 0.0), inputs_of(name)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    with torch.no_grad():
        loss, logits = model(**inputs, labels=labels, return_dict=False)[:2]
        output = model(**inputs, labels=labels)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)


@families
def test_training_knows_no_gate(name: str) -> None:
    inputs = inputs_of(name, ROWS)
    ours, reference = gated(name, 1e9).train(), gated(name, None).train()
    assert torch.equal(logits_of(ours, inputs), logits_of(reference, inputs))


def test_a_forward_without_logits_has_no_gate() -> None:
    model, inputs = plain("llava"), inputs_of("llava")
    model.forward = model.model.forward  # somebody who asks for states
    config = flexkit.FlexConfig.training_free(high_res_states="features", zoom=2, start_layer=1)
    flexkit.patch_model(model, config)
    with pytest.raises(ConfigError, match="gate"):
        model(**inputs)
    flexkit.unpatch_model(model)
    flexkit.patch_model(model, config.replace(gate=None))
    with torch.no_grad():
        assert bool(model(**inputs).last_hidden_state.isfinite().all())


@families
def test_beams_with_a_gate(name: str) -> None:
    model = gated(name, between(entropy(logits_of(plain(name), low_res(inputs_of(name)))[:, -1])))
    inputs = inputs_of(name)
    output = generate(model, inputs, num_beams=2, num_return_sequences=2)
    assert new_tokens(output).shape == (6, 4)
    base = generate(model, low_res(inputs), num_beams=2, num_return_sequences=2)
    assert torch.equal(new_tokens(output)[4:], new_tokens(base)[4:])
