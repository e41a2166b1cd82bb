"""One vision tower for both views of an image: the low-res one whole, the high-res one in tiles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flexkit.checks import FLOATS
from flexkit.errors import ConfigError, HighResInputError
from flexkit.grids import Grid, Pair, split_tiles, stitch_tiles, zoom_along
from flexkit.selection import margin_cells, valid_cells

__all__ = ["DualResolutionEncoder", "DualResolutionOutput"]


@dataclass(frozen=True)
class DualResolutionOutput:
    """What :class:`DualResolutionEncoder` returns; tokens are in raster order.

    Parameters
    ----------
    low_res : torch.Tensor
        ``(batch, rows * columns, dim)``: tokens of the low-res view.
    high_res : torch.Tensor
        ``(batch, high-res cells, dim)``: tokens of the high-res view, without gradient.
    grid : tuple of int
        Rows and columns of the low-res view; of videos frames, rows and columns.
    zoom : tuple of int
        High-res cells per low-res cell along the same axes.
    valid : torch.Tensor
        ``(batch, zoom_rows * rows, zoom_columns * columns)``, bool, of videos with zoom_frames * frames in front of
        rows: False where the high-res view shows padding only.
    """

    low_res: Tensor
    high_res: Tensor
    grid: Grid
    zoom: Grid
    valid: Tensor


class DualResolutionEncoder(nn.Module):
    """Encode images at the size of a vision tower and, in tiles, at a multiple of it (paper, section 3.1).

    No gradient flows through the high-res tokens, as in the paper; the low-res ones keep theirs. Videos are encoded
    frame by frame.

    Parameters
    ----------
    tower : torch.nn.Module
        From images ``(n, channels, height, width)`` to tokens ``(n, rows * columns, width)`` in raster order,
        without class tokens, or to maps ``(n, width, rows, columns)``.
    projector : torch.nn.Module, optional
        From the tower's tokens to tokens ``(n, rows * columns, dim)``.
    zoom : int or tuple of int
        Tiles along rows and columns. A third number, in front of these, says how many frames of the high-res view of a
        video there are for each of the low-res view.
    tile_batch : int, optional
        How many tiles go through the tower at once; None for all.
    grid : tuple of int, optional
        Rows and columns of the tower's tokens, if they are neither a map nor a square.

    Raises
    ------
    ConfigError
        If a setting is out of range.

    Examples
    --------
    >>> tower = nn.Conv2d(3, 8, kernel_size=4, stride=4)
    >>> encoder = DualResolutionEncoder(tower, zoom=2)
    >>> output = encoder(torch.zeros(1, 3, 24, 16))
    >>> output.grid, output.low_res.shape, output.high_res.shape
    ((3, 2), torch.Size([1, 6, 8]), torch.Size([1, 24, 8]))
    """

    def __init__(
        self,
        tower: nn.Module,
        projector: nn.Module | None = None,
        zoom: int | Grid = 3,
        *,
        tile_batch: int | None = None,
        grid: Pair | None = None,
    ) -> None:
        super().__init__()
        if tile_batch is not None and tile_batch < 1:
            raise ConfigError(f"tile_batch must be a positive int or None, got {tile_batch}.")
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise ConfigError(f"grid must be two positive ints (rows, columns), got {grid!r}.")
        self.tower = tower
        self.projector = nn.Identity() if projector is None else projector
        self.zoom = zoom_along(zoom)
        self.tile_batch = tile_batch
        self.grid = grid

    def forward(
        self, images: Tensor, low_res: Tensor | None = None, image_sizes: Tensor | None = None
    ) -> DualResolutionOutput:
        """Encode both views.

        Parameters
        ----------
        images : torch.Tensor
            ``(batch, channels, zoom_rows * height, zoom_columns * width)``, floating: the high-res view,
            normalised; of videos with ``zoom_frames * frames`` in front of channels.
        low_res : torch.Tensor, optional
            ``(batch, channels, height, width)``, of videos ``(batch, frames, channels, height, width)``: the low-res
            view; by default ``images``, downsampled bilinearly with antialiasing, and the mean of zoomed frames.
        image_sizes : torch.Tensor, optional
            ``(batch, 2)``, integer: height and width of the originals, if they were padded to a square.

        Returns
        -------
        DualResolutionOutput
            Tokens of both views, and where they lie.

        Raises
        ------
        HighResInputError
            If the low-res view or the sizes do not fit the images, or these are not floating.
        ConfigError
            If the zoom does not divide the images, or the tower does not return one token per cell of a grid.
        """
        _check_pixels("images", images)
        is_video = images.ndim == 5
        batch, zoom = len(images), zoom_along(self.zoom, 3 if is_video else 2)
        tiles = split_tiles(images.flatten(0, 1) if is_video else images, zoom[-2:])
        frames, together = (images.shape[1], zoom[0]) if is_video else (1, 1)
        if frames % together:
            raise ConfigError(f"images are videos of {frames} frames; expected a number divisible by {together}.")
        low_frames = [frames // together] if is_video else []
        shape = (batch, *low_frames, *tiles.shape[-3:])
        if low_res is None:
            low_res = _downsample(images.reshape(-1, together, *images.shape[-3:]).mean(1), shape[-2:])
        else:
            _check_pixels("low_res", low_res)
            if low_res.shape != shape or low_res.device != images.device:
                raise HighResInputError(
                    f"low_res has shape {tuple(low_res.shape)} on {low_res.device}, expected {tuple(shape)} on "
                    f"{images.device}: images of {tuple(images.shape)} reduced by zoom {zoom}."
                )
            low_res = low_res.to(images.dtype).flatten(0, -4)
        tokens, grid = self._encode(low_res)
        high_res = stitch_tiles(self._encode_tiles(tiles, grid), grid, zoom[-2:])
        high_res = high_res.reshape(*images.shape[:-3], *high_res.shape[1:])
        return DualResolutionOutput(
            low_res=tokens.reshape(batch, -1, tokens.shape[-1]),
            high_res=high_res.flatten(1, -2),
            grid=(*low_frames, *grid),
            zoom=zoom,
            valid=_valid(image_sizes, high_res),
        )

    def extra_repr(self) -> str:
        return f"zoom={self.zoom}, tile_batch={self.tile_batch}, grid={self.grid}"

    @torch.no_grad()
    def _encode_tiles(self, tiles: Tensor, grid: Pair) -> Tensor:
        """Tokens of every tile, ``(batch, tiles, rows * columns, dim)``."""
        flat = tiles.flatten(0, 1)
        parts = []
        for part in torch.split(flat, self.tile_batch or len(flat)):
            tokens, part_grid = self._encode(part)
            if part_grid != grid:
                raise ConfigError(f"the tower returned a grid of {part_grid} for tiles, of {grid} for low-res views.")
            parts.append(tokens)
        return rearrange(torch.cat(parts), "(b t) n d -> b t n d", t=tiles.shape[1])

    def _encode(self, images: Tensor) -> tuple[Tensor, Pair]:
        """Projected tokens of images of the tower's size, and their grid."""
        tokens = self.tower(images)
        if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
            got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ConfigError(
                f"the tower returned {got}, expected a tensor (n, rows * columns, width) or (n, width, rows, columns)."
            )
        grid = self.grid
        if tokens.ndim == 4:
            found = tokens.shape[2], tokens.shape[3]
            if grid not in (None, found):
                raise ConfigError(f"the tower returned a map of {found}, expected grid={grid}.")
            grid = found
            tokens = rearrange(tokens, "n d r c -> n (r c) d")
        elif grid is None:
            grid = math.isqrt(tokens.shape[1]), math.isqrt(tokens.shape[1])
        if math.prod(grid) != tokens.shape[1]:
            raise ConfigError(
                f"the tower returned {tokens.shape[1]} tokens an image, expected {math.prod(grid)} for a grid of "
                f"{grid}: drop class tokens, and give grid=(rows, columns) if it is no square."
            )
        return self.projector(tokens), grid


def _check_pixels(name: str, pixels: object) -> None:
    if not isinstance(pixels, Tensor) or pixels.layout is not torch.strided:
        given = pixels.layout if isinstance(pixels, Tensor) else f"a {type(pixels).__name__}"
        raise HighResInputError(f"{name} are {given}, expected a dense tensor (batch, channels, height, width).")
    if pixels.dtype not in FLOATS:
        raise HighResInputError(f"{name} are {pixels.dtype}, expected floating: normalise them first.")
    if 0 in pixels.shape[1:]:
        raise HighResInputError(f"{name} have no pixels: their shape is {tuple(pixels.shape)}.")


def _downsample(images: Tensor, size: Sequence[int]) -> Tensor:
    # The antialiasing kernel does not take half precision on every device.
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    small = F.interpolate(wide, size=list(size), mode="bilinear", antialias=True, align_corners=False)
    return small.to(images.dtype)


def _valid(image_sizes: Tensor | None, high_res: Tensor) -> Tensor:
    batch, *frames, rows, columns, _ = high_res.shape
    if image_sizes is None:
        return torch.ones(high_res.shape[:-1], dtype=torch.bool, device=high_res.device)
    margins = margin_cells(image_sizes, (rows, columns))
    if len(margins) != batch:
        raise HighResInputError(f"image_sizes are for {len(margins)} images, expected {batch}.")
    valid = valid_cells(margins, (rows, columns)).to(high_res.device)
    return valid.reshape(batch, *[1] * len(frames), rows, columns).expand(high_res.shape[:-1])
