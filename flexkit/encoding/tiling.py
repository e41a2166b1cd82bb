"""Cut a high-res view into tiles of the low-res size, and stitch their features back into one grid."""

from einops import rearrange
from torch import Tensor

from flexkit.errors import ConfigError
from flexkit.zoom import Pair, zoom_pair

__all__ = ["split_tiles", "stitch_tiles"]


def split_tiles(images: Tensor, zoom: int | Pair) -> Tensor:
    """Cut images into ``zoom`` tiles along each axis, in raster order (paper, section 3.1).

    Parameters
    ----------
    images : torch.Tensor
        ``(batch, channels, zoom_rows * height, zoom_columns * width)``, any dtype.
    zoom : int or tuple of int
        Tiles along rows and columns.

    Returns
    -------
    torch.Tensor
        ``(batch, zoom_rows * zoom_columns, channels, height, width)``.

    Raises
    ------
    ConfigError
        If the sides of the images are no multiples of the zoom.
    """
    rows, columns = zoom_pair(zoom)
    if images.ndim != 4 or images.shape[-2] % rows or images.shape[-1] % columns:
        raise ConfigError(
            f"images have shape {tuple(images.shape)}; expected (batch, channels, height, width) "
            f"with a height divisible by {rows} and a width by {columns}: resize to a multiple of the zoom."
        )
    return rearrange(images, "b c (r h) (s w) -> b (r s) c h w", r=rows, s=columns)


def stitch_tiles(features: Tensor, grid: Pair, zoom: int | Pair) -> Tensor:
    """Stitch the features of tiles into one grid; the inverse of cutting.

    Parameters
    ----------
    features : torch.Tensor
        ``(batch, zoom_rows * zoom_columns, rows * columns, dim)``: tiles, and cells of each, in raster order.
    grid : tuple of int
        Rows and columns of one tile.
    zoom : int or tuple of int
        Tiles along rows and columns.

    Returns
    -------
    torch.Tensor
        ``(batch, zoom_rows * rows, zoom_columns * columns, dim)``.

    Raises
    ------
    ConfigError
        If there are not that many tiles, or cells in a tile.
    """
    zoom_rows, zoom_columns = zoom_pair(zoom)
    rows, columns = grid
    if features.ndim != 4 or features.shape[1:3] != (zoom_rows * zoom_columns, rows * columns):
        raise ConfigError(
            f"features have shape {tuple(features.shape)}; expected "
            f"(batch, {zoom_rows * zoom_columns}, {rows * columns}, dim): "
            f"{zoom_rows} x {zoom_columns} tiles of {rows} x {columns} cells."
        )
    return rearrange(features, "b (y x) (r c) d -> b (y r) (x c) d", y=zoom_rows, r=rows, c=columns)
