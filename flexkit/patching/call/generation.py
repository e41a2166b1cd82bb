"""What ``generate`` asks of a patched model, beside its forward."""

from typing import Any

import torch
from torch import nn

from flexkit.patching.call.forward import take_high_res
from flexkit.patching.call.inputs import asks_last
from flexkit.patching.call.route import Prompt
from flexkit.patching.geometry.base import PREFIX
from flexkit.patching.seam.config_view import PROMPT
from flexkit.patching.state import get_patch, is_patched, of_class

__all__ = ["CANDIDATES", "EXPAND", "candidate_generator", "expand_inputs", "generate"]

EXPAND = "_expand_inputs_for_generation"
CANDIDATES = "_get_candidate_generator"


def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of a patched model: its own, but a call that keeps the patch from being taken away meanwhile."""
    patch = get_patch(self, here=True)
    high_res, _ = take_high_res(patch, kwargs)  # pictures beside them may be encoded before the first forward
    return patch.own_method(self, "generate")(*args, **kwargs, **high_res)


def expand_inputs(self: nn.Module, expand_size: int = 1, **kwargs: Any) -> Any:
    """``_expand_inputs_for_generation`` of a patched model: high-res views are encoded once for all beams of a sample.

    The prompt is seen as a whole only here: generating without a cache runs the whole sequence at every step, and a
    prompt may be run in chunks. So where it ends, and where its images are, is noted, counted from its own start: what
    is put in front of it, as PEFT's prompts are, is seen when the model is called.
    """
    patch = get_patch(self, here=True)
    high_res, _ = take_high_res(patch, kwargs)
    if not high_res:
        return of_class(self, EXPAND)(expand_size=expand_size, **kwargs)
    kwargs.pop("labels", None)  # PaliGemma's processor always gives some; there is nothing to predict them for
    ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    prompt = Prompt(repeats=expand_size)
    if ids is not None and ids.shape[1] and (cache is None or not cache.get_seq_length()):
        image_tokens = torch.stack([geometry.image_tokens(self, ids, None) for geometry in patch.views])
        image_tokens = image_tokens.repeat_interleave(expand_size, dim=1)
        queries = high_res.get("hd_queries")
        if queries is None and asks_last(patch.config):
            queries = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) == ids.shape[1] - 1
        prompt = Prompt(image_tokens, queries, expand_size)
    input_ids, model_kwargs = of_class(self, EXPAND)(expand_size=expand_size, **kwargs)
    return input_ids, model_kwargs | high_res | {PROMPT: prompt}


def candidate_generator(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``_get_candidate_generator`` of a patched model: an assistant that is not patched proposes in low resolution.

    An assistant notes for itself where its prompt ends.
    """
    assistant, inputs = kwargs.get("assistant_model"), kwargs.get("model_kwargs", {})
    if assistant is not None:
        foreign = PROMPT if is_patched(assistant) else (PREFIX, PROMPT)
        kwargs["model_kwargs"] = {name: value for name, value in inputs.items() if not name.startswith(foreign)}
    return of_class(self, CANDIDATES)(*args, **kwargs)
