"""Three ways for one model to look at one picture."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flexkit.encoding import split_tiles, stitch_tiles
from flexkit.patching import get_patch

__all__ = ["Way", "all_in_sequence", "low_res_only", "with_flexkit"]

Way = Callable[[nn.Module, Mapping[str, Tensor], int], Any]
"""From a patched model, inputs with both views and a number of tokens to what ``generate`` returns."""


def low_res_only(model: nn.Module, inputs: Mapping[str, Tensor], new_tokens: int) -> Any:
    """The base model: it never sees the high-res view.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    inputs : dict
        Of both views.
    new_tokens : int
        How many tokens to generate.
    """
    return _generate(model, _base_inputs(inputs), new_tokens)


def with_flexkit(model: nn.Module, inputs: Mapping[str, Tensor], new_tokens: int) -> Any:
    """The low-res view in the sequence; of the high-res view the layers read what they select.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    inputs : dict
        Of both views.
    new_tokens : int
        How many tokens to generate.
    """
    return _generate(model, inputs, new_tokens)


def all_in_sequence(model: nn.Module, inputs: Mapping[str, Tensor], new_tokens: int) -> Any:
    """The base model with every high-res token in its sequence, behind the low-res ones.

    Parameters
    ----------
    model : torch.nn.Module
        A patched LLaVA.
    inputs : dict
        Of both views and one image.
    new_tokens : int
        How many tokens to generate.
    """
    owner: Any = model
    with torch.no_grad():
        zoom = get_patch(model).config.zoom_pair
        low_res = _features(owner, inputs["pixel_values"])
        tiles = _features(owner, split_tiles(inputs["hd_pixel_values"], zoom)[0])
        side = round(tiles.shape[1] ** 0.5)
        high_res = rearrange(stitch_tiles(tiles[None], (side, side), zoom), "b r c d -> b (r c) d")
        text = owner.get_input_embeddings()(inputs["input_ids"])
        places = (inputs["input_ids"][0] == owner.config.image_token_id).nonzero()
        first, last = int(places[0]), int(places[-1])
        sequence = torch.cat([text[:, :first], low_res, high_res, text[:, last + 1 :]], dim=1)
    mask = torch.ones(sequence.shape[:2], dtype=torch.long)
    return _generate(model, {"inputs_embeds": sequence, "attention_mask": mask}, new_tokens)


def _features(model: Any, pixel_values: Tensor) -> Tensor:
    """``(images, tokens, dim)``."""
    return torch.stack(list(model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output))


def _base_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if not name.startswith("hd_")}


def _generate(model: Any, inputs: Mapping[str, Tensor], new_tokens: int) -> Any:
    # As many tokens in each way: their costs are compared.
    return model.generate(
        **inputs,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
