"""The attention modules of a model that read its image from a context."""

import inspect
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from flexkit.errors import UnsupportedModelError
from flexkit.patching.context.own_code import HEADS
from flexkit.patching.seam.attention import apart, captured, together, twin_of
from flexkit.patching.seam.decoder import DecoderLayer
from flexkit.patching.seam.projections import own_projections

__all__ = ["Site", "find_sites"]


@dataclass(frozen=True)
class Site(DecoderLayer):
    """One attention module that reads the image, numbered in the order in which they run."""

    reads: str = "hidden_states"
    """Its argument that keys and values are made of."""
    source_norm: nn.Module | None = None
    """A norm through which its layer passes that argument first."""
    behind_text: bool = False
    """Whether the keys of the context stand behind those of the text."""

    def first_key(self, end: int | Tensor, keys: int) -> int:
        return -keys if self.behind_text else 0  # columns count from the end, or from the start, of the keys

    def project(self, features: Tensor, tables: Any, *, normed: bool = False) -> tuple[Tensor, Tensor]:
        if self.source_norm is not None:
            features = self.source_norm(features)
        if self.is_rotated:
            return super().project(features, tables)
        states = apart(self.attention, features)
        unrotated = states.new_ones(1, 1, 1), states.new_zeros(1, 1, 1)
        known = {
            "hidden_states": torch.zeros_like(states),
            "latents": torch.zeros_like(states),
            "position_embeddings": unrotated,
            "merged_attention_mask": None,
            self.reads: states,
        }
        twin = twin_of(self.attention, self.attention)
        accepted = inspect.signature(type(self.attention).forward).parameters
        arguments = {name: value for name, value in known.items() if name in accepted}
        if self.has_own_code:
            heads = HEADS[type(self.attention).__name__](twin, **arguments)
            parts = heads.key, heads.value
        else:
            parts = captured(twin, arguments)
        # The other keys are those of the words, or of the learned queries.
        at = slice(-1, None) if self.behind_text else slice(0, 1)
        key, value = (together(part[:, :, at], len(features)) for part in parts)
        return key, value


def find_sites(
    model: nn.Module,
    names: str,
    reads: str,
    *,
    norm: str | None = None,
    behind_text: bool = False,
    rotated: bool = False,
) -> list[Site]:
    """The modules of these names, where ``*`` stands for a number, and the norm of each one's layer.

    Raises
    ------
    UnsupportedModelError
        If there are none, or one has no projections of keys and values.
    """
    found = [(name, module) for name, module in model.named_modules() if fnmatchcase(name, names)]
    if not found or not all(own_projections(module) for _, module in found):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention {names} with projections of keys and values: flexkit has no "
            "place to read in."
        )
    sites = []
    for index, (name, module) in enumerate(found):
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        sites.append(
            Site(
                index,
                module,
                module,
                # Keys are made of the context as it is, so that there is no norm to be left out.
                input_norm=nn.Identity(),
                kind=None,
                reads=reads,
                source_norm=getattr(layer, norm) if norm else None,
                behind_text=behind_text,
                is_rotated=rotated,
                rotary="rotary_emb" if rotated else None,
                has_own_code=type(module).__name__ in HEADS,
            )
        )
    return sites
