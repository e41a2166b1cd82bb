"""Self-attention with a second, high-resolution set of keys, as a module for people who build models."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from flexkit.attention.layer import HighResKeys, Looked, look, read
from flexkit.attention.plain import PlainSelfAttention, Tables, base_attention, check_settings
from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.rotary import rotate
from flexkit.attention.select import select_tokens
from flexkit.attention.validation import check_dense, check_tensor, check_tokens, image_group, selection_by_row
from flexkit.attention.visible import ImageGroup, and_itself, hidden_keys, visibility
from flexkit.errors import ConfigError, HighResInputError
from flexkit.grids import Grid
from flexkit.selection import AttentionMapSelector

__all__ = ["HierarchicalAttentionOutput", "HierarchicalSelfAttention"]


@dataclass(frozen=True)
class HierarchicalAttentionOutput:
    """What :class:`HierarchicalSelfAttention` returns.

    Parameters
    ----------
    hidden_states : torch.Tensor
        ``(batch, length, dim)``.
    map : torch.Tensor or None
        ``(batch, querying rows, rows, columns)``: the selector's scores of each querying row; None unless
        asked for.
    selected : torch.Tensor or None
        ``(batch, querying rows, high-res rows, high-res columns)``, bool: made from this layer's map, for the
        next layer. None without a selector or a grid.
    queries : RaggedIndex
        Which positions the querying rows are; entries beyond a batch row's own number mean nothing.
    high_res : torch.Tensor or None
        ``(batch, tokens, dim)``: what the high-res tokens got in this layer, where they have states of their own.
    past : tuple
        Keys and values so far, each ``(batch, key_heads, keys, head_dim)``, to be handed in with the next
        positions.
    """

    hidden_states: Tensor
    map: Tensor | None
    selected: Tensor | None
    queries: RaggedIndex
    past: tuple[Tensor, Tensor]
    high_res: Tensor | None = None


class HierarchicalSelfAttention(PlainSelfAttention):
    r"""Self-attention whose querying rows also read selected tokens of a high-res view (paper, section 3.2).

    A querying row computes :math:`\mathrm{softmax}([q K ; q K'_S] / \sqrt{d_k}) [V ; V'_S]`, one joint
    softmax over the sequence and the selected high-res tokens. These are keys and values only, through
    projections of their own (``k_proj_hd`` and ``v_proj_hd``): the sequence stays as long as it is. Rows that
    do not query, or select nothing, keep the bits of plain attention. Gradients reach the high-res features;
    the paper detaches them.

    Parameters
    ----------
    dim : int
        Width of the hidden states and of the high-res features.
    num_heads : int
        Query heads.
    num_kv_heads : int, optional
        Key and value heads, a divisor of ``num_heads``; as many by default.
    head_dim : int, optional
        Width of a head, ``dim / num_heads`` by default.
    bias : bool
        Whether the query, key and value projections, also the high-res ones, have a bias.
    qk_norm : bool
        RMS-normalise queries and keys, also the high-res ones, over ``head_dim``.
    softcap : float, optional
        Squash logits to ``softcap * tanh(logits / softcap)``.
    sinks : bool
        Give each head a learned logit that takes part in the softmax without a value.
    sliding_window : int, optional
        A causal window over the sequence. High-res tokens are no part of it: a window never hides them.
    is_causal : bool
        Whether later positions are hidden.
    scaling : float, optional
        Factor on the logits, ``head_dim ** -0.5`` by default.
    dropout : float
        Probability with which an attention weight is dropped in training.
    selector : AttentionMapSelector, optional
        Turns this layer's map into a selection, for this layer or the next.
    select_from : str
        "previous": read what the caller hands in as ``selected``. "same": read what this layer's own low-res
        logits select, in the same softmax. Either way a map counts only where its row sees all of the image, cells of
        padding apart; other rows select nothing.
    share_selection : bool
        Make one selection for all querying rows of a batch row, from the map of the last one (paper, Eq.
        6-7).
    high_res_states : str
        "features": keys and values of high-res tokens are made of their image features, by projections of their own.
        "own": of their hidden states in this layer, by the layer's projections; the tokens are handed in as they come
        from the layer before, and the output has what they got in this one: each sees itself, and what the last low-res
        token of the image sees up to there. Needs ``grid`` and ``image_positions``.
    low_res_keys : str
        "keep", or "replace": querying rows no longer see the low-res keys of cells with a selected high-res
        token.
    replace_dilation : int
        How many cells around the selected ones "replace" hides with them.
    logit_bias : float
        Added to all high-res logits.
    key_norm : torch.nn.Module, optional
        Applied to the high-res features before their projections, such as the layer's input norm. The paper
        has none.
    gate : float, optional
        Querying rows whose low-res answer has an ``entropy`` below this many nats read no high-res token.
    alpha : float
        Weight in [0, 1] of the hierarchical output: querying rows get ``(1 - alpha) * base + alpha * hierarchical``.

    Raises
    ------
    ConfigError
        If a setting is out of range, or two contradict each other.

    Examples
    --------
    >>> layer = HierarchicalSelfAttention(dim=8, num_heads=2)
    >>> text, image = torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    >>> last = torch.tensor([[False, False, True]])
    >>> selected = torch.tensor([[True, False, True, False]])
    >>> sharp = layer(text, image, selected=selected, queries=last).hidden_states
    >>> (sharp == layer(text).hidden_states).all(-1)
    tensor([[ True,  True, False]])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        qk_norm: bool = False,
        softcap: float | None = None,
        sinks: bool = False,
        sliding_window: int | None = None,
        is_causal: bool = True,
        scaling: float | None = None,
        dropout: float = 0.0,
        selector: AttentionMapSelector | None = None,
        select_from: Literal["previous", "same"] = "previous",
        share_selection: bool = False,
        high_res_states: Literal["features", "own"] = "features",
        low_res_keys: Literal["keep", "replace"] = "keep",
        replace_dilation: int = 0,
        logit_bias: float = 0.0,
        key_norm: nn.Module | None = None,
        gate: float | None = None,
        alpha: float = 1.0,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            num_kv_heads,
            head_dim,
            bias=bias,
            qk_norm=qk_norm,
            softcap=softcap,
            sinks=sinks,
            sliding_window=sliding_window,
            is_causal=is_causal,
            scaling=scaling,
            dropout=dropout,
        )
        replaces = low_res_keys == "replace"
        check_settings(
            (
                select_from in ("previous", "same"),
                f'select_from is {select_from!r}, expected "previous" or "same".',
            ),
            (
                replaces or low_res_keys == "keep",
                f'low_res_keys is {low_res_keys!r}, expected "keep" or "replace".',
            ),
            (
                high_res_states in ("features", "own"),
                f'high_res_states is {high_res_states!r}, expected "features" or "own".',
            ),
            (high_res_states != "own" or key_norm is None, 'key_norm is of high_res_states="features".'),
            (select_from != "same" or selector is not None, 'select_from="same" needs a selector.'),
            (replace_dilation >= 0, f"replace_dilation must be at least 0, got {replace_dilation}."),
            (replaces or replace_dilation == 0, 'replace_dilation needs low_res_keys="replace".'),
            (gate is None or gate >= 0, f"gate is an entropy in nats, at least 0, got {gate}."),
            (0.0 <= alpha <= 1.0, f"alpha must lie in [0, 1], got {alpha}."),
        )
        self.high_res_states = high_res_states
        if high_res_states == "features":
            self.k_proj_hd = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=bias)
            self.v_proj_hd = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=bias)
        self.selector, self.key_norm = selector, key_norm
        self.select_from, self.share_selection = select_from, share_selection
        self.low_res_keys, self.replace_dilation = low_res_keys, replace_dilation
        self.logit_bias, self.gate, self.alpha = logit_bias, gate, alpha

    def forward(
        self,
        hidden_states: Tensor,
        high_res: Tensor | None = None,
        *,
        grid: Grid | None = None,
        zoom: int | Grid = 1,
        image_positions: Tensor | None = None,
        selected: Tensor | None = None,
        queries: Tensor | None = None,
        rotary: Tables | None = None,
        high_res_rotary: Tables | None = None,
        attention_mask: Tensor | None = None,
        high_res_mask: Tensor | None = None,
        margins: Tensor | None = None,
        layer: int | None = None,
        entropy: Tensor | None = None,
        past: Tables | None = None,
        return_map: bool = False,
    ) -> HierarchicalAttentionOutput:
        """Attend to the sequence and, from querying rows, to selected high-res tokens.

        Parameters
        ----------
        hidden_states : torch.Tensor
            ``(batch, length, dim)``.
        high_res : torch.Tensor, optional
            ``(batch, tokens, dim)``: high-res features, or states, in raster order; None for plain attention.
        grid : tuple of int, optional
            Low-res ``(rows, columns)``, of a video ``(frames, rows, columns)``; needed for a map, and to replace
            low-res keys.
        zoom : int or tuple of int
            High-res cells per low-res cell and axis; one int, or two, for rows and columns.
        image_positions : torch.Tensor, optional
            ``(batch, cells)``, int64: where the low-res image tokens stand in the sequence of keys
            (``past`` included), in raster order; needed whenever ``grid`` is.
        selected : torch.Tensor, optional
            With ``select_from="previous"``: bool, ``(batch, tokens)`` for all querying rows or
            ``(batch, querying rows, tokens)`` for each, tokens flat or on their grid; None selects nothing.
        queries : torch.Tensor, optional
            ``(batch, length)``, bool: the querying rows; None for all.
        rotary, high_res_rotary : tuple, optional
            Cosines and sines, each ``(batch or 1, length or tokens, dim)`` with ``dim <= head_dim``.
        attention_mask : torch.Tensor, optional
            Broadcastable to ``(batch, heads, length, keys)``, bool (True attends) or additive; on top of
            causality.
        high_res_mask : torch.Tensor, optional
            ``(batch, tokens)``, bool: False is never read.
        margins : torch.Tensor, optional
            ``(batch, 2)``: cells of padding, as :func:`flexkit.selection.margin_cells` gives them, for the
            selector.
        layer : int, optional
            Index of this layer, for a selector with a schedule.
        entropy : torch.Tensor, optional
            ``(batch, length)``, nats: of the low-res answer at each position; needed with a gate.
        past : tuple, optional
            Keys and values of earlier positions, from the last output.
        return_map : bool
            Whether the output has a ``map``; needs a selector, which reduces the heads.

        Returns
        -------
        HierarchicalAttentionOutput
            Hidden states, and what the next layer and the next step need.

        Raises
        ------
        ConfigError
            If the inputs do not fit the module or each other, or one that the settings need is missing.
        HighResInputError
            If the high-res features, their mask or their selection do not fit.
        """
        self._check_states(hidden_states)
        self._check_rotary("rotary", rotary, hidden_states)
        if high_res is not None:
            check_tensor(
                "high_res",
                high_res,
                like=hidden_states,
                error=HighResInputError,
                batch=len(hidden_states),
                tokens=None,
                dim=self.dim,
            )
            high_res = high_res.to(hidden_states.dtype)
            self._check_rotary("high_res_rotary", high_res_rotary, high_res)
        self._check_needs(high_res, grid, selected, return_map, rotary, high_res_rotary)
        rows = _querying(queries, hidden_states)
        query, key, value = self._project(hidden_states, rotary, past)
        mask = self._mask(attention_mask, query, key)
        heads = self._attend(query, key, value, mask)
        image = None if grid is None else image_group(grid, zoom, image_positions, key, margins)
        scores = made = passed = None
        if high_res is not None and image is not None and self.high_res_states == "own":
            passed = self._pass(high_res, high_res_rotary, image, key, value, mask)
        if high_res is not None or image is not None:
            looked = self._look(rows, query, key, value, mask, image)
            if self.selector is not None and image is not None:
                made = self._select(self.selector, looked, rows, image, layer)
                scores = self._scores(self.selector, looked, image) if return_map else None
            selected = made if self.select_from == "same" else selected
            if high_res is not None and selected is not None:
                chosen = self._chosen(selected, rows, high_res, high_res_mask, entropy, image)
                heads = self._read(heads, rows, looked, high_res, high_res_rotary, chosen)
        return HierarchicalAttentionOutput(self._merge_heads(heads), scores, made, rows, (key, value), passed)

    def _check_states(self, states: Tensor) -> None:
        check_tensor("hidden_states", states, batch=None, length=None, dim=self.dim)
        weight = getattr(self.q_proj, "weight", states)
        dtypes = {weight.dtype, states.dtype}
        if len(dtypes) > 1 and weight.is_floating_point() and not torch.is_autocast_enabled(states.device.type):
            raise ConfigError(
                f"hidden_states are {states.dtype}, the weights {weight.dtype}: bring both to one dtype, or use "
                "autocast."
            )

    def _check_needs(
        self,
        high_res: Tensor | None,
        grid: Grid | None,
        selected: Tensor | None,
        return_map: bool,
        rotary: Tables | None,
        high_res_rotary: Tables | None,
    ) -> None:
        same, reads = self.select_from == "same", high_res is not None
        needs = "grid=(rows, columns) and image_positions, the place of the image in the sequence"
        check_settings(
            (
                not return_map or self.selector is not None,
                "return_map needs a selector: it reduces the heads.",
            ),
            (not return_map or grid is not None, f"return_map needs {needs}."),
            (not (reads and self.high_res_states == "own") or grid is not None, f"own states need {needs}."),
            (not (reads and same) or grid is not None, f'select_from="same" needs {needs}.'),
            (not (reads and self.low_res_keys == "replace") or grid is not None, f'"replace" needs {needs}.'),
            (
                not reads or (rotary is None) == (high_res_rotary is None),
                "rotary and high_res_rotary go together: keys of both views have positions, or neither; "
                "flexkit.attention.fractional_positions and interpolate_table make those of the high-res view.",
            ),
            (
                not same or selected is None,
                'select_from="same" makes its own selection: do not hand in `selected`.',
            ),
        )

    def _pass(
        self, states: Tensor, rotary: Tables | None, image: ImageGroup, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """What high-res tokens ``(batch, tokens, dim)`` get in this layer."""
        last, keys = image.columns.amax(-1, keepdim=True), key.shape[2]
        if mask is not None:
            row = (last - keys + mask.shape[2]).clamp_min(0)  # of an image that came before, the first that there is
            mask = mask.expand(len(last), -1, -1, -1).take_along_dim(row[:, None, :, None], dim=2)
        seen = self._visible(last, keys, mask)
        visible = torch.arange(keys, device=key.device) <= last
        if seen is not None:
            visible = visible & (~hidden_keys(seen)).any(1)[:, 0]
        tokens = self._project(states, rotary, None)
        heads = base_attention(
            tokens[0],
            torch.cat([key, tokens[1]], dim=2),
            torch.cat([value, tokens[2]], dim=2),
            scaling=self.scaling,
            mask=and_itself(visible[:, None].expand(-1, states.shape[1], -1)),
            is_causal=False,
            softcap=self.softcap,
            sinks=self.sinks,
            dropout=self._dropout,
        )
        return self._merge_heads(heads)

    def _look(
        self,
        rows: RaggedIndex,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        image: ImageGroup | None,
    ) -> Looked:
        """Attention of the querying rows over the sequence."""
        keys = key.shape[2]
        if mask is not None:
            mask = rows.gather(mask, dim=2)
        positions = rows.index + keys - query.shape[2]
        mask = self._visible(positions, keys, mask)
        return look(
            rows.gather(query, dim=2),
            key,
            value,
            visibility(mask, () if image is None else (image,), positions, keys),
            scaling=self.scaling,
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def _select(
        self, selector: AttentionMapSelector, looked: Looked, rows: RaggedIndex, image: ImageGroup, layer: int | None
    ) -> Tensor:
        """``(batch, querying rows, high-res rows, high-res columns)``, bool."""
        shared_from = rows.last if self.share_selection else None
        made = select_tokens(selector, looked.seen.images, looked.map_of, layer=layer, shared_from=shared_from)
        return made.masks[0]

    def _scores(self, selector: AttentionMapSelector, looked: Looked, image: ImageGroup) -> Tensor:
        """The map that was selected from, with gradient."""
        return selector.scores(looked.map_of(looked.seen.images[0]), image.grid, image.margins)

    def _chosen(
        self,
        selected: Tensor,
        rows: RaggedIndex,
        high_res: Tensor,
        high_res_mask: Tensor | None,
        entropy: Tensor | None,
        image: ImageGroup | None,
    ) -> Tensor:
        """The high-res tokens that each querying row reads, ``(batch, querying rows, tokens)``."""
        batch, length = rows.mask.shape
        tokens = high_res.shape[1]
        if image is not None:
            check_tokens(tokens, image)
        check_dense("selected", selected, high_res, HighResInputError)
        chosen = selection_by_row(selected, batch, rows.count, tokens) & rows.valid[..., None]
        if high_res_mask is not None:
            check_tensor(
                "high_res_mask",
                high_res_mask,
                dtype=torch.bool,
                like=high_res,
                error=HighResInputError,
                batch=batch,
                tokens=tokens,
            )
            chosen = chosen & high_res_mask[:, None]
        if self.gate is not None:
            if entropy is None:
                raise ConfigError(f"gate={self.gate} needs the entropy of the low-res answer at each position.")
            check_tensor("entropy", entropy, like=high_res, batch=batch, length=length)
            chosen = chosen & (rows.gather(entropy)[..., None] >= self.gate)
        return chosen

    def _read(
        self,
        heads: Tensor,
        rows: RaggedIndex,
        looked: Looked,
        high_res: Tensor,
        rotary: Tables | None,
        chosen: Tensor,
    ) -> Tensor:
        """Attention heads with the querying rows extended by the high-res tokens that they read."""
        project = partial(self._project_high_res, high_res, rotary)
        joint = read(rows.gather(heads, dim=2), looked, chosen, project, self, dropout=self._dropout)
        return rows.scatter(joint.output.transpose(1, 2), heads.transpose(1, 2)).transpose(1, 2)

    def _project_high_res(self, high_res: Tensor, rotary: Tables | None, wanted: Tensor) -> HighResKeys:
        """K' and V' of the high-res tokens that some row reads."""
        tokens = RaggedIndex(wanted)
        features = tokens.gather(high_res).masked_fill(~tokens.valid[..., None], 0.0)
        if self.key_norm is not None:
            features = self.key_norm(features)
        own = self.high_res_states == "own"
        k_proj, v_proj = (self.k_proj, self.v_proj) if own else (self.k_proj_hd, self.v_proj_hd)
        key = self.k_norm(self._split_heads(k_proj(features)))
        if rotary is not None:
            cos, sin = (tokens.gather(table) for table in rotary)
            key = rotate(key, cos, sin)
        return HighResKeys(key, self._split_heads(v_proj(features)), tokens)


def _querying(queries: Tensor | None, states: Tensor) -> RaggedIndex:
    if queries is None:
        return RaggedIndex.all(torch.ones(states.shape[:2], dtype=torch.bool, device=states.device))
    check_tensor("queries", queries, dtype=torch.bool, like=states, batch=states.shape[0], length=states.shape[1])
    return RaggedIndex(queries)
