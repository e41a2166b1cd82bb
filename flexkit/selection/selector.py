"""From attention weights over the low-res tokens to a selection of high-res tokens."""

import math
from collections.abc import Callable, Sequence
from operator import mul
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from flexkit.checks import WIDE_FLOATS, is_count, is_int
from flexkit.errors import ConfigError, PolicyError
from flexkit.grids import Grid, check_grid, zoom_along
from flexkit.selection.margins import valid_cells
from flexkit.selection.policy import NAMED, Policy, as_policy, check_mask, check_scores, failure
from flexkit.selection.ranking import cells_of, within_budget
from flexkit.selection.schedule import Schedule
from flexkit.selection.threshold import PUBLISHED_POLICY


class AttentionMapSelector(nn.Module):
    """Select high-res tokens by where a querying position attends in the low-res view.

    This is the paper's high-resolution feature selection, with the policy to choose.

    Parameters
    ----------
    policy : Policy or Schedule or collections.abc.Callable
        Which cells of a map are selected. A callable maps scores (..., rows, columns) to a bool mask of that
        shape.
    reduce : str
        How a map is made of the heads' attention: "sum", "mean" or "max".
    heads : collections.abc.Sequence or None
        Indices of the heads that count; None for all.
    budget : int or float or None
        At most so many high-res tokens for each map, or at most this share in (0, 1] of the high-res grid
        (rounded, at least one token); the best-scored ones stay. None for no bound. The frames of a video share it.

    Raises
    ------
    PolicyError
        If ``policy`` is none of these.
    ConfigError
        If another setting is out of range.

    Examples
    --------
    >>> from flexkit.selection import TopK
    >>> selector = AttentionMapSelector(TopK(1))
    >>> attention = torch.tensor([0.1, 0.2, 0.6, 0.1]).reshape(1, 1, 1, 4)
    >>> selector(attention, grid=(2, 2), zoom=(1, 2)).int().tolist()
    [[[[0, 0, 0, 0], [1, 1, 0, 0]]]]
    """

    def __init__(
        self,
        policy: Policy | Schedule | Callable[[Tensor], Tensor] = PUBLISHED_POLICY,
        *,
        reduce: Literal["sum", "mean", "max"] = "sum",
        heads: Sequence[int] | None = None,
        budget: int | float | None = None,
    ) -> None:
        super().__init__()
        if reduce not in ("sum", "mean", "max"):
            raise ConfigError(f'reduce must be "sum", "mean" or "max", got {reduce!r}')
        if budget is not None and not is_count(budget):
            raise ConfigError(
                "budget must be an int of at least 1 (that many high-res tokens), a float in (0, 1] (a share "
                f"of the high-res grid) or None, got {budget!r}"
            )
        self.policy = policy if isinstance(policy, Schedule) else as_policy(policy)
        self.reduce = reduce
        self.heads = None if heads is None else _check_heads(heads)
        self.budget = budget

    @property
    def uses_scores(self) -> bool:
        """Whether a selection depends on the scores, by its policy or by its budget."""
        return self.policy.uses_scores or self.budget is not None

    def most(self, grid: Grid, zoom: Grid) -> int:
        """How many high-res tokens of an image or video are selected at most.

        Parameters
        ----------
        grid, zoom : tuple of int
            Of the low-res grid, and high-res tokens of a cell, along [frames,] rows and columns.
        """
        most = self.policy.most(grid) * math.prod(zoom)
        return most if self.budget is None else min(most, cells_of(self.budget, math.prod(grid) * math.prod(zoom)))

    def forward(
        self,
        attention: Tensor,
        grid: Grid,
        zoom: int | Grid = 1,
        *,
        margins: Tensor | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """Select high-res tokens: :meth:`scores`, then :meth:`select`.

        Parameters
        ----------
        attention : torch.Tensor
            Shape (batch, heads, queries, cells), floating.
        grid : tuple of int
            Rows and columns of the low-res grid; of a video frames, rows and columns.
        zoom : int or tuple of int
            High-res tokens to a side of a low-res cell; along frames, rows and columns, if three are given.
        margins : torch.Tensor or None
            Shape (batch, 2), integer, as :func:`margin_cells` gives them.
        layer : int or None
            Index of the layer; needed with a :class:`Schedule`.

        Returns
        -------
        torch.Tensor
            Shape (batch, queries, zoom_rows * rows, zoom_columns * columns), bool; of a video with
            zoom_frames * frames in front of rows.
        """
        return self.select(self.scores(attention, grid, margins), zoom, layer=layer)

    def scores(self, attention: Tensor, grid: Grid, margins: Tensor | None = None, *, processes: Any = None) -> Tensor:
        """Reduce the heads' attention over the low-res tokens to a map for each querying position.

        Parameters
        ----------
        attention : torch.Tensor
            Shape (batch, heads, queries, cells), floating; cells in raster order, frame by frame.
        grid : tuple of int
            Rows and columns of the low-res grid; of a video frames, rows and columns.
        margins : torch.Tensor or None
            Shape (batch, 2), integer, as :func:`margin_cells` gives them; scores in the margins become 0.
        processes : object or None
            A process group of ``torch.distributed`` whose members hold as many heads each, in their order (tensor
            parallelism): the map is of the heads of all, and the same in all. Each has to call.

        Returns
        -------
        torch.Tensor
            Shape (batch, queries) + grid, in the dtype of ``attention`` but at least float32.

        Raises
        ------
        ConfigError
            If the shapes contradict each other, or the attention lacks one of the selector's heads.
        """
        grid = check_grid("grid", grid)
        cells = math.prod(grid)
        if not isinstance(attention, Tensor) or attention.layout is not torch.strided:
            raise ConfigError(f"attention is a {type(attention).__name__}, expected a dense tensor")
        if attention.ndim != 4 or attention.shape[-1] != cells or not attention.is_floating_point():
            raise ConfigError(
                f"attention is {attention.dtype} of shape {tuple(attention.shape)}, expected floating "
                f"(batch, heads, queries, {cells}) for a grid of {' x '.join(map(str, grid))} cells: pass the "
                "columns of the low-res image tokens only"
            )
        heads = attention if attention.dtype in WIDE_FLOATS else attention.float()
        if self.heads is not None:
            available = heads.shape[1] if processes is None else heads.shape[1] * dist.get_world_size(processes)
            if max(self.heads) >= available:
                raise ConfigError(
                    f"heads {self.heads} were chosen, the attention has {available}: 0 to {available - 1}"
                )
        if processes is not None:
            maps = _over_processes(heads, processes, self.reduce, self.heads)
        else:
            if self.heads is not None:
                heads = torch.stack([heads[:, head] for head in self.heads], dim=1)
            maps = heads.sum(1) if self.reduce == "sum" else heads.mean(1) if self.reduce == "mean" else heads.amax(1)
        maps = maps.reshape(*maps.shape[:2], *grid)
        if margins is None:
            return maps
        valid = valid_cells(margins, grid[-2:])
        if len(valid) != len(maps) or valid.device != maps.device:
            raise ConfigError(
                f"margins are for {len(valid)} images, the attention for {len(maps)}; they lie on {valid.device} and "
                f"{maps.device}"
            )
        every_frame = valid.view(len(valid), *[1] * (maps.ndim - valid.ndim), *valid.shape[1:])
        return maps.masked_fill(~every_frame, 0.0)

    def select(self, scores: Tensor, zoom: int | Grid, *, layer: int | None = None) -> Tensor:
        """Select high-res tokens by maps of scores.

        Parameters
        ----------
        scores : torch.Tensor
            Shape (batch, queries, rows, columns), or (batch, queries, frames, rows, columns), floating.
        zoom : int or tuple of int
            High-res tokens to a side of a low-res cell; along frames, rows and columns, if three are given.
        layer : int or None
            Index of the layer; needed with a :class:`Schedule`.

        Returns
        -------
        torch.Tensor
            Shape (batch, queries, zoom_rows * rows, zoom_columns * columns), bool; of a video with
            zoom_frames * frames in front of rows.

        Raises
        ------
        ConfigError
            If ``zoom`` is not one, two or three positive ints.
        PolicyError
            If the policy failed or returned anything but such a mask, or the layer of a schedule is missing.
        """
        is_video = isinstance(scores, Tensor) and scores.ndim == 5
        factors = zoom_along(zoom, 3 if is_video else 2)
        policy = self.policy
        if isinstance(policy, Schedule):
            if layer is None:
                raise PolicyError(f"the policy is {policy!r}, which differs by layer: pass layer=...")
            policy = policy.at(layer)
        check_scores(policy, scores)
        maps = scores.detach() if scores.requires_grad else scores
        as_frame = policy.sees_frames and not is_video
        if as_frame:
            maps, factors = maps.unsqueeze(-3), (1, *factors)
        axes = len(factors)
        size = tuple(map(mul, maps.shape[-axes:], factors))
        try:
            chosen: object = policy.select(maps, size)
        except NAMED:
            raise
        except Exception as error:
            raise failure(policy, maps, error) from error
        selected = check_mask(policy, chosen, (*maps.shape[:-axes], *size), maps.device)
        if self.budget is not None:
            selected = within_budget(selected, maps, self.budget, axes=axes)
        return selected.squeeze(-3) if as_frame else selected

    @override
    def extra_repr(self) -> str:
        return f"policy={self.policy!r}, reduce={self.reduce!r}, heads={self.heads}, budget={self.budget}"


def _over_processes(attention: Tensor, processes: Any, reduce: str, heads: Sequence[int] | None) -> Tensor:
    """``(batch, queries, cells)``: the map of chosen heads, of which this process may have all, some or none."""
    held, rank = attention.shape[1], dist.get_rank(processes)
    count = held * dist.get_world_size(processes) if heads is None else len(heads)
    own = attention if heads is None else attention[:, [head % held for head in heads if head // held == rank]]
    if reduce == "max":
        maps = own.amax(1) if own.shape[1] else torch.full_like(attention[:, 0], -torch.inf)
        dist.all_reduce(maps, dist.ReduceOp.MAX, processes)
        return maps
    maps = own.sum(1)
    dist.all_reduce(maps, dist.ReduceOp.SUM, processes)
    return maps / count if reduce == "mean" else maps


def _check_heads(heads: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(heads) if isinstance(heads, Sequence) else ()
    if not chosen or not all(is_int(head, 0) for head in chosen) or len(set(chosen)) != len(chosen):
        raise ConfigError(f"heads must be one or more different ints of at least 0, or None; got {heads!r}")
    return chosen
