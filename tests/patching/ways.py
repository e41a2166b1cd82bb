"""Models, patched and plain, and ways of running them that the tests of this folder share."""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import flexkit
from tests.zoo import FAMILIES, MAIN, Row, copied, prompt

families = pytest.mark.parametrize("name", MAIN)
every_family = pytest.mark.parametrize("name", FAMILIES)

ROWS = (Row((None,)), Row((None, None), 2), Row((), 6))
"""A row with an image, one with two, one without; the first and the last are padded."""

SETTINGS = {"start_layer": 1, "zoom": 2, "policy": flexkit.TopK(3)}


@cache
def _built(name: str) -> PreTrainedModel:
    return FAMILIES[name].model()


def plain(name: str) -> PreTrainedModel:
    """A model of its own for one test."""
    return copied(_built(name))


def patched(name: str, config: flexkit.FlexConfig | None = None, **settings: Any) -> PreTrainedModel:
    """A patched model of its own, by default one whose high-res tokens matter."""
    return flexkit.patch_model(plain(name), config or flexkit.FlexConfig(**(SETTINGS | settings)), trained=True)


def inputs_of(name: str, rows: Iterable[Row] = ROWS, **settings: Any) -> dict[str, Tensor]:
    """Both views of a batch."""
    return prompt(FAMILIES[name], tuple(rows), **settings)


def logits_of(model: PreTrainedModel, inputs: dict[str, Any], **settings: Any) -> Tensor:
    """Logits of a forward without gradients."""
    with torch.no_grad():
        return model(**inputs, **settings).logits


def generate(model: PreTrainedModel, inputs: dict[str, Any], tokens: int = 4, **settings: Any) -> Any:
    """Generate exactly ``tokens`` tokens; raw logits of each step come along."""
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True} | settings
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, **settings)


def new_tokens(output: Any) -> Tensor:
    """``(rows, steps)``: what was generated."""
    return output.sequences[:, -len(output.logits) :]


def assert_close(ours: Any, theirs: Any) -> None:
    """Equal but for the order of summation; generate hands float64 logits out as float32."""
    tolerance = 1e-5 if torch.float32 in (ours.dtype, theirs.dtype) else 1e-9
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, check_dtype=False)


def assert_same_logits(output: Any, reference: Any) -> None:
    """Both generations took the same steps with the same logits."""
    assert torch.equal(new_tokens(output), new_tokens(reference))
    for ours, theirs in zip(output.logits, reference.logits, strict=True):
        assert_close(ours, theirs)


def through_a_file(value: Any, **options: Any) -> Any:
    """What ``torch.load`` gives of what ``torch.save`` wrote."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def row_of(name: str, inputs: dict[str, Tensor], row: int, rows: Iterable[Row] = ROWS) -> dict[str, Tensor]:
    """One row of a left-padded batch as a batch of its own, without padding."""
    counts = [len(entry.images) for entry in rows]
    images = slice(sum(counts[:row]), sum(counts[: row + 1]))
    real = inputs["attention_mask"][row].bool()
    alone: dict[str, Tensor] = {}
    for key, value in inputs.items():
        if key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            alone[key] = value[row : row + 1, real]
        elif not counts[row]:
            continue
        elif key.endswith("pixel_values") and FAMILIES[name].any_grid:
            sizes = inputs[key.replace("pixel_values", "image_grid_thw")].prod(-1).tolist()
            alone[key] = torch.cat(value.split(sizes)[images])
        else:
            alone[key] = value[images]
    return alone


def decoding(tokens: Tensor, mask: Tensor, deltas: Tensor | None) -> dict[str, Tensor]:
    """Inputs that decode one token a row; ``mask`` covers it, ``deltas`` are Qwen's shifts of the rows' positions."""
    places = torch.full_like(tokens, mask.shape[1] - 1)
    if deltas is not None:
        places = (places + deltas).expand(3, -1, -1)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": places}


@contextmanager
def unharmed(model: PreTrainedModel, inputs: dict[str, Any]) -> Iterator[None]:
    """What happens in the block leaves the model with the output and the state that it had."""
    before, state = logits_of(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    yield
    assert torch.equal(logits_of(model, inputs), before)
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
