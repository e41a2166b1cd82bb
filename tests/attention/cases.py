"""Random layers with inputs that fit them."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from flexkit.attention import HierarchicalSelfAttention, fractional_positions, rotary_tables
from flexkit.selection import AttentionMapSelector, TopK

DIM = 8


@dataclass
class Case:
    """A layer in float64 and what it is called with."""

    layer: HierarchicalSelfAttention
    hidden_states: Tensor
    high_res: Tensor
    queries: Tensor
    grid: tuple[int, ...]
    zoom: tuple[int, ...]
    image_positions: Tensor
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> dict[str, Any]:
        return {"grid": self.grid, "zoom": self.zoom, "image_positions": self.image_positions}

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(cells * factor for cells, factor in zip(self.grid, self.zoom, strict=True))

    @property
    def rows(self) -> int:
        return int(self.queries.sum(-1).max())

    def plain(self, **options: Any) -> Any:
        low_res = {key: value for key, value in self.rest.items() if key in ("rotary", "attention_mask")}
        return self.layer(self.hidden_states, queries=self.queries, **low_res, **options)

    def sharp(self, **options: Any) -> Any:
        return self.layer(
            self.hidden_states, self.high_res, **{"queries": self.queries, **self.place, **self.rest, **options}
        )

    @property
    def for_reference(self) -> dict[str, Any]:
        """Inputs of the naive implementation that no test varies."""
        names = {"attention_mask": "mask", "rotary": "rotary", "high_res_rotary": "high_res_rotary"}
        return {names[key]: value for key, value in self.rest.items() if key in names}


def masks(length: int, kind: str, batch: int, heads: int) -> Tensor | None:
    seen = torch.rand(batch, heads, length, length) < 0.7
    if kind == "none":
        return None
    if kind == "bool":
        return seen[:, :1]
    bias = torch.randn(batch, heads, length, length, dtype=torch.float64)
    return bias.masked_fill(~seen, torch.finfo(torch.float64).min if kind == "lowest" else -torch.inf)


@st.composite
def cases(
    draw: st.DrawFn, *, select_from: str | None = None, low_res_keys: str | None = None, is_causal: bool | None = None
) -> Case:
    """Layers with every kind of head sharing, norm, cap, sink, window, mask, position and key, on uneven grids."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    heads, key_heads = draw(st.sampled_from([(2, 2), (4, 2), (2, 1)]))
    causal = draw(st.booleans()) if is_causal is None else is_causal
    replace = draw(st.sampled_from(["keep", "replace"])) if low_res_keys is None else low_res_keys
    rotates = draw(st.booleans())
    grid = draw(st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 1), (2, 3), (2, 1, 2), (3, 1, 1), (1, 2, 2)]))
    zoom = draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 1)]))
    if len(grid) == 3:  # a video
        zoom = (draw(st.integers(1, 2)), *zoom)
    batch, cells = draw(st.integers(1, 2)), math.prod(grid)
    length = cells + draw(st.integers(1, 3))
    layer = HierarchicalSelfAttention(
        DIM,
        heads,
        key_heads,
        draw(st.sampled_from([None, 6])),
        bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 1.5])),
        sinks=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([None, 1, 3])) if causal else None,
        is_causal=causal,
        scaling=draw(st.sampled_from([None, 0.8])),
        selector=AttentionMapSelector(TopK(draw(st.integers(1, 3)))),
        select_from=draw(st.sampled_from(["previous", "same"])) if select_from is None else select_from,  # type: ignore[arg-type]
        low_res_keys=replace,  # type: ignore[arg-type]
        replace_dilation=draw(st.integers(0, 1)) if replace == "replace" else 0,
        logit_bias=draw(st.sampled_from([0.0, 1.5])),
        key_norm=draw(st.sampled_from([None, nn.LayerNorm(DIM)])),
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    start = draw(st.integers(0, length - cells))
    positions = torch.arange(start, start + cells).expand(batch, -1)
    rest: dict[str, Any] = {}
    if rotates:
        sequence = torch.arange(length, dtype=torch.float64)[None]
        width = draw(st.sampled_from([2, layer.head_dim]))
        rest["rotary"] = rotary_tables(sequence, width, base=50.0)
        rest["high_res_rotary"] = rotary_tables(fractional_positions(positions.double(), grid, zoom), width, base=50.0)
    mask = masks(length, draw(st.sampled_from(["none", "bool", "lowest", "infinite"])), batch, heads)
    if mask is not None:
        rest["attention_mask"] = mask
    return Case(
        layer=layer,
        hidden_states=torch.randn(batch, length, DIM, dtype=torch.float64),
        high_res=torch.randn(batch, cells * math.prod(zoom), DIM, dtype=torch.float64),
        queries=torch.rand(batch, length) < draw(st.sampled_from([0.3, 1.0])),
        grid=grid,
        zoom=zoom,
        image_positions=positions,
        rest=rest,
    )
