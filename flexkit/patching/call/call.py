"""What one forward call of a patched model carries through its layers, and what a layer does with it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexkit.attention.layer import HighResKeys, look, read
from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.select import Selection, hidden_cells, open_tokens, select_tokens
from flexkit.attention.visible import (
    ImageGroup,
    Visibility,
    behind_tokens,
    key_mask,
    rows_of_mask,
    visibility,
    without_keys,
)
from flexkit.errors import PatchError, UnsupportedModelError
from flexkit.patching.call.one_selection import OneSelection
from flexkit.patching.call.own_states import OwnStates
from flexkit.patching.memory.high_res import HighResMemory, attach_memory
from flexkit.patching.memory.tokens import Encode, alike, by_rows, no_tiles, tokens_by_image
from flexkit.patching.seam.attention import map_tables
from flexkit.patching.seam.decoder import DecoderLayer, high_res_rotary
from flexkit.patching.state import Patch

__all__ = ["FlexCall"]

_ALL_TABLES = 1 << 15
"""Up to how many high-res tokens the position embeddings of all are made, once a call; of more, as in deep pyramids,
those of the tokens that are wanted, layer by layer."""


@dataclass
class FlexCall:
    """State of one forward call; travels as a keyword argument, so calls in two threads never meet."""

    patch: Patch
    memory: HighResMemory
    rows: RaggedIndex
    """The positions that read high-res tokens."""
    past: int | Tensor
    """Number of positions in the KV cache before this call."""
    projection: str
    """Of which tokens K' and V' are computed, and when: ``"lazy"``, ``"full"`` or ``"recompute"``."""
    training: bool
    """Whether layers may be computed twice, by checkpointing: then K' and V' are not kept."""
    encode: Sequence[Encode] = (no_tiles,)
    """What encodes tiles of images, and of videos, that have not been."""
    selections: dict[int, Selection] = field(default_factory=dict)
    """What each layer selected; kept by layer, because gradient checkpointing runs layers again."""
    opened: dict[int, Selection] = field(default_factory=dict)
    """What each layer's map over the high-res tokens selected on the levels below."""
    visited: set[int] = field(default_factory=set)
    seen: list[tuple[Tensor | None, tuple[object, ...], Visibility]] = field(default_factory=list)
    """What the rows see, by the mask of the kernel and what else decides: in most models the same in all layers."""
    shut: RaggedIndex | None = None
    """The positions that the gate keeps from reading."""
    own: OwnStates | None = None
    """Own states of the tokens, where these are what is read."""
    one: OneSelection | None = None
    """What rows read, where one selection is made for an answer."""
    masks: list[tuple[Tensor | None, tuple[object, ...], Tensor | None]] = field(default_factory=list)
    """Of kernels that read tokens: the base model's, what else decides, and what they get."""
    tables: dict[object, Any] = field(default_factory=dict)
    """Position embeddings of all high-res tokens, by what rotates them."""
    last: "FlexCall | None" = None
    """The last run of the querying rows, if they were run again."""
    asks: bool = True
    """Whether each layer asks the host if K' and V' of something are missing, and waits; else it is noted."""
    noted: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """For each layer that did not ask, what it wanted and what was there, each ``(batch, tokens)``, bool."""
    is_settled: bool = True
    """Whether all that was read was there before."""
    levels: tuple[tuple[ImageGroup, ...], ...] = field(init=False)
    """On each level of a pyramid the images by grid."""
    sources: set[int] = field(init=False)
    """The layers whose maps are read."""
    records: bool = field(init=False)
    """Whether the selections of all layers are wanted, also those that no layer reads."""
    reads_by_kernel: bool = field(init=False)
    """Whether the base kernels read the tokens, as keys in front of others."""
    shares_selection: bool = field(init=False)
    """Whether all querying rows of a sample read what the last one selected."""
    keeps: bool = field(init=False)
    """Whether keys and values of high-res tokens are kept for later calls."""
    gate: float | None = field(init=False)
    """Entropy, in nats, below which a low-res answer stands, where each row decides for itself."""
    most: int | None = field(init=False)
    """How many tokens a row reads at most, where K' and V' of all are there; None where that is not asked."""

    # No cached_property: it takes a lock, which no graph can.
    _given: Tensor | None = field(init=False, default=None, repr=False)
    _behind: Tensor | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.keeps = not self.training and self.projection != "recompute"
        self.gate = None if self.one is not None or self.training else self.patch.config.gate
        self.levels, self.sources = self.memory.levels, self.patch.sources
        self.records, self.shares_selection = bool(self.patch.recorders), self.patch.config.shares_selection
        config = self.patch.config
        self.most = None
        if len(self.levels) == 1 and (self.projection == "full" or torch.compiler.is_compiling()):
            of_rows = dict.fromkeys((span.row for span in self.memory.images), 0)
            for span in self.memory.images:
                of_rows[span.row] += config.selector.most(span.grid, span.zoom)
            self.most = max([0, *of_rows.values()])
        plain = config.logit_bias == 0.0 and config.alpha == 1.0
        # While a row looks, it looks at base keys alone. Keys of a cache that cannot grow are not copied for a kernel.
        decided = self.one is not None and self.one.reads and self.one.is_decided
        self.reads_by_kernel = plain and decided and not torch.compiler.is_compiling()

    @property
    def hides(self) -> int | None:
        """How many cells around those that are read are hidden with them; None if none is hidden."""
        config = self.patch.config
        return config.replace_dilation if config.low_res_keys == "replace" else None

    @property
    def given(self) -> Tensor:
        """``(batch, queries, tokens)``, bool: what the rows read in all layers, where one selection is made."""
        if self._given is None:
            self._given = self.own.there(self.one.given & self.behind & self.rows.valid[..., None])  # type: ignore[union-attr]
        return self._given

    @property
    def behind(self) -> Tensor:
        """``(batch, queries, tokens)``, bool: whether the row stands behind the image of the token."""
        if self._behind is None:
            self._behind = (self.rows.index + self.past)[..., None] >= self.memory.ends[:, None]
        return self._behind

    def querying(self, mask: Tensor, **changed: Any) -> "FlexCall":
        """The same call with other querying positions ``(batch, length)``, before any layer has run."""
        rows = RaggedIndex(mask)
        if self.one is not None and "one" not in changed:
            shared, memory = self.shares_selection, self.memory
            changed["one"] = self.one.begin(rows, self.past, memory.tokens, memory.answer, shared=shared)
        if self.own is not None and "own" not in changed:
            changed["own"] = replace(self.own, keys={}, missing=None, read=None, masks={})
        return replace(self, rows=rows, selections={}, opened={}, visited=set(), seen=[], masks=[], noted=[], **changed)

    def sees(
        self, layer: int, kernel: str, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[str, Tensor, Tensor, Tensor | None]:
        """By what name the base kernel of a layer is run, and on what, where rows read own states."""
        if self.own is not None and not torch.compiler.is_compiling():
            key, value, mask = self.own.seen(self.patch.layers[layer], key, value, mask, **options)
        self.reads_by_kernel = self.reads_by_kernel and kernel in ("sdpa", "eager")  # others take no mask of any kind
        if self.reads_by_kernel and layer >= self.patch.start_layer:
            given = self.given  # which notes what is not there
            if self.own is not None and layer in self.own.held:
                of = self.patch.layers[layer]
                key, value, mask = self._with_tokens(of, given, self.own.held[layer], key, value, mask, **options)
        return kernel, key, value, mask

    def finish(self, cache: object) -> None:
        """Check that every layer has called, tell those who record, and leave with the cache what later calls need."""
        if self.last is not None:
            self.last.finish(cache)
            return
        self.check_visited(self.patch.layers)
        self.memory.is_settled = self.is_settled
        for record in self.patch.recorders:
            record(self)
        attach_memory(cache, self.memory)

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
        softcap: float | None = None,
        sinks: Tensor | None = None,
        position_bias: Tensor | None = None,
        normaliser: Tensor | None = None,
        is_causal: bool = False,
        sliding_window: int | None = None,
        dropout: float = 0.0,
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
        normaliser : torch.Tensor, optional
            The kernel's log-normaliser, of as many numbers as ``(batch, heads, length)``, if it told it.

        Returns
        -------
        torch.Tensor
            ``base`` with the querying rows replaced.
        """
        is_causal = is_causal and query.shape[2] > 1  # as kernels are that get no mask
        skipped = self.rows.mask.shape[1] - query.shape[2]
        if skipped:  # layers that share keys may run for the positions alone whose logits are kept (Gemma 4)
            query = pad(query, (0, 0, skipped, 0))
            mask, sinks, position_bias = (_behind(skipped, states) for states in (mask, sinks, position_bias))
            base = pad(base, (0, 0, 0, 0, skipped, 0))
        self.visited.add(layer)
        patch, config, of = self.patch, self.patch.config, self.patch.layers[layer]
        maps, reads = self.asks_of(layer)
        if not (maps or reads):
            return base[:, skipped:]
        heard = None
        if normaliser is not None and sinks is None and not skipped:
            heard = self.rows.gather(normaliser.reshape(*query.shape[:3], 1), dim=2)
        looked = look(
            self.rows.gather(query, dim=2),
            key,
            value,
            self._visibility(of, mask, key.shape[2], is_causal, sliding_window),
            scaling=scaling if scaling is not None else query.shape[-1] ** -0.5,
            softcap=softcap,
            sinks=self.rows.gather(sinks, dim=2) if sinks is not None and sinks.ndim == 4 else sinks,
            bias=None if position_bias is None else self.rows.gather(position_bias, dim=2),
            normaliser=heard,
        )
        shared_from = self.rows.last if self.shares_selection else None
        processes = None if of.share is None else of.share.processes
        if maps:
            earlier = patch.before[layer]
            self.selections[layer] = select_tokens(
                config.selector,
                looked.seen.images,
                looked.map_of,
                before=self.selections.get(earlier) if earlier in self.sources else None,  # recorded or not
                layer=layer if config.select_from == "same" else layer + 1,
                shared_from=shared_from,
                processes=processes,
            )
        if not reads:
            return base[:, skipped:]

        if self.one is None:
            source = patch.source(layer)
            if source not in self.visited:
                self.check_visited([source])
            selection, opened = self.selections[source], self.opened.get(patch.before[layer])
            selection = selection if opened is None else selection.and_then(opened)
            selected = selection.tokens(self.memory.batch, self.memory.tokens)
            if not self.rows.whole:
                selected = selected & self.rows.valid[..., None]
            if self.own is not None:
                selected = self.own.there(selected & self.behind)
        else:
            selected = self.given
        if self.own is not None and layer not in self.own.held:
            return base[:, skipped:]
        joint = read(
            self.rows.gather(base).transpose(1, 2),
            looked,
            selected,
            partial(self._project, of, key, value),
            config,
            levels=self.levels,
            most=self.most,
            dropout=dropout,
        )
        if len(self.levels) > 1:
            self.opened[layer] = open_tokens(
                config.selector,
                self.levels,
                joint.attention(),
                joint.tokens,
                selected,
                layer=layer + 1,
                shared_from=shared_from,
                processes=processes,
            )
        output = self.rows.scatter(joint.output.transpose(1, 2), base)
        return output[:, skipped:] if skipped else output

    def asks_of(self, layer: int) -> tuple[bool, bool]:
        """Whether rows select by the map of a layer, and whether they read in it."""
        reads = self.rows.count > 0 and layer >= self.patch.config.start_layer  # type: ignore[operator]
        if self.one is None:
            return self.records or layer in self.sources, reads
        return layer in self.sources and not self.one.is_decided, reads and self.one.reads and not self.reads_by_kernel

    def _with_tokens(
        self,
        of: DecoderLayer,
        given: Tensor,
        held: HighResKeys,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        queries: int,
        is_causal: bool,
        sliding_window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask of a kernel with those of the tokens in front."""
        keys, value = torch.cat([held.key, key], dim=2), torch.cat([held.value, value], dim=2)
        kind = key.shape[2], queries, sliding_window
        for other, known, made in self.masks:
            if other is mask and known == kind:  # by its id a graph would hold for one mask
                return keys, value, made
        length, count = self.rows.mask.shape[1], key.shape[2]
        base = mask
        if mask is None and is_causal and queries > 1:
            positions = torch.arange(count - queries, count, device=key.device)[None]
            base = key_mask(positions, count, sliding_window=sliding_window)
        if self.hides is not None:
            images = self._visibility(of, mask, count, is_causal, sliding_window).images
            hidden = hidden_cells(given, images, count, dilation=self.hides)
            hidden = self.rows.scatter(hidden, hidden.new_zeros(len(hidden), length, count))[:, None, -queries:]
            base = without_keys(base, hidden)
        among = held.tokens.among(given)
        all_of_them = base is None and self.rows.whole and not torch.compiler.is_compiling() and bool(among.all())
        if not all_of_them:
            reads = self.rows.scatter(among, among.new_zeros(len(among), length, among.shape[-1]))
            base = behind_tokens(reads[:, None, length - queries :], base, count)
        self.masks.append((mask, kind, base))
        return keys, value, base

    def check_visited(self, layers: Iterable[int]) -> None:
        """Raise :class:`~flexkit.errors.PatchError` if the attention of one of these layers has not called."""
        unseen = sorted(set(layers) - self.visited)
        if unseen:
            raise PatchError(
                f"the attention of layers {unseen} did not run through flexkit: the model dropped the keyword argument "
                "that carries the call, or its attention no longer comes from transformers' AttentionInterface."
            )

    def _visibility(
        self, of: DecoderLayer, given: Tensor | None, keys: int, is_causal: bool, sliding_window: int | None
    ) -> Visibility:
        """What the querying rows see in a layer whose kernel got this mask."""
        kind = keys, is_causal, sliding_window, of.keeps_prompt, of.is_sparse
        for other, known, seen in self.seen:
            if other is given and known == kind:
                return seen
        if given is not None and not isinstance(given, Tensor):
            raise UnsupportedModelError(
                f"flexkit cannot read rows of a {type(given).__name__}; load the model with attn_implementation='sdpa'."
            )
        rows, in_sequence = self.rows, self.memory.in_sequence
        offset = of.first_key(self.past + rows.mask.shape[1], keys)
        mask = rows_of_mask(
            given, rows, keys=keys, past=self.past - offset, is_causal=is_causal, sliding_window=sliding_window
        )
        # No context beside the sequence is behind any row of it.
        positions = rows.index + self.past if in_sequence else torch.full_like(rows.index, -1)
        seen = visibility(
            mask,
            self.levels[0],
            positions,
            keys,
            offset=offset,
            before=self.past if isinstance(self.past, int) else None,
            sparse=of.is_sparse,
            beside=not in_sequence,
        )
        self.seen.append((given, kind, seen))
        return seen

    def _project(self, of: DecoderLayer, key: Tensor, value: Tensor, wanted: Tensor) -> HighResKeys:
        """K' and V' of the tokens that are wanted ``(batch, tokens)``, and of those that were before."""
        if self.own is not None:
            return self.own.held[of.index]
        kept = self.memory.projected
        held = kept.get(of.index)
        if self.projection == "full" or torch.compiler.is_compiling():
            if held is None or not held.tokens.whole:
                held = self._project_tokens(of, RaggedIndex.all(torch.ones_like(wanted)))
        else:
            if held is not None and not self.asks:
                self.noted.append((wanted, held.tokens.mask))
                return held
            tokens = RaggedIndex(wanted if held is None else wanted > held.tokens.mask)
            self.is_settled = self.is_settled and not tokens.count
            if tokens.count:
                new = self._project_tokens(of, tokens)
                held = new if held is None else held.and_then(new)
            elif held is None:  # not every module can be run on no token at all
                held = HighResKeys(key[:, :, :0], value[:, :, :0], tokens)
            if self.patch.config.kept is not None:
                limit = self.patch.config.limit_kept(self.memory.tokens)
                held = held if held.key.shape[2] <= limit else held.only(wanted)
        if self.keeps and self.memory.is_placed:
            kept[of.index] = held
        return held

    def _project_tokens(self, of: DecoderLayer, tokens: RaggedIndex) -> HighResKeys:
        """K' and V' of some high-res tokens."""
        memory, kind = self.memory, (of.rotary, of.kind)
        features = memory.features.of(tokens, memory.images, self.encode)
        if memory.tokens > _ALL_TABLES:
            tables = self._tables_of(of, features, tokens)
        else:
            if kind not in self.tables:
                self.tables[kind] = self._all_tables(of, features)
            tables = map_tables(lambda table: tokens.gather(table.movedim(-3, 0), -2).movedim(0, -3), self.tables[kind])
        return HighResKeys(*of.project(features, tables, normed=self.patch.config.key_norm), tokens)

    def _all_tables(self, of: DecoderLayer, like: Tensor) -> Any:
        """Position embeddings of all high-res tokens, each ``(..., batch, tokens, width)``."""
        images, positions = zip(*alike(self.memory.images), strict=True)
        found = [
            high_res_rotary(
                self.patch.decoder, of, like, known, spans[0].grid, spans[0].zoom, self.patch.config.positions
            )
            for spans, known in zip(images, positions, strict=True)
        ]
        return map_tables(lambda *parts: by_rows(images, parts, self.memory.batch, self.memory.tokens), *found)

    def _tables_of(self, of: DecoderLayer, like: Tensor, tokens: RaggedIndex) -> Any:
        """The same of some of them, image by image."""
        config, places = self.patch.config, tokens_by_image(self.memory.images, tokens)
        tables = []
        for span, _, local in places:
            positions = None if span.positions is None else span.positions[:, None]
            tables.append(
                high_res_rotary(self.patch.decoder, of, like, positions, span.grid, span.zoom, config.positions, local)
            )

        def by_row(*images: Tensor) -> Tensor:
            first = images[0]
            whole = first.new_zeros(*first.shape[:-3], self.memory.batch, tokens.count, first.shape[-1])
            for (span, place, _), table in zip(places, images, strict=True):
                whole[..., span.row, place, :] = table[..., 0, :, :]
            return whole

        return map_tables(by_row, *tables)


def _behind(skipped: int, states: Tensor | None) -> Tensor | None:
    """``(batch, heads, length, ...)`` with zeros for positions in front; others, as masks of padding, as they are."""
    return pad(states, (0, 0, skipped, 0)) if states is not None and states.ndim == 4 else states
