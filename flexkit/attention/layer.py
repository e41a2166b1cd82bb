"""What a layer does: its querying rows look at the low-res image, and read high-res tokens where they looked.

In order: what is visible (:func:`~flexkit.attention.visible.visibility`), logits over it (:func:`look`), the map, what
it selects (:func:`~flexkit.attention.select.select_tokens`), K' and V' of that and joint attention (:func:`read`). A
patched layer and :class:`HierarchicalSelfAttention` both call these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexkit.attention.core import attention_logits, attention_map, joint_attention, log_normaliser
from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.select import bias_of_tokens, hidden_cells
from flexkit.attention.visible import ImageGroup, Visibility

__all__ = ["HighResKeys", "Looked", "Read", "ReadSettings", "look", "read"]


class ReadSettings(Protocol):
    """How high-res tokens are read, in the words of :class:`flexkit.FlexConfig` and the module alike."""

    @property
    def low_res_keys(self) -> str: ...

    @property
    def replace_dilation(self) -> int: ...

    @property
    def logit_bias(self) -> float: ...

    @property
    def alpha(self) -> float: ...


@dataclass(frozen=True)
class HighResKeys:
    """K' and V' of some high-res tokens, in the head layout of a layer's attention."""

    key: Tensor
    """``(batch, key_heads, held, head_dim)``."""
    value: Tensor
    """``(batch, key_heads, held, value_dim)``."""
    tokens: RaggedIndex
    """Whose they are, among all high-res tokens of a batch row."""

    @property
    def bytes(self) -> int:
        """What they take up."""
        return int(self.key.nbytes + self.value.nbytes)

    def and_then(self, later: "HighResKeys") -> "HighResKeys":
        """These, followed by those of other tokens."""
        key, value = torch.cat([self.key, later.key], dim=2), torch.cat([self.value, later.value], dim=2)
        return HighResKeys(key, value, self.tokens.and_then(later.tokens))

    def only(self, wanted: Tensor) -> "HighResKeys":
        """Those of the wanted tokens ``(batch, tokens)`` among these."""
        return self.at(RaggedIndex(self.tokens.among(wanted)), self.tokens.mask & wanted)

    def at(self, places: RaggedIndex, mask: Tensor) -> "HighResKeys":
        """Those at some places among these, which are the tokens of a mask ``(batch, tokens)``."""
        tokens = RaggedIndex(mask, order=(places.gather(self.tokens.index), places.valid))
        return HighResKeys(places.gather(self.key, 2), places.gather(self.value, 2), tokens)

    def of_rows(self, rows: Tensor) -> "HighResKeys":
        """Those of other batch rows."""
        return HighResKeys(self.key[rows], self.value[rows], self.tokens.of_rows(rows))


@dataclass(frozen=True)
class Looked:
    """Attention of the querying rows over the base keys."""

    query: Tensor
    """``(batch, heads, queries, head_dim)``."""
    value: Tensor
    """``(batch, key_heads, keys, value_dim)``: of the base keys."""
    logits: Tensor
    """``(batch, heads, queries, keys)``, float32 or wider; minus infinity where a row does not see."""
    normaliser: Tensor
    """``(batch, heads, queries, 1)``."""
    seen: Visibility
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None

    @property
    def map(self) -> Tensor:
        """``(batch, heads, queries, keys)``: softmax attention, without gradient."""
        return attention_map(self.logits.detach(), normaliser=self.normaliser.detach())


@dataclass(frozen=True)
class Read:
    """What reading gave."""

    output: Tensor
    """``(batch, heads, queries, value_dim)``: attention over base and high-res keys."""
    attention: Callable[[], Tensor]
    """``(batch, heads, queries, held)`` when called: joint attention over the high-res tokens."""
    tokens: RaggedIndex
    """Which these are."""


def look(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Visibility,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Looked:
    """Let the querying rows look at the base keys, once more than the layer's kernel, which keeps what it saw.

    Parameters
    ----------
    query : torch.Tensor
        ``(batch, heads, queries, head_dim)``: of the querying rows.
    key, value : torch.Tensor
        ``(batch, key_heads, keys, head_dim or value_dim)``: all base keys.
    seen : Visibility
        What the rows see.
    scaling, softcap, sinks, bias
        As for :func:`~flexkit.attention.attention_logits` and :func:`~flexkit.attention.log_normaliser`.
    """
    added = 0.0 if bias is None else bias
    logits = attention_logits(query, key, scaling=scaling, mask=seen.mask, softcap=softcap, bias=added)
    return Looked(query, value, logits, log_normaliser(logits, sinks), seen, scaling, softcap, sinks, bias)


def read(
    base: Tensor,
    looked: Looked,
    selected: Tensor,
    project: Callable[[Tensor], HighResKeys],
    settings: ReadSettings,
    *,
    levels: Sequence[Sequence[ImageGroup]] = (),
    dropout: float = 0.0,
) -> Read:
    """Extend the attention of the querying rows to the high-res tokens that are selected (paper, section 3.2).

    Parameters
    ----------
    base : torch.Tensor
        ``(batch, heads, queries, value_dim)``: their attention over the base keys, from any kernel.
    looked : Looked
        The same attention, as logits.
    selected : torch.Tensor
        ``(batch, queries, tokens)``, bool: the high-res tokens that each row reads.
    project : callable
        From ``(batch, tokens)``, bool, to K' and V' of these tokens, and of others that are at hand.
    settings : ReadSettings
        How they are read.
    levels : sequence of sequence of ImageGroup
        The images, on each level of a pyramid of zooms; needed where keys have a bias by position.
    dropout : float
        Probability with which an attention weight is dropped.

    Returns
    -------
    Read
        Rows that select nothing keep the bits of ``base``.
    """
    high_res = project(selected.any(1))
    tokens, images = high_res.tokens, looked.seen.images
    bias: Tensor | float = settings.logit_bias
    if looked.bias is not None:
        bias = bias + tokens.gather(bias_of_tokens(looked.bias, images, levels, selected.shape[-1]), -1)
    logits = attention_logits(looked.query, high_res.key, scaling=looked.scaling, softcap=looked.softcap, bias=bias)
    replaced = None
    if settings.low_res_keys == "replace":
        replaced = hidden_cells(selected, images, looked.logits.shape[-1], dilation=settings.replace_dilation)
    among = tokens.among(selected)
    output = joint_attention(
        base,
        looked.logits,
        looked.value,
        logits,
        high_res.value,
        among,
        replaced=replaced,
        sinks=looked.sinks,
        dropout=dropout,
        normaliser=looked.normaliser,
    )
    if settings.alpha < 1.0:
        output = torch.lerp(base, output, settings.alpha)

    def attention() -> Tensor:
        low = looked.logits if replaced is None else looked.logits.masked_fill(replaced[:, None], -torch.inf)
        both = torch.cat([low, logits.masked_fill(~among[:, None], -torch.inf)], dim=-1)
        return attention_map(both.detach(), looked.sinks)[..., low.shape[-1] :]

    return Read(output, attention, tokens)
