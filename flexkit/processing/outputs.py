"""Arrays, tensors and lists of them: what image processors give."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["appended", "joined", "like", "named", "processed"]


def like(values: Tensor | Sequence[Tensor], low_res: Any) -> Any:
    """Values of the high-res view, in the form of those of the low-res view.

    Parameters
    ----------
    values : torch.Tensor or sequence of torch.Tensor
        One entry for each of ``low_res``, more or fewer.
    low_res : torch.Tensor or numpy.ndarray or list
        What the image processor gave.

    Returns
    -------
    torch.Tensor or numpy.ndarray or list
        Of the kind of ``low_res``.
    """
    if isinstance(low_res, list | tuple):
        first = low_res[0] if len(low_res) else None
        return [like(value, first) if hasattr(first, "dtype") else value.tolist() for value in values]
    whole = values if isinstance(values, Tensor) else torch.stack(list(values))
    return whole if isinstance(low_res, Tensor) else whole.numpy()


def joined(values: Sequence[Tensor], *, axis: int = 0, filler: int = 0) -> Tensor:
    """Outputs for several images along one axis; where sizes differ on later ones, padded at their end.

    Parameters
    ----------
    values : sequence of torch.Tensor
        What the image processor gave for each.
    axis : int
        The axis that counts images, or patches of all images.
    filler : int
        What the padding holds.
    """
    if axis:
        return torch.cat(list(values), axis)
    longest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    missing = [[size - own for own, size in zip(value.shape[1:], longest, strict=True)] for value in values]
    pads = [[width for size in reversed(sizes) for width in (0, size)] for sizes in missing]
    return torch.cat([pad(value, sides, value=filler) for value, sides in zip(values, pads, strict=True)])


def appended(values: Any, more: Any) -> Any:
    """Outputs for some images, and behind them those for others.

    Parameters
    ----------
    values, more : torch.Tensor or numpy.ndarray or list
        As :func:`like` gives them.
    """
    if isinstance(values, list):
        return [*values, *more]
    return like(joined([torch.as_tensor(values), torch.as_tensor(more)]), values)


def named(made: Any) -> Any:
    """What an image processor made, by name.

    Parameters
    ----------
    made : transformers.BatchFeature or torch.Tensor or numpy.ndarray or list
        Its outputs; IDEFICS gives pixels alone.
    """
    return made if isinstance(made, Mapping) else {"pixel_values": made}


def processed(image_processor: Any, picture: Any, options: Mapping[str, Any], **changes: Any) -> Mapping[str, Tensor]:
    """What an image processor makes of one picture, as tensors.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        The image processor.
    picture : numpy.ndarray or torch.Tensor
        ``(channels, height, width)``.
    options : mapping
        The keyword arguments of the low-res call.
    **changes
        What is different now.
    """
    form = {"input_data_format": "channels_first", "return_tensors": "pt"}
    made: Mapping[str, Tensor] = named(image_processor.preprocess([picture], **{**options, **form, **changes}))
    return made
