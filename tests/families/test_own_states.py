"""Reading own states: everything selected is what the base model computes if the tokens stand in its sequence."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import flexkit
from flexkit import FlexConfig
from flexkit.grids import fractional_positions
from flexkit.patching import get_patch
from flexkit.patching.memory import cached_memory
from tests.families.seeing import kernel_changed
from tests.families.test_laws import continued, differences, generation, logits, rows_of, tensors
from tests.zoo import IN_SEQUENCE, ZOO, Family, Row, low_res, prompt
from tests.zoo.squares import CAPPED

OWN = {"high_res_states": "own", "zoom": 2, "start_layer": 0, "select_from": "same"}
REFUSED = {
    "of an image's end": (
        "minicpmv4_6",
        "minicpmv4_7",
        "minicpm_ocr",
        "qwen3_5",
        "qwen3_5_moe",
        "lfm2_vl",
        "lfm3_vl",
        "qwen4_exp",
        "glm5_next",
        "nemotron_h_omni",
    ),
    "by an index of their own": ("minimax_m3_vl", "dots3_note", "mistral_large4", "mistral_large4-shared"),
    "forgets some": ("unlimited_ocr",),
    "biased by whole distances": ("inkling2", "inkling_mm_model"),
    "takes pictures itself": ("chameleon",),
}
_refused = {name: reason for reason, names in REFUSED.items() for kind in names for name in (kind, f"{kind}-video")}
families = {name: family for name, family in IN_SEQUENCE.items() if name not in _refused}
every_family = pytest.mark.parametrize("family", families.values(), ids=list(families))
with_caps = pytest.mark.parametrize("family", [*families.values(), CAPPED], ids=[*families, CAPPED.name])


@pytest.mark.parametrize("name", [name for name in ZOO if name not in families])
def test_who_reads_features_alone(name: str, fact: Any) -> None:
    model = ZOO[name].model()
    with pytest.raises(flexkit.UnsupportedModelError, match=_refused.get(name, "beside the sequence")) as raised:
        flexkit.patch_model(model, FlexConfig(**OWN))
    assert not flexkit.is_patched(model)
    if name == model.config.model_type:
        reason = str(raised.value).partition("of their own: ")[2].partition(". Set")[0]
        fact(name, {"own states": f"no: {reason}"})


@every_family
def test_nothing_selected_is_the_base_model(family: Family) -> None:
    """Logits, KV cache and tokens, to the bit; and when the model is unpatched."""
    model, inputs = family.model(), prompt(family, rows_of(family))
    base = low_res(inputs)
    expected, said = logits(model, base), tensors(generation(model, base))
    flexkit.patch_model(model, FlexConfig(**OWN | {"policy": flexkit.TopK(2) & ~flexkit.TopK(3)}))
    assert torch.equal(logits(model, inputs), expected)
    assert all(map(torch.equal, tensors(generation(model, inputs)), said))
    flexkit.patch_model(flexkit.unpatch_model(model), FlexConfig(**OWN | {"policy": flexkit.Everything()}))
    assert not torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, base), expected)
    assert torch.equal(logits(flexkit.unpatch_model(model), base), expected)


@every_family
@pytest.mark.parametrize("settings", [{}, {"select_from": "previous"}, {"select_layers": (1, 2)}], ids=str)
def test_decoding_equals_recomputing(family: Family, settings: dict[str, Any]) -> None:
    model, inputs = family.model(), prompt(family, [Row()])
    flexkit.patch_model(model, FlexConfig(**OWN | {"policy": flexkit.TopK(3), "start_layer": 1} | settings))
    output = generation(model, inputs)
    again = logits(model, continued(family, inputs, output))[:, -len(output.logits) - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, 1), again.float(), rtol=1e-4, atol=1e-4)


@every_family
def test_a_gate_opens_by_the_low_res_answer(family: Family) -> None:
    """At the entropy of what the model itself says; shut, it leaves every bit."""
    model, inputs = family.model(), prompt(family, [Row()])
    plain = logits(model, low_res(inputs))
    entropy = float(torch.distributions.Categorical(logits=plain[0, -1].double()).entropy())
    found = []
    for gate in (None, entropy - 1e-3, entropy + 1e-3):
        settings = OWN | {"policy": flexkit.TopK(3), "select_layers": (1, 2), "gate": gate}
        flexkit.patch_model(model, FlexConfig(**settings))
        found.append(logits(model, inputs))
        flexkit.unpatch_model(model)
    assert torch.equal(found[1], found[0])
    assert not torch.equal(found[1][:, -1], plain[:, -1])
    assert torch.equal(found[2], plain)


@every_family
def test_a_batch_equals_its_rows(family: Family) -> None:
    model, rows = family.model(), rows_of(family)
    padding = "right" if family.right_padding else "left"
    inputs = prompt(family, rows, padding=padding)
    flexkit.patch_model(model, FlexConfig(**OWN | {"policy": flexkit.TopK(3)}))
    ours = differences(family, model, rows, inputs, padding)
    with flexkit.disabled(model):
        own = differences(family, model, rows, inputs, padding)
    for found, base in zip(ours, own, strict=True):
        assert found <= max(1e-5, 10 * base), f"{found} where the base model has {base}"


def masked_by(attentions: dict[Any, int], mask_of: Any) -> Any:
    """Let the kernels of some attention modules have other masks, each ``mask_of(layer, its own mask, query)``."""

    def masked(kernel: Any) -> Any:
        def run(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
        ) -> Any:
            mask = mask_of(attentions[module], attention_mask, query)
            return kernel(module, query, key, value, mask, **options)

        return run

    return kernel_changed(attentions, masked)


def in_sequence(
    model: Any, decoder: Any, attentions: dict[Any, int], inputs: Any, image: Any, features: Tensor, start: int
) -> Tensor:
    """Logits of the base model with high-res tokens behind the prompt, where only whom they concern sees them."""
    masks: dict[int, Tensor] = {}
    seen: dict[str, Any] = {}

    def noted(layer: int, mask: Tensor | None, query: Tensor) -> Tensor | None:
        length = query.shape[2]
        if mask is None:
            masks[layer] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        else:
            masks[layer] = mask if mask.dtype == torch.bool else mask >= 0
        return mask

    hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with masked_by(attentions, noted):
        model(**inputs, use_cache=False)
    hook.remove()
    tokens = features.shape[1]

    def extended(layer: int, mask: Tensor | None, query: Tensor) -> Tensor:
        base = masks[layer].expand(1, -1, -1, -1)
        length = base.shape[2]
        whole = torch.zeros(*base.shape[:2], length + tokens, length + tokens, dtype=torch.bool)
        whole[:, :, :length, :length] = base
        whole[:, :, length:, : image.end] = base[:, :, image.end - 1 : image.end, : image.end]
        whole[:, :, length:, length:] = torch.eye(tokens, dtype=torch.bool)
        if layer >= start:
            whole[:, :, length - 1, length:] = True
        if mask is not None and mask.dtype != torch.bool:
            return torch.zeros(whole.shape, dtype=mask.dtype).masked_fill(~whole, torch.finfo(mask.dtype).min)
        return whole

    def append(module: Any, args: Any, kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"]
        length = embeds.shape[1]
        first, *deeper = features.split(embeds.shape[-1], dim=-1)
        ids = kwargs.get("position_ids")
        ids = torch.arange(length)[None] if ids is None else ids
        positions = fractional_positions(image.positions, image.grid, image.zoom)[:, None]
        if ids.ndim == 2:
            positions = positions[0]
        elif len(ids) > len(positions):
            positions = torch.cat([positions[:1], positions])
        batch = embeds.shape[:2]
        by_word = {
            name: value for name, value in kwargs.items() if isinstance(value, Tensor) and value.shape[:2] == batch
        }
        more = {
            name: torch.cat([value, value[:, image.end - 1 : image.end].expand(-1, tokens, *value.shape[2:])], dim=1)
            for name, value in by_word.items()
        } | {
            "inputs_embeds": torch.cat([embeds, first / getattr(decoder, "embedding_multiplier", 1.0)], dim=1),
            "position_ids": torch.cat([ids, positions], dim=-1),
            "attention_mask": None,
            "use_cache": False,
        }
        for name, old in kwargs.items():
            if name == "deepstack_visual_embeds":
                more[name] = [torch.cat([states, part[0]]) for states, part in zip(old, deeper, strict=True)]
            elif name == "deepstack_features":
                more[name] = {
                    layer: torch.cat([states, part[0]])
                    for (layer, states), part in zip(old.items(), deeper, strict=True)
                }
        return args, kwargs | more

    def cut(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, :-tokens]
        return output

    hooks = [decoder.register_forward_pre_hook(append, with_kwargs=True), decoder.register_forward_hook(cut)]
    try:
        with masked_by(attentions, extended):
            return model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


@with_caps
@pytest.mark.parametrize("start", [0, 2])
def test_everything_selected_is_in_the_sequence(family: Family, start: int, fact: Any) -> None:
    model, inputs = family.model(), prompt(family, [Row()])
    flexkit.patch_model(model, FlexConfig(**OWN | {"policy": flexkit.Everything(), "start_layer": start}))
    patch = get_patch(model)
    with torch.no_grad():
        cache = DynamicCache(config=patch.decoder.config)
        output = model(**inputs, past_key_values=cache)
    memory = cached_memory(cache)
    assert memory is not None
    encode = [partial(geometry.encode_tiles, model) for geometry in patch.views]
    features = memory.features.of(memory.all_tokens, memory.images, encode)
    attentions = {layer.attention: index for index, layer in patch.layers.items()}
    flexkit.unpatch_model(model)
    base = low_res(inputs)
    with torch.no_grad():
        plain = model(**base).logits
        expected = in_sequence(model, patch.decoder, attentions, base, memory.images[0], features, start)
    assert float((expected - plain)[:, -1].abs().max()) > 1e-3
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
    if family.name == model.config.model_type:
        fact(family.name, {"own states": "yes"})
