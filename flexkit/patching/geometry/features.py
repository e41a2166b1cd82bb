"""Image features of a model in one form, whatever its family returns."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import UnsupportedModelError

__all__ = ["image_features"]


def image_features(model: PreTrainedModel, **inputs: Tensor) -> list[Tensor]:
    """Projected features of every image, each ``(tokens, dim)``; no gradient flows through them.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model with ``get_image_features``.
    **inputs : torch.Tensor
        The arguments of ``get_image_features``.
    """
    owner = model if hasattr(model, "get_image_features") else getattr(model, "model", model)
    with torch.no_grad():
        output = owner.get_image_features(**inputs, return_dict=True)
    features = getattr(output, "pooler_output", output)
    if features is None:
        raise UnsupportedModelError(f"{type(model).__name__}.get_image_features gave no `pooler_output`.")
    return [image.reshape(-1, image.shape[-1]) for image in features]
