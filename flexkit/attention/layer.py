"""What a layer does: its querying rows look at the low-res image, and read high-res tokens where they looked.

In order: what is visible (:func:`~flexkit.attention.visible.visibility`), a look at it (:func:`look`), what its maps
select (:func:`~flexkit.attention.select.select_tokens`), K' and V' of that and joint attention (:func:`read`). Patched
layers and :class:`HierarchicalSelfAttention` do this.

Where a fused kernel told its log-normaliser, of the base keys only those of images are read again, and what high-res
tokens add comes from a fused kernel, too (:mod:`~flexkit.attention.kernels`); else all is made of logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexkit.attention.core import attention_logits, attention_map, joint_attention, log_normaliser
from flexkit.attention.kernels import merge_fused, products
from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.select import bias_of_tokens, hidden_cells
from flexkit.attention.visible import ImageGroup, Visibility, VisibleImages

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
    key: Tensor
    """``(batch, key_heads, keys, head_dim)``: of the base keys."""
    value: Tensor
    """``(batch, key_heads, keys, value_dim)``."""
    normaliser: Tensor
    """``(batch, heads, queries, 1)``, float32 or wider."""
    known: Tensor | None
    """The logits, unless the kernel told the normaliser, so that nobody needed them."""
    seen: Visibility
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None

    @property
    def logits(self) -> Tensor:
        """``(batch, heads, queries, keys)``, float32 or wider; minus infinity where a row does not see."""
        if self.known is not None:
            return self.known
        return attention_logits(
            self.query,
            self.key,
            scaling=self.scaling,
            mask=self.seen.mask,
            softcap=self.softcap,
            bias=0.0 if self.bias is None else self.bias,
        )

    def map_of(self, image: VisibleImages) -> Tensor:
        """``(images, heads, queries, cells)``: softmax attention over the low-res tokens of some images."""
        normaliser = self.normaliser if image.group.is_batch else self.normaliser[image.group.rows]
        seen_as_a_whole = image.whole is None and image.cells is None
        if self.known is not None or self.bias is not None or not seen_as_a_whole:
            return attention_map(image.of_cells(self.logits, -1), normaliser=normaliser)
        # The keys of the image alone, in the dtype of the cache.
        query = (self.query if image.group.is_batch else self.query[image.group.rows]) * self.scaling
        return torch.exp(products(query, image.of_cells(self.key, 2)) - normaliser)


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
    normaliser: Tensor | None = None,
) -> Looked:
    """Let the querying rows look at the base keys: once more than the layer's kernel, unless it told its normaliser.

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
    normaliser : torch.Tensor, optional
        ``(batch, heads, queries, 1)``: the kernel's.
    """
    logits = None
    if normaliser is None:
        added = 0.0 if bias is None else bias
        logits = attention_logits(query, key, scaling=scaling, mask=seen.mask, softcap=softcap, bias=added)
        normaliser = log_normaliser(logits, sinks)
    return Looked(query, key, value, normaliser, logits, seen, scaling, softcap, sinks, bias)


def read(
    base: Tensor,
    looked: Looked,
    selected: Tensor,
    project: Callable[[Tensor], HighResKeys],
    settings: ReadSettings,
    *,
    levels: Sequence[Sequence[ImageGroup]] = (),
    most: int | None = None,
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
    most : int, optional
        No row reads more tokens than this.
    dropout : float
        Probability with which an attention weight is dropped.

    Returns
    -------
    Read
        Rows that select nothing keep the bits of ``base``.
    """
    alone = selected.shape[1] == 1
    wanted = selected[:, 0] if alone else selected.any(1)
    high_res, images = project(wanted), looked.seen.images
    if alone and high_res.tokens.whole and most is not None and most < selected.shape[-1]:
        places = RaggedIndex.bounded(wanted, most)  # by shapes that no data decides
        high_res = high_res.at(places, wanted)
    tokens = high_res.tokens
    among = tokens.among(selected)
    replaced, own, output = None, None, None
    if settings.low_res_keys == "replace":
        replaced = hidden_cells(selected, images, looked.key.shape[2], dilation=settings.replace_dilation)

    def logits() -> Tensor:
        bias: Tensor | float = settings.logit_bias
        if looked.bias is not None:
            bias = bias + tokens.gather(bias_of_tokens(looked.bias, images, levels, selected.shape[-1]), -1)
        return attention_logits(looked.query, high_res.key, scaling=looked.scaling, softcap=looked.softcap, bias=bias)

    if looked.known is None and replaced is None and looked.bias is None and not dropout:
        output = merge_fused(
            base,
            looked.normaliser,
            looked.query,
            high_res.key,
            high_res.value,
            among,
            scaling=looked.scaling,
            bias=settings.logit_bias,
            share=settings.alpha,
        )
    if output is None:
        own = logits()
        joint = joint_attention(
            base,
            looked.logits,
            looked.value,
            own,
            high_res.value,
            among,
            replaced=replaced,
            sinks=looked.sinks,
            dropout=dropout,
            normaliser=looked.normaliser,
        )
        output = joint if settings.alpha == 1.0 else torch.lerp(base, joint, settings.alpha)

    def attention() -> Tensor:
        low, high = looked.logits, logits() if own is None else own
        low = low if replaced is None else low.masked_fill(replaced[:, None], -torch.inf)
        both = torch.cat([low, high.masked_fill(~among[:, None], -torch.inf)], dim=-1)
        return attention_map(both.detach(), looked.sinks)[..., low.shape[-1] :]

    return Read(output, attention, tokens)
