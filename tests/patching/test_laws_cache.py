"""Laws 4 and 6: how a result is computed does not matter: in steps or at once, in a batch or alone, kept or again."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

import flexkit
from flexkit import Everything
from flexkit.patching.memory import Tiled, cached_memory
from tests.patching.laws import ROUNDED, batches, last_attended, model_of, patched, position_ids, row_alone, settings_of
from tests.patching.ways import generate
from tests.zoo import FAMILIES, MAIN, Row, prompt

EXACT = {"rtol": 1e-9, "atol": 1e-9}
# One selection for all rows is shared within a call, so a result with it does depend on the calls.
last = settings_of(
    queries=st.just("last"),
    share_selection=st.sampled_from([None, False]),
    zoom=st.sampled_from([(1, 2), (2, 2), (2, 1)]),
)
TURN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def with_positions(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"position_ids": position_ids(model, inputs)}


def followed_by(model: Any, inputs: dict[str, Tensor], words: Tensor) -> dict[str, Tensor]:
    """The inputs with ``words`` ``(batch, length)`` behind the prompt."""
    longer = dict(inputs)
    for name in TURN:
        if name in inputs:
            new = {"input_ids": words, "attention_mask": torch.ones_like(words)}.get(name, torch.zeros_like(words))
            longer[name] = torch.cat([inputs[name], new], dim=1)
    return with_positions(model, longer)


def turn(inputs: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Positions ``start`` to ``stop`` of a sequence, without images; the mask covers what came before."""
    part = {name: inputs[name][..., start:stop] for name in (*TURN, "position_ids") if name in inputs}
    return part | {"attention_mask": inputs["attention_mask"][:, :stop]}


def images(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name not in TURN and name != "position_ids"}


def cache_of(model: Any, kind: str) -> Any:
    text = model.config.get_text_config()
    return StaticCache(config=text, max_cache_len=64) if kind == "static" else DynamicCache(config=text)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=8)
@given(data=st.data(), config=last, kind=st.sampled_from(["dynamic", "static"]), seed=st.integers(0, 99))
@torch.no_grad()
def test_decoding_equals_recomputing(
    name: str, data: st.DataObject, config: dict[str, Any], kind: str, seed: int
) -> None:
    model = model_of(name)
    start = prompt(FAMILIES[name], data.draw(batches(name, max_rows=2, max_words=12)), zoom=config["zoom"])
    length = start["input_ids"].shape[1]
    words = torch.randint(3, 80, (len(start["input_ids"]), 5), generator=torch.Generator().manual_seed(seed))
    whole = followed_by(model, start, words)
    # One token at a time, then a turn of two words, of which the last one queries.
    stops = [length, length + 1, length + 2, length + 4, length + 5]
    with patched(model, **config):
        cache, begin, found = cache_of(model, kind), 0, []
        for stop in stops:
            given_images = images(start) if begin == 0 else {}
            output = model(**turn(whole, begin, stop), **given_images, past_key_values=cache)
            found.append(output.logits[:, -1])
            begin = stop
        queries = torch.zeros_like(whole["input_ids"], dtype=torch.bool)
        queries[:, [stop - 1 for stop in stops]] = True
        expected = model(**whole, hd_queries=queries).logits
    torch.testing.assert_close(torch.stack(found, 1), expected[:, [stop - 1 for stop in stops]], **EXACT)


# On a kept cache gemma3 itself masks the block of a second image otherwise than in one call.
@pytest.mark.parametrize("name", ["llava", "llava-mistral", "qwen2_5_vl"])
@settings(max_examples=8)
@given(config=last, kind=st.sampled_from(["dynamic", "static"]), words=st.integers(1, 12))
@torch.no_grad()
def test_second_image_on_a_kept_cache(name: str, config: dict[str, Any], kind: str, words: int) -> None:
    model = model_of(name)
    grids = ((1, 3), (2, 2)) if FAMILIES[name].any_grid else (None, None)
    whole = with_positions(model, prompt(FAMILIES[name], [Row(images=grids, words=words)], zoom=config["zoom"]))
    length = whole["input_ids"].shape[1]
    second = int((whole["input_ids"] == 92).nonzero()[1, 1])
    ends = [second - 1, length - 1]
    queries = torch.zeros(1, length, dtype=torch.bool)
    queries[:, ends] = True
    with patched(model, **config):
        cache = cache_of(model, kind)
        turns = [(0, second, row_images(whole, 0)), (second, length, row_images(whole, 1))]
        found = [
            model(**turn(whole, begin, stop), **views, past_key_values=cache).logits[:, -1]
            for begin, stop, views in turns
        ]
        expected = model(**whole, hd_queries=queries).logits[:, ends]
    torch.testing.assert_close(torch.stack(found, 1), expected, **EXACT)


def row_images(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """The views of one image of a prompt."""
    chosen = {}
    for prefix in ("", "hd_"):
        views, sizes = inputs[f"{prefix}pixel_values"], inputs.get(f"{prefix}image_grid_thw")
        if sizes is None:
            chosen[f"{prefix}pixel_values"] = views[index : index + 1]
        else:
            counts = sizes.prod(-1).tolist()
            chosen[f"{prefix}pixel_values"] = views[sum(counts[:index]) : sum(counts[: index + 1])]
            chosen[f"{prefix}image_grid_thw"] = sizes[index : index + 1]
    return chosen


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10)
@given(data=st.data(), padding=st.sampled_from(["left", "right"]), config=settings_of())
@torch.no_grad()
def test_a_batch_equals_its_rows(name: str, data: st.DataObject, padding: str, config: dict[str, Any]) -> None:
    model = model_of(name)
    rows = data.draw(batches(name, max_words=12))
    inputs = with_positions(model, prompt(FAMILIES[name], rows, zoom=config["zoom"], padding=padding))
    counts = [len(row.images) for row in rows]
    attended = inputs["attention_mask"].bool()
    with patched(model, **config):
        together = model(**inputs).logits
        for row in range(len(rows)):
            alone = model(**row_alone(inputs, row, counts)).logits
            torch.testing.assert_close(together[row, attended[row]], alone[0], **EXACT)


@pytest.mark.parametrize("name", MAIN)
@torch.no_grad()
def test_the_last_attended_position_queries(name: str) -> None:
    model = model_of(name)
    for padding in ("left", "right"):
        inputs = prompt(FAMILIES[name], [Row(), Row(words=2), Row(images=(), words=3)], padding=padding)
        with patched(model, zoom=2, policy=Everything()):
            with flexkit.disabled(model):
                base = model(**inputs).logits
            changed = (model(**inputs).logits != base).any(-1)
        # Padding behind it may see it, and is never asked for.
        changed &= inputs["attention_mask"].bool()
        assert torch.equal(changed, last_attended(inputs) & torch.tensor([[True], [True], [False]]))


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("policy", [flexkit.Threshold(0.2), flexkit.TopK(2), Everything()])
def test_generating_equals_generating_alone(name: str, policy: flexkit.Policy) -> None:
    model = model_of(name)
    rows = [Row(), Row(words=1), Row(images=(), words=2), Row(images=(None, None), words=3)]
    inputs = prompt(FAMILIES[name], rows)
    counts = [len(row.images) for row in rows]
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with patched(model, zoom=2, policy=policy):
        together = model.generate(**inputs, **options)
        for row in range(len(rows)):
            alone = model.generate(**row_alone(inputs, row, counts), **options)
            for step, logits in enumerate(alone.logits):
                torch.testing.assert_close(together.logits[step][row], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MAIN)
@settings(max_examples=6)
@given(data=st.data(), config=last, way=st.sampled_from(["again", "copied", "copied once"]))
@torch.no_grad()
def test_keeping_projections_changes_nothing(name: str, data: st.DataObject, config: dict[str, Any], way: str) -> None:
    model = model_of(name)
    start = prompt(FAMILIES[name], data.draw(batches(name, max_rows=2)), zoom=config["zoom"])
    length = start["input_ids"].shape[1]
    whole = followed_by(model, start, torch.randint(3, 80, (len(start["input_ids"]), 4)))

    def steps(disturbed: bool) -> Tensor:
        cache, found = cache_of(model, "dynamic"), []
        for begin, stop in [(0, length), *((i, i + 1) for i in range(length, length + 4))]:
            given_images = images(start) if begin == 0 else {}
            found.append(model(**turn(whole, begin, stop), **given_images, past_key_values=cache).logits[:, -1])
            memory = cached_memory(cache)
            kept = set() if config["projection"] == "recompute" else set(range(config["start_layer"], 4))
            assert memory is not None
            unread = config["high_res_states"] == "own" and not memory.projected
            assert unread or set(memory.projected) == kept
            if disturbed and way == "again":
                memory.projected.clear()
            elif disturbed and (way == "copied" or begin == length):
                cache = copy.deepcopy(cache)
        return torch.stack(found)

    with patched(model, **config):
        exactly = {"rtol": 0, "atol": 0}  # computed again, other tokens are computed together
        tolerance = ROUNDED if way == "again" else exactly
        torch.testing.assert_close(steps(disturbed=True), steps(disturbed=False), **tolerance)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=6)
@given(data=st.data(), config=settings_of(), tokens=st.integers(1, 4))
@torch.no_grad()
def test_when_tokens_are_encoded_and_projected_changes_nothing(
    name: str, data: st.DataObject, config: dict[str, Any], tokens: int
) -> None:
    model = model_of(name)
    inputs = prompt(FAMILIES[name], data.draw(batches(name, max_rows=2)), zoom=config["zoom"])
    answers = []
    for ways in (("on_demand", "lazy"), ("all", "lazy"), ("all", "full"), ("on_demand", "recompute")):
        with patched(model, **config | dict(zip(("tiles", "projection"), ways, strict=True))):
            answers.append(generate(model, inputs, tokens))
    for other in answers[1:]:
        assert torch.equal(other.sequences, answers[0].sequences)
        torch.testing.assert_close(other.logits, answers[0].logits, **ROUNDED)


@pytest.mark.parametrize("name", MAIN)
@torch.no_grad()
def test_what_is_kept_is_bounded(name: str) -> None:
    model, held = model_of(name), {}
    inputs = prompt(FAMILIES[name], [Row(), Row(images=())], zoom=(2, 2))
    for kept in (None, 0.34):
        with patched(model, start_layer=2, zoom=2, policy=flexkit.TopK(1), kept=kept):
            memory = cached_memory(generate(model, inputs, 9).past_key_values)
        assert memory is not None
        held[kept] = max(projected.key.shape[2] for projected in memory.projected.values())
    assert held[0.34] <= 0.34 * memory.tokens < held[None]


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_a_tile_is_encoded_once_and_only_if_it_is_looked_at(name: str, beams: int) -> None:
    model, encoded = model_of(name), []
    inputs = prompt(FAMILIES[name], [Row(), Row((None, None)), Row(images=())], zoom=(2, 2))
    own = model.get_image_features

    def counted(*args: Any, **kwargs: Any) -> Any:
        encoded.append(len(kwargs["pixel_values"]))
        return own(*args, **kwargs)

    with patched(model, start_layer=3, zoom=2, policy=flexkit.TopK(1)), flexkit.trace(model) as trace:
        model.get_image_features = counted
        try:
            cache = generate(model, inputs, 2, num_beams=beams).past_key_values
        finally:
            del model.get_image_features
        looked_at = {
            (row // beams, image, *place)
            for step in range(len(trace))
            for image in range(2)
            for row, mask in enumerate(trace.mask(step, 2, image=image))
            for place in (mask.nonzero() // (len(mask) // 2)).tolist()
        }
    memory = cached_memory(cache)
    assert memory is not None and isinstance(memory.features, Tiled)
    assert memory.features.opened == sum(encoded) == len(looked_at) < 12


@pytest.mark.parametrize("name", MAIN)
@torch.no_grad()
def test_a_token_is_projected_once_and_only_if_it_is_read(name: str) -> None:
    model, counts = model_of(name), []
    inputs = prompt(FAMILIES[name], [Row(), Row(images=())], zoom=(2, 2))
    with patched(model, start_layer=2, zoom=2, policy=flexkit.TopK(2)), flexkit.trace(model) as trace:
        for layer in (2, 3):
            projection = next(module for path, module in model.named_modules() if path.endswith(f"{layer}.self_attn"))
            projection.k_proj_hd.register_forward_hook(lambda module, args, _: counts.append(args[0].shape[0]))
        cache = generate(model, inputs, 5).past_key_values
        read = {
            layer: torch.stack([trace.mask(step, layer - 1) for step in range(len(trace))]).any(0).sum((-2, -1))
            for layer in (2, 3)
        }
        memory = cached_memory(cache)
        assert memory is not None
        for layer, held in memory.projected.items():
            assert held.tokens is not None and torch.equal(held.tokens.valid.sum(-1), read[layer])
        assert sum(counts) == sum(held.key.shape[0] * held.key.shape[2] for held in memory.projected.values())


@pytest.mark.parametrize("name", MAIN)
@torch.no_grad()
def test_going_on_twice_from_one_cache(name: str) -> None:
    model = model_of(name)
    start = prompt(FAMILIES[name])
    length = start["input_ids"].shape[1]
    ways = [followed_by(model, start, torch.tensor([[word, 7]])) for word in (5, 60)]
    with patched(model, zoom=2, policy=flexkit.TopK(2)):
        cache = cache_of(model, "dynamic")
        model(**turn(ways[0], 0, length), **images(start), past_key_values=cache)
        branches = [copy.deepcopy(cache) for _ in ways]
        for whole, branch in zip(ways, branches, strict=True):
            found = [
                model(**turn(whole, stop - 1, stop), past_key_values=branch).logits[:, -1]
                for stop in (length + 1, length + 2)
            ]
            queries = torch.arange(length + 2)[None] >= length - 1
            expected = model(**whole, hd_queries=queries).logits[:, -2:]
            torch.testing.assert_close(torch.stack(found, 1), expected, **EXACT)


@pytest.mark.parametrize("name", MAIN)
@torch.no_grad()
def test_positions_after_the_named_ones_query(name: str) -> None:
    model = model_of(name)
    inputs = prompt(FAMILIES[name], [Row(words=5), Row(words=3)])
    named = inputs["attention_mask"].bool() & (torch.arange(inputs["input_ids"].shape[1]) % 2 == 1)
    with patched(model, zoom=2, policy=flexkit.TopK(2)):
        output = model.generate(
            **inputs,
            hd_queries=named,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        words = output.sequences[:, named.shape[1] :]
        queries = torch.cat([named, torch.ones_like(words, dtype=torch.bool)], dim=1)
        expected = model(**followed_by(model, inputs, words), hd_queries=queries).logits[:, -5:-1]
    torch.testing.assert_close(torch.stack(output.logits, 1), expected.float(), rtol=1e-5, atol=1e-5)
