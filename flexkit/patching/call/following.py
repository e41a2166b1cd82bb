"""An answer that goes on: one position more of every batch row, which reads the tokens that stand in the cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexkit.patching.memory.high_res import HighResMemory, attach_memory
from flexkit.patching.memory.resident import GrowingResident, ResidentLayer
from flexkit.patching.seam.attention import Silent

__all__ = ["Following"]


@dataclass
class Following(Silent):
    """Stands in the place of a call: base kernels see the tokens, and nothing else is asked or noted."""

    memory: HighResMemory
    layers: list[Any]
    """Of the cache."""
    masks: list[tuple[Tensor | None, torch.device, Tensor | None]] = field(default_factory=list)
    """Those of the base model, where, and what kernels get in their place."""
    own: ClassVar[bool] = True

    @classmethod
    def begin(cls, memory: HighResMemory, cache: Any, past: object) -> "Following | None":
        """The call of an answer that goes on at ``past``; None if none does."""
        resident = memory.resident
        if resident is None or not resident.goes_on:
            return None
        # A graph is of a step in the middle of an answer, whose end it cannot note.
        if not torch.compiler.is_compiling() and memory.seen != past:
            return None
        has_room = resident.room is None or memory.seen < resident.room
        return cls(memory, cache.layers) if has_room else None

    def sees(
        self, layer: int, kernel: str, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[str, Tensor, Tensor, Tensor | None]:
        """All that the layer of the cache holds, and a mask for it."""
        holder, resident = self.layers[layer], self.memory.resident
        if resident is None or not isinstance(holder, ResidentLayer) or not holder.hd_count:
            return kernel, key, value, mask
        key, value = holder.hd_seen
        for other, device, made in self.masks:
            if other is mask and device == key.device:  # by its id a graph would hold for one mask
                return kernel, key, value, made
        self.masks.append((mask, key.device, holder.hd_mask(mask, resident)))
        return kernel, key, value, self.masks[-1][2]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the layers of the cache know that what they are given goes on with the answer."""
        layers = [layer for layer in self.layers if isinstance(layer, GrowingResident)]
        for layer in layers:
            layer.hd_follows = True
        try:
            yield
        finally:
            for layer in layers:
                layer.hd_follows = False

    def finish(self, cache: object) -> None:
        """Leave with the cache where the answer goes on."""
        if not torch.compiler.is_compiling():
            attach_memory(cache, replace(self.memory, seen=self.memory.seen + 1))
