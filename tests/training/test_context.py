"""Training where attention reads the image from a context beside the decoder's sequence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import flexkit
from flexkit.patching import added_parameters
from tests.training.contexts import examples, model_for
from tests.training.stripes import joined, state_of
from tests.training.trainers import losses_of, trainer_for
from tests.zoo import CONTEXT

TRAINED = ("mllama", "git", "blip", "florence2", "vision-encoder-decoder-gpt2", "blip-2", "idefics2")
each = pytest.mark.parametrize("name", TRAINED)


def changes(model: Any, before: dict[str, Tensor]) -> set[str]:
    return {key for key, value in state_of(model).items() if not torch.equal(value, before[key])}


@each
def test_trainer(name: str, tmp_path: Path) -> None:
    model, rows = model_for(name), examples(name, 8)
    before = state_of(model)
    trainer = trainer_for(model, rows, tmp_path, max_steps=8, learning_rate=0.02)
    trainer.train()
    assert losses_of(trainer)[-1] < 0.98 * losses_of(trainer)[0]
    assert changes(model, before) == added_parameters(model).keys()
    flexkit.save_flex(model, tmp_path)
    loaded, batch = flexkit.load_flex(CONTEXT[name].model().float(), tmp_path), joined(rows)
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


CANNOT_CHECKPOINT = {("mllama", True): "all of its layers would run back through its tower"}
"""Base models that fail, and whether reentrantly."""


@each
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    """Layers that are run again read again."""
    model, batch = model_for(name, trains_all=True).double(), joined(examples(name, 2))
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    if name == "git":  # otherwise its layers write to their cache twice
        batch["use_cache"] = False

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if (name, use_reentrant) in CANNOT_CHECKPOINT:
        with pytest.raises(RuntimeError, match="through the graph a second time"):
            gradients()
        return
    ours = gradients()
    assert ours.keys() == expected.keys() and all(bool(ours[key].any()) for key in added_parameters(model))
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "copies"), [(name, index % 2 == 0) for index, name in enumerate(TRAINED)])
def test_adapters_beside_the_added_projections(name: str, copies: bool, tmp_path: Path) -> None:
    model, rows = model_for(name), examples(name, 4)
    names = {key.rpartition(".")[2] for key, _ in model.named_modules()}
    added = sorted(key for key in names if key.endswith("_hd"))
    targets = sorted(names & {"q_proj", "query", "q_attn"})
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=added if copies else None))
    for parameter in flexkit.flex_parameters(wrapped):
        parameter.requires_grad_(True)
    before = state_of(wrapped)
    trainer_for(wrapped, rows, tmp_path, max_steps=2, per_device_train_batch_size=4).train()
    changed = changes(wrapped, before)
    assert changed and all("lora_" in key or "_hd" in key for key in changed)
    assert len([key for key in changed if "_hd" in key]) == len(added_parameters(model))

    batch = joined(rows)
    expected = wrapped.eval()(**batch).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    flexkit.save_flex(wrapped, tmp_path / "added")
    loaded = flexkit.load_flex(CONTEXT[name].model().float(), tmp_path / "added")
    assert not torch.equal(loaded(**batch).logits, expected)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    assert torch.equal(loaded(**batch).logits, expected)
