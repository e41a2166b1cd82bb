"""The laws, for every family of the zoo."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import flexkit
from flexkit import FlexConfig
from flexkit.attention.layer import HighResKeys
from flexkit.patching import get_patch
from flexkit.patching.memory import cached_memory, no_tiles
from flexkit.patching.registry import find_geometry
from flexkit.patching.seam.decoder import find_layers
from flexkit.patching.seam.projections import ADDED
from tests.families.seeing import attention_input, norm_input, watching
from tests.patching.laws import keys_values
from tests.versions import counts_positions_once
from tests.zoo import IMAGE, IN_SEQUENCE, MAIN, VOCABULARY, ZOO, Family, Row, low_res, prompt

every_family = pytest.mark.parametrize("family", ZOO.values(), ids=list(ZOO))
in_sequence = pytest.mark.parametrize("family", IN_SEQUENCE.values(), ids=list(IN_SEQUENCE))
"""The others are in test_context.py."""


@cache
def built(family: Family) -> Any:
    """The model of a family; tests leave it unpatched."""
    return family.model()


def rows_of(family: Family) -> list[Row]:
    """A batch of rows that differ in length, and in their images where the family allows it."""
    if family.one_image:
        return [Row(), Row(words=2)]
    return [Row(), Row((), 6), Row((None, None), 2)]


@pytest.fixture
def patched(request: pytest.FixtureRequest) -> Any:
    """A function that patches a model for the length of the test, with random projections."""
    models: list[Any] = []

    def patch(model: Any, **settings: Any) -> Any:
        settings = {"zoom": 2, "policy": flexkit.TopK(3)} | settings
        flexkit.patch_model(model, FlexConfig(**settings), trained=True)
        models.append(model)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in flexkit.flex_parameters(model):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    yield patch
    for model in models:
        flexkit.unpatch_model(model)


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def generation(model: Any, inputs: dict[str, Tensor], tokens: int = 4) -> Any:
    return model.generate(
        **{name: value.clone() for name, value in inputs.items()},  # BLIP writes into its prompt
        max_new_tokens=tokens,
        do_sample=False,
        suppress_tokens=list(range(IMAGE, VOCABULARY)),  # a recomputed prompt would hold an image too many
        return_dict_in_generate=True,
        output_logits=True,
    )


def tensors(output: Any) -> list[Tensor]:
    return [output.sequences, *output.logits, *keys_values(output.past_key_values)]


@every_family
def test_nothing_selected_is_the_base_model(family: Family, patched: Any) -> None:
    """Law 1: logits, KV cache and tokens are bit-identical."""
    model, inputs = built(family), prompt(family, rows_of(family))
    base = low_res(inputs)
    expected, said = logits(model, base), tensors(generation(model, base))
    patched(model, policy=flexkit.Nothing())
    assert torch.equal(logits(model, inputs), expected)
    assert all(map(torch.equal, tensors(generation(model, inputs)), said))
    assert torch.equal(logits(model, base), expected)


@every_family
def test_unpatching_gives_the_model_back(family: Family) -> None:
    """Law 3: the same bits, attributes, hooks and attention."""
    model, inputs = built(family), prompt(family, rows_of(family))
    expected = logits(model, low_res(inputs))

    def anatomy() -> Any:
        return {
            name: (
                type(module),
                list(vars(module)),
                id(getattr(module, "config", None)),
                len(module._forward_pre_hooks),
            )
            for name, module in model.named_modules()
        }

    before, state = anatomy(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flexkit.patch_model(model, FlexConfig(zoom=2), trained=True)
    logits(model, inputs)
    assert anatomy() != before
    flexkit.unpatch_model(model)
    assert anatomy() == before
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, low_res(inputs)), expected)


def continued(family: Family, inputs: dict[str, Any], output: Any) -> dict[str, Any]:
    """A prompt and what a model said to it, as one prompt that is read at the same positions."""
    said, text = len(output.logits), output.sequences
    length = text.shape[1] - said
    whole = inputs | {family.stream + "input_ids": text}
    for name in (family.stream + "attention_mask", *_OF_WORDS):
        if name in inputs:  # what is said is attended to and typed as the last word
            last = inputs[name][:, -1:]
            whole[name] = torch.cat([inputs[name][:, :length], last.expand(-1, said, *last.shape[2:])], dim=1)
    if not family.learned_queries:
        whole["hd_queries"] = (torch.arange(text.shape[1]) >= length - 1)[None]
    return whole


_OF_WORDS = (
    "mm_token_type_ids",
    "token_type_ids",
    "moe_mm_token_type_ids",
    "cross_attention_mask",
    "image_attention_mask",
    "image_embeds_position_mask",
)
"""Inputs that have an entry for every word."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=counts_positions_once if name == "git" else ()) for name, each in ZOO.items()],
    ids=list(ZOO),
)
def test_decoding_equals_recomputing(family: Family, patched: Any) -> None:
    """Law 4: with the cache or without."""
    model, inputs = built(family), prompt(family, [Row()])
    base = generation(model, low_res(inputs), tokens=1)
    patched(model)
    output = generation(model, inputs)
    assert not torch.equal(output.logits[0], base.logits[0])
    again = logits(model, continued(family, inputs, output))[:, -len(output.logits) - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, 1), again.float(), rtol=1e-4, atol=1e-4)


def differences(family: Family, model: Any, rows: list[Row], inputs: dict[str, Any], padding: str) -> list[float]:
    """By how much the logits of each row in a batch differ from those of the row alone."""
    text = inputs[family.stream + "input_ids"]
    attended = inputs.get(family.stream + "attention_mask", torch.ones_like(text)).bool()
    together = logits(model, inputs)
    front = together.shape[1] - text.shape[1]  # GIT answers for its image too
    found = []
    for index, row in enumerate(rows):
        if row.images or not family.needs_image:
            alone = logits(model, prompt(family, rows, only=index, padding=padding))[0, front:]
            found.append(float((together[index, front:][attended[index]] - alone).abs().max()))
    return found


@every_family
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_batch_equals_its_rows(family: Family, padding: str, patched: Any) -> None:
    """Law 4: padding on either side changes nothing that the base model does not change itself."""
    if padding == "left" and family.right_padding:
        pytest.skip(family.right_padding)
    model, rows = built(family), rows_of(family)
    inputs = prompt(family, rows, padding=padding)
    patched(model)
    ours = differences(family, model, rows, inputs, padding)
    if max(ours) <= 1e-5:  # whatever the base model has
        return
    with flexkit.disabled(model):
        own = differences(family, model, rows, inputs, padding)
    for found, base in zip(ours, own, strict=True):
        assert found <= max(1e-5, 10 * base), f"{found} where the base model has {base}"


@every_family
def test_the_high_res_view_matters(family: Family, patched: Any) -> None:
    """Given it, the output changes where positions query; the added projections get finite gradients."""
    model, inputs = built(family), prompt(family, rows_of(family))
    base = logits(model, low_res(inputs))
    patched(model, policy=flexkit.Everything())
    output = model(**inputs).logits
    changed = ((output - base).abs().amax((1, 2)) > 1e-9).tolist()  # experts run other rows together, which rounds
    assert changed == [bool(row.images) for row in rows_of(family)]
    output.float().logsumexp(-1).sum().backward()
    gradients = [parameter.grad for parameter in flexkit.flex_parameters(model)]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients)
    model.zero_grad(set_to_none=True)


@in_sequence
@pytest.mark.parametrize(
    ("positions", "key_norm"), [("interpolated", False), ("fractional", False), ("fractional", True)]
)
def test_high_res_keys_are_made_as_low_res_keys(family: Family, positions: str, key_norm: bool) -> None:
    """At zoom 1, of the same hidden states, K' and V' are what the model itself gives its kernel for a cell.

    Behind the norm, the states are those that enter it.
    """
    model, inputs = family.model(), prompt(family, [Row()], zoom=(1, 1))
    forget_the_token_before(model)
    settings = {"zoom": 1, "positions": positions, "policy": flexkit.Everything(), "select_from": "same"}
    config = FlexConfig(start_layer=0, key_norm=key_norm, **settings)
    if key_norm and any(layer.input_norm is None for layer in find_layers(find_geometry(model).decoder(model))):
        pytest.skip("the norm stands behind the attention")
    flexkit.patch_model(model, config, trained=True)
    try:
        patch = get_patch(model)
        cache = empty_cache(model)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        memory = cached_memory(cache)
    finally:
        flexkit.unpatch_model(model)
    assert memory is not None and set(memory.projected) == set(patch.layers)
    (image,) = memory.images

    def with_features(layer: Any, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        features = memory.features.of(memory.all_tokens, memory.images, [no_tiles])[0]
        hidden[0, image.columns] = features.to(hidden.dtype)
        return hidden

    layers = list(patch.layers.values())
    changed = norm_input if key_norm else attention_input
    with watching(model, patch.decoder, layers) as record, changed(layers, with_features), torch.no_grad():
        model(**low_res(inputs))
    for layer, held in memory.projected.items():
        for ours, theirs in ((held.key, record.keys[layer]), (held.value, record.values[layer])):
            heads = theirs.shape[1] // ours.shape[1]
            expected = theirs[:, ::heads, image.columns]
            torch.testing.assert_close(ours.to(expected.dtype), expected, rtol=1e-5, atol=1e-5)


def forget_the_token_before(model: Any) -> None:
    """Let short convolutions over keys and values see the token itself alone, as they do for a high-res token."""
    for module in model.modules():
        for name in ("k_sconv", "v_sconv"):
            taps = getattr(getattr(module, name, None), "static_weight", None)
            with torch.no_grad():
                if taps is not None:  # the token itself is the first tap, in these and in those made of it
                    taps[1:] = 0
                    made = getattr(module, name).weight_proj.weight
                    made.unflatten(0, (-1, len(taps)))[:, 1:] = 0
                elif hasattr(module, name):
                    getattr(module, name).conv1d.weight[..., :-1] = 0


def empty_cache(model: Any) -> DynamicCache:
    """A cache as models make it for themselves; some make none."""
    return DynamicCache(config=get_patch(model).decoder.config)


def holds_keys_and_values(layer: Any, projected: HighResKeys) -> bool:
    """Whether a layer of a cache holds what kernels are given, and nothing else."""
    own = getattr(layer, "own", type(layer))  # one layer of a cache carries the memory, in a class made of its own
    plain = own in (DynamicLayer, DynamicSlidingWindowLayer)
    pairs = ((layer.keys, projected.key), (layer.values, projected.value)) if plain else ()
    return plain and all(own.shape[1::2] == ours.shape[1::2] for own, ours in pairs)


def projections_of(attention: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in attention.state_dict().items() if name.split(".")[0] in ADDED}


def everything_mask(record: Any, layer: int, columns: int, length: int) -> Tensor:
    """The mask of a layer with that of the high-res keys in front, which every position sees."""
    mask = record.masks[layer]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    mask = mask[..., :length] if mask.dtype == torch.bool else mask[..., :length] == 0
    return torch.cat([mask.new_ones(*mask.shape[:-1], columns), mask], dim=-1)


@in_sequence
def test_everything_selected_is_a_cache_filled_beforehand(family: Family, patched: Any) -> None:
    """Law 2: rectangular attention of all positions over base and high-res keys.

    Where a cache holds something else than keys and values, test_full_attention.py hands them to the kernels.
    """
    model, inputs = built(family), prompt(family, [Row()])
    patched(model, policy=flexkit.Everything(), queries="all", start_layer=0, select_from="same")
    for layer in get_patch(model).layers.values():
        if layer.source is not layer.attention:  # one cache of keys for both, so one projection
            layer.attention.load_state_dict(projections_of(layer.source), strict=False)
    filled = empty_cache(model)
    with torch.no_grad():
        found = model(**inputs, past_key_values=filled).logits
    memory = cached_memory(filled)
    assert memory is not None
    decoder, layers = get_patch(model).decoder, list(get_patch(model).layers.values())
    with flexkit.disabled(model):
        base = low_res(inputs)
        with watching(model, decoder, layers) as record, torch.no_grad():
            plain = model(**base).logits
        cache = DynamicCache(config=decoder.config)
        if not all(
            holds_keys_and_values(filled.layers[layer.index], memory.projected[layer.index])
            for layer in layers
            if layer.source is layer.attention
        ):
            assert family.name not in MAIN
            pytest.skip("the cache holds latents, keys of an indexer or states of convolutions")
        # Sliding layers would drop keys that the mask shows.
        cache.layers = [
            DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer for layer in cache.layers
        ]
        for layer in layers:
            if layer.source is layer.attention:  # the others attend to what these hold
                held = memory.projected[layer.index]
                cache.update(held.key, held.value, layer.index)
        length, tokens = inputs["input_ids"].shape[1], memory.tokens
        masks = {layer.kind: everything_mask(record, layer.index, tokens, length) for layer in layers}
        mask: Any = next(iter(masks.values()))
        if len(masks) > 1:
            mask = dict.fromkeys(decoder.config.layer_types) | masks  # layers without attention have none
        positions = record.position_ids
        base |= {"attention_mask": mask, "past_key_values": cache}
        base["position_ids"] = torch.arange(length)[None] if positions is None else positions
        with torch.no_grad():
            expected = model(**base).logits
    assert float((found - plain).abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
