"""Finding the layer that reads."""

import math
from typing import Any

import pytest
import torch

import flexkit
from flexkit.visual_search.data import Chats, Collator
from flexkit.visual_search.model import ZOOM, build_model, build_processor

FREE = flexkit.FlexConfig.training_free(high_res_states="features", gate=None, zoom=ZOOM)


@pytest.fixture(scope="module")
def samples() -> list[dict[str, torch.Tensor]]:
    collator = Collator(flexkit.FlexProcessor(build_processor(), ZOOM))
    return [collator([Chats(1, 3, {"attribute": 1.0}, turns)[index]]) for index, turns in enumerate((1, 2, 3))]


@pytest.fixture
def model() -> Any:
    return build_model().train()


@torch.no_grad()
def test_losses_are_those_of_models_that_read_in_one_layer(model: Any, samples: list[dict[str, torch.Tensor]]) -> None:
    found = flexkit.probe_start_layer(model, samples, FREE)
    assert model.training and not flexkit.is_patched(model)
    assert list(found.losses) == [0, 1, 2, 3]
    joint = Collator(flexkit.FlexProcessor(build_processor(), ZOOM))(
        [Chats(1, 3, {"attribute": 1.0}, turns)[index] for index, turns in enumerate((1, 2, 3))]
    )
    model.eval()
    low_res = {name: value for name, value in joint.items() if not name.startswith("hd_")}
    assert found.base_loss == pytest.approx(float(model(**low_res).loss), abs=1e-5)
    for layer in range(4):
        only = flexkit.Schedule({layer: flexkit.Threshold(48 / 255), layer + 1: flexkit.Nothing()})
        flexkit.patch_model(model, FREE.replace(start_layer=0, policy=only))
        assert found.losses[layer] == pytest.approx(float(model(**joint).loss), abs=1e-5)
        flexkit.unpatch_model(model)
    assert len(set(found.losses.values())) == 4
    assert found.gain == max(0.0, found.base_loss - min(found.losses.values()))


@pytest.mark.parametrize(
    ("losses", "layer", "gain"),
    [((2.0, 1.0, 1.0, 1.9), 1, 1.0), ((2.0, 1.4, 1.0), 1, 1.0), ((1.6, 2.0, 1.0), 2, 1.0), ((1.0, 2.0, 1.0), 0, 1.0)],
)
def test_the_first_layer_that_reads_well(losses: tuple[float, ...], layer: int, gain: float) -> None:
    found = flexkit.LayerProbe(dict(enumerate(losses)), 2.0)
    assert (found.layer, found.gain) == (layer, gain)


@torch.no_grad()
def test_standard_errors_are_those_of_the_samples(model: Any, samples: list[dict[str, torch.Tensor]]) -> None:
    other = {**samples[2], "labels": samples[2]["labels"].clone()}
    count = int(samples[0]["labels"].ne(-100).sum())
    other["labels"][:, other["labels"][0].ne(-100).nonzero()[count:, 0]] = -100
    alike = [samples[0], other]  # as many labels in each
    found = flexkit.probe_start_layer(model, alike, FREE)
    alone = [flexkit.probe_start_layer(model, [sample], FREE) for sample in alike]
    base = torch.tensor([each.base_loss for each in alone])
    assert found.base_standard_error == pytest.approx(float(base.std() / 2**0.5), abs=1e-6)
    for layer in found.losses:
        losses = torch.tensor([each.losses[layer] for each in alone])
        assert found.standard_errors[layer] == pytest.approx(float(losses.std() / 2**0.5), abs=1e-6)
        assert found.gain_standard_errors[layer] == pytest.approx(float((base - losses).std() / 2**0.5), abs=1e-6)
    assert math.isnan(alone[0].base_standard_error) and all(map(math.isnan, alone[0].standard_errors.values()))
    assert len(repr(found)) < 120


def test_tuples_are_outputs_too(model: Any, samples: list[dict[str, torch.Tensor]]) -> None:
    found = flexkit.probe_start_layer(model, samples, FREE)
    assert flexkit.probe_start_layer(model, [{**sample, "return_dict": False} for sample in samples], FREE) == found


def test_no_layer_reads() -> None:
    found = flexkit.LayerProbe({2: 1.2, 0: 1.3, 1: 1.1}, 1.0)
    assert (found.layer, found.gain) == (1, 0.0)


def test_what_cannot_be_probed(model: Any, samples: list[dict[str, torch.Tensor]]) -> None:
    with pytest.raises(flexkit.HighResInputError, match="no samples"):
        flexkit.probe_start_layer(model, [])
    without = {name: value for name, value in samples[0].items() if name != "labels"}
    with pytest.raises(flexkit.HighResInputError, match="needs labels"):
        flexkit.probe_start_layer(model, [without])
    silent = {**samples[1], "labels": torch.full_like(samples[1]["labels"], -100)}
    with pytest.raises(flexkit.HighResInputError, match="sample 1 has no label but -100"):
        flexkit.probe_start_layer(model, [samples[0], silent])
    with pytest.raises(flexkit.HighResInputError, match="needs labels, a tensor"):
        flexkit.probe_start_layer(model, [{**samples[0], "labels": [[1]]}])
    assert not flexkit.is_patched(model)
    with pytest.raises(flexkit.ConfigError, match="select_from"):
        flexkit.probe_start_layer(model, samples, flexkit.FlexConfig.published())
    flexkit.patch_model(model, FREE)
    with pytest.raises(flexkit.PatchError, match="is patched"):
        flexkit.probe_start_layer(model, samples)


def test_a_model_is_left_as_it_was_also_by_an_error(model: Any, samples: list[dict[str, torch.Tensor]]) -> None:
    broken = {**samples[0], "hd_pixel_values": samples[0]["hd_pixel_values"][..., :-3]}
    with pytest.raises(flexkit.FlexkitError):
        flexkit.probe_start_layer(model, [broken])
    assert model.training and not flexkit.is_patched(model)
