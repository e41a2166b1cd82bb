"""What the querying rows of a call see of the base keys, and of the images among them."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from flexkit.lazy import lazy
from flexkit.patching.groups import ImageGroup, within

__all__ = ["SeenImages", "Sight", "see"]


@dataclass(frozen=True)
class SeenImages:
    """The images of a group, as querying rows see them."""

    group: ImageGroup
    columns: Tensor
    """``(images, cells)``: indices of their low-res tokens among the base keys."""
    whole: Tensor
    """``(images, queries)``, bool: whether the map of the row covers the image."""
    behind: Tensor
    """``(images, queries)``, bool: whether the row stands behind the image, in sight or not."""
    cells: Tensor | None
    """``(images, queries, rows, columns)``, bool: the cells that are no padding; None where none is."""

    @lazy
    def always_whole(self) -> bool:
        """Whether the maps of all rows cover all images."""
        return not torch.compiler.is_compiling() and bool(self.whole.all())


@dataclass(frozen=True)
class Sight:
    """What the querying rows of a call see in all layers whose kernels get the same mask."""

    given: Tensor | None
    """The mask of the kernel."""
    kind: tuple[object, ...]
    """What else decides."""
    mask: Tensor | None
    """Of the querying rows, broadcastable to ``(batch, heads, queries, keys)``; None if everything is seen."""
    offset: int | Tensor
    """Position in the sequence of the first key."""
    images: tuple[SeenImages, ...]
    """Of every group of images."""


def see(
    group: ImageGroup,
    visible: Tensor,
    offset: int | Tensor,
    positions: Tensor,
    *,
    sparse: bool = False,
    beside: bool = False,
) -> SeenImages:
    """How querying rows see the images of a group.

    Parameters
    ----------
    group : ImageGroup
        The images.
    visible : torch.Tensor
        ``(batch, queries, keys)``, bool: the keys that a querying row sees.
    offset : int or torch.Tensor
        Position in the sequence of the first key.
    positions : torch.Tensor
        ``(batch, queries)``: positions of the querying rows in the sequence.
    sparse : bool
        Whether the layer hides keys by choice: those have attention 0, and the map of what is behind a row counts.
    beside : bool
        Whether the images stand beside the sequence: the keys that a row does not see in one that it does see are
        padding, and nothing is selected there.
    """
    columns, inside = within(group.columns - offset, visible.shape[-1])
    behind = positions[group.rows] >= group.columns.amax(-1, keepdim=True)
    seen = visible[group.rows[:, None], :, columns]
    whole = (behind if sparse else seen.any(1) if beside else seen.all(1)) & inside.all(-1)[:, None]
    cells = rearrange(seen, "i (r c) q -> i q r c", r=group.grid[0]) if beside else None
    return SeenImages(group, columns, whole, behind, cells)
