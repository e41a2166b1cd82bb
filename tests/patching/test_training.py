from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import flexkit
from flexkit.errors import ConfigError, PatchError
from flexkit.patching import added_parameters, get_patch
from tests.patching.ways import (
    assert_close,
    every_family,
    families,
    inputs_of,
    logits_of,
    patched,
    plain,
)
from tests.zoo import Row, low_res

ROWS = (Row((None,), 9), Row((None, None), 7), Row((), 8))


def with_labels(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Two turns of labels in the words of each row, another number in each, and the positions that predict them."""
    labels, predicting = torch.full_like(inputs["input_ids"], -100), []
    length = labels.shape[1]
    for row, turns in enumerate(([-6, -5, -2, -1], [-5, -2, -1], [-7, -4, -3, -1])):
        labels[row, turns] = inputs["input_ids"][row, turns]
        predicting.append([length + turn - 1 for turn in turns])
    return inputs | {"labels": labels}, predicting


def trained(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """Only what patching added is trained."""
    model.requires_grad_(False)
    for parameter in flexkit.flex_parameters(model):
        parameter.requires_grad_(True)
    return model


def gradients(model: tf.PreTrainedModel) -> dict[str, Tensor]:
    return {name: entry.grad.clone() for name, entry in model.named_parameters() if entry.grad is not None}


@families
@pytest.mark.parametrize("is_training", [True, False])
def test_label_predicting_positions_query(name: str, is_training: bool) -> None:
    model = patched(name).train(is_training)
    inputs, predicting = with_labels(inputs_of(name, ROWS))
    with flexkit.trace(model) as trace:
        output = model(**inputs)
    found = [[int(entry) for entry in row if entry >= 0] for row in trace.steps[0].queries]
    assert found == [predicting[0], predicting[1], []]
    base, _ = with_labels(low_res(inputs))
    reference = model(**base).logits
    changed = (output.logits != reference).any(-1)
    assert bool(output.loss.isfinite())
    for row, positions in enumerate(predicting[:2]):
        assert changed[row, positions].all()
        assert not changed[row, : positions[0]].any()
    assert not changed[2].any()


@families
def test_labels_alike_in_train_and_eval(name: str) -> None:
    model = patched(name)
    inputs, _ = with_labels(inputs_of(name, ROWS))
    losses = [model.train(is_training)(**inputs).loss for is_training in (True, False)]
    assert_close(losses[0], losses[1])


@families
def test_no_label_at_all(name: str) -> None:
    model, inputs = patched(name), inputs_of(name, ROWS)
    labels = torch.full_like(inputs["input_ids"], -100)
    assert torch.equal(logits_of(model, inputs, labels=labels), logits_of(model, low_res(inputs)))


@every_family
@pytest.mark.parametrize("start_layer", [1, 3])
def test_gradients_where_layers_read_and_nowhere_else(name: str, start_layer: int) -> None:
    model = trained(patched(name, start_layer=start_layer)).train()
    inputs, _ = with_labels(inputs_of(name, ROWS))
    model(**inputs).loss.backward()
    found = gradients(model)
    layers = {int(key.split(".layers.")[1].split(".")[0]) for key in found}
    assert layers == set(range(start_layer, 4))
    assert found.keys() == added_parameters(model).keys()
    assert all(bool(value.isfinite().all()) and bool(value.any()) for value in found.values())


@families
def test_no_gradient_through_the_high_res_view(name: str) -> None:
    model = patched(name).train().requires_grad_(True)
    inputs, _ = with_labels(inputs_of(name, ROWS))
    views = [key for key in inputs if key.endswith("pixel_values")]
    for key in views:
        inputs[key].requires_grad_(True)
    model(**inputs).loss.backward()
    assert inputs["hd_pixel_values"].grad is None
    assert bool(inputs["pixel_values"].grad.any())
    model.zero_grad()
    del inputs["pixel_values"]
    model(**inputs).loss.backward()
    tower = [key for key in gradients(model) if "vis" in key.split(".layers.")[0] or "projector" in key]
    assert not any(bool(gradients(model)[key].any()) for key in tower)
    assert bool(gradients(model)[next(iter(added_parameters(model)))].any())


@families
def test_alpha_zero_is_the_base_model(name: str) -> None:
    model, inputs = patched(name, alpha=0.0), inputs_of(name, ROWS)
    assert torch.equal(logits_of(model, inputs), logits_of(model, low_res(inputs)))
    flexkit.set_alpha(model, 1.0)
    assert torch.equal(logits_of(model, inputs), logits_of(patched(name), inputs))


@families
@pytest.mark.parametrize("alpha", [0.25, 0.7])
def test_alpha_between_interpolates_a_layer(name: str, alpha: float) -> None:
    model, inputs = patched(name), inputs_of(name, ROWS)
    seen: list[Tensor] = []
    attention = get_patch(model).layers[get_patch(model).start_layer].attention
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for value in (0.0, 1.0, alpha):
        flexkit.set_alpha(model, value)
        logits_of(model, inputs)
    base, full, ours = seen
    assert not torch.equal(base, full)
    assert_close(ours, (1 - alpha) * base + alpha * full)


def test_alpha_out_of_range() -> None:
    model = patched("llava")
    for wrong in (-0.1, 1.5, float("nan"), "1", None):
        with pytest.raises(ConfigError, match="alpha"):
            flexkit.set_alpha(model, wrong)  # type: ignore[arg-type]
    assert get_patch(model).config.alpha == 1.0
    with pytest.raises(PatchError, match="not patched"):
        flexkit.set_alpha(plain("llava"), 0.5)


@families
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("trains_all", [True, False])
def test_gradient_checkpointing_changes_nothing(name: str, use_reentrant: bool, trains_all: bool) -> None:
    inputs, _ = with_labels(inputs_of(name, ROWS))
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for checkpoints in (False, True):
        model = patched(name, low_res_keys="replace").train()
        model = model.requires_grad_(True) if trains_all else trained(model)
        if checkpoints:
            settings: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
            model.gradient_checkpointing_enable(**settings)
            model.enable_input_require_grads()
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss, gradients(model)))
    (loss, expected), (checkpointed_loss, ours) = found
    assert_close(checkpointed_loss, loss)
    assert added_parameters(model).keys() <= expected.keys()
    assert ours.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-7, atol=1e-9)


@families
def test_a_few_steps_lower_the_loss_and_leave_the_base(name: str) -> None:
    model = trained(patched(name)).train()
    inputs, _ = with_labels(inputs_of(name, ROWS))
    added = added_parameters(model).keys()
    before = {key: value.clone() for key, value in model.state_dict().items() if key not in added}
    base = logits_of(model, low_res(inputs))
    optimizer = torch.optim.AdamW(flexkit.flex_parameters(model), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(logits_of(model, low_res(inputs)), base)
    flexkit.unpatch_model(model)
    assert model.state_dict().keys() == before.keys()


def test_only_the_added_parameters_are_listed() -> None:
    model = patched("llava", start_layer=2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = sorted(names[id(parameter)] for parameter in flexkit.flex_parameters(model))
    assert listed == [
        f"model.language_model.layers.{layer}.self_attn.{kind}_proj_hd.weight" for layer in (2, 3) for kind in "kv"
    ]
    with pytest.raises(PatchError, match="not patched"):
        list(flexkit.flex_parameters(plain("llava")))


@families
def test_added_projections_of_a_frozen_model_are_trainable(name: str) -> None:
    model = plain(name).requires_grad_(False)
    flexkit.patch_model(model, trained=True)
    assert all(parameter.requires_grad for parameter in flexkit.flex_parameters(model))
    assert sum(parameter.requires_grad for parameter in model.parameters()) == len(added_parameters(model))
