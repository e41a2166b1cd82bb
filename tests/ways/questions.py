"""Questions that a model answers otherwise once it sees the high-res view, and the plainest way to ask them."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import flexkit
from tests.patching.ways import SETTINGS, generate, logits_of, new_tokens
from tests.versions import marked
from tests.zoo import END, IMAGE, START, VIDEO, ZOO, Row, copied, low_res, prompt

SIX = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "llava_next")
"""Kinds of models that differ in towers, positions, masks and caches."""
six = pytest.mark.parametrize("name", SIX)


def six_but(name: str, mark: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """All six, one of them marked."""
    return pytest.mark.parametrize("name", marked(SIX, **{name: mark}))


ONE = (Row((None,), 7),)
"""One image, no padding."""
SPECIAL = torch.tensor([IMAGE, VIDEO, START, END])
TOKENS = 4
"""How many tokens an answer has."""


@dataclass(frozen=True)
class Question:
    """A prompt, and what a patched model makes of it by greedy decoding with a dynamic cache."""

    inputs: dict[str, Tensor]
    answer: Any
    base: Any
    """The same without the high-res view."""

    @property
    def tokens(self) -> Tensor:
        """``(rows, steps)``: the answer alone."""
        return new_tokens(self.answer)

    @property
    def distance(self) -> float:
        """How far the high-res view moves the first logits."""
        return float((self.answer.logits[0] - self.base.logits[0]).abs().max())


@cache
def plain_model(name: str) -> PreTrainedModel:
    """A model as transformers makes it, for all tests: to be left as it is."""
    return ZOO[name].model()


def patch(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """Patch a model, by default so that its high-res tokens matter."""
    settings = SETTINGS | {"start_layer": None} | settings
    return flexkit.patch_model(model, flexkit.FlexConfig(**settings), trained=True)


def own_model(name: str) -> PreTrainedModel:
    """A plain model for one test, which may do with it what it likes."""
    return copied(plain_model(name))


@cache
def patched_model(name: str, **settings: Any) -> PreTrainedModel:
    """A patched model for all tests: to be left as it is."""
    return patch(own_model(name), **settings)


@cache
def question(name: str, rows: tuple[Row, ...] = ONE) -> Question:
    """A question whose answer is another in every row, and in its first token, with the high-res view."""
    model = patched_model(name)
    for seed in range(1, 60):
        inputs = prompt(ZOO[name], rows, seed=seed)
        answer, base = (generate(model, given, TOKENS) for given in (inputs, low_res(inputs)))
        ours, theirs = new_tokens(answer), new_tokens(base)
        if bool((ours != theirs)[:, 0].all()) and not torch.isin(ours, SPECIAL).any():
            return Question(inputs, answer, base)
    raise LookupError(f"no question to {name} depends on the high-res view.")


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs with the floating ones in ``dtype``."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def longer(inputs: dict[str, Any], words: Tensor) -> dict[str, Any]:
    """One prompt and the words ``(length,)`` behind it."""
    more = words[None]
    kept = {key: inputs[key] for key in ("attention_mask", "token_type_ids", "mm_token_type_ids") if key in inputs}
    filled = {key: torch.full_like(more, int(key == "attention_mask")) for key in kept}
    joined = {key: torch.cat([value, filled[key]], dim=1) for key, value in kept.items()}
    return inputs | joined | {"input_ids": torch.cat([inputs["input_ids"], more], dim=1)}


def forced_logits(model: PreTrainedModel, inputs: dict[str, Any], written: Tensor) -> Tensor:
    """``(steps, vocabulary)``: logits from which each token of an answer to one prompt was chosen.

    One call over prompt and answer, without a cache: an answer that was made in any other way must agree.
    """
    start = inputs["input_ids"].shape[1]
    whole = longer(inputs, written[:-1])
    if any(key.startswith("hd_") for key in inputs):
        whole["hd_queries"] = torch.arange(start)[None] == start - 1
    return logits_of(model, whole, use_cache=False)[0, start - 1 :]
