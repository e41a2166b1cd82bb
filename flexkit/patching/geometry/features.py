"""Image features of a model in one form, whatever its family returns."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import UnsupportedModelError
from flexkit.patching.decoder import find_decoder

__all__ = ["features_owner", "image_features"]


def image_features(model: PreTrainedModel, **inputs: Tensor) -> list[Tensor]:
    """Projected features of every image, each ``(tokens, dim)``, as they enter the decoder layers; without gradient.

    A decoder that scales its embeddings (Granite) scales image features too. Where a model adds features of deeper
    layers of its tower to the image tokens on their way through the decoder (deepstack), these are added here: a
    high-res token carries what a low-res one has carried.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model with ``get_image_features``.
    **inputs : torch.Tensor
        The arguments of ``get_image_features``.
    """
    with torch.no_grad():
        output = features_owner(model).get_image_features(**inputs, return_dict=True)
    features = getattr(output, "pooler_output", output)
    if features is None:
        features = getattr(output, "last_hidden_state", None)
    scale = getattr(find_decoder(model), "embedding_multiplier", 1.0)
    images = [] if features is None else [image.reshape(-1, image.shape[-1]) * scale for image in features]
    deeper = [_per_image(layer, images) for layer in getattr(output, "deepstack_features", None) or ()]
    sums = [list(layer) for layer in (images, *deeper) if layer]
    if not sums:
        raise UnsupportedModelError(f"{type(model).__name__}.get_image_features gave no features.")
    return [sum(layers[1:], start=layers[0]) for layers in zip(*sums, strict=True)]


def features_owner(model: PreTrainedModel) -> Any:
    """The part of a model that has ``get_image_features``."""
    return model if hasattr(model, "get_image_features") else getattr(model, "model", model)


def _per_image(layer: Any, images: Sequence[Tensor]) -> Sequence[Tensor]:
    """Features of a deeper layer image by image: in one tensor, in a list, or in a list behind a layer's number."""
    if isinstance(layer, Tensor):
        return torch.split(layer.reshape(-1, layer.shape[-1]), [len(image) for image in images])
    features: Sequence[Tensor] = layer[1] if isinstance(layer[0], int) else layer
    return features
