"""Every family in the numbers that people load it in."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flexkit
from flexkit import FlexConfig
from tests.patching.ways import generate, logits_of
from tests.zoo import ZOO, Family, Row, cast, low_res, prompt


@pytest.mark.parametrize("family", ZOO.values(), ids=list(ZOO))
def test_numbers_are_finite_and_of_the_dtype_of_the_base_model(family: Family) -> None:
    """With tokens selected and without; where none is, they are the base model's to the bit."""
    model, inputs = family.model(), prompt(family, [Row()])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def given(of: dict[str, Tensor], dtype: torch.dtype = dtype) -> dict[str, Tensor]:
            """BLIP writes into its prompt."""
            return {name: each.to(dtype) if each.is_floating_point() else each.clone() for name, each in of.items()}

        cast(model, dtype)
        base = logits_of(model, given(low_res(inputs)))
        flexkit.patch_model(model, FlexConfig(zoom=2, policy=flexkit.Nothing()), trained=True)
        assert torch.equal(logits_of(model, given(inputs)), base), dtype
        flexkit.set_policy(model, flexkit.TopK(3))
        said: Any = generate(model, given(inputs), 2)
        assert all(step.isfinite().all() for step in said.logits), dtype
        flexkit.unpatch_model(model)
