"""Law 2: a patched layer is naive joint attention; all of it selected, the whole model is rectangular attention."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

import flexkit
from flexkit import Everything
from flexkit.patching import get_patch
from tests.patching.laws import ROUNDED, ZOOMS, batches, model_of, patched, position_ids, settings_of
from tests.patching.reference import (
    Image,
    Recording,
    attention_of_row,
    high_res_keys_values,
    images_of,
    recording,
    tables_of,
)
from tests.zoo import FAMILIES, IMAGE, PAD, Row, low_res, prompt

Projections = dict[int, tuple[Any, Any]]


def added_to(model: Any) -> Projections:
    """The added projections of every reading layer; they outlive the patch."""
    patch = get_patch(model)
    return {
        index: (layer.attention.k_proj_hd, layer.attention.v_proj_hd)
        for index, layer in patch.layers.items()
        if index >= patch.start_layer
    }


def keys_values_of(
    model: Any, layer: int, images: list[Image], added: Projections, record: Recording, config: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    return [
        high_res_keys_values(
            model,
            layer,
            image,
            added[layer],
            tables_of(model, layer, image, record, config["zoom"], config["positions"]),
            config["key_norm"],
        )
        for image in images
    ]


def low_res_cells(mask: Tensor, image: Image, zoom: tuple[int, int], dilation: int) -> list[bool]:
    """Whether a cell, or one at most ``dilation`` away, holds a selected token."""
    rows, columns = image.grid
    chosen = [
        [bool(mask[r * zoom[0] : (r + 1) * zoom[0], c * zoom[1] : (c + 1) * zoom[1]].any()) for c in range(columns)]
        for r in range(rows)
    ]
    return [
        any(
            chosen[y][x]
            for y in range(max(0, r - dilation), min(rows, r + dilation + 1))
            for x in range(max(0, c - dilation), min(columns, c + dilation + 1))
        )
        for r in range(rows)
        for c in range(columns)
    ]


def tolerance_of(config: dict[str, Any], exact: float, *, rounded: float) -> float:
    """Positions that are no binary fractions may round differently: rotary modules compute in float32."""
    return rounded if config["positions"] == "fractional" and 3 in config["zoom"] else exact


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10)
@given(
    data=st.data(), padding=st.sampled_from(["left", "right"]), config=settings_of(high_res_states=st.just("features"))
)
def test_layers_are_naive_joint_attention(name: str, data: st.DataObject, padding: str, config: dict[str, Any]) -> None:
    model = model_of(name, implementation="spying")
    zoom = config["zoom"]
    inputs = prompt(FAMILIES[name], data.draw(batches(name, max_rows=2, max_words=12)), zoom=zoom, padding=padding)
    with patched(model, **config), flexkit.trace(model) as trace, recording(model) as record, torch.no_grad():
        model(**inputs)
        added = added_to(model)
        sources = {layer: get_patch(model).source(layer) for layer in added}
    images = images_of(model, inputs, zoom)
    order = [sum(other.row == image.row for other in images[:index]) for index, image in enumerate(images)]
    scaling = model.model.language_model.layers[0].self_attn.scaling

    for layer, seen in record.layers.items():
        expected = seen.kernel.clone()
        if layer in added:
            projected = keys_values_of(model, layer, images, added, record, config)
            for row, positions in enumerate(trace.steps[0].queries.tolist()):
                for query, position in enumerate(p for p in positions if p >= 0):
                    masks = [
                        trace.mask(0, sources[layer], image=place, query=query)[row, : z * g, : y * h]
                        for image, place in zip(images, order, strict=True)
                        for (z, y), (g, h) in [(zoom, image.grid)]
                    ]
                    own = [index for index, image in enumerate(images) if image.row == row]
                    if not any(masks[index].any() for index in own):
                        continue
                    hidden = torch.zeros(seen.key.shape[2], dtype=torch.bool)
                    if config["low_res_keys"] == "replace":
                        for index in own:
                            cells = low_res_cells(masks[index], images[index], zoom, config["replace_dilation"])
                            hidden[images[index].columns] = torch.tensor(cells)
                    high_res = [(*projected[index], masks[index]) for index in own]
                    joint = attention_of_row(
                        seen, row, position, high_res, scaling=scaling, bias=config["logit_bias"], hidden=hidden
                    )
                    alpha = config["alpha"]
                    expected[row, position] = (1 - alpha) * seen.kernel[row, position] + alpha * joint
        tolerance = tolerance_of(config, 1e-9, rounded=1e-4)
        attended = inputs["attention_mask"].bool()
        torch.testing.assert_close(seen.output[attended], expected.flatten(2)[attended], rtol=tolerance, atol=tolerance)


def rectangular_mask(
    inputs: dict[str, Tensor],
    images: list[Image],
    *,
    window: int | None,
    bidirectional: bool,
    shared: bool,
    replace: bool,
    bias: float,
) -> Tensor:
    """``(batch, 1, length, tokens + length)``, additive: high-res keys first, as they stand in a pre-filled cache."""
    ids, attended = inputs["input_ids"], inputs["attention_mask"].bool()
    batch, length = ids.shape
    tokens = max(tokens_of(images, row) for row in range(batch))
    is_image = ids == IMAGE
    mask = torch.full((batch, 1, length, tokens + length), -torch.inf, dtype=torch.float64)
    for row in range(batch):
        for q in range(length):
            for k in range(length):
                near = k <= q and (window is None or q - k < window)
                same_image = bool(is_image[row, min(q, k) : max(q, k) + 1].all()) and bidirectional
                if (near or same_image) and attended[row, k]:
                    mask[row, 0, q, tokens + k] = 0.0
            start = 0
            for image in images:
                if image.row == row:
                    stop = start + len(image.features)
                    # The last row reads all images, and the others with it if they share its selection.
                    if shared or q >= int(image.columns[0 if bidirectional else -1]):
                        mask[row, 0, q, start:stop] = bias
                        if replace:
                            mask[row, 0, q, tokens + image.columns] = -torch.inf
                    start = stop
            if not attended[row, q]:
                mask[row, 0, q, tokens + q] = 0.0  # a row of padding must see something, or it is NaN
    return mask


def tokens_of(images: list[Image], row: int) -> int:
    return sum(len(image.features) for image in images if image.row == row)


full = settings_of(
    start_layer=st.just(0),
    queries=st.just("all"),
    policy=st.just(Everything()),
    budget=st.none(),
    alpha=st.just(1.0),
    zoom=st.sampled_from(ZOOMS),
    high_res_states=st.just("features"),
)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10)
@given(data=st.data(), padding=st.sampled_from(["left", "right"]), config=full)
def test_everything_is_a_cache_filled_beforehand(
    name: str, data: st.DataObject, padding: str, config: dict[str, Any]
) -> None:
    model = model_of(name, implementation="spying")
    zoom = config["zoom"]
    inputs = prompt(FAMILIES[name], data.draw(batches(name, max_words=12)), zoom=zoom, padding=padding)
    inputs["position_ids"] = position_ids(model, inputs)
    with patched(model, **config), torch.no_grad():
        found = model(**inputs).logits
        added = added_to(model)
    with recording(model) as record, torch.no_grad():
        base = model(**low_res(inputs)).logits

    images = images_of(model, inputs, zoom)
    cache = DynamicCache()  # without a config: sliding layers keep all keys
    for layer in sorted(added):
        projected = keys_values_of(model, layer, images, added, record, config)
        padded = []
        for part in range(2):
            by_row = [
                torch.cat(
                    [
                        projected[0][part][:, :0],
                        *(kv[part] for image, kv in zip(images, projected, strict=True) if image.row == row),
                    ],
                    1,
                )
                for row in range(len(found))
            ]
            padded.append(pad_sequence([states.transpose(0, 1) for states in by_row], batch_first=True).transpose(1, 2))
        cache.update(*padded, layer)

    replace = config["low_res_keys"] == "replace"
    shared = config["share_selection"] is not False
    common = {"shared": shared, "replace": replace, "bias": config["logit_bias"]}
    window = {"gemma3": 8, "llava-mistral": 16}.get(name)
    sliding = rectangular_mask(inputs, images, window=window, bidirectional=name == "gemma3", **common)
    if name == "gemma3":
        plain = rectangular_mask(inputs, images, window=None, bidirectional=True, **common)
        mask: Any = {"full_attention": plain, "sliding_attention": sliding}
    else:
        mask = sliding
    with torch.no_grad():
        expected = model(**low_res(inputs) | {"attention_mask": mask, "past_key_values": cache}).logits

    attended = inputs["attention_mask"].bool()
    tolerance = tolerance_of(config, ROUNDED["rtol"], rounded=1e-2)
    torch.testing.assert_close(found[attended], expected[attended], rtol=tolerance, atol=tolerance)
    changed = (found - base).abs().amax(-1) > 1e-6
    with_images = torch.tensor([any(image.row == row for image in images) for row in range(len(found))])
    assert torch.equal((changed & attended).any(-1), with_images)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ["gemma3", "llava-mistral"])
def test_kernels_that_mask_by_themselves(name: str, padded: bool) -> None:
    """FlashAttention is given a padding mask or None, and told the window."""
    model = model_of(name)
    inputs = prompt(FAMILIES[name], [Row(words=12), Row(words=20 if padded else 12)])
    del inputs["attention_mask"]
    inputs.pop("token_type_ids", None)
    attended = torch.ones_like(inputs["input_ids"]).bool() if not padded else inputs["input_ids"] != PAD
    with patched(model, zoom=2, policy=flexkit.Threshold(0.2), queries="all", share_selection=False), torch.no_grad():
        expected = model(**inputs, attention_mask=attended.long()).logits
        model.set_attn_implementation("windowed")
        try:
            found = model(**inputs, attention_mask=attended.long()).logits
        finally:
            model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found[attended], expected[attended], rtol=1e-9, atol=1e-9)
