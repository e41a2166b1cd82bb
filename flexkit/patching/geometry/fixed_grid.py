"""Towers of a fixed input size: how many tokens they make of a picture, and how tiles of that size are handed to them.

The high-res view is cut into tiles, and each is encoded as the family encodes one overview.
"""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.grids import Grid, Pair, split_tiles, stitch_tiles
from flexkit.patching.geometry.base import Declared, Geometry, cells_of_image, features_owner, image_features

__all__ = [
    "AnyRes",
    "FixedGrid",
    "TileEncoder",
    "TwoSizes",
    "encode_images",
    "encode_in_two_sizes",
    "encode_overviews",
    "encode_pages",
    "encode_pooled",
    "encode_projected",
    "encode_samples",
    "merged_by_stages",
    "merged_patches",
    "selected_patches",
    "sides",
    "timm_patches",
    "timm_size",
    "vision_size",
]


def sides(size: object) -> Pair | None:
    """Height and width of a size that configs give as one number or as two; None if it is neither."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return size[0], size[1]
    return None


def vision_size(config: Any) -> object:
    """The picture that the tower takes, as most configs state it."""
    return getattr(getattr(config, "vision_config", None), "image_size", None)


def merged_patches(config: Any, merge: int = 1, vision: Any = None) -> int:
    """Tokens of an image where ``merge`` times ``merge`` patches of the tower become one."""
    vision = vision or config.vision_config
    image, patch = sides(vision.image_size), sides(vision.patch_size)
    if image is None or patch is None:
        return 0
    return math.prod(math.ceil(length // side / merge) for length, side in zip(image, patch, strict=True))


def selected_patches(config: Any) -> int:
    """Tokens of an image where the config says whether the tower's class token stays (LLaVA and its relatives)."""
    keeps_class_token = config.vision_feature_select_strategy == "full" and "clip" in config.vision_config.model_type
    return merged_patches(config, merged_by_stages(config.vision_config)) + keeps_class_token


def merged_by_stages(vision: Any) -> int:
    """Patches a side that a hierarchical tower makes one token of: it merges two by two between its stages (Swin)."""
    return int(2 ** (len(getattr(vision, "depths", (1,))) - 1))


def timm_size(config: Any) -> object:
    """The picture that a timm tower was made for, if the config says it."""
    return (config.vision_config.model_args or {}).get("img_size")


def timm_patches(config: Any, merge: int = 1) -> int:
    """Tokens of an image where a timm tower's name says how large its patches are."""
    size, named = sides(timm_size(config)), re.search(r"patch(\d+)", config.vision_config.architecture)
    if size is None or named is None:
        return 0
    return math.prod(length // int(named[1]) // merge for length in size)


TileEncoder = Callable[..., Sequence[Tensor]]
"""A model and its tiles ``(tiles, channels, height, width)``, in every size that it takes them in, to the features
``(tokens, dim)`` of each overview."""


def encode_images(model: PreTrainedModel, tiles: Tensor) -> Sequence[Tensor]:
    """Every tile as one image: towers that take ``(images, channels, height, width)``."""
    # Video-LLaVA called them pixel_values_images in earlier versions of transformers.
    accepted, former = inspect.signature(features_owner(model).get_image_features).parameters, "pixel_values_images"
    return image_features(model, **{former if former in accepted else "pixel_values": tiles})


def encode_in_two_sizes(model: PreTrainedModel, tiles: Tensor, larger: Tensor) -> Sequence[Tensor]:
    """Every tile as one image in the sizes of two towers (DeepSeek-VL hybrid)."""
    return image_features(model, pixel_values=tiles, high_res_pixel_values=larger)


def encode_samples(model: PreTrainedModel, tiles: Tensor) -> Sequence[Tensor]:
    """Every tile as the only image of a sample (Idefics3, SmolVLM)."""
    # Samples are filled up with images of zeros there, which the model drops.
    blank = (tiles == 0).flatten(1).all(1)
    tiles = tiles.masked_fill(blank[:, None, None, None], torch.finfo(model.dtype).tiny)
    return image_features(model, pixel_values=tiles[:, None])


def encode_overviews(model: PreTrainedModel, tiles: Tensor) -> Sequence[Tensor]:
    """Every tile as an image that is not cut any further, and the newline behind it (LLaVA-NeXT)."""
    sizes = torch.tensor([tiles.shape[-2:]] * len(tiles))
    return image_features(model, pixel_values=tiles[:, None], image_sizes=sizes)


def encode_pages(model: PreTrainedModel, tiles: Tensor) -> Sequence[Tensor]:
    """Every tile as a page of one tile, none of it padding (GraniteDocling)."""
    real = torch.ones(len(tiles), 1, dtype=torch.bool, device=tiles.device)
    return image_features(model, pixel_values=tiles[:, None], pixel_attention_mask=real)


@torch.no_grad()
def encode_projected(model: PreTrainedModel, tiles: Tensor) -> Sequence[Tensor]:
    """Every tile as one image, where the model itself projects what its tower gives (Llama 4)."""
    projector: Any = model.get_submodule("multi_modal_projector")
    # Earlier versions of transformers ask for it, and do without.
    accepted = inspect.signature(features_owner(model).get_image_features).parameters
    strategy = "vision_feature_select_strategy"
    asked = {strategy: getattr(model.config.vision_config, strategy)} if strategy in accepted else {}
    return [projector(image) for image in image_features(model, pixel_values=tiles, **asked)]


@torch.no_grad()
def encode_pooled(model: PreTrainedModel, tiles: Tensor) -> Sequence[Tensor]:
    """Every tile as a crop in patches, of which two by two are pooled and added to a word (Molmo2)."""
    side = model.config.vision_config.patch_size
    crops = rearrange(tiles, "n c (h p) (w q) -> n (h w) (p q c)", p=side, q=side)
    rows, columns = (length // side for length in tiles.shape[-2:])
    places = torch.arange(len(tiles) * rows * columns, device=tiles.device).view(-1, rows, columns)
    places = torch.nn.functional.pad(places, (0, columns % 2, 0, rows % 2), value=-1)
    grid = [places.shape[1] // 2, places.shape[2] // 2, 0, 0]
    images = image_features(
        model,
        pixel_values=crops,
        image_token_pooling=rearrange(places, "n (r h) (c w) -> (n r c) (h w)", h=2, w=2),
        image_grids=torch.tensor([grid] * len(tiles), device=tiles.device),
    )
    word = model.get_input_embeddings()(torch.tensor(model.config.image_token_id, device=tiles.device))
    return [image + word for image in images]


class FixedGrid(Geometry):
    """One square grid of tokens for every image, from a tower that takes one size (LLaVA, Gemma 3, InternVL).

    Where a family cuts large images into tiles of its own, the high-res view takes their place: the prompt holds the
    overview only.

    Parameters
    ----------
    tokens : callable
        From the model's config to the number of cells of one image's grid.
    size : callable, optional
        From the model's config to the side, or height and width, of the pictures that the tower takes. None where the
        config does not say: the view is ``zoom`` times whatever size the tower gets.
    encode : callable
        How tiles are handed to the tower.
    layout : callable, optional
        From a grid to the mask of the image tokens of one image that are its cells; by default, all are.
    overview_only : str
        What makes the family's prompts carry overviews only, for errors; empty if they carry nothing else anyway.
    video : Geometry, optional
        How the same models lay out videos.
    """

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    default_zoom = 3

    def __init__(
        self,
        tokens: Callable[[Any], int],
        *,
        size: Callable[[Any], object] | None = vision_size,
        encode: TileEncoder = encode_images,
        layout: Callable[[Grid], Tensor] = lambda grid: torch.ones(grid[0] * grid[1], dtype=torch.bool),
        overview_only: str = "",
        video: Geometry | None = None,
    ) -> None:
        self._tokens = tokens
        self._size = size
        self._encode = encode
        self._layout = layout
        self.overview_only = overview_only
        self.video = video

    def check_model(self, model: PreTrainedModel) -> None:
        if self._size is not None and sides(self._size(model.config)) is None:
            vision = getattr(model.config, "vision_config", None)
            raise UnsupportedModelError(
                f"the vision tower of {type(model).__name__} ({type(vision).__name__}) has no single `image_size`."
            )
        self.grid(model)

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        channels = getattr(getattr(model.config, "vision_config", None), "num_channels", 3)
        size = self.tower_size(model)
        if size is None:
            view = Declared(("images", channels, ...), meaning=f"zoom {zoom} times those of pixel_values", zoom=zoom)
        else:
            meaning = f"zoom {zoom} times the tower's {size[0]} x {size[1]} pixels"
            view = Declared(("images", channels, zoom[0] * size[0], zoom[1] * size[1]), meaning=meaning)
        return {"pixel_values": view}

    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Grid) -> Sequence[Grid]:
        pixels = inputs["pixel_values"]
        if pixels.shape[-2] % zoom[0] or pixels.shape[-1] % zoom[1]:
            raise HighResInputError(
                f"hd_pixel_values has shape {tuple(pixels.shape)}; expected a height divisible by {zoom[0]} and a "
                f"width by {zoom[1]}."
            )
        return [self.grid(model)] * len(pixels)

    def layout(self, model: PreTrainedModel, grid: Grid) -> Tensor:
        return self._layout(grid)

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Grid], zoom: Grid
    ) -> list[Tensor]:
        tiles = (self.encode_tiles(model, image)[None] for image in self.cut(inputs, zoom))
        stitched = (stitch_tiles(image, grid, zoom) for image, grid in zip(tiles, grids, strict=True))
        return [rearrange(image, "1 r c d -> (r c) d") for image in stitched]

    def cut(self, inputs: Mapping[str, Tensor], zoom: Grid) -> list[tuple[Tensor, ...]]:
        tiles = (split_tiles(inputs[name], zoom) for name in self.inputs)
        return list(zip(*tiles, strict=True))

    def tile_grid(self, model: PreTrainedModel) -> Pair:
        return self.grid(model)

    def encode_tiles(self, model: PreTrainedModel, tiles: Sequence[Tensor]) -> Tensor:
        encoded, layout = torch.stack(list(self._encode(model, *tiles))), self.layout(model, self.grid(model))
        return encoded if len(layout) == math.prod(self.grid(model)) else cells_of_image(encoded, layout)

    def grid(self, model: PreTrainedModel) -> Pair:
        """Rows and columns of every image."""
        tokens = self._tokens(model.config)
        side = math.isqrt(tokens)
        if not tokens or side * side != tokens:
            raise UnsupportedModelError(
                f"{type(model).__name__} has {tokens} tokens an image, which is no square grid."
            )
        return side, side

    def tower_size(self, model: PreTrainedModel) -> Pair | None:
        """Height and width of the pictures that the tower takes, if the config says them."""
        return sides(self._size(model.config)) if self._size is not None else None


class AnyRes(FixedGrid):
    """An overview, tiles, and a newline token behind (LLaVA-NeXT); the prompt carries the overview only.

    While it is patched, the model takes overviews without tiles, too: ``pixel_values`` ``(images, 1, channels, height,
    width)``, whatever ``image_sizes`` say.
    """

    def methods(self, model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
        yield model.model, "get_image_features", get_image_features


def get_image_features(self: Any, pixel_values: Tensor, *args: Any, **options: Any) -> Any:
    """``get_image_features`` of a patched model, which takes overviews too."""
    if pixel_values.ndim == 5 and pixel_values.shape[1] == 1:
        self, config = copy.copy(self), copy.copy(self.config)
        config.image_grid_pinpoints = [[0, 0]]  # the model counts an overview, and the tiles that fit in here
        self.config = config
    return type(self).get_image_features(self, pixel_values, *args, **options)


class TwoSizes(FixedGrid):
    """Every image in the sizes of two towers, whose features make one grid of tokens together (DeepSeek-VL hybrid).

    Both views are cut into the same tiles.
    """

    inputs = ("pixel_values", "high_res_pixel_values")

    def __init__(self) -> None:
        super().__init__(merged_patches, encode=encode_in_two_sizes)

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        declared, size = super().declared(model, zoom), model.config.high_res_vision_config.image_size
        axes = (*declared["pixel_values"].axes[:2], zoom[0] * size, zoom[1] * size)
        meaning = f"the images of hd_pixel_values, zoom {zoom} times the larger tower's {size} pixels"
        return {**declared, "high_res_pixel_values": Declared(axes, meaning=meaning)}
