"""A pyramid of zooms: what a layer reads on all levels is naive joint attention, and opens what lies below."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import flexkit
from flexkit import ConfigError, Everything, FlexConfig, HighResInputError, Random, Threshold, TopK, TopP
from flexkit.patching import get_patch
from flexkit.patching.memory import cached_memory
from tests.patching.laws import ROUNDED, batches, model_of, patched, settings_of
from tests.patching.reference import high_res_keys_values, joint_row, recording, tables_of
from tests.patching.tiles import images_of_level, tiled_prompt
from tests.zoo import FAMILIES, Row, prompt

TILED = ("llava", "gemma3")
drawn = settings_of(
    zoom=st.sampled_from([(1, 2), (2, 1)]),
    levels=st.integers(1, 3),
    start_layer=st.just(1),
    low_res_keys=st.just("keep"),
    policy=st.sampled_from([Threshold(0.3), TopK(2), TopP(0.5), Everything(), Random(3)]),
    queries=st.just("last"),
    alpha=st.just(1.0),
    budget=st.sampled_from([None, 3, 0.5]),
    high_res_states=st.just("features"),
)


def calls(name: str, rows: list[Row], config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return tiled_prompt(name, rows, config["zoom"], config["levels"], **settings)


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask of the best-scored entries of a map, ties in raster order."""
    order = sorted(range(scores.numel()), key=lambda place: (-float(scores.flatten()[place]), place))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("name", TILED)
@settings(max_examples=6)
@given(data=st.data(), padding=st.sampled_from(["left", "right"]), config=drawn)
def test_layers_are_naive_joint_attention(name: str, data: st.DataObject, padding: str, config: dict[str, Any]) -> None:
    model = model_of(name, implementation="spying")
    rows = data.draw(batches(name, max_rows=2, max_words=3))
    inputs, levels = calls(name, rows, config, padding=padding), range(config["levels"])
    with patched(model, **config), flexkit.trace(model) as trace, recording(model) as record, torch.no_grad():
        model(**inputs)
        patch = get_patch(model)
        reading = {layer: (of.attention.k_proj_hd, of.attention.v_proj_hd) for layer, of in patch.reading.items()}
        before = {layer: (patch.source(layer), patch.before[layer]) for layer in reading}
    images = [images_of_level(model, name, inputs, level) for level in levels]
    zooms = [(config["zoom"][0] ** (level + 1), config["zoom"][1] ** (level + 1)) for level in levels]
    order = [sum(other.row == image.row for other in images[0][:index]) for index, image in enumerate(images[0])]
    scaling = model.model.language_model.layers[0].self_attn.scaling

    for layer, projections in reading.items():
        seen, tolerance = record.layers[layer], 1e-8
        source, earlier = before[layer]
        for row, positions in enumerate(trace.steps[0].queries.tolist()):
            own = [index for index, image in enumerate(images[0]) if image.row == row]
            for query, position in enumerate(p for p in positions if p >= 0):
                high_res, masks = [], []
                for index in own:
                    for level in levels:
                        chooser = source if level == 0 else earlier
                        shape = [z * g for z, g in zip(zooms[level], images[0][index].grid, strict=True)]
                        if level and chooser not in reading:  # nothing was read there that could be opened
                            mask = torch.zeros(shape, dtype=torch.bool)
                        else:
                            mask = trace.mask(0, chooser, image=order[index], query=query, level=level)[row]
                        tables = tables_of(
                            model, layer, images[level][index], record, zooms[level], config["positions"]
                        )
                        image = images[level][index]
                        keys = high_res_keys_values(model, layer, image, projections, tables, config["key_norm"])
                        high_res.append((*keys, mask))
                        masks.append(mask)
                expected = seen.kernel[row, position]
                if any(mask.any() for mask in masks):
                    expected, weights = joint_row(
                        seen, row, position, high_res, scaling=scaling, bias=config["logit_bias"]
                    )
                    for place, index in enumerate(own):
                        for level in levels[:-1]:
                            at = place * config["levels"] + level
                            self_opened = trace.mask(0, layer, image=order[index], query=query, level=level + 1)[row]
                            shown = trace.scores(0, layer, image=order[index], query=query, level=level + 1)[row]
                            reduced = getattr(weights[at], {"max": "amax"}.get(config["reduce"], config["reduce"]))(0)
                            torch.testing.assert_close(shown.flatten(), reduced, rtol=1e-6, atol=1e-9)
                            coarse = torch.nn.functional.max_pool2d(
                                self_opened[None].double(), config["zoom"], config["zoom"]
                            )[0].bool()
                            assert not (coarse & ~masks[at]).any(), "what was not read cannot be opened"
                            if isinstance(config["policy"], TopK) and config["budget"] is None:
                                assert torch.equal(coarse, largest(shown, config["policy"].k) & masks[at])
                            if isinstance(config["policy"], Everything) and config["budget"] is None:
                                assert torch.equal(coarse, masks[at])
                found = seen.output[row, position].reshape(expected.shape)
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", TILED)
@settings(max_examples=8)
@given(data=st.data(), config=drawn)
@torch.no_grad()
def test_how_tiles_are_read_does_not_matter(name: str, data: st.DataObject, config: dict[str, Any]) -> None:
    model, rows = model_of(name), data.draw(batches(name, max_rows=2))
    found = []
    for changes in ({}, {"projection": "recompute"}, {"projection": "full"}, {"tiles": "all"}, {"kept": 1}):
        with patched(model, **{**config, "tiles": "on_demand", "projection": "lazy", "kept": None, **changes}):
            found.append(model(**calls(name, rows, config)).logits)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **ROUNDED)


@pytest.mark.parametrize("name", TILED)
@settings(max_examples=8)
@given(data=st.data(), config=drawn)
@torch.no_grad()
def test_one_level_of_tiles_is_the_view_that_they_make(name: str, data: st.DataObject, config: dict[str, Any]) -> None:
    config |= {"levels": 1}
    model = model_of(name)
    inputs = calls(name, data.draw(batches(name)), config)
    views = inputs["hd_tiles"]
    with patched(model, **config):
        found = model(**inputs).logits
        del inputs["hd_tiles"]
        expected = model(**inputs, hd_pixel_values=torch.stack([view.whole(0) for view in views])).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=8)
@given(config=drawn, words=st.integers(1, 4))
@torch.no_grad()
def test_decoding_equals_recomputing(config: dict[str, Any], words: int) -> None:
    config |= {"share_selection": None, "policy": TopK(2)}
    model, rows = model_of("llava"), [Row(words=3 + words)]
    whole = calls("llava", rows, config)
    ids, start = whole["input_ids"], whole["input_ids"].shape[1] - words
    with patched(model, **config):
        queries = torch.zeros_like(ids, dtype=torch.bool)
        queries[:, start - 1 :] = True
        expected = model(**calls("llava", rows, config), hd_queries=queries).logits[:, start - 1 :]
        cache = DynamicCache(config=model.config.get_text_config())
        first = {name: whole[name][:, :start] for name in ("input_ids", "attention_mask")}
        found = [model(**{**whole, **first}, past_key_values=cache).logits[:, -1]]
        for place in range(start, start + words):
            found.append(model(input_ids=ids[:, place : place + 1], past_key_values=cache).logits[:, -1])
    torch.testing.assert_close(torch.stack(found, 1), expected, **ROUNDED)


@torch.no_grad()
def test_tiles_of_what_is_read_are_encoded_and_no_others() -> None:
    model, zoom, levels = model_of("llava"), (2, 2), 3
    inputs = tiled_prompt("llava", [Row()], zoom, levels)
    (view,) = inputs["hd_tiles"]
    rows, columns = FAMILIES["llava"].grid
    with patched(model, zoom=zoom, levels=levels, start_layer=1, policy=TopK(1)), flexkit.trace(model) as trace:
        output = model(**inputs, use_cache=True)
        layers = list(get_patch(model).reading)
        memory = cached_memory(output.past_key_values)
    for level in range(levels):
        tiles = set()
        for layer in layers:
            if level and layer - 1 not in layers:
                continue
            mask = trace.mask(0, layer - 1, level=level)[0]
            assert mask.sum() == zoom[0] * zoom[1] or (level == 2 and layer == layers[1])
            for row, column in mask.nonzero().tolist():
                tiles.add(row // rows * view.zooms[level][1] + column // columns)
        assert sorted(view.reads[level]) == sorted(tiles), "each is read once"
    assert trace.steps[0].tiles == memory.features.opened == sum(map(len, view.reads)) < 4 + 16 + 64


@torch.no_grad()
def test_a_copied_cache_reads_the_same_picture() -> None:
    model = model_of("llava")
    inputs = tiled_prompt("llava", [Row()], (2, 2), 2)
    with patched(model, zoom=2, levels=2, policy=TopK(1)):
        cache = model(**inputs, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        word = torch.tensor([[7]])
        found = [model(input_ids=word, past_key_values=own).logits for own in (cache, twin)]
    assert torch.equal(*found)
    memories = [cached_memory(own).features.images for own in (cache, twin)]
    assert all(own.read.args[0] is other.read.args[0] for own, other in zip(*memories, strict=True))


@torch.no_grad()
def test_levels_reach_as_far_as_layers_read() -> None:
    model = model_of("llava")
    with patched(model, zoom=2, levels=3, start_layer=2, policy=TopK(1)), flexkit.trace(model) as trace:
        model(**tiled_prompt("llava", [Row()], (2, 2), 3))
    assert not trace.mask(0, 2, level=2).any()  # the first layer that reads has nothing on the second level
    assert trace.mask(0, 2, level=1).any()
    with pytest.raises(ConfigError, match="level 1"):
        trace.mask(0, 1, level=1)


def test_views_that_are_none_are_refused() -> None:
    model = model_of("llava")
    inputs = tiled_prompt("llava", [Row()], (2, 2), 2)
    with patched(model, zoom=2, levels=1), pytest.raises(HighResInputError, match=r"expected one flexkit\.TileView"):
        model(**inputs)
    with patched(model, zoom=2, levels=2):
        with pytest.raises(HighResInputError, match=r"a Tensor; expected one flexkit\.TileView"):
            model(**{**inputs, "hd_tiles": [torch.zeros(3)]})
        with pytest.raises(HighResInputError, match="2 levels of zoom"):
            model(**prompt(FAMILIES["llava"], zoom=(2, 2)))


def test_towers_of_any_size_have_no_tiles() -> None:
    model = model_of("qwen2_5_vl")
    with pytest.raises(ConfigError, match="set levels to 1"):
        flexkit.patch_model(model, FlexConfig(levels=2), trained=True)
    with patched(model, zoom=2), pytest.raises(HighResInputError, match="takes no hd_tiles"):
        model(**prompt(FAMILIES["qwen2_5_vl"]), hd_tiles=[])


@pytest.mark.parametrize("levels", [0, 1.0, True, None])
def test_levels_are_counted(levels: Any) -> None:
    with pytest.raises(ConfigError, match="levels must be an int"):
        FlexConfig(levels=levels)
