"""Adapters of PEFT beside the added projections, on them, and from before the patch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import flexkit
from flexkit.errors import UnsupportedModelError
from flexkit.patching import added_parameters
from tests.training.stripes import base_model, examples, families, joined, main_families, model_for, state_of
from tests.training.trainers import losses_of, trainer_for
from tests.zoo import low_res

ADDED = ["k_proj_hd", "v_proj_hd"]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings))


def moved(model: Any) -> Any:
    """The same model, all that it trains somewhere else."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@main_families
@pytest.mark.parametrize("copies", [True, False], ids=["modules_to_save", "requires_grad"])
def test_trains_beside_the_added_projections(name: str, copies: bool, tmp_path: Path) -> None:
    model = model_for(name)
    wrapped = get_peft_model(model, lora(modules_to_save=ADDED if copies else None))
    for parameter in flexkit.flex_parameters(wrapped):
        parameter.requires_grad_(True)
    before = state_of(wrapped)
    trainer = trainer_for(wrapped, examples(name, 16), tmp_path, num_train_epochs=2, learning_rate=0.02)
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    changed = {key for key, value in state_of(wrapped).items() if not torch.equal(value, before[key])}
    assert changed and all("lora_" in key or "_proj_hd" in key for key in changed)
    assert not any("original_module" in key for key in changed)
    ours = {key for key in changed if "_proj_hd" in key}
    assert len(ours) == len(added_parameters(model)) == len(list(flexkit.flex_parameters(wrapped)))


@main_families
def test_it_is_saved_in_two_folders(name: str, tmp_path: Path) -> None:
    batch = joined(examples(name, 2))
    model = get_peft_model(model_for(name), lora())
    for parameter in flexkit.flex_parameters(model):
        parameter.requires_grad_(True)
    model = moved(model)
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    flexkit.save_flex(model, tmp_path / "added")
    loaded = flexkit.load_flex(base_model(name), tmp_path / "added")
    assert not torch.equal(logits_of(loaded, batch), expected)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded, batch), expected)


@main_families
def test_copies_that_peft_trains_are_in_its_own_folder(name: str, tmp_path: Path) -> None:
    batch = joined(examples(name, 2))
    model = moved(get_peft_model(model_for(name), lora(modules_to_save=ADDED)))
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(model_for(name), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded, batch), expected)
    # And flexkit saves what is in use, under the names that it has without PEFT.
    flexkit.save_flex(model, tmp_path / "added")
    added = added_parameters(flexkit.load_flex(base_model(name), tmp_path / "added"))
    assert added.keys() == added_parameters(model_for(name)).keys()
    assert all(torch.equal(value, added_parameters(model)[key]) for key, value in added.items())


@main_families
@pytest.mark.parametrize("target", ["beside", "on", "copies"])
def test_merged_it_is_a_patched_model_as_before(name: str, target: str, tmp_path: Path) -> None:
    batch = joined(examples(name, 2))
    targets = ["q_proj", "v_proj", *(ADDED if target == "on" else [])]
    settings = {"target_modules": targets, "modules_to_save": ADDED if target == "copies" else None}
    names = state_of(model_for(name)).keys()
    model = moved(get_peft_model(model_for(name), lora(**settings)))
    expected = logits_of(model, batch)
    merged = model.merge_and_unload()
    assert flexkit.is_patched(merged) and state_of(merged).keys() == names
    torch.testing.assert_close(logits_of(merged, batch), expected, rtol=0, atol=1e-3)
    flexkit.save_flex(merged, tmp_path)
    copied = flexkit.load_flex(flexkit.unpatch_model(copy.deepcopy(merged)), tmp_path)
    assert torch.equal(logits_of(copied, batch), logits_of(merged, batch))


@families
def test_patched_inside_of_a_peft_model(name: str) -> None:
    """What is copied then is what the adapted layers compute, not the adapters themselves."""
    batch = joined(examples(name, 2))
    settings = flexkit.FlexConfig(start_layer=1, zoom=2, policy=flexkit.TopK(3))
    model = moved(get_peft_model(base_model(name), lora(target_modules=["k_proj", "v_proj", "o_proj"])))
    adapters = {key for key in state_of(model) if "lora_" in key}
    merged = flexkit.patch_model(copy.deepcopy(model).merge_and_unload(), settings, trained=True)

    assert flexkit.patch_model(model.get_base_model(), settings, trained=True) is model.get_base_model()
    assert flexkit.is_patched(model)
    assert {key for key in state_of(model) if "lora_" in key} == adapters
    assert added_parameters(model).keys() == added_parameters(merged).keys()
    for key, value in added_parameters(model).items():
        torch.testing.assert_close(value, added_parameters(merged)[key])
        assert value.requires_grad
    torch.testing.assert_close(logits_of(model, batch), logits_of(merged, batch), rtol=0, atol=1e-3)
    model.train()(**batch).loss.backward()
    assert all(bool(parameter.grad.any()) for parameter in flexkit.flex_parameters(model))

    with flexkit.disabled(model.eval()):
        base = logits_of(model, batch)
    assert torch.equal(base, logits_of(model, low_res(batch)))
    assert flexkit.unpatch_model(model) is model and not flexkit.is_patched(model)
    assert torch.equal(logits_of(model, low_res(batch)), base)


def test_a_peft_model_itself_cannot_be_patched() -> None:
    model = get_peft_model(base_model("llava"), lora())
    with pytest.raises(UnsupportedModelError, match=r"PeftModel.*LlavaForConditionalGeneration that it wraps"):
        flexkit.patch_model(model)


@main_families
def test_disabled_adapters_leave_the_patched_model(name: str) -> None:
    batch = joined(examples(name, 2))
    expected = logits_of(model_for(name).eval(), batch)
    model = moved(get_peft_model(model_for(name), lora(modules_to_save=ADDED)))
    assert not torch.equal(logits_of(model, batch), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), expected)
    with flexkit.trace(model) as trace:
        model.generate(**{key: value for key, value in batch.items() if key != "labels"}, max_new_tokens=2)
    assert len(trace) == 2
