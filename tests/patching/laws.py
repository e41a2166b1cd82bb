"""What the law tests share: models built once, batches and settings to draw from, positions and caches to look into."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

import flexkit
from flexkit import Border, Center, Everything, FlexConfig, Nothing, Random, Threshold, TopK, TopP
from tests.zoo import FAMILIES, Row

ROUNDED = {"rtol": 1e-8, "atol": 1e-8}
"""For what runs through all layers in two ways that add in other orders."""
ZOOMS = ((1, 1), (2, 2), (1, 2), (2, 1), (3, 3))
POLICIES = (
    Threshold(48 / 255),
    Threshold(0.5).dilated(1),
    Threshold(0.3).pooled(2),
    TopK(2) | Border(1),
    TopP(0.5) & ~Border(1),
    Random(3),
    Center(2),
    Everything(),
)
EMPTY = (
    Nothing(),
    TopK(3) & Nothing(),
    TopK(2) & ~TopK(3),
    lambda scores: scores > scores.amax((-2, -1), keepdim=True),
)
"""Policies that select nothing: by name, by composition with and without scores, by the scores."""


@lru_cache
def model_of(name: str, dtype: torch.dtype = torch.float64, implementation: str = "sdpa") -> Any:
    """The tiny model of a family; shared, so patch it with :func:`patched` only."""
    model = FAMILIES[name].model().to(dtype)
    model.set_attn_implementation(implementation)
    return model


@contextmanager
def patched(model: Any, **settings: Any) -> Iterator[Any]:
    """The model while patched, with added projections that are not copies of its own."""
    flexkit.patch_model(model, FlexConfig(**settings), trained=True)
    try:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in flexkit.flex_parameters(model):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        yield model
    finally:
        flexkit.unpatch_model(model)


def images_of(name: str) -> st.SearchStrategy[tuple[Any, ...]]:
    """Up to two images of one batch row, of several grids where the family takes any."""
    grid = st.tuples(st.integers(1, 3), st.integers(1, 3)) if FAMILIES[name].any_grid else st.none()
    return st.lists(grid, max_size=2).map(tuple)


def rows_of(name: str, *, max_words: int = 6) -> st.SearchStrategy[Row]:
    """A batch row with 0, 1 or 2 images."""
    return st.builds(Row, images_of(name), st.integers(1, max_words))


def batches(name: str, *, max_rows: int = 3, max_words: int = 6) -> st.SearchStrategy[list[Row]]:
    """Batches in which at least one row has an image."""
    rows = st.lists(rows_of(name, max_words=max_words), min_size=1, max_size=max_rows)
    return rows.filter(lambda batch: any(row.images for row in batch))


def settings_of(**fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Settings of a patch to the four-layer models of the zoo; every option is drawn, unless it is fixed."""
    options = {
        "start_layer": st.integers(1, 3),
        "zoom": st.sampled_from(ZOOMS),
        "policy": st.sampled_from(POLICIES),
        "queries": st.sampled_from(["last", "all"]),
        "select_from": st.sampled_from(["previous", "same"]),
        "high_res_states": st.sampled_from(["features", "own"]),
        "select_layers": st.sampled_from([None, (1, 2)]),
        "low_res_keys": st.sampled_from(["keep", "replace"]),
        "replace_dilation": st.integers(0, 1),
        "logit_bias": st.sampled_from([0.0, -1.5, 2.0]),
        "key_norm": st.booleans(),
        "positions": st.sampled_from(["interpolated", "fractional"]),
        "share_selection": st.sampled_from([None, True, False]),
        "reduce": st.sampled_from(["sum", "mean", "max"]),
        "tiles": st.sampled_from(["on_demand", "all"]),
        "projection": st.sampled_from(["lazy", "full", "recompute", "auto"]),
        "kept": st.sampled_from([None, 2, 0.4]),
        "budget": st.sampled_from([None, 0.3, 2]),
        "alpha": st.sampled_from([1.0, 0.3]),
    }
    return st.fixed_dictionaries(options | fixed).map(_consistent)


def _consistent(config: dict[str, Any]) -> dict[str, Any]:
    """One selection is made of own states only."""
    return config if config["high_res_states"] == "own" else config | {"select_layers": None}


def in_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs with the floating ones in ``dtype``."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def position_ids(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Positions that do not count padding: ``(batch, length)``, or ``(3, batch, length)`` for several axes."""
    mask = inputs["attention_mask"]
    if "mm_token_type_ids" in inputs and "image_grid_thw" in inputs:
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return model.model.get_rope_index(**{name: inputs[name] for name in names})[0]
    return (mask.cumsum(-1) - 1).clamp_min(0)


def keys_values(cache: Any) -> list[Tensor]:
    """All keys and values of the decoder layers in a cache."""
    if isinstance(cache, EncoderDecoderCache):
        return keys_values(cache.self_attention_cache) + keys_values(cache.cross_attention_cache)
    return [
        states
        for layer in cache.layers
        if getattr(layer, "keys", None) is not None
        for states in (layer.keys, layer.values)
    ]


def last_attended(inputs: dict[str, Tensor]) -> Tensor:
    """``(batch, length)``, bool: the last position of each row that is not padding."""
    mask = inputs["attention_mask"].bool()
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def row_alone(inputs: dict[str, Tensor], row: int, images: list[int]) -> dict[str, Tensor]:
    """Row ``row`` of a batch as a batch of its own, without its padding.

    ``images`` holds the number of images of every row.
    """
    attended = inputs["attention_mask"][row].bool()
    held = slice(sum(images[:row]), sum(images[: row + 1]))
    alone = {}
    for name, value in inputs.items():
        if name.endswith("pixel_values"):
            sizes = inputs.get(name.replace("pixel_values", "image_grid_thw"))
            if sizes is not None:
                counts = sizes.prod(-1).tolist()
                value = value[sum(counts[: held.start]) : sum(counts[: held.stop])]
            else:
                value = value[held]
        elif name.endswith("image_grid_thw"):
            value = value[held]
        elif name == "position_ids":
            value = value[..., row : row + 1, attended]
        else:
            value = value[row : row + 1, attended]
        alone[name] = value
    if not images[row]:
        alone = {name: value for name, value in alone.items() if "pixel" not in name and "grid" not in name}
    return alone
