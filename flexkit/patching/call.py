"""What one forward call of a patched model carries through its layers, and what a layer does with it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexkit.attention.core import attention_logits, attention_map, log_normaliser
from flexkit.attention.joint import joint_attention
from flexkit.attention.rows import QueryRows
from flexkit.errors import PatchError
from flexkit.lazy import lazy
from flexkit.patching.features import Encode, no_tiles
from flexkit.patching.groups import ImageGroup, group_images
from flexkit.patching.masks import rows_of_mask, visible_keys
from flexkit.patching.memory import HighResMemory, attach_memory
from flexkit.patching.opening import open_tokens
from flexkit.patching.positions import high_res_tables
from flexkit.patching.projected import Projected, Tokens
from flexkit.patching.selections import Selection, bias_of_tokens, select_tokens
from flexkit.patching.sight import Sight, see
from flexkit.patching.state import Patch

__all__ = ["FlexCall"]


@dataclass
class FlexCall:
    """State of one forward call; travels as a keyword argument, so calls in two threads never meet."""

    patch: Patch
    memory: HighResMemory
    rows: QueryRows
    past: int | Tensor
    """Number of positions in the KV cache before this call."""
    keep_projected: bool
    """Whether K' and V' are kept: not while training, where checkpointing computes layers twice."""
    projection: str
    """Of which tokens K' and V' are computed, and when: ``"lazy"``, ``"full"`` or ``"recompute"``."""
    encode: Encode
    """What encodes tiles that have not been."""
    records: bool
    """Whether the selections of all layers are wanted, also those that no layer reads."""
    selections: dict[int, Selection] = field(default_factory=dict)
    """What each layer selected; kept by layer, because gradient checkpointing runs layers again."""
    opened: dict[int, Selection] = field(default_factory=dict)
    """What each layer's map over the high-res tokens selected on the levels below."""
    visited: set[int] = field(default_factory=set)
    sights: list[Sight] = field(default_factory=list)
    """What the querying rows see: in most models the same in all layers."""
    shut: QueryRows | None = None
    """The positions that the gate keeps from reading."""

    @classmethod
    def of(
        cls,
        patch: Patch,
        memory: HighResMemory,
        rows: QueryRows,
        past: int | Tensor,
        *,
        cache: object = None,
        training: bool,
        encode: Encode = no_tiles,
        **own: Any,
    ) -> Self:
        """A call that has not run yet; ``own`` is what a subclass adds."""
        projection = patch.projection(cache)
        keep = not training and projection != "recompute"
        return cls(patch, memory, rows, past, keep, projection, encode, bool(patch.recorders), **own)

    @property
    def length(self) -> int:
        """Number of positions in this call."""
        return self.rows.mask.shape[1]

    def querying(self, rows: QueryRows) -> "FlexCall":
        """The same call with other querying positions, before any layer has run."""
        return replace(self, rows=rows, selections={}, opened={}, visited=set(), sights=[])

    def keep(self, cache: object) -> None:
        """Leave with the KV cache what the next calls of a generation need."""
        attach_memory(cache, self.memory)

    def finish(self) -> None:
        """Check that every layer has called, and tell those who record."""
        self.check_visited(self.patch.layers)
        for record in self.patch.recorders:
            record(self)

    def place(self, position_ids: Tensor | None) -> None:
        """Note the rotary positions that the text model was given, ``([axes,] batch, length)``."""
        if position_ids is None:
            device = self.rows.mask.device
            position_ids = self.past + torch.arange(self.length, device=device)[None]
        if position_ids.ndim == 2:
            position_ids = position_ids[None]
        if len(position_ids) > self.patch.position_axes:  # the first axis, of the text, only serves the masks
            position_ids = position_ids[1:]
        self.memory.place(position_ids.expand(-1, self.memory.batch, -1), self.past)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        base: Tensor,
        *,
        scaling: float | None,
        softcap: float | None,
        sinks: Tensor | None,
        position_bias: Tensor | None,
        is_causal: bool,
        sliding_window: int | None,
        dropout: float,
    ) -> Tensor:
        """Put hierarchical attention (paper, section 3.2) into the querying rows of a layer's base attention.

        Parameters
        ----------
        layer : int
            Index of the layer.
        query : torch.Tensor
            ``(batch, heads, length, head_dim)``.
        key, value : torch.Tensor
            ``(batch, key_heads, keys, head_dim)``: everything the layer's cache gave.
        mask : torch.Tensor, optional
            The mask that the base kernel got.
        base : torch.Tensor
            ``(batch, length, heads, head_dim)``: what the base kernel gave.
        scaling, softcap, sinks, position_bias, is_causal, sliding_window, dropout
            As the attention module passes them to its kernel.

        Returns
        -------
        torch.Tensor
            ``base`` with the querying rows replaced.
        """
        is_causal = is_causal and query.shape[2] > 1  # as kernels are that get no mask
        skipped = self.length - query.shape[2]
        if skipped:  # layers that share keys may run for the positions alone whose logits are kept (Gemma 4)
            query = pad(query, (0, 0, skipped, 0))
            mask, sinks, position_bias = (_behind(skipped, states) for states in (mask, sinks, position_bias))
            base = pad(base, (0, 0, 0, 0, skipped, 0))
        self.visited.add(layer)
        sight = self._sight(layer, mask, key.shape[2], is_causal, sliding_window)
        queries = self._of_rows(query)
        scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
        bias = None if position_bias is None else self._of_rows(position_bias)
        if sinks is not None and sinks.ndim == 4:
            sinks = self._of_rows(sinks)
        logits = attention_logits(
            queries, key, scaling=scaling, mask=sight.mask, softcap=softcap, bias=0.0 if bias is None else bias
        )
        normaliser = log_normaliser(logits, sinks)
        if self.records or layer in self._sources:
            self.selections[layer] = self._select(layer, logits, normaliser, sight)
        if layer < self.patch.start_layer or self.rows.count == 0:
            return base[:, skipped:]

        source = self.patch.source(layer)
        self.check_visited([source])
        selection = self.selections[source].and_then(self.opened.get(self.patch.before(layer)))
        selected = selection.tokens(self.memory)
        if not self.rows.whole:
            selected = selected & self.rows.valid[..., None]
        projected = self._projected(layer, selected)
        high_res_bias: Tensor | float = self.patch.config.logit_bias
        if bias is not None:
            groups = tuple(group for level in self.levels for group in level)
            high_res_bias = high_res_bias + projected.of(bias_of_tokens(bias, groups, self.memory, sight.offset))
        high_res_logits = attention_logits(queries, projected.key, scaling=scaling, softcap=softcap, bias=high_res_bias)
        among = projected.among(selected)
        plain = self.rows.gather(base).transpose(1, 2)
        replaced = None
        if self.patch.config.low_res_keys == "replace":
            replaced = selection.low_res_keys(
                len(query), key.shape[2], sight.offset, self.patch.config.replace_dilation
            )
        merged = joint_attention(
            plain,
            logits,
            value,
            high_res_logits,
            projected.value,
            among,
            replaced=replaced,
            sinks=sinks,
            dropout=dropout,
            normaliser=normaliser,
        )
        if len(self.levels) > 1:
            seen = logits if replaced is None else logits.masked_fill(replaced[:, None], -torch.inf)
            self.opened[layer] = self._open(layer, seen, high_res_logits, among, projected.tokens, selected, sinks)
        if self.patch.config.alpha < 1.0:
            merged = torch.lerp(plain, merged, self.patch.config.alpha)
        return self.rows.scatter(merged.transpose(1, 2), base)[:, skipped:]

    def check_visited(self, layers: Iterable[int]) -> None:
        """Raise :class:`~flexkit.errors.PatchError` if the attention of one of these layers has not called."""
        unseen = sorted(set(layers) - self.visited)
        if unseen:
            raise PatchError(
                f"the attention of layers {unseen} did not run through flexkit: the model dropped the keyword argument "
                "that carries the call, or its attention no longer comes from transformers' AttentionInterface."
            )

    def _of_rows(self, states: Tensor) -> Tensor:
        """The querying rows of ``(batch or 1, heads, length, ...)``."""
        return self.rows.gather(states.expand(len(self.rows.mask), *states.shape[1:]).transpose(1, 2)).transpose(1, 2)

    @lazy
    def levels(self) -> tuple[tuple[ImageGroup, ...], ...]:
        """On each level of a pyramid the images by grid."""
        depth = 1 + max([0, *(span.level for span in self.memory.images)])
        return tuple(group_images(span for span in self.memory.images if span.level == level) for level in range(depth))

    @property
    def groups(self) -> tuple[ImageGroup, ...]:
        """The images by grid, on the first level."""
        return self.levels[0]

    @lazy
    def _sources(self) -> set[int]:
        return self.patch.sources

    @property
    def _positions(self) -> Tensor:
        """``(batch, count)``: of the querying rows in the sequence; no context beside it is behind any of them."""
        return self.rows.index + self.past if self.memory.in_sequence else torch.full_like(self.rows.index, -1)

    @lazy
    def _shared_from(self) -> Tensor | None:
        if not self.patch.config.shares_selection:
            return None
        return (self.rows.mask.sum(-1) - 1).clamp_min(0)

    def _sight(self, layer: int, given: Tensor | None, keys: int, is_causal: bool, sliding_window: int | None) -> Sight:
        """What the querying rows see in a layer whose kernel got this mask."""
        of, rows = self.patch.layers[layer], self.rows
        kind = keys, is_causal, sliding_window, of.keeps_prompt, of.is_sparse
        for sight in self.sights:
            if sight.given is given and sight.kind == kind:
                return sight
        offset = of.first_key(self.past + self.length, keys)
        mask = rows_of_mask(
            given, rows, keys=keys, past=self.past - offset, is_causal=is_causal, sliding_window=sliding_window
        )
        visible, beside = visible_keys(mask, rows, keys), not self.memory.in_sequence
        images = tuple(
            see(group, visible, offset, self._positions, sparse=of.is_sparse, beside=beside) for group in self.groups
        )
        self.sights.append(Sight(given, kind, mask, offset, images))
        return self.sights[-1]

    def _select(self, layer: int, logits: Tensor, normaliser: Tensor, sight: Sight) -> Selection:
        """What the map of a layer selects."""
        return select_tokens(
            self.patch.config.selector,
            sight.images,
            attention_map(logits.detach(), normaliser=normaliser.detach()),
            self.selections.get(self.patch.before(layer)),
            layer=layer if self.patch.config.select_from == "same" else layer + 1,
            shared_from=self._shared_from,
        )

    def _open(
        self,
        layer: int,
        logits: Tensor,
        high_res_logits: Tensor,
        among: Tensor,
        tokens: Tokens | None,
        selected: Tensor,
        sinks: Tensor | None,
    ) -> Selection:
        """What the joint attention of a layer selects on the levels below."""
        with torch.no_grad():
            read = high_res_logits.masked_fill(~among[:, None], -torch.inf)
            attention = attention_map(torch.cat([logits, read], dim=-1), sinks)[..., logits.shape[-1] :]
            return open_tokens(
                self.patch.config.selector,
                self.levels,
                attention,
                tokens,
                selected,
                layer=layer + 1,
                shared_from=self._shared_from,
            )

    def _projected(self, layer: int, selected: Tensor) -> Projected:
        """K' and V' of the tokens that are selected ``(batch, queries, tokens)``, and of others that were."""
        held = self.memory.projected.get(layer)
        if held is not None and held.tokens is None:
            return held
        wanted = selected.any(1)
        if self.projection == "full" or torch.compiler.is_compiling():
            held = self._project(layer, None)
        elif held is None:
            held = self._project(layer, Tokens.where(wanted))
        elif bool((missing := held.missing(wanted)).any()):
            held = held.and_then(self._project(layer, Tokens.where(missing)))
        if self.keep_projected and self.memory.is_placed:
            limit = self.patch.config.limit_kept(self.memory.tokens)
            self.memory.projected[layer] = held if held.key.shape[2] <= limit else held.only(wanted)
        return held

    def _project(self, layer: int, tokens: Tokens | None) -> Projected:
        """K' and V' of some high-res tokens, or of all."""
        of, features = self.patch.layers[layer], self.memory.features_of(tokens, self.encode)
        if self.patch.config.key_norm and of.input_norm is not None:
            features = of.input_norm(features)
        config, decoder = self.patch.config, self.patch.decoder
        tables = high_res_tables(decoder, of, self.memory, tokens, config.positions, features)
        key, value = of.project(features, tables)
        return Projected(key, value, tokens)


def _behind(skipped: int, states: Tensor | None) -> Tensor | None:
    """``(batch, heads, length, ...)`` with zeros for positions in front; others, as masks of padding, as they are."""
    return pad(states, (0, 0, skipped, 0)) if states is not None and states.ndim == 4 else states
