"""Tokens that stand in the KV cache while an answer reads them: nobody else sees them, and nothing else changes."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, StaticCache

import flexkit
from flexkit import FlexConfig
from flexkit.patching.memory import cached_memory
from tests.patching.ways import ROWS, assert_close, generate, inputs_of, plain, through_a_file
from tests.versions import resets_by_emptying
from tests.zoo import Row, low_res

ONE = {
    "high_res_states": "own",
    "select_from": "same",
    "select_layers": (0, 1),
    "start_layer": 1,
    "zoom": 2,
    "policy": flexkit.TopK(3),
}
REPLACING = {"low_res_keys": "replace", "replace_dilation": 1}
families = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
keeping = pytest.mark.parametrize("keys", [{}, REPLACING], ids=["keeping", "replacing"])


def base(name: str, window: int = 64) -> Any:
    """A model whose layers, if they have windows, have some of this length."""
    model = plain(name)
    for part in (model.config.get_text_config(), *model.modules()):
        if isinstance(getattr(part, "sliding_window", None), int):
            part.sliding_window = window
    return model


def patched(name: str, window: int = 64, **settings: Any) -> Any:
    return flexkit.patch_model(base(name, window), FlexConfig(**ONE | settings))


def prefilled(model: Any, inputs: dict[str, Tensor], static: bool = False) -> Any:
    config = model.config.get_text_config()
    cache: Cache = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return cache


def run(model: Any, cache: Any, *tokens: int) -> Tensor:
    """Logits behind tokens that are given at once; positions are told, as Qwen notes some of its own."""
    rows, past = len(cache.layers[0].keys), int(cache.get_seq_length())
    ids, positions = torch.tensor(tokens).expand(rows, -1), torch.arange(past, past + len(tokens)).expand(rows, -1)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, position_ids=positions, past_key_values=cache).logits
    return logits


def step(model: Any, cache: Any, *tokens: int) -> Tensor:
    """Logits behind a token of each row, or several in succession."""
    for token in tokens:
        logits = run(model, cache, token)[:, -1]
    return logits


def without_residence(model: Any, **settings: Any) -> Any:
    """The same model, which joins tokens to the keys of every call."""
    return flexkit.patch_model(flexkit.unpatch_model(model), FlexConfig(**ONE | settings, projection="recompute"))


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[str(function)] += not function.is_view
        return function(*args, **(kwargs or {}))


@families
@pytest.mark.parametrize("settings", [{}, {"surer": 1.0}, {"gate": 1e6}, REPLACING], ids=str)
def test_a_decoded_token_takes_the_operators_of_the_base_model(name: str, settings: dict[str, float]) -> None:
    model, inputs = patched(name, **settings), inputs_of(name, [Row()])
    found = []
    for each, given in ((model, inputs), (base(name), low_res(inputs))):
        cache = prefilled(each, given)
        step(each, cache, 5)
        with Counted() as counted:
            step(each, cache, 6)
        found.append(counted.operators)
    assert not found[0] - found[1]


@keeping
@families
def test_who_does_not_know_of_them_does_not_see_them(name: str, keys: dict[str, Any]) -> None:
    """A model in whose cache they stand is the base model while the patch is off, or gone."""
    model, inputs = patched(name, **keys), inputs_of(name)
    cache, unpatched = prefilled(model, inputs), base(name)
    assert any(layer.keys.shape[2] > cache.get_seq_length() for layer in cache.layers)
    assert {cache.get_seq_length(index) for index in range(len(cache.layers))} == {inputs["input_ids"].shape[1]}
    with flexkit.disabled(model):
        off = step(model, copy.deepcopy(cache), 5)
    flexkit.unpatch_model(model)
    assert_close(step(model, copy.deepcopy(cache), 5), off)
    for layer in cache.layers:
        if hasattr(layer, "take"):
            layer.take()
        layer.__class__ = getattr(type(layer), "own", type(layer))
    assert_close(step(unpatched, cache, 5), off)


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "nothing": lambda model, cache: cache,
    "copied": lambda model, cache: copy.deepcopy(cache),
    "pickled": lambda model, cache: through_a_file(cache, weights_only=False),
    "cropped": lambda model, cache: cropped(model, cache, 1),
    "cropped to the prompt": lambda model, cache: cropped(model, cache, 2),
    "cropped into the prompt": lambda model, cache: cropped(model, cache, 3),
    "another order": lambda model, cache: cache.reorder_cache(torch.tensor([1, 2, 0])) or cache,
    "fewer rows": lambda model, cache: cache.batch_select_indices(torch.tensor([2, 1])) or cache,
    "more rows": lambda model, cache: cache.batch_repeat_interleave(2) or cache,
    "watched": lambda model, cache: watched(model, cache),
    "disabled": lambda model, cache: passed_over(model, cache),
    "several at once": lambda model, cache: several(model, cache),
}


def cropped(model: Any, cache: Any, count: int) -> Any:
    cache.crop(-count)
    return cache


def watched(model: Any, cache: Any) -> Any:
    with flexkit.trace(model):
        step(model, cache, 7)
    return cache


def passed_over(model: Any, cache: Any) -> Any:
    with flexkit.disabled(model):
        step(model, cache, 7)
    return cache


def several(model: Any, cache: Any) -> Any:
    run(model, cache, 7, 8, 9)
    return cache


@keeping
@families
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rows", [ROWS, (Row(), Row(words=3), Row((), 7))], ids=["padded", "one image"])
def test_an_answer_goes_on_however_its_cache_is_changed(
    name: str, change: str, rows: Any, keys: dict[str, Any]
) -> None:
    """As by joining tokens to the keys of every call; and the prompt that follows it sees none of them."""
    found = []
    model, inputs = patched(name, **keys), inputs_of(name, rows)
    for each in (model, without_residence(copy.deepcopy(model), **keys)):
        cache = prefilled(each, inputs)
        step(each, cache, 5, 6)
        cache = CHANGES[change](each, cache)
        found.append([step(each, cache, 7), step(each, cache, 8)])
        found[-1] += run(each, cache, 3, 4, 5).unbind(1)
        found[-1].append(step(each, cache, 9))
    for with_residence, joined in zip(*found, strict=True):
        assert_close(with_residence, joined)


@keeping
@families
def test_a_token_behind_a_static_cache_takes_a_mask_more(name: str, keys: dict[str, Any]) -> None:
    model, found = patched(name, **keys), []
    for each, inputs in ((model, inputs_of(name)), (base(name), low_res(inputs_of(name)))):
        cache = prefilled(each, inputs, static=True)
        assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1]
        step(each, cache, 5)
        with Counted() as counted:
            step(each, cache, 6)
        found.append(counted.operators)
    masks = 2 if name == "gemma3" else 1  # for layers with a window and without
    assert (found[0] - found[1]).total() <= 3 * masks  # each longer, and more closed


ON_A_STATIC_ONE = ["nothing", "copied", "pickled", "another order", "watched", "disabled", "several at once"]


@keeping
@families
@pytest.mark.parametrize("change", ON_A_STATIC_ONE)
@pytest.mark.parametrize("rows", [ROWS, (Row(), Row(words=3), Row((), 7))], ids=["padded", "one image"])
def test_an_answer_goes_on_in_a_static_cache(name: str, change: str, rows: Any, keys: dict[str, Any]) -> None:
    """As it does in one that grows, unseen by whom it does not concern; and the next prompt finds the cache empty."""
    found = []
    model, inputs = patched(name, **keys), inputs_of(name, rows)
    for static in (True, False):
        cache = prefilled(model, inputs, static=static)
        step(model, cache, 5, 6)
        cache = CHANGES[change](model, cache)
        found.append([step(model, cache, 7), step(model, cache, 8)])
        found[-1] += run(model, cache, 3, 4, 5).unbind(1)
        found[-1].append(step(model, cache, 9))
        if static:
            again(model, inputs, cache)
        else:
            cache = prefilled(model, inputs)
        found[-1].append(step(model, cache, 5))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


@keeping
@pytest.mark.parametrize("room", [0, 2])
def test_a_window_that_is_shorter_than_a_static_cache_slides(room: int, keys: dict[str, Any]) -> None:
    inputs, found = inputs_of("gemma3"), []
    model = patched("gemma3", inputs["input_ids"].shape[1] + room, **keys)
    for static in (True, False):
        cache = prefilled(model, inputs, static=static)
        found.append([step(model, cache, token) for token in range(5, 13)])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


def again(model: Any, inputs: dict[str, Tensor], cache: Any) -> None:
    """Run a prompt in a cache that has held another one."""
    cache.reset()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)


@resets_by_emptying
@keeping
@families
def test_a_growing_cache_can_be_emptied(name: str, keys: dict[str, Any]) -> None:
    model, inputs = patched(name, **keys), inputs_of(name)
    cache = prefilled(model, inputs)
    expected = step(model, cache, 5)
    again(model, inputs, cache)
    assert_close(step(model, cache, 5), expected)


@families
def test_they_are_held_once(name: str) -> None:
    """What stands in the cache is nowhere else, and comes back whole."""
    model, inputs = patched(name), inputs_of(name)
    cache = prefilled(model, inputs)
    memory = cached_memory(cache)
    assert memory is not None and memory.resident is not None and not memory.projected
    resident = memory.resident.tokens
    with flexkit.trace(model) as trace:
        step(model, cache, 5)
    assert trace.mask(0, 1).any()
    memory = cached_memory(cache)
    assert memory is not None and memory.resident is not None and resident is not None
    assert torch.equal(memory.resident.tokens.mask, resident.mask)  # type: ignore[union-attr]


@families
def test_a_generation_with_them_is_one_without(name: str) -> None:
    """Beams, too, and an assistant that proposes several tokens."""
    model, inputs = patched(name), inputs_of(name, [Row()])
    other = without_residence(copy.deepcopy(model))
    for settings in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 2}):
        ours, theirs = (generate(each, inputs, 6, **settings) for each in (model, other))
        assert torch.equal(ours.sequences, theirs.sequences)


@keeping
@pytest.mark.parametrize("change", ["nothing", "disabled", "several at once"])
@pytest.mark.parametrize("name", ["gemma3", "llava-mistral"])
@pytest.mark.parametrize("room", [-1, 0, 2])
def test_what_slides_out_of_a_window_takes_its_tokens_along(
    name: str, change: str, room: int, keys: dict[str, Any]
) -> None:
    """Before the window is full, while it fills, and after that, an answer is one whose tokens are joined."""
    inputs, found = inputs_of(name), []
    model = patched(name, inputs["input_ids"].shape[1] + 1 + room, **keys)
    for each in (model, without_residence(copy.deepcopy(model), **keys)):
        cache = prefilled(each, inputs)
        found.append([step(each, cache, 5)])
        cache = CHANGES[change](each, cache)
        found[-1] += [step(each, cache, token) for token in range(6, 14)]
    for with_residence, joined in zip(*found, strict=True):
        assert_close(with_residence, joined)
