"""Checks of what callers hand to attention, with messages that say what was given and what was expected."""

import math

import torch
from torch import Tensor

from flexkit.attention.visible import ImageGroup, hidden_keys
from flexkit.checks import FLOATS, INTEGERS
from flexkit.errors import ConfigError, FlexkitError, HighResInputError
from flexkit.grids import Grid, check_grid, zoom_along

__all__ = [
    "broadcast_mask",
    "check_dense",
    "check_pair_of_tensors",
    "check_tensor",
    "check_tokens",
    "image_group",
    "selection_by_row",
]


def check_dense(name: str, tensor: object, like: Tensor | None = None, error: type[FlexkitError] = ConfigError) -> None:
    """Raise ``error`` unless ``tensor`` is a dense tensor, on the device of ``like``."""
    if not isinstance(tensor, Tensor):
        raise error(f"{name} is a {type(tensor).__name__}, expected a tensor.")
    if tensor.layout is not torch.strided:
        raise error(f"{name} is a {tensor.layout} tensor, expected a dense one: pass {name}.to_dense().")
    if like is not None and tensor.device != like.device:
        raise error(f"{name} lies on {tensor.device}, the hidden states on {like.device}: move it there.")


def check_pair_of_tensors(name: str, value: object, parts: str) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a pair, whose parts the message names."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        given = f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
        raise ConfigError(f"{name} is {given}, expected a pair of tensors: {parts}.")


def check_tensor(
    name: str,
    tensor: Tensor,
    /,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] = FLOATS,
    like: Tensor | None = None,
    error: type[FlexkitError] = ConfigError,
    **axes: int | tuple[int, ...] | None,
) -> None:
    """Raise ``error`` unless ``tensor`` has the named axes in order: of a size, one of several, or any.

    It is also to be dense, floating or of another dtype, and on the device of ``like``.
    """
    check_dense(name, tensor, like, error)
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    sizes = [size if isinstance(size, tuple | None) else (size,) for size in axes.values()]
    fits = tensor.ndim == len(sizes) and all(
        size is None or got in size for size, got in zip(sizes, tensor.shape, strict=True)
    )
    if fits and tensor.dtype in dtypes:
        return
    expected = ", ".join(
        axis if size is None else f"{axis}={' or '.join(map(str, size))}"
        for axis, size in zip(axes, sizes, strict=True)
    )
    kind = {FLOATS: "floating", INTEGERS: "integers"}.get(dtypes, str(dtype))
    raise error(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {kind} of shape ({expected}).")


def image_group(
    grid: Grid, zoom: int | Grid, positions: Tensor | None, key: Tensor, margins: Tensor | None
) -> ImageGroup:
    """The images of a batch, or :class:`ConfigError` unless there is one key ``(batch, heads, keys, dim)`` per cell."""
    (batch, _, keys, _), grid = key.shape, check_grid("grid", grid)
    if positions is None:
        raise ConfigError("a grid was given without image_positions: say where its tokens stand in the sequence.")
    check_tensor("image_positions", positions, dtype=torch.long, like=key, batch=batch, cells=math.prod(grid))
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < keys:
        raise ConfigError(
            f"image_positions go from {int(positions.min())} to {int(positions.max())}, expected 0 to "
            f"{keys - 1}: positions in the sequence of keys."
        )
    if margins is not None:
        check_tensor("margins", margins, dtype=INTEGERS, like=key, batch=batch, sides=2)
    return ImageGroup.of_batch(grid, zoom_along(zoom, len(grid)), positions, margins)


def check_tokens(tokens: int, image: ImageGroup) -> None:
    """Raise :class:`HighResInputError` unless there is one high-res token per cell of the zoomed grid."""
    expected = math.prod(image.size)
    if tokens != expected:
        raise HighResInputError(
            f"high_res has {tokens} tokens, expected {expected}: grid {image.grid} with zoom {image.zoom}."
        )


def broadcast_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Give an attention mask four axes, all queries and keys, and minus infinity where an additive one hides.

    Raises
    ------
    ConfigError
        If the mask is not bool or floating, or cannot be broadcast to ``shape``.
    """
    fits = mask.ndim <= 4 and all(got in (1, want) for got, want in zip(mask.shape[::-1], shape[::-1], strict=False))
    if not fits or mask.dtype not in (torch.bool, *FLOATS):
        raise ConfigError(
            f"attention_mask is {mask.dtype} of shape {tuple(mask.shape)}, expected bool or floating, "
            f"broadcastable to (batch, heads, length, keys) = {shape}."
        )
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    mask = mask.expand(-1, -1, *shape[2:])
    return mask if mask.dtype == torch.bool else mask.masked_fill(hidden_keys(mask), -torch.inf)


def selection_by_row(selected: Tensor, batch: int, rows: int, tokens: int) -> Tensor:
    """Bring a selection in any of its accepted layouts to one row of tokens per querying row.

    Parameters
    ----------
    selected : torch.Tensor
        Bool: ``(batch, tokens)`` or ``(batch, [high-res frames,] high-res rows, high-res columns)`` for all querying
        rows of a batch row; with an axis of those behind the batch for each.
    batch, rows, tokens : int
        Batch size, querying rows and high-res tokens that are expected.

    Returns
    -------
    torch.Tensor
        ``(batch, rows, tokens)``, bool.

    Raises
    ------
    HighResInputError
        If the selection is none of these.
    """
    begin = next((axis for axis in range(1, selected.ndim) if math.prod(selected.shape[axis:]) == tokens), 1)
    flat = selected.flatten(begin) if selected.ndim > 1 else selected
    flat = flat[:, None] if flat.ndim == 2 else flat
    fits = flat.ndim == 3 and flat.shape[0] == batch and flat.shape[1] in (1, rows) and flat.shape[2] == tokens
    if not fits or selected.dtype != torch.bool:
        raise HighResInputError(
            f"selected is {selected.dtype} of shape {tuple(selected.shape)}, expected torch.bool: "
            f"{batch} batch rows, optionally {rows} querying rows, {tokens} high-res tokens (flat or a grid)."
        )
    return flat.expand(-1, rows, -1)
