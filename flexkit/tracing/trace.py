"""What a patched model looked at: every selection of every layer and step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.select import Selection
from flexkit.errors import ConfigError
from flexkit.patching.call.call import FlexCall
from flexkit.patching.state import get_patch, overridden

__all__ = ["Step", "Trace", "trace"]


@dataclass(frozen=True, repr=False)
class Step:
    """One forward call of a traced model.

    Attributes
    ----------
    queries : torch.Tensor
        ``(batch, queries)``, int64: the positions that read high-res keys, in order; -1 where a row has fewer.
    layers : dict
        From the index of a layer to what its map selected.
    tiles : int, optional
        How many high-res tiles of all images have been encoded by the end of the call; None where views were encoded
        as a whole.
    gated : torch.Tensor
        ``(batch, positions)``, int64: the positions that would have read, but whose low-res answer was so certain that
        the gate stayed shut; -1 where a row has fewer.
    """

    queries: Tensor
    layers: dict[int, Selection]
    tiles: int | None
    gated: Tensor

    def __repr__(self) -> str:
        read, kept = (tuple((positions >= 0).sum(-1).tolist()) for positions in (self.queries, self.gated))
        return f"Step(layers={list(self.layers)}, reading positions {read}, gated {kept}, tiles={self.tiles})"

    @property
    def shut(self) -> Tensor:
        """``(batch,)``, bool: the rows in which nothing read, because of the gate."""
        gated = (self.queries[..., None] == self.gated[:, None]).any(-1)
        return (self.gated >= 0).any(-1) & ~((self.queries >= 0) & ~gated).any(-1)

    @classmethod
    def of(cls, call: FlexCall) -> "Step":
        """What a finished call did."""
        shut = call.shut or RaggedIndex(call.rows.mask & False)
        queries, gated = (_positions(rows, call.past) for rows in (call.rows, shut))
        layers = dict(sorted(call.selections.items()))
        layers |= {layer: own.and_then(call.opened[layer]) for layer, own in layers.items() if layer in call.opened}
        return cls(queries, layers, call.memory.features.opened, gated)


@dataclass(repr=False)
class Trace:
    """Selections of the forward calls that read high-res tokens, in order.

    While generating, step 0 is the prompt and each later step one decoded token.

    Attributes
    ----------
    steps : list of Step
        One for each call.
    """

    steps: list[Step] = field(default_factory=list)

    def record(self, call: FlexCall) -> None:
        """Add what a finished call did."""
        self.steps.append(Step.of(call))

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"Trace({len(self)} steps, layers {self.layers})"

    @property
    def layers(self) -> list[int]:
        """The layers whose maps were recorded, in order."""
        return sorted({layer for step in self.steps for layer in step.layers})

    def mask(self, step: int, layer: int, *, image: int = 0, query: int = -1, level: int = 0) -> Tensor:
        """What a layer's map selected.

        With the published schedule the *next* layer reads it.

        Parameters
        ----------
        step : int
            Index of the call; may be negative.
        layer : int
            Index of the decoder layer whose map it was.
        image : int
            Which image or video of each batch row, in the order of the prompt.
        query : int
            Which querying position, in order; -1 for the last of each row.
        level : int
            Which level of a pyramid of zooms.

        Returns
        -------
        torch.Tensor
            ``(batch, rows, columns)``, bool, on the high-res grid; ``(batch, frames, rows, columns)`` if it is a video.
            Rows without such an image or query select nothing; where grids differ, smaller ones are padded, and a
            picture beside videos is a frame.

        Raises
        ------
        ConfigError
            If there is no such step or layer.
        """
        return _padded(self._maps(step, layer, "masks", image, query, level))

    def scores(self, step: int, layer: int, *, image: int = 0, query: int = -1, level: int = 0) -> Tensor:
        """The map that a layer selected by.

        Parameters
        ----------
        step, layer, image, query, level : int
            As for :meth:`mask`.

        Returns
        -------
        torch.Tensor
            ``(batch, rows, columns)``, floating, on the low-res grid; 0 in padded margins. Of a video as for
            :meth:`mask`.
        """
        return _padded(self._maps(step, layer, "scores", image, query, level))

    def selected_fraction(self, step: int, layer: int, *, image: int = 0, query: int = -1, level: int = 0) -> Tensor:
        """Share of the high-res tokens that was selected.

        Parameters
        ----------
        step, layer, image, query, level : int
            As for :meth:`mask`.

        Returns
        -------
        torch.Tensor
            ``(batch,)``, float32, between 0 and 1.
        """
        return torch.stack([mask.float().mean() for mask in self._maps(step, layer, "masks", image, query, level)])

    def _maps(self, step: int, layer: int, kind: str, image: int, query: int, level: int) -> list[Tensor]:
        """The map of one image and query in each batch row; zeros where there is none."""
        try:
            recorded = self.steps[step]
            selection = recorded.layers[layer].at(level)
        except (IndexError, KeyError):
            raise ConfigError(
                f"there is no step {step} with layer {layer}; recorded are {len(self.steps)} steps, of layers "
                f"{self.layers}."
            ) from None
        batch = len(recorded.queries)
        counts = (recorded.queries >= 0).sum(-1).tolist()
        stacks: Sequence[Tensor] = getattr(selection, kind)
        if not stacks:
            raise ConfigError(f"layer {layer} selected nothing on level {level} in step {step}: it had no map of it.")
        maps: dict[int, Tensor] = {}
        seen = [0] * batch
        for row, stack in _by_sequence(selection, stacks):
            slot = query if query >= 0 else counts[row] + query
            if seen[row] == image and 0 <= slot < counts[row]:
                maps[row] = stack[slot]
            seen[row] += 1
        shape = next((shown.shape for shown in maps.values()), stacks[0].shape[2:])
        none = stacks[0].new_zeros(shape)
        return [maps.get(row, none) for row in range(batch)]


def _positions(rows: RaggedIndex, past: int | Tensor) -> Tensor:
    """``(batch, count)``: positions in the sequence; -1 where a row has fewer."""
    return (rows.index + past).masked_fill(~rows.valid, -1)


@contextmanager
def trace(model: nn.Module, *, everywhere: bool = False) -> Iterator[Trace]:
    """Record what a patched model selects, in every call until the block ends.

    One call or ``generate`` takes ``hd_trace=flexkit.Trace()`` for the same.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    everywhere : bool
        Whether calls of all threads are recorded, in the order in which they finish, and not those of the calling
        thread and ``asyncio`` task alone.

    Yields
    ------
    Trace
        Filled as the model runs.

    Raises
    ------
    PatchError
        If the model is not patched.
    """
    recorded, patch = Trace(), get_patch(model)
    record = recorded.record
    if not everywhere:
        with overridden(patch, recorders=[record]):
            yield recorded
        return
    patch.recorders.append(record)
    try:
        yield recorded
    finally:
        patch.recorders.remove(record)


def _by_sequence(selection: Selection, stacks: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """``(batch row, maps of all queries)`` of every image, in the order of the prompt."""
    found = [
        (row, start, image)
        for group, stack in zip(selection.groups, stacks, strict=True)
        for row, start, image in zip(group.rows.tolist(), group.starts.tolist(), stack, strict=True)
    ]
    return [(row, stack) for row, _, stack in sorted(found, key=lambda entry: entry[:2])]


def _padded(maps: Sequence[Tensor]) -> Tensor:
    """Stack maps of different sizes, smaller ones with zeros after them."""
    axes = max(shown.ndim for shown in maps)
    maps = [shown.reshape(*[1] * (axes - shown.ndim), *shown.shape) for shown in maps]
    size = [max(lengths) for lengths in zip(*(shown.shape for shown in maps), strict=True)]
    missing = [[new - old for new, old in zip(size, shown.shape, strict=True)] for shown in maps]
    sides = [[side for length in reversed(lengths) for side in (0, length)] for lengths in missing]
    return torch.stack([F.pad(shown, own) for shown, own in zip(maps, sides, strict=True)])
