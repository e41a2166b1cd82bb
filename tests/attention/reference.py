"""Hierarchical self-attention one row and one head at a time, in float64: slow, obvious, independent of the library."""

import math

import torch
from torch import Tensor

from flexkit.attention import HierarchicalSelfAttention


def split_heads(states: Tensor, linear: torch.nn.Linear, heads: int, norm: torch.nn.Module | None) -> Tensor:
    """``(length, dim)`` to ``(heads, length, head_dim)``, RMS-normalised where the layer has such a norm."""
    projected = states @ linear.weight.T + (0 if linear.bias is None else linear.bias)
    split = torch.stack(projected.chunk(heads, dim=-1))
    if not isinstance(norm, torch.nn.RMSNorm):
        return split
    eps = torch.finfo(split.dtype).eps
    return split / (split.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def turn(states: Tensor, table: tuple[Tensor, Tensor] | None, batch_row: int) -> Tensor:
    """Multiply channel ``i`` and channel ``i + dim / 2`` as a complex number by (cos, sin)."""
    if table is None:
        return states
    cos, sin = (part[min(batch_row, len(part) - 1)] for part in table)
    half = cos.shape[-1] // 2
    number = torch.complex(states[..., :half], states[..., half : 2 * half])
    # The two halves of a table are equal for a rotation, but not required to be: turn each with its own.
    real = number.real * cos[:, :half] - number.imag * sin[:, :half]
    imaginary = number.imag * cos[:, half:] + number.real * sin[:, half:]
    return torch.cat([real, imaginary, states[..., 2 * half :]], dim=-1)


def softmax(logits: list[Tensor], sink: Tensor | None) -> list[Tensor]:
    """Softmax of scalars, with a sink in the denominator; all zero without any logit."""
    everything = [*logits, sink] if sink is not None else logits
    if not everything:
        return []
    peak = max(value.item() for value in everything)
    total = sum((value - peak).exp() for value in everything)
    return [(value - peak).exp() / total for value in logits]


def attend_row(
    layer: HierarchicalSelfAttention, query: Tensor, keys: list[tuple[Tensor, float]], values: list[Tensor], head: int
) -> tuple[Tensor, list[Tensor]]:
    """One softmax of one query over a list of (key, what is added to its logit)."""
    logits = []
    for key, added in keys:
        logit = (query @ key) * layer.scaling
        if layer.softcap is not None:
            logit = layer.softcap * torch.tanh(logit / layer.softcap)
        logits.append(logit + added)
    weights = softmax(logits, None if layer.sinks is None else layer.sinks[head])
    answer = query.new_zeros(layer.head_dim)
    for weight, value in zip(weights, values, strict=True):
        answer = answer + weight * value
    return answer, weights


def visible(layer: HierarchicalSelfAttention, query: int, key: int) -> bool:
    if not layer.is_causal:
        return True
    return key <= query and (layer.sliding_window is None or query - key < layer.sliding_window)


def hierarchical(
    layer: HierarchicalSelfAttention,
    hidden_states: Tensor,
    high_res: Tensor | None = None,
    chosen: Tensor | None = None,
    *,
    replaced: Tensor | None = None,
    mask: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    high_res_rotary: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states, and each position's attention over the low-res keys alone ``(batch, heads, length, length)``.

    ``chosen (batch, length, tokens)``: what each position reads; ``replaced (batch, length, length)``: the low-res
    keys that it gives up.
    """
    batch, length, _ = hidden_states.shape
    if mask is not None:
        mask = mask.expand(batch, layer.num_heads, length, length)
    outputs, maps = [], torch.zeros(batch, layer.num_heads, length, length, dtype=hidden_states.dtype)
    for b in range(batch):
        queries = split_heads(hidden_states[b], layer.q_proj, layer.num_heads, layer.q_norm)
        keys = split_heads(hidden_states[b], layer.k_proj, layer.num_kv_heads, layer.k_norm)
        values = split_heads(hidden_states[b], layer.v_proj, layer.num_kv_heads, None)
        queries, keys = turn(queries, rotary, b), turn(keys, rotary, b)
        if high_res is not None:
            features = high_res[b] if layer.key_norm is None else layer.key_norm(high_res[b])
            sharp_keys = split_heads(features, layer.k_proj_hd, layer.num_kv_heads, layer.k_norm)
            sharp_keys = turn(sharp_keys, high_res_rotary, b)
            sharp_values = split_heads(features, layer.v_proj_hd, layer.num_kv_heads, None)
        rows = []
        for i in range(length):
            heads = []
            for h in range(layer.num_heads):
                shared = h // (layer.num_heads // layer.num_kv_heads)
                base: dict[int, float] = {}
                for j in range(length):
                    added = 0.0
                    if mask is not None:
                        entry = mask[b, h, i, j].item()
                        added = (0.0 if entry else -math.inf) if mask.dtype == torch.bool else entry
                    if visible(layer, i, j) and added > -1e30:
                        base[j] = added
                low = [(keys[shared, j], added) for j, added in base.items()]
                _, weights = attend_row(layer, queries[h, i], low, [values[shared, j] for j in base], h)
                for j, weight in zip(base, weights, strict=True):
                    maps[b, h, i, j] = weight.item()

                sharp = [] if chosen is None else [t for t in range(chosen.shape[-1]) if chosen[b, i, t]]
                left = [j for j in base if replaced is None or not sharp or not replaced[b, i, j]]
                all_keys = [(keys[shared, j], base[j]) for j in left]
                all_keys += [(sharp_keys[shared, t], layer.logit_bias) for t in sharp]
                all_values = [values[shared, j] for j in left] + [sharp_values[shared, t] for t in sharp]
                heads.append(attend_row(layer, queries[h, i], all_keys, all_values, h)[0])
            rows.append(torch.cat(heads))
        outputs.append(torch.stack(rows) @ layer.o_proj.weight.T)
    return torch.stack(outputs), maps


def cells_around(
    chosen: Tensor, grid: tuple[int, ...], zoom: tuple[int, ...], dilation: int, positions: Tensor, keys: int
) -> Tensor:
    """Low-res keys of the cells that hold a chosen token, or have such a cell of their frame within ``dilation``."""
    (rows, columns), (down, across) = grid[-2:], zoom[-2:]
    together = 1 if len(grid) == 2 else zoom[0]
    replaced = torch.zeros(*chosen.shape[:2], keys, dtype=torch.bool)
    for b, i, token in chosen.nonzero().tolist():
        row, column = token // (columns * across), token % (columns * across) // across
        frame, row = row // (rows * down) // together, row % (rows * down) // down
        for r in range(max(0, row - dilation), min(rows, row + dilation + 1)):
            for c in range(max(0, column - dilation), min(columns, column + dilation + 1)):
                replaced[b, i, positions[b, (frame * rows + r) * columns + c]] = True
    return replaced


def spread(rows: Tensor, queries: Tensor) -> Tensor:
    """Values of the querying rows ``(batch, rows, n)`` at their positions ``(batch, length, n)``; zero elsewhere."""
    spread = rows.new_zeros(*queries.shape, rows.shape[-1])
    for b, mask in enumerate(queries):
        for row, position in enumerate(mask.nonzero().flatten().tolist()):
            spread[b, position] = rows[b, row]
    return spread
