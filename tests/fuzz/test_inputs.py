"""Whatever is handed in as a high-res view: it is read, or refused by flexkit, and the model stays what it was."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexkit
from flexkit import FlexConfig, FlexkitError
from tests.zoo import ZOO, Row, low_res, prompt

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DTYPES = [*FLOATS, *INTEGERS, torch.complex64, torch.bool]
NUMBERS = [0, 1, -1, 2, 3, 0.5, 255, 2**31, -(2**63), 2**63 - 1, 1e30, float("nan"), float("inf"), -float("inf")]


@cache
def subject(name: str) -> tuple[Any, dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """A patched model, inputs that it takes, what it says without the high-res ones, and its state."""
    family = ZOO[name]
    settings = {"start_layer": 0, "select_from": "same", "zoom": 2, "policy": flexkit.TopK(2)}
    model = flexkit.patch_model(family.model(), FlexConfig(**settings), trained=True)
    inputs = prompt(family, (Row(words=3), Row(words=2)))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        return model, inputs, model(**low_res(inputs)).logits, state


@st.composite
def tensors(draw: st.DrawFn, like: Tensor | None = None) -> Tensor:
    """A tensor of any small shape, or another one changed a little."""
    if like is None:
        shape = draw(st.lists(st.integers(0, 4), max_size=5))
        return torch.full(shape, draw(st.sampled_from([0.0, 1.0, -1.0, 2.0]))).to(draw(st.sampled_from(DTYPES)))
    way = draw(st.sampled_from(["slice", "pad", "axis", "flatten", "turn", "number", "fill"]))
    axis = draw(st.integers(0, like.ndim - 1))
    if way == "slice":
        return like.narrow(axis, 0, draw(st.integers(0, like.shape[axis])))
    if way == "pad":
        return torch.cat([like, like.narrow(axis, 0, draw(st.integers(1, like.shape[axis])))], dim=axis)
    if way == "axis":
        return like.unsqueeze(axis) if draw(st.booleans()) else like.select(axis, 0)
    if way == "flatten":
        return like.flatten(draw(st.integers(0, axis)))
    if way == "turn":
        return like.transpose(axis, draw(st.integers(0, like.ndim - 1)))
    number = draw(st.sampled_from(NUMBERS))
    if not like.is_floating_point():
        number = int(max(-(2**63), min(2**63 - 1, number))) if abs(number) < float("inf") else 0
    if way == "fill":
        return torch.full_like(like, number)
    changed = like.clone()
    changed.view(-1)[draw(st.integers(0, like.numel() - 1))] = number
    return changed


@st.composite
def values(draw: st.DrawFn, given: Any) -> Any:
    """What may stand in the place of an input."""
    like = given if isinstance(given, Tensor) else None
    value: Any = draw(tensors(like) if like is not None and draw(st.integers(0, 3)) else tensors())
    if draw(st.booleans()):
        value = value.to(draw(st.sampled_from(DTYPES)))
    way = draw(st.sampled_from(["", "", "", "", "list", "array", "meta", "sparse", "tuple", "other"]))
    if way == "list":
        return value.tolist()
    if way == "array":
        return value.float().numpy()
    if way == "meta":
        return value.to("meta")
    if way == "sparse":
        return value.float().to_sparse()
    if way == "tuple":
        return (value, value)
    return value if not way else draw(st.sampled_from([None, "x", 0, 1.5, True, {}, [], object()]))


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mistral3", "mllama", "pix2struct", "lfm2_vl"])
@given(data=st.data())
def test_any_high_res_input_is_read_or_refused(name: str, data: st.DataObject) -> None:
    model, inputs, base, state = subject(name)
    own = [key for key in inputs if key.startswith("hd_")]
    names = [*own, *own, "hd_image_sizes", "hd_queries", "hd_tiles", "hd_unknown"]
    given = dict(inputs)
    for key in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3), label="changed"):
        if data.draw(st.integers(0, 9)):
            given[key] = data.draw(values(inputs.get(key)), label=key)
        else:
            given.pop(key, None)
    with torch.no_grad():
        try:
            logits = model(**given).logits
        except FlexkitError:
            pass
        else:
            assert logits.shape == base.shape and logits.isfinite().all()
        assert torch.equal(model(**low_res(inputs)).logits, base)
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
