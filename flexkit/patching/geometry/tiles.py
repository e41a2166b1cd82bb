"""How families hand a batch of tiles to their vision tower, each tile encoded as the family encodes one overview."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.patching.geometry.features import features_owner, image_features

__all__ = [
    "TileEncoder",
    "encode_images",
    "encode_in_two_sizes",
    "encode_overviews",
    "encode_pages",
    "encode_pooled",
    "encode_projected",
    "encode_samples",
]

TileEncoder = Callable[..., Sequence[Tensor]]
"""A model and its tiles ``(tiles, channels, height, width)``, in every size that it takes them in, to the features
``(tokens, dim)`` of each overview."""


def encode_images(model: PreTrainedModel, tiles: Tensor) -> Sequence[Tensor]:
    """Every tile as one image: towers that take ``(images, channels, height, width)``."""
    # Video-LLaVA called them pixel_values_images in earlier versions of transformers.
    former = "pixel_values_images"
    return image_features(model, **{former if _takes(model, former) else "pixel_values": tiles})


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
    strategy = "vision_feature_select_strategy"
    asked = {strategy: getattr(model.config.vision_config, strategy)} if _takes(model, strategy) else {}
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


def _takes(model: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(features_owner(model).get_image_features).parameters
