"""Models whose attention reads the image from a context beside the decoder's sequence, and what to train them on."""

from typing import Any

import flexkit
from tests.training.stripes import Example
from tests.zoo import CONTEXT, prompt


def model_for(name: str, *, trains_all: bool = False) -> Any:
    """A patched float32 model, by default with only the added projections trainable."""
    model = CONTEXT[name].model().float().train()
    flexkit.patch_model(model, flexkit.FlexConfig(zoom=2, policy=flexkit.Everything()), trained=True)
    model.requires_grad_(trains_all)
    for parameter in flexkit.flex_parameters(model):
        parameter.requires_grad_(True)
    return model


def examples(name: str, count: int) -> list[Example]:
    """Prompts, each with a picture of its own and labels for its last two words."""
    rows = []
    for seed in range(count):
        row = prompt(CONTEXT[name], seed=seed + 1)
        row = {key: value.float() if value.is_floating_point() else value for key, value in row.items()}
        labels = row[CONTEXT[name].stream + "input_ids"].clone()
        labels[:, :-2] = -100
        rows.append(row | {"labels": labels})
    return rows
