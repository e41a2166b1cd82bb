"""What ``generate`` asks of a patched model, beside its forward."""

from typing import Any

import torch
from torch import nn

from flexkit.patching.forward import take_high_res
from flexkit.patching.methods import METHODS, of_class
from flexkit.patching.queries import asks_last
from flexkit.patching.state import get_patch, is_patched
from flexkit.patching.views import PREFIX

__all__ = ["EXPAND", "candidate_generator", "expand_inputs", "generate"]

EXPAND = "_expand_inputs_for_generation"
CANDIDATES = "_get_candidate_generator"


def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of a patched model: its own, but a call that keeps the patch from being taken away meanwhile."""
    return get_patch(self).own_method(self, "generate")(*args, **kwargs)


def expand_inputs(self: nn.Module, expand_size: int = 1, **kwargs: Any) -> Any:
    """``_expand_inputs_for_generation`` of a patched model: high-res views are encoded once for all beams of a sample.

    The prompt is seen as a whole only here: generating without a cache runs the whole sequence at every step, and a
    prompt may be run in chunks. So where it ends, and where its images are, is noted, counted from its own start: what
    is put in front of it, as PEFT's prompts are, is seen when the model is called.
    """
    high_res = take_high_res(kwargs)
    if high_res:
        kwargs.pop("labels", None)  # PaliGemma's processor always gives some; there is nothing to predict them for
    ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    if high_res and ids is not None and ids.shape[1] and (cache is None or not cache.get_seq_length()):
        patch = get_patch(self)
        high_res["hd_image_tokens"] = patch.geometry.image_tokens(self, ids, None).repeat_interleave(expand_size, dim=0)
        if asks_last(patch.config) and "hd_queries" not in high_res:
            high_res["hd_queries"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) == ids.shape[1] - 1
    input_ids, model_kwargs = of_class(self, EXPAND)(expand_size=expand_size, **kwargs)
    if high_res and expand_size > 1:
        high_res["hd_repeats"] = expand_size
    return input_ids, model_kwargs | high_res


def candidate_generator(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``_get_candidate_generator`` of a patched model: an assistant that is not patched proposes in low resolution."""
    assistant, inputs = kwargs.get("assistant_model"), kwargs.get("model_kwargs", {})
    if assistant is not None and not is_patched(assistant):
        kwargs["model_kwargs"] = {name: value for name, value in inputs.items() if not name.startswith(PREFIX)}
    return of_class(self, CANDIDATES)(*args, **kwargs)


METHODS.update({"generate": generate, EXPAND: expand_inputs, CANDIDATES: candidate_generator})
