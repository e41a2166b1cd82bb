"""A cache that carries the high-res tokens is its model's own: in its layers, and in all that is done to it."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

import flexkit
from flexkit.errors import HighResInputError
from flexkit.patching.memory import cached_memory
from tests.patching.ways import assert_close, generate, logits_of, through_a_file
from tests.ways.contexts import said
from tests.ways.questions import patched_model, question, six
from tests.zoo import CONTEXT, ZOO, Row, low_res, prompt

TWO = (Row((None,), 7), Row((None,), 4))
WORD = {"input_ids": torch.tensor([[5], [9]])}
OWN: dict[str, Callable[[Any], tf.Cache]] = {
    "dynamic": lambda config: tf.DynamicCache(config=config),
    "lazy": lambda config: tf.DynamicCache(),
    "static": lambda config: tf.StaticCache(config=config, max_cache_len=64),
}


def filled(name: str, kind: str = "dynamic", *, views: bool = True) -> Any:
    """The cache of two prompts, one padded."""
    model, inputs = patched_model(name), prompt(ZOO[name], TWO)
    cache = OWN[kind](model.config.get_text_config())
    logits_of(model, inputs if views else low_res(inputs), past_key_values=cache)
    return cache


def went_on(name: str, cache: Any, words: Tensor = WORD["input_ids"]) -> Tensor:
    return logits_of(patched_model(name), {"input_ids": words}, past_key_values=cache)


@six
@pytest.mark.parametrize("kind", OWN)
def test_its_layers_are_those_of_the_model(name: str, kind: str) -> None:
    with_views, without = filled(name, kind), filled(name, kind, views=False)
    assert cached_memory(with_views) is not None and cached_memory(without) is None
    assert len(with_views.layers) == len(with_views) == patched_model(name).config.get_text_config().num_hidden_layers
    for ours, theirs in zip(with_views.layers, without.layers, strict=True):
        assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
        assert ours.keys.shape == theirs.keys.shape and ours.get_seq_length() == theirs.get_seq_length()
    assert repr(with_views) == repr(without) and with_views.is_sliding == without.is_sliding
    assert with_views.get_max_length() == without.get_max_length()


def test_an_encoder_decoder_has_two_caches_with_layers_of_its_own() -> None:
    model = flexkit.patch_model(CONTEXT["florence2"].model(), flexkit.FlexConfig(zoom=2), trained=True)
    inputs = prompt(CONTEXT["florence2"], [Row()])
    cache, base = (said(model, given).past_key_values for given in (inputs, low_res(inputs)))
    assert cached_memory(cache) is not None
    for part in ("self_attention_cache", "cross_attention_cache"):
        assert repr(getattr(cache, part)) == repr(getattr(base, part))


def of_copied_layers(cache: Any) -> Any:
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": partial(through_a_file, weights_only=False),
    "copies of layers": of_copied_layers,
}


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_goes_on_by_itself(name: str, way: str) -> None:
    cache = filled(name)
    expected = went_on(name, copy.deepcopy(cache))
    twin = COPIES[way](cache)
    assert torch.equal(went_on(name, twin), expected)
    assert torch.equal(went_on(name, cache), expected)
    assert not torch.equal(went_on(name, filled(name, views=False)), expected)


SELECTIONS: dict[str, tuple[list[int], Callable[[Any], None]]] = {
    "reordered": ([1, 0], lambda held: held.reorder_cache(torch.tensor([1, 0]))),
    "selected": ([1], lambda held: held.batch_select_indices(torch.tensor([1]))),
    "by a mask": ([0], lambda held: held.batch_select_indices(torch.tensor([True, False]))),
    "repeated": ([0, 0, 1, 1], lambda held: held.batch_repeat_interleave(2)),
}


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("way", SELECTIONS)
@pytest.mark.parametrize("by", ["cache", "layers"])
def test_rows_are_chosen_together(name: str, way: str, by: str) -> None:
    """By methods of the cache, or of its layers one by one."""
    rows, change = SELECTIONS[way]
    cache = filled(name)
    expected = went_on(name, copy.deepcopy(cache))[rows]
    for held in [cache] if by == "cache" else cache.layers:
        change(held)
    assert_close(went_on(name, cache, WORD["input_ids"][rows]), expected)


@settings(max_examples=10)
@given(changes=st.lists(st.sampled_from([*SELECTIONS, *COPIES]), min_size=2, max_size=5))
def test_whatever_is_done_to_a_cache(changes: list[str]) -> None:
    name, rows = "llava", torch.arange(2)
    cache = filled(name)
    expected = went_on(name, copy.deepcopy(cache))
    for change in changes:
        if change in COPIES:
            cache = COPIES[change](cache)
        elif len(rows) == 2:
            chosen, do = SELECTIONS[change]
            do(cache)
            rows = rows[chosen]
    assert_close(went_on(name, cache, WORD["input_ids"][rows]), expected[rows])


@six
def test_a_crop_takes_decoded_words_away(name: str) -> None:
    cache = filled(name)
    if not cache.is_croppable:
        pytest.skip("the windows of this cache cannot be cropped")
    expected = went_on(name, copy.deepcopy(cache))
    cropped = copy.deepcopy(cache)
    if hasattr(cropped, "activate_past_recording"):
        cropped.activate_past_recording()
    held = cropped.get_seq_length()
    went_on(name, cropped, torch.tensor([[7, 8, 6], [3, 4, 8]]))
    cropped.crop(-3)
    assert cropped.get_seq_length() == held
    assert_close(went_on(name, cropped), expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_crop_into_an_image_takes_it_away(name: str) -> None:
    cache = filled(name)
    cache.crop(-10)
    memory = cached_memory(cache)
    assert memory is None or len(memory.images) < 2
    cache.crop(-(cache.get_seq_length() - 1))
    assert cached_memory(cache) is None


def test_what_a_base_model_appends_counts() -> None:
    model, inputs = patched_model("llava"), question("llava").inputs
    caches = [tf.DynamicCache(config=model.config.get_text_config()) for _ in range(3)]
    words = {"input_ids": torch.tensor([[7, 8]])}
    for cache in caches:
        logits_of(model, inputs, past_key_values=cache)
    with flexkit.disabled(model):
        logits_of(model, words, past_key_values=caches[0])
    model.model.language_model(**words, past_key_values=caches[1])
    logits_of(
        model, words | {"hd_queries": torch.zeros(1, 1, dtype=torch.bool).expand(1, 21)}, past_key_values=caches[2]
    )
    first, second, third = (logits_of(model, {"input_ids": torch.tensor([[5]])}, past_key_values=c) for c in caches)
    assert torch.equal(first, second) and torch.equal(first, third)


def without(layer: Any, gone: slice) -> None:
    """Take positions out of a layer by hand."""
    left = torch.ones(layer.keys.shape[-2], dtype=torch.bool)
    left[gone] = False
    layer.keys, layer.values = layer.keys[:, :, left], layer.values[:, :, left]


@six
@pytest.mark.parametrize("gone", [slice(0, 2), slice(3, 5), slice(-1, None)], ids=["front", "image", "end"])
def test_positions_taken_out_by_hand_are_noticed(name: str, gone: slice) -> None:
    cache = filled(name)
    for layer in cache.layers:
        if not layer.is_sliding:
            without(layer, gone)
    with pytest.raises(HighResInputError, match=r"was given \d+ positions and holds \d+.* its own method crop"):
        went_on(name, cache)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_positions_put_in_by_hand_are_noticed(name: str) -> None:
    cache = filled(name)
    for layer in cache.layers:
        layer.keys, layer.values = (torch.cat([held[:, :, :2], held], dim=2) for held in (layer.keys, layer.values))
    with pytest.raises(HighResInputError, match=r"was given \d+ positions and holds \d+"):
        went_on(name, cache)


def test_positions_dropped_while_the_prompt_runs_are_noticed() -> None:
    """As libraries that compress caches do, by hooks on attention."""
    model, inputs = patched_model("llava"), question("llava").inputs
    cache = tf.DynamicCache(config=model.config.get_text_config())

    def compress(module: Any, args: Any, output: Any) -> None:
        without(cache.layers[module.layer_idx], slice(0, 4))

    layers = model.get_decoder().layers
    hooks = [layer.self_attn.register_forward_hook(compress) for layer in layers]
    try:
        logits_of(model, inputs, past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    with pytest.raises(HighResInputError, match="was given 19 positions and holds 15"):
        logits_of(model, {"input_ids": torch.tensor([[5]])}, past_key_values=cache)


class Dropping(DynamicLayer):
    """A layer that keeps the last positions alone, and counts those."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        whole = super().update(key_states, value_states)
        self.keys, self.values = (held[:, :, -12:] for held in whole)
        return whole


def test_layers_that_drop_positions_are_noticed() -> None:
    model, inputs = patched_model("llava"), question("llava").inputs
    word = {"input_ids": torch.tensor([[5]])}
    cache, base = (tf.Cache(layers=[Dropping() for _ in range(4)]) for _ in range(2))
    logits_of(model, low_res(inputs), past_key_values=base)
    logits_of(model, word, past_key_values=base)
    logits_of(model, inputs, past_key_values=cache)
    with pytest.raises(HighResInputError, match="was given 19 positions and holds 12"):
        logits_of(model, word, past_key_values=cache)


class Typed(DynamicLayer):
    """A layer for a type of attention, as models define them in files of their own."""

    _layer_type = "flexkit_test_attention"


def test_a_layer_that_carries_is_not_registered_for_its_type() -> None:
    from transformers import cache_utils

    cache = tf.Cache(layers=[Typed() for _ in range(4)])
    logits_of(patched_model("llava"), question("llava").inputs, past_key_values=cache)
    assert isinstance(cache.layers[0], Typed) and cached_memory(cache) is not None
    registered = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {"flexkit_test_attention": Typed})
    assert registered.pop("flexkit_test_attention") is Typed
    assert all(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def test_a_cache_that_was_reset_is_new() -> None:
    model, asked = patched_model("llava"), question("llava")
    cache = tf.StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    for inputs, expected in ((asked.inputs, asked.answer), (low_res(asked.inputs), asked.base)):
        answer = generate(model, inputs, past_key_values=cache)
        assert torch.equal(answer.sequences, expected.sequences)
        cache.reset()
        assert cached_memory(cache) is None
