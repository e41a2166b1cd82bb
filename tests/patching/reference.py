"""A slow, obvious account of what a patched model computes, from the model's own parts and none of flexkit's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from tests.zoo import IMAGE, Grid


@dataclass
class Seen:
    """What went through one layer's attention."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    kernel: Tensor | None = None
    """What the model's own kernel gave, ``(batch, length, heads, head_dim)``."""
    output: Tensor | None = None
    """What the output projection got, ``(batch, length, heads * head_dim)``."""
    cos: Tensor | None = None
    sin: Tensor | None = None


@dataclass
class Recording:
    """What went through every layer of one forward call."""

    layers: dict[int, Seen] = field(default_factory=dict)
    position_ids: Tensor | None = None

    def at(self, layer: int) -> Seen:
        return self.layers.setdefault(layer, Seen())


_RECORDINGS: list[Recording] = []


def _spying_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """A user's own kernel: sdpa that remembers."""
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if _RECORDINGS and hasattr(module, "layer_idx"):  # attention of the tower has none
        seen = _RECORDINGS[-1].at(module.layer_idx)
        seen.query, seen.key, seen.value, seen.mask, seen.kernel = query, key, value, attention_mask, output
    return output, None


AttentionInterface.register("spying", _spying_attention)
AttentionMaskInterface.register("spying", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def recording(model: Any) -> Iterator[Recording]:
    """Record the next forward call of a model whose attention implementation is ``"spying"``."""
    record = Recording()
    hooks = [model.model.language_model.register_forward_pre_hook(_keep_positions(record), with_kwargs=True)]
    for index, layer in enumerate(model.model.language_model.layers):
        hooks.append(layer.self_attn.register_forward_pre_hook(_keep_tables(record.at(index)), with_kwargs=True))
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(_keep_output(record.at(index))))
    _RECORDINGS.append(record)
    try:
        yield record
    finally:
        _RECORDINGS.pop()
        for hook in hooks:
            hook.remove()


def _keep_positions(record: Recording) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> None:
        record.position_ids = kwargs.get("position_ids")

    return hook


def _keep_tables(seen: Seen) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> None:
        seen.cos, seen.sin = kwargs["position_embeddings"]

    return hook


def _keep_output(seen: Seen) -> Any:
    def hook(module: Any, args: Any) -> None:
        seen.output = args[0]

    return hook


@dataclass(frozen=True)
class Image:
    """One image of a batch: where its low-res tokens are, and its high-res features in raster order."""

    row: int
    grid: Grid
    columns: Tensor
    features: Tensor


@torch.no_grad()
def images_of(model: Any, inputs: dict[str, Tensor], zoom: Grid) -> list[Image]:
    """Encode every high-res view, tile by tile where the tower takes one size, and find its place in the prompt."""
    grids, features = _dynamic(model, inputs, zoom) if "hd_image_grid_thw" in inputs else _tiled(model, inputs, zoom)
    images = []
    for row, ids in enumerate(inputs["input_ids"]):
        columns = (ids == IMAGE).nonzero().flatten()
        while len(columns):
            grid = grids[len(images)]
            cells = grid[0] * grid[1]
            images.append(Image(row, grid, columns[:cells], features[len(images)]))
            columns = columns[cells:]
    assert len(images) == len(grids)
    return images


def _tiled(model: Any, inputs: dict[str, Tensor], zoom: Grid) -> tuple[list[Grid], list[Tensor]]:
    size = model.config.vision_config.image_size
    grids, features = [], []
    for view in inputs["hd_pixel_values"]:
        lines = []
        for i in range(zoom[0]):
            tiles = []
            for j in range(zoom[1]):
                tile = view[None, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
                tokens = model.get_image_features(pixel_values=tile, return_dict=True).pooler_output[0]
                side = round(len(tokens) ** 0.5)
                tiles.append(tokens.reshape(side, side, -1))
            lines.append(torch.cat(tiles, dim=1))
        features.append(torch.cat(lines, dim=0).flatten(0, 1))
        grids.append((side, side))
    return grids, features


def _dynamic(model: Any, inputs: dict[str, Tensor], zoom: Grid) -> tuple[list[Grid], list[Tensor]]:
    sizes = inputs["hd_image_grid_thw"]
    grids, features, start = [], [], 0
    for size in sizes:
        patches = inputs["hd_pixel_values"][start : start + int(size.prod())]
        start += len(patches)
        output = model.get_image_features(pixel_values=patches, image_grid_thw=size[None], return_dict=True)
        features.append(output.pooler_output[0])
        grids.append((int(size[1]) // 2 // zoom[0], int(size[2]) // 2 // zoom[1]))
    return grids, features


def tables_of(model: Any, layer: int, image: Image, record: Recording, zoom: Grid, kind: str) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the high-res tokens of one image, each ``(tokens, width)``."""
    rows, columns = image.grid
    if kind == "interpolated":
        seen = record.layers[layer]
        tables = []
        for table in (seen.cos, seen.sin):
            table = table[min(image.row, len(table) - 1), image.columns]
            planes = table.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
            finer = F.interpolate(planes, size=(rows * zoom[0], columns * zoom[1]), mode="bicubic", align_corners=False)
            tables.append(finer[0].permute(1, 2, 0).reshape(rows * zoom[0] * columns * zoom[1], -1))
        return tables[0], tables[1]
    ids = record.position_ids
    if ids is None:
        ids = torch.arange(record.layers[layer].output.shape[1])[None]
    ids = ids if ids.ndim == 3 else ids[None]
    ids = ids[:, min(image.row, ids.shape[1] - 1), image.columns].double()
    finer = torch.empty(len(ids), rows * zoom[0], columns * zoom[1], dtype=torch.float64)
    first = ids[:, 0]
    down = ids[:, columns] - first if rows > 1 else torch.zeros_like(first)
    right = ids[:, 1] - first if columns > 1 else torch.zeros_like(first)
    for i in range(rows * zoom[0]):
        for j in range(columns * zoom[1]):
            # Positions of image tokens are linear in row and column, in one axis and in three.
            finer[:, i, j] = first + down * ((i + 0.5) / zoom[0] - 0.5) + right * ((j + 0.5) / zoom[1] - 0.5)
    positions = finer.flatten(1)[:, None]
    rotary = model.model.language_model.rotary_emb
    options = {}
    if model.config.model_type == "gemma3":
        options = {"layer_type": model.config.text_config.layer_types[layer]}
    cos, sin = rotary(image.features, positions if len(ids) > 1 else positions[0], **options)
    return cos[0], sin[0]


@torch.no_grad()
def high_res_keys_values(
    model: Any, layer: int, image: Image, projections: tuple[Any, Any], tables: tuple[Tensor, Tensor], key_norm: bool
) -> tuple[Tensor, Tensor]:
    """K' and V' of one image, each ``(key_heads, tokens, head_dim)``, token by token."""
    block = model.model.language_model.layers[layer]
    width = block.self_attn.head_dim
    keys, values = [], []
    for token, cos, sin in zip(image.features, *tables, strict=True):
        if key_norm:
            token = block.input_layernorm(token)
        key = projections[0](token).reshape(-1, width)
        if hasattr(block.self_attn, "k_norm"):
            key = block.self_attn.k_norm(key)
        half = width // 2
        turned = torch.cat([-key[:, half:], key[:, :half]], dim=-1)
        keys.append(key * cos + turned * sin)
        values.append(projections[1](token).reshape(-1, width))
    return torch.stack(keys, dim=1), torch.stack(values, dim=1)


def attention_of_row(
    seen: Seen,
    batch: int,
    position: int,
    high_res: list[tuple[Tensor, Tensor, Tensor]],
    *,
    scaling: float,
    bias: float = 0.0,
    hidden: Tensor | None = None,
) -> Tensor:
    """Attention of one position over its base keys and the selected high-res keys, ``(heads, head_dim)``.

    ``high_res`` holds (K', V', selected) of each image of the batch row; ``hidden`` the base keys given up.
    """
    return joint_row(seen, batch, position, high_res, scaling=scaling, bias=bias, hidden=hidden)[0]


def joint_row(
    seen: Seen,
    batch: int,
    position: int,
    high_res: list[tuple[Tensor, Tensor, Tensor]],
    *,
    scaling: float,
    bias: float = 0.0,
    hidden: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The same, and the weights ``(heads, tokens)`` of the high-res keys of each image, 0 where not selected."""
    heads, key_heads = seen.query.shape[1], seen.key.shape[1]
    length = seen.key.shape[2]
    visible = torch.arange(length) <= position if seen.mask is None else seen.mask[batch, 0, position, :length]
    if hidden is not None:
        visible = visible & ~hidden
    outputs, maps = [], [value.new_zeros(heads, value.shape[1]) for _, value, _ in high_res]
    for head in range(heads):
        group = head // (heads // key_heads)
        query = seen.query[batch, head, position]
        logits = [scaling * (query @ seen.key[batch, group, n]) for n in range(length) if visible[n]]
        values = [seen.value[batch, group, n] for n in range(length) if visible[n]]
        places = []
        for image, (key, value, selected) in enumerate(high_res):
            for n in selected.flatten().nonzero().flatten().tolist():
                places.append((len(logits), image, n))
                logits.append(scaling * (query @ key[group, n]) + bias)
                values.append(value[group, n])
        weights = torch.softmax(torch.stack(logits), dim=0)
        outputs.append(weights @ torch.stack(values))
        for place, image, n in places:
            maps[image][head, n] = weights[place]
    return torch.stack(outputs), maps


def _windowed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Masks like FlashAttention: by itself, from a padding mask ``(batch, keys)`` or None, and a window."""
    if not hasattr(module, "layer_idx"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.pop("sliding_window", None) or key.shape[2]
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    visible = ((distance >= 0) & (distance < window))[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None].bool() | torch.eye(key.shape[2], dtype=torch.bool)
    return sdpa_attention_forward(module, query, key, value, visible, **kwargs)


AttentionInterface.register("windowed", _windowed_attention)
AttentionMaskInterface.register("windowed", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
