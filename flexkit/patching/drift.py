"""Whether layers may understand image features: measured once, on the first picture that an untrained model reads.

Layer l's projections expect hidden states of layer l. Where states have drifted far from what the projector put in,
keys and values that copies of them make of image features mean nothing.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from flexkit.patching.seam.config_view import CALL
from flexkit.patching.seam.projections import SUFFIX, floating_dtype, innermost, own_projections
from flexkit.patching.state import Patch

__all__ = ["FeatureDriftWarning", "watch_drift"]

_LAYERS = 2
"""Behind how many layers it is measured."""
_LEAST = 0.3
"""Below this cosine features have been seen to read nothing; models that read them were above 0.5."""


class FeatureDriftWarning(UserWarning):
    """A model whose hidden states drift far from its image features reads these through projections nobody trained."""


class _Drift:
    """Looks at the states of image tokens as they enter the layers, until it has seen some."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.entered: tuple[Any, Tensor] | None = None
        self.is_known = False

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the first layer is given."""
        if not (self.is_known or layer.training or torch.compiler.is_compiling()):
            states = _image_states(args, kwargs)
            self.entered = None if states is None else (kwargs[CALL], states)

    def leave(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the layers in front of this one have made of it."""
        if self.is_known or self.entered is None or torch.compiler.is_compiling():
            return
        (call, before), after = self.entered, _image_states(args, kwargs)
        if after is None or kwargs[CALL] is not call:  # of another thread
            return
        self.entered, self.is_known = None, True
        cosine = cosine_similarity(before.float(), after.float(), dim=-1).mean().item()
        if cosine < _LEAST and _is_untrained(self.patch):
            warnings.warn(
                f"after {_LAYERS} layers the hidden states of image tokens have a cosine of {cosine:.2f} to what was "
                "put in: layers that expect such states cannot be expected to understand keys and values that "
                "untrained projections make of image features. Train them, load trained ones (flexkit.load_flex), or "
                'read own states (high_res_states="own").',
                FeatureDriftWarning,
                stacklevel=2,
            )


def watch_drift(patch: Patch) -> None:
    """Warn, once, if a model that is about to read image features is one whose hidden states are not like these."""
    if not patch.route.runs_tokens:  # features are read elsewhere than among hidden states
        return
    layers: Any = patch.decoder.layers
    if len(layers) > _LAYERS:
        drift = _Drift(patch)
        patch.hooks.append(layers[0].register_forward_pre_hook(drift.enter, with_kwargs=True))
        patch.hooks.append(layers[_LAYERS].register_forward_pre_hook(drift.leave, with_kwargs=True))


def _image_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """``(tokens, dim)``: the hidden states of the low-res tokens that a call runs; None if there are none."""
    call: Any = kwargs.get(CALL)
    states = args[0] if args else kwargs.get("hidden_states")
    memory = getattr(call, "memory", None)
    if memory is None or not isinstance(states, Tensor) or not isinstance(call.past, int):
        return None
    end = call.past + states.shape[1]
    new = [span for span in memory.images if int(span.columns[0]) >= call.past and span.end <= end]
    found = [states[span.row, span.columns.to(states.device) - call.past] for span in new]
    return torch.cat(found).detach() if found else None


def _is_untrained(patch: Patch) -> bool:
    """Whether the first layer that reads has copies of its own projections still."""
    layer = next(iter(patch.reading.values()))
    for name in own_projections(layer.source):
        own: Any = innermost(getattr(layer.attention, name, None) or getattr(layer.source, name))
        added: Any = innermost(getattr(layer.attention, name + SUFFIX))
        if None in (floating_dtype(own), floating_dtype(added)) or not torch.equal(own.weight, added.weight):
            return False
    return True
