"""Other ways to train: everything at once, in less memory, with many labels, with a ramp, in half precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import flexkit
from flexkit.patching import get_patch
from tests.training.stripes import base_model, examples, joined, main_families, model_for, state_of
from tests.training.trainers import losses_of, trainer_for
from tests.zoo import ZOO, Row, low_res, prompt


def turns(name: str, count: int = 4, *, evenly: bool = False) -> list[dict[str, Tensor]]:
    """Prompts with one, two or three labelled turns, equally long; evenly: with two each."""
    rows = []
    for index in range(count):
        row = prompt(ZOO[name], (Row((None,), 9),), seed=index + 1)
        row = {key: value.float() if value.is_floating_point() else value for key, value in row.items()}
        labelled = [-1, -2, -4, -5, -8][: 3 if evenly else 1 + 2 * (index % 3)]
        labels = torch.full_like(row["input_ids"], -100)
        labels[0, labelled] = row["input_ids"][0, labelled]
        rows.append(row | {"labels": labels})
    return rows


def trained_weights(
    name: str, folder: Path, *, trains_all: bool = False, evenly: bool = False, **settings: Any
) -> dict[str, Tensor]:
    """What three epochs of four prompts make of the model."""
    model = model_for(name, trains_all=trains_all, policy=flexkit.TopK(3)).double()
    rows = [
        {key: value.double() if value.is_floating_point() else value for key, value in row.items()}
        for row in turns(name, evenly=evenly)
    ]
    if not trains_all:
        model.enable_input_require_grads()  # reentrant checkpointing asks for it where the base is frozen
    # Adam would make much of the rounding of gradients that are almost 0.
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "optim": "sgd",
        "learning_rate": 0.1,
    } | settings
    trainer = trainer_for(model, rows, folder, **settings)
    trainer.train()
    return state_of(model)


@main_families
def test_everything_trains(name: str, tmp_path: Path) -> None:
    model = model_for(name, trains_all=True)
    before = state_of(model)
    trainer = trainer_for(model, turns(name, 8), tmp_path, num_train_epochs=8, learning_rate=2e-3)
    trainer.train()
    losses = losses_of(trainer)
    assert losses.isfinite().all() and losses[-1] < 0.7 * losses[0]
    changed = {key for key, value in state_of(model).items() if not torch.equal(value, before[key])}
    for part in ("vis", "embed_tokens", "q_proj", "k_proj_hd", "v_proj_hd", "mlp", "norm"):
        assert any(part in key for key in changed), part


@main_families
def test_the_high_res_features_are_constants_of_the_gradient(name: str) -> None:
    batch = joined(turns(name))
    found = []
    for features_are_given in (False, True):
        model = model_for(name, trains_all=True, policy=flexkit.TopK(3))
        if features_are_given:
            geometry, encode = get_patch(model).geometry, type(get_patch(model).geometry).encode
            inputs = {key.removeprefix("hd_"): value for key, value in batch.items() if key.startswith("hd_")}
            grids = geometry.grids(model, inputs, (2, 2))
            with torch.no_grad():
                given = [image.clone() for image in encode(geometry, model, inputs, grids, (2, 2))]
            patch = get_patch(model)
            patch.geometry = Given(geometry, given)  # type: ignore[assignment]
        model(**batch).loss.backward()
        found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    ours, expected = found
    assert ours.keys() == expected.keys() and any("vis" in key and bool(ours[key].any()) for key in ours)
    for key, gradient in expected.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-6, atol=1e-9)


class Given:
    """A geometry whose high-res features are known beforehand."""

    def __init__(self, geometry: Any, features: list[Tensor]) -> None:
        self.geometry, self.features = geometry, features

    def __getattr__(self, name: str) -> Any:
        return getattr(self.geometry, name)

    def cut(self, *args: Any) -> None:
        return None

    def encode(self, *args: Any) -> list[Tensor]:
        return self.features


@main_families
def test_gradient_checkpointing(name: str, tmp_path: Path) -> None:
    expected = trained_weights(name, tmp_path)
    for use_reentrant in (True, False):
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        assert_close(trained_weights(name, tmp_path, **settings), expected)


@main_families
def test_gradient_accumulation(name: str, tmp_path: Path) -> None:
    # Some models do not let Trainer count labels over all batches of a step; each batch then counts the same.
    settings: dict[str, Any] = {"evenly": not getattr(ZOO[name].model_class, "accepts_loss_kwargs", True)}
    expected = trained_weights(name, tmp_path, trains_all=True, **settings)
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_close(trained_weights(name, tmp_path, trains_all=True, **settings), expected)


@main_families
def test_trainer_treats_the_loss_as_the_base_models(name: str, tmp_path: Path) -> None:
    models = (model_for(name), base_model(name))
    ours, base = (trainer_for(model, [], tmp_path).model_accepts_loss_kwargs for model in models)
    assert ours == base


def test_batches_without_an_image(tmp_path: Path) -> None:
    text = prompt(ZOO["llava"], (Row((), 6),))
    rows = [row for pictured in turns("llava") for row in (pictured, text | {"labels": text["input_ids"]})]
    model = model_for("llava")
    before = state_of(model)
    trainer = trainer_for(model, rows, tmp_path, per_device_train_batch_size=1, num_train_epochs=1)
    trainer.train()
    assert len(losses_of(trainer)) == 8 and losses_of(trainer).isfinite().all()
    changed = {key for key, value in state_of(model).items() if not torch.equal(value, before[key])}
    assert changed and all("_proj_hd" in key for key in changed)


@main_families
def test_a_batch_without_an_image_has_a_gradient_of_zero(name: str) -> None:
    model = model_for(name)
    text = prompt(ZOO[name], (Row((), 6),))
    output = model(**text, labels=text["input_ids"])
    output.loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in flexkit.flex_parameters(model))
    assert torch.equal(output.logits, base_model(name).train()(**text).logits)


class AlphaRamp(TrainerCallback):
    """The paper's ramp of alpha: the whole of it within the first tenth of an epoch."""

    seen: list[float]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        flexkit.set_alpha(model, min(1.0, 10 * state.epoch))
        self.seen.append(get_patch(model).config.alpha)


def test_alpha_ramps_in_a_callback(tmp_path: Path) -> None:
    ramp, model = AlphaRamp(), model_for("llava")
    rows = examples("llava", 40)
    trainer = trainer_for(model, rows, tmp_path, per_device_train_batch_size=1, max_steps=8, callbacks=[ramp])
    trainer.train()
    assert ramp.seen == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0])
    first = {key: value[:1] for key, value in joined([rows[0]]).items()}
    flexkit.set_alpha(model, 0.0)
    assert torch.equal(model(**first).loss, model(**low_res(first)).loss)


@main_families
def test_bfloat16_autocast(name: str, tmp_path: Path) -> None:
    model = model_for(name)
    before = state_of(model)
    trainer = trainer_for(model, turns(name, 8), tmp_path, bf16=True, num_train_epochs=4, learning_rate=0.01)
    trainer.train()
    losses = losses_of(trainer)
    norms = torch.tensor([float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry])
    assert losses.isfinite().all() and losses[-1] < losses[0]
    assert norms.isfinite().all() and (norms > 0).all()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert any(not torch.equal(value, before[key]) for key, value in state_of(model).items())


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-7, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")
