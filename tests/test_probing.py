"""Finding the layer that reads."""

from typing import Any

import pytest
import torch

import flexkit
from flexkit.visual_search.data import Chats, Collator
from flexkit.visual_search.model import ZOOM, build_model, build_processor

FREE = flexkit.FlexConfig.training_free(gate=None, zoom=ZOOM)


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


def test_no_layer_reads() -> None:
    found = flexkit.LayerProbe({2: 1.2, 0: 1.3, 1: 1.1}, 1.0)
    assert (found.layer, found.gain) == (1, 0.0)


def test_what_cannot_be_probed(model: Any, samples: list[dict[str, torch.Tensor]]) -> None:
    with pytest.raises(flexkit.HighResInputError, match="no samples"):
        flexkit.probe_start_layer(model, [])
    without = {name: value for name, value in samples[0].items() if name != "labels"}
    with pytest.raises(flexkit.HighResInputError, match="needs labels"):
        flexkit.probe_start_layer(model, [without])
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
