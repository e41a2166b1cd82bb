"""Cells of the low-res grid that show padding only, where an image was padded to a square."""

import torch
from torch import Tensor

from flexkit.errors import ConfigError, HighResInputError
from flexkit.grids import Grid, check_grid


def margin_cells(image_sizes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Count the cells of padding on each side of images that were padded to a square, centred.

    On the short axis ``int(floor(abs(width - height) / 2) / max(width, height) * cells)`` with that axis'
    number of cells, as in the authors' code; on the long axis 0.

    Parameters
    ----------
    image_sizes : torch.Tensor
        Shape (images, 2), integer: heights and widths before padding.
    grid : tuple of int
        Rows and columns of the low-res grid.

    Returns
    -------
    torch.Tensor
        Shape (images, 2), int64, on the device of ``image_sizes``: rows above and as many below, columns left
        and as many right.

    Raises
    ------
    HighResInputError
        If ``image_sizes`` is not such a tensor of positive numbers.
    ConfigError
        If ``grid`` is not two positive ints.

    Examples
    --------
    >>> margin_cells(torch.tensor([[480, 640], [640, 480], [100, 100]]), (24, 24)).tolist()
    [[3, 0], [0, 3], [0, 0]]
    """
    rows, columns = check_grid("grid", grid, most=2)
    if not isinstance(image_sizes, Tensor) or image_sizes.layout is not torch.strided or image_sizes.is_meta:
        raise HighResInputError(f"image sizes must be a dense tensor of integers, got {image_sizes!r}")
    if image_sizes.ndim != 2 or image_sizes.shape[-1] != 2 or _is_not_integer(image_sizes):
        raise HighResInputError(
            f"image sizes are {image_sizes.dtype} of shape {tuple(image_sizes.shape)}, expected integers of "
            "shape (images, 2): (height, width) of each original image"
        )
    sizes: list[list[int]] = image_sizes.tolist()
    if any(side < 1 for size in sizes for side in size):
        raise HighResInputError(f"image sizes must be positive, got {sizes}")
    margins = [
        (int(padding * rows), 0) if width > height else (0, int(padding * columns))
        for height, width in sizes
        for padding in [abs(width - height) // 2 / max(width, height)]
    ]
    return torch.tensor(margins, dtype=torch.long, device=image_sizes.device).reshape(-1, 2)


def valid_cells(margins: Tensor, grid: Grid) -> Tensor:
    """Mask the cells inside the margins.

    Parameters
    ----------
    margins : torch.Tensor
        Shape (images, 2), integer, as :func:`margin_cells` gives them.
    grid : tuple of int
        Rows and columns of the low-res grid.

    Returns
    -------
    torch.Tensor
        Shape (images, rows, columns), bool, False in the margins.

    Raises
    ------
    ConfigError
        If ``margins`` is not such a tensor, or ``grid`` not two positive ints.

    Examples
    --------
    >>> valid_cells(torch.tensor([[1, 0]]), (3, 2)).int().tolist()
    [[[0, 0], [1, 1], [0, 0]]]
    """
    rows, columns = check_grid("grid", grid, most=2)
    if not isinstance(margins, Tensor) or margins.layout is not torch.strided:
        raise ConfigError(f"margins must be a dense tensor, as margin_cells returns it, got {margins!r}")
    if margins.ndim != 2 or margins.shape[-1] != 2 or _is_not_integer(margins):
        raise ConfigError(
            f"margins are {margins.dtype} of shape {tuple(margins.shape)}, expected integers of shape "
            "(images, 2): pass what margin_cells returns"
        )
    above, left = margins[:, :1], margins[:, 1:]
    row = torch.arange(rows, device=margins.device)
    column = torch.arange(columns, device=margins.device)
    in_rows = (row >= above) & (row < rows - above)
    in_columns = (column >= left) & (column < columns - left)
    return in_rows[:, :, None] & in_columns[:, None, :]


def _is_not_integer(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
