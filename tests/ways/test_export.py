"""``torch.export`` of a patched model that is given no high-res view: of the base model."""

import pytest
import torch

from tests.patching.ways import logits_of
from tests.ways.questions import patch
from tests.zoo import ZOO, low_res, prompt


@pytest.mark.parametrize("name", ("llava", "git", "blip"))
def test_the_base_model_is_exported(name: str) -> None:
    model, inputs = patch(ZOO[name].model()), low_res(prompt(ZOO[name]))
    expected = logits_of(model, {key: value.clone() for key, value in inputs.items()})
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False  # no program gives a cache out
    given = {key: value.clone() for key, value in inputs.items()}
    with torch.no_grad():
        program = torch.export.export(model, (), given, strict=False).module()
    assert torch.equal(logits_of(program, inputs), expected)
