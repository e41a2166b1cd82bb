"""An answer that goes on: one position more of every batch row, which reads the tokens that stand in the cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from flexkit.attention.visible import behind_tokens
from flexkit.patching.memory.high_res import HighResMemory, attach_memory
from flexkit.patching.memory.resident import Places, ResidentLayer
from flexkit.patching.seam.attention import Silent

__all__ = ["Following"]


@dataclass
class Following(Silent):
    """Stands in the place of a call: base kernels see the tokens, and nothing else is asked or noted."""

    memory: HighResMemory
    layers: list[Any]
    """Of the cache."""
    masks: dict[tuple[object, ...], tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    """Those of the base model, and what kernels get in their place."""
    own: ClassVar[bool] = True

    @classmethod
    def begin(cls, memory: HighResMemory, cache: Any, past: object) -> "Following | None":
        """The call of an answer that goes on at ``past``; None if none does."""
        resident = memory.resident
        if resident is None or not resident.goes_on or memory.seen != past:
            return None
        has_room = resident.room is None or memory.seen < resident.room
        return cls(memory, cache.layers) if has_room else None

    def sees(
        self, layer: int, kernel: str, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[str, Tensor, Tensor, Tensor | None]:
        """All that the layer of the cache holds, and a mask for it."""
        holder = self.layers[layer]
        if not getattr(holder, "hd_front", 0):
            return kernel, key, value, mask
        key, value = holder.hd_seen
        kind = id(mask), key.device
        if kind not in self.masks:
            self.masks[kind] = mask, self._mask(mask, holder.hd_places, key)
        return kernel, key, value, self.masks[kind][1]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the layers of the cache know that what they are given goes on with the answer."""
        layers = [layer for layer in self.layers if isinstance(layer, ResidentLayer)]
        for layer in layers:
            layer.hd_follows = True
        try:
            yield
        finally:
            for layer in layers:
                layer.hd_follows = False

    def finish(self, cache: object) -> None:
        """Leave with the cache where the answer goes on."""
        attach_memory(cache, replace(self.memory, seen=self.memory.seen + 1))

    def _mask(self, base: Tensor | None, places: Places | None, key: Tensor) -> Tensor | None:
        resident = self.memory.resident
        if resident is None or resident.tokens is None:
            return None
        keys = key.shape[2] - resident.tokens.count
        mask = base if places is None else places.mask(base, keys)
        if mask is None and not resident.is_padded:
            return None
        return behind_tokens(resident.tokens.valid[:, None, None].to(key.device), mask, keys)
