"""transformers' Trainer on the added projections alone, with a task that needs the high-res view."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import flexkit
from flexkit.patching import added_parameters
from tests.training.stripes import (
    ANSWERS,
    Example,
    base_model,
    example,
    examples,
    families,
    joined,
    model_for,
    state_of,
    with_noise,
)
from tests.training.trainers import losses_of, trainer_for
from tests.zoo import ZOO, low_res

NOT_KNOWING = math.log(2)
"""The least loss that can be expected of who does not see the stripes: both answers come equally often."""
View = Callable[[list[Example]], list[Example]]


def trained(name: str, folder: Path, view: View = list, **settings: Any) -> Trainer:
    """A Trainer after 30 steps, each on pictures of its own."""
    trainer = trainer_for(model_for(name), view(examples(name, 240)), folder, max_steps=30, **settings)
    trainer.train()
    return trainer


@families
def test_the_low_res_view_shows_nothing(name: str) -> None:
    rows, columns = ZOO[name].grid
    pictures = [example(name, cell, answer) for cell in (0, rows * columns - 1) for answer in (0, 1)]
    first = low_res(pictures[0])
    for picture in pictures[1:]:
        assert torch.equal(picture["pixel_values"], first["pixel_values"])
        assert torch.equal(picture["input_ids"][:, :-1], first["input_ids"][:, :-1])
        assert not torch.equal(picture["hd_pixel_values"], pictures[0]["hd_pixel_values"])


@families
def test_it_learns_to_read_what_only_the_high_res_view_shows(name: str, tmp_path: Path) -> None:
    before = state_of(model_for(name))
    trainer = trained(name, tmp_path)
    model: Any = trainer.model
    added = added_parameters(model).keys()
    assert all(torch.equal(value, before[key]) != (key in added) for key, value in state_of(model).items())

    unseen = examples(name, 16, seed=1)
    assert trainer.evaluate(unseen)["eval_loss"] < 0.8 * NOT_KNOWING
    assert losses_of(trainer)[-5:].mean() < 0.8 * NOT_KNOWING
    batch = joined(unseen)
    with torch.no_grad():
        logits = model(**batch).logits
    right = logits[:, -2, list(ANSWERS)].argmax(-1) == torch.arange(16) % 2
    assert right.sum() >= 14

    flexkit.save_flex(model, tmp_path / "added")
    base = base_model(name)
    without = base(**low_res(batch)).logits
    loaded = flexkit.load_flex(base, tmp_path / "added")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, logits)
    assert torch.equal(loaded(**low_res(batch)).logits, without)
    assert torch.equal(model(**low_res(batch)).logits, without)


def test_from_noise_in_place_of_the_high_res_view_it_learns_nothing(tmp_path: Path) -> None:
    trainer = trained("llava", tmp_path, with_noise)
    assert trainer.evaluate(with_noise(examples("llava", 64, seed=1)))["eval_loss"] > 0.9 * NOT_KNOWING


def test_without_the_high_res_view_nothing_changes(tmp_path: Path) -> None:
    trainer = trained("llava", tmp_path, lambda rows: [low_res(row) for row in rows], weight_decay=0.0)
    before = state_of(model_for("llava"))
    assert all(torch.equal(value, before[key]) for key, value in state_of(trainer.model).items())
    assert losses_of(trainer)[-5:].mean() > NOT_KNOWING


@pytest.mark.parametrize("removes", [True, False])
def test_columns_that_no_forward_takes(removes: bool, tmp_path: Path) -> None:
    noted: list[dict[str, Any]] = [row | {"note": "?"} for row in examples("qwen2_5_vl", 8)]
    trainer = trainer_for(model_for("qwen2_5_vl"), noted, tmp_path, max_steps=1, remove_unused_columns=removes)
    if removes:
        trainer.train()
        assert losses_of(trainer).isfinite().all()
    else:
        with pytest.raises(TypeError, match="str"):
            trainer.train()
