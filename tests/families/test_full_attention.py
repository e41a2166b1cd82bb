"""Law 2, one level down: everything selected is what the base model computes if its kernels see the high-res keys too.

Unlike a cache that was filled beforehand, this holds for attention that caches latents, or that picks its keys.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import flexkit
from flexkit import FlexConfig
from flexkit.patching import get_patch
from flexkit.patching.memory import ImageSpan, cached_memory
from tests.families.seeing import kernel_changed
from tests.zoo import IN_SEQUENCE, Family, Row, low_res, prompt
from tests.zoo.squares import CAPPED

families = [*IN_SEQUENCE.values(), CAPPED]
every_family = pytest.mark.parametrize("family", families, ids=[family.name for family in families])


def seen_by_kernels(keys_values: dict[Any, tuple[Tensor, Tensor]], cells: Tensor) -> Any:
    """Let the kernels of some attention modules see keys and values in front of their own, each as if in a cell."""

    def extended(kernel: Any) -> Any:
        def run(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
        ) -> Any:
            if options.get("position_bias") is not None:
                bias = options["position_bias"]
                options["position_bias"] = torch.cat([bias[..., cells], bias], dim=-1)
            mask = attention_mask
            if mask is None:
                mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
            more_keys, more_values = keys_values[module]
            shape = (*mask.shape[:-1], more_keys.shape[2])
            seen = mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
            key, value = torch.cat([more_keys, key], dim=2), torch.cat([more_values, value], dim=2)
            return kernel(module, query, key, value, torch.cat([seen, mask], dim=-1), **options)

        return run

    return kernel_changed(keys_values, extended)


def cells_of(image: ImageSpan) -> Tensor:
    """The low-res token over each high-res token."""
    cells = image.columns.view(image.grid)
    return cells.repeat_interleave(image.zoom[0], dim=0).repeat_interleave(image.zoom[1], dim=1).flatten()


@every_family
def test_everything_selected_is_full_attention(family: Family, fact: Any) -> None:
    model, inputs = family.model(), prompt(family, [Row()])
    config = FlexConfig(zoom=2, policy=flexkit.Everything(), queries="all", start_layer=0, select_from="same")
    flexkit.patch_model(model, config, trained=True)
    patch = get_patch(model)
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(model):
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
        cache = DynamicCache(config=patch.decoder.config)
        output = model(**inputs, past_key_values=cache)
    memory = cached_memory(cache)
    assert memory is not None and memory.projected.keys() == patch.layers.keys()
    projected = {patch.layers[index].attention: (held.key, held.value) for index, held in memory.projected.items()}
    flexkit.unpatch_model(model)
    with torch.no_grad():
        plain = model(**low_res(inputs)).logits
        with seen_by_kernels(projected, cells_of(*memory.images)):
            expected = model(**low_res(inputs)).logits
    assert float((expected - plain).abs().max()) > 1e-3
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
    if family.name == model.config.model_type:
        fact(family.name, {"equal to full attention": "yes"})
