"""Trainer goes on from a checkpoint of a patched model as if it had never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import flexkit
from flexkit.patching import added_parameters
from tests.training.stripes import base_model, examples, joined, main_families, model_for, state_of
from tests.training.trainers import losses_of, trainer_for


def adapted(name: str) -> Any:
    """A patched model in PEFT's hands, which trains copies of the added projections."""
    adapters = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["k_proj_hd", "v_proj_hd"])
    return get_peft_model(model_for(name), adapters)


def everything(name: str) -> Any:
    return model_for(name, trains_all=True)


def run(model: Any, name: str, folder: Path, *, steps: int = 6, resumes: bool = False, **settings: Any) -> Any:
    """A Trainer after its last step; it saves at every third."""
    torch.manual_seed(0)
    settings = {"save_strategy": "steps", "save_steps": 3, "eval_steps": 3, "learning_rate": 0.01} | settings
    trainer = trainer_for(model, examples(name, 24), folder, max_steps=steps, per_device_train_batch_size=4, **settings)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resumes else None)
    return trainer


@main_families
@pytest.mark.parametrize("make", [model_for, everything, adapted])
def test_resumed_bit_for_bit(name: str, make: Any, tmp_path: Path) -> None:
    whole = run(make(name), name, tmp_path)
    resumed = run(make(name), name, tmp_path, resumes=True)
    assert torch.equal(losses_of(resumed), losses_of(whole))
    assert same_bits(state_of(resumed.model), state_of(whole.model))
    assert any(not torch.equal(value, start) for value, start in pairs(state_of(whole.model), state_of(make(name))))
    for ours, theirs in zip(*(trainer.optimizer.state.values() for trainer in (resumed, whole)), strict=True):
        assert same_bits(ours, theirs)


@main_families
def test_a_checkpoint_is_a_saved_model(name: str, tmp_path: Path) -> None:
    model = run(model_for(name), name, tmp_path, steps=3).model.eval()
    folder = tmp_path / "checkpoint-3"
    assert same_bits(load_file(folder / "flexkit.weights"), dict(added_parameters(model)))
    assert not any("_hd" in key for key in load_file(folder / "model.safetensors"))
    batch = joined(examples(name, 2))
    loaded = flexkit.load_flex(AutoModelForImageTextToText.from_pretrained(folder), folder)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@main_families
def test_the_best_model_at_the_end(name: str, tmp_path: Path) -> None:
    """The steps after the best checkpoint are thrown away, also those of the added projections."""
    best = run(model_for(name), name, tmp_path / "short", steps=3, lr_scheduler_type="constant")
    with_worse = run(
        model_for(name),
        name,
        tmp_path / "long",
        lr_scheduler_type="constant",
        eval_strategy="steps",
        load_best_model_at_end=True,
        greater_is_better=True,  # the greatest loss is that of the first evaluation
    )
    assert Path(with_worse.state.best_model_checkpoint).name == "checkpoint-3"
    assert same_bits(state_of(with_worse.model), state_of(best.model))


def test_alpha_is_where_a_ramp_left_it(tmp_path: Path) -> None:
    model = model_for("llava", alpha=0.25)
    run(model, "llava", tmp_path, steps=3)
    loaded = flexkit.load_flex(base_model("llava"), tmp_path / "checkpoint-3")
    batch = joined(examples("llava", 2))
    expected = model.eval()(**batch).logits
    assert torch.equal(loaded(**batch).logits, expected)
    flexkit.set_alpha(loaded, 1.0)
    assert not torch.equal(loaded(**batch).logits, expected)


def pairs(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    assert ours.keys() == theirs.keys()
    return [(value, theirs[key]) for key, value in ours.items()]


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other) for value, other in pairs(ours, theirs))
