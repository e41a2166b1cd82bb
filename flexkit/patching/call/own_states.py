"""Own states of high-res tokens: what the attention of the text model sees where these pass through its layers.

The projections of a layer expect hidden states of that layer, which in a deep model are nothing like image features. So
each token that some row reads is run through the text model once, on its feature: it sees itself, and what the last
low-res token of its image sees up to there. The keys and values that it has in a layer are what rows read in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flexkit.attention.layer import HighResKeys
from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.visible import and_itself, key_mask, rows_of_mask
from flexkit.patching.memory.tokens import ImageSpan, Prefix
from flexkit.patching.seam.attention import Silent
from flexkit.patching.seam.decoder import DecoderLayer

__all__ = ["LayerKeys", "OwnStates", "Passing"]


@dataclass(frozen=True)
class LayerKeys:
    """What the attention of one layer has before it: all keys that its cache gave, and those of the call."""

    key: Tensor
    """``(batch, key_heads, keys, head_dim)``."""
    value: Tensor
    """``(batch, key_heads, keys, value_dim)``."""
    mask: Tensor | None
    """As its kernel got it, for all rows of the call."""
    is_causal: bool
    sliding_window: int | None
    offset: int
    """Position in the sequence of the first key."""
    end: int
    """Column behind the last position of the call; a static cache has room behind."""

    @property
    def kind(self) -> tuple[object, ...]:
        """What decides which of the keys a row sees."""
        return id(self.mask), self.key.shape[2], self.is_causal, self.sliding_window, self.offset

    def rows(self, rows: RaggedIndex, past: int) -> Tensor | None:
        """The mask of some rows of the call, as :func:`~flexkit.attention.visible.rows_of_mask` gives it."""
        return rows_of_mask(
            self.mask,
            rows,
            keys=self.key.shape[2],
            past=past - self.offset,
            is_causal=self.is_causal,
            sliding_window=self.sliding_window,
        )


@dataclass
class OwnStates:
    """Own states in one run of a call through the text model."""

    past: int
    """Positions in front of the call."""
    length: int
    """Positions of the call."""
    start: int = 0
    """The first of them that runs."""
    notes_read: bool = False
    """Whether it is asked which tokens rows read."""
    behind: Mapping[int, LayerKeys] = field(default_factory=dict)
    """Of each layer in the run before, of which this one repeats the end."""
    held: Mapping[int, HighResKeys] = field(default_factory=dict)
    """Of each layer the own states that are there."""
    keys: dict[int, LayerKeys] = field(default_factory=dict)
    """Of each layer in this run."""
    missing: Tensor | None = None
    """``(batch, queries, tokens)``, bool: what rows selected that is not there."""
    read: Tensor | None = None
    """``(batch, tokens)``, bool: what rows read."""
    masks: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict)
    """For the kernels of this run, by what decides."""

    def seen(
        self,
        of: DecoderLayer,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        queries: int,
        is_causal: bool,
        sliding_window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask for a layer's kernel, which are noted."""
        before = self.behind.get(of.index)
        if before is None:
            end = self.past + self.length
            offset = int(of.first_key(end, key.shape[2]))
            known = LayerKeys(key, value, mask, is_causal, sliding_window, offset, end - offset)
        else:
            first = before.end - key.shape[2]
            key = torch.cat([before.key[:, :, :first], key, before.key[:, :, before.end :]], dim=2)
            value = torch.cat([before.value[:, :, :first], value, before.value[:, :, before.end :]], dim=2)
            known = replace(before, key=key, value=value)
            mask = self._mask(known, queries)
        self.keys[of.index] = known
        return key, value, mask

    def _mask(self, known: LayerKeys, queries: int) -> Tensor | None:
        """Of the last rows of the call."""
        keys = known.key.shape[2]
        kind = *known.kind, queries
        if kind not in self.masks:
            mask, hides = known.mask, queries > 1 or known.sliding_window is not None or known.end < keys
            if mask is not None and mask.ndim == 4 and mask.shape[2] > 1:
                mask = mask[:, :, -queries:]
            elif mask is None and known.is_causal and hides:
                positions = torch.arange(known.end - queries, known.end, device=known.key.device)[None]
                mask = key_mask(positions, keys, sliding_window=known.sliding_window)
            self.masks[kind] = mask
        return self.masks[kind]

    def again(self, start: int, held: Mapping[int, HighResKeys]) -> "OwnStates":
        """Of a run of the end of the call, from a position of this one on."""
        return replace(
            self, start=self.start + start, behind=self.keys, held=held, keys={}, missing=None, read=None, masks={}
        )

    def there(self, selected: Tensor) -> Tensor:
        """Those of the selected tokens ``(batch, queries, tokens)`` that are there; the others are noted."""
        held = next(iter(self.held.values()), None)
        missing = selected if held is None else selected & ~held.tokens.mask[:, None]
        self.missing = missing if self.missing is None else self.missing | missing
        there = selected & ~missing
        if self.notes_read:
            self.read = there.any(1) if self.read is None else self.read | there.any(1)
        return there


@dataclass
class Passing(Silent):
    """High-res tokens on their way through the text model, in the place of a call."""

    layers: Mapping[int, DecoderLayer]
    keys: Mapping[int, LayerKeys]
    tokens: RaggedIndex
    places: Sequence[tuple[ImageSpan, Any, Tensor | None]]
    """Which tokens are those of which image."""
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of each layer their keys and values ``(batch, key_heads, tokens, head_dim)``."""
    masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    own: ClassVar[bool] = True

    def sees(
        self, layer: int, kernel: str, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[str, Tensor, Tensor, Tensor]:
        """What the last low-res token of its image sees, and itself, by a kernel that takes any mask."""
        self.states[layer] = key, value
        prefixes = [span.prefix[layer] for span, _, _ in self.places]
        if prefixes[0].key is None:
            width, known = max(len(prefix.visible) for prefix in prefixes), self.keys[layer]
            keys, values, starts = known.key[:, :, :width], known.value[:, :, :width], [0] * len(prefixes)
        else:
            keys, values, starts = self._kept(prefixes)
        kind = (*(id(prefix.visible) for prefix in prefixes), *starts)
        if kind not in self.masks:
            self.masks[kind] = self._mask(prefixes, starts, keys.shape[2])
        mask = self.masks[kind]
        if kernel != "sdpa":
            kernel, mask = "eager", key.new_full(mask.shape, torch.finfo(key.dtype).min).masked_fill_(mask, 0.0)
        return kernel, torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2), mask

    def _kept(self, prefixes: Sequence[Prefix]) -> tuple[Tensor, Tensor, list[int]]:
        """Keys and values of the prefixes of every batch row, one behind the other, and where each starts."""
        rows: list[list[Prefix]] = [[] for _ in self.tokens.index]
        starts = []
        for (span, _, _), prefix in zip(self.places, prefixes, strict=True):
            starts.append(sum(len(other.visible) for other in rows[span.row]))
            rows[span.row].append(prefix)

        def packed(name: str) -> Tensor:
            none = getattr(prefixes[0], name)[:, :0]
            whole = [torch.cat([none, *(getattr(each, name) for each in own)], dim=1).transpose(0, 1) for own in rows]
            return pad_sequence(whole, batch_first=True).transpose(1, 2)

        return packed("key"), packed("value"), starts

    def _mask(self, prefixes: Sequence[Prefix], starts: Sequence[int], keys: int) -> Tensor:
        """``(batch, 1, tokens, keys + tokens)``, bool."""
        index = self.tokens.index
        visible = torch.zeros(*index.shape, keys, dtype=torch.bool, device=index.device)
        for (span, place, _), prefix, start in zip(self.places, prefixes, starts, strict=True):
            visible[span.row, place, start : start + len(prefix.visible)] = prefix.visible
        return and_itself(visible)
