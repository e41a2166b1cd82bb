"""What the published code computes, on checkpoints in its own layout, is what flexkit computes."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from flexkit.checkpoints import load_llava_flexattn
from flexkit.patching import get_patch, set_alpha
from flexkit.tracing import trace

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
PLACEHOLDER, IGNORED = -200, -100
STEPS = 6

close = {"rtol": 0.0, "atol": 1e-4}


@dataclass
class Case:
    model: LlavaForConditionalGeneration
    expected: dict[str, Tensor]
    grid: tuple[int, int]
    high: Tensor
    low: Tensor
    ids: Tensor
    labels: Tensor
    image_size: Tensor

    @property
    def views(self) -> dict[str, Tensor]:
        return {"pixel_values": self.low, "hd_pixel_values": self.high, "hd_image_sizes": self.image_size}


def expanded(tokens: Tensor, at: Tensor, count: int, value: int) -> Tensor:
    """Put ``count`` values in the place of the one at ``at``."""
    before, after = tokens[:, :at], tokens[:, at + 1 :]
    return torch.cat([before, torch.full((1, count), value), after], dim=1)


@pytest.fixture(scope="module", params=["small-wide", "pool-wide"])
def case(request: pytest.FixtureRequest) -> Case:
    folder = REFERENCE / request.param
    expected = load_file(folder / "expected.safetensors")
    width, height = json.loads((folder / "case.json").read_text())["original_size"]
    model = load_llava_flexattn(folder)
    size = model.config.vision_config.image_size
    high = ((expected["image"] / 255 - MEAN) / STD)[None]
    at = (expected["input_ids"][0] == PLACEHOLDER).nonzero().squeeze()
    cells = model.config.image_seq_length
    return Case(
        model=model,
        expected=expected,
        grid=(size // 14, size // 14),
        high=high,
        low=F.interpolate(high, size=(size, size), mode="bilinear", antialias=True),
        ids=expanded(expected["input_ids"], at, cells, model.config.image_token_id),
        labels=expanded(expected["labels"], at, cells, IGNORED),
        image_size=torch.tensor([[height, width]]),
    )


def test_features_of_both_views(case: Case) -> None:
    with torch.no_grad():
        low = case.model.get_image_features(case.low).pooler_output[0]
    torch.testing.assert_close(low, case.expected["low_res_features"], **close)
    geometry = get_patch(case.model).geometry
    (high,) = geometry.encode(case.model, {"pixel_values": case.high}, [case.grid], (3, 3))
    torch.testing.assert_close(high, case.expected["hr_features"], **close)


def test_prefill_decoding_and_selection(case: Case) -> None:
    vocabulary = case.model.config.image_token_id
    with torch.no_grad(), trace(case.model) as recorded:
        output = case.model(case.ids, attention_mask=torch.ones_like(case.ids), use_cache=True, **case.views)
        prefill, decoded = output.logits[0, -1], []
        for token in case.expected["generated"]:
            output = case.model(token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
            decoded.append(output.logits[0, -1])
    torch.testing.assert_close(prefill[:vocabulary], case.expected["prefill_logits_last"], **close)
    torch.testing.assert_close(torch.stack(decoded)[:, :vocabulary], case.expected["decode_logits"], **close)

    masks = {name: mask for name, mask in case.expected.items() if name.startswith("select_mask")}
    assert len(masks) == (1 + STEPS) * 4
    for name, mask in masks.items():
        step, layer = map(int, re.findall(r"\d+", name))
        assert torch.equal(recorded.mask(step, layer).flatten(), mask), name


def test_generation(case: Case) -> None:
    tokens = case.model.generate(
        input_ids=case.ids, **case.views, max_new_tokens=STEPS, do_sample=False, eos_token_id=None
    )
    assert torch.equal(tokens[0, case.ids.shape[1] :], case.expected["generated"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("stage", "alpha"), [("1.0", 1.0), ("0.03", 0.3)])
def test_label_predicting_rows_and_loss(case: Case, stage: str, alpha: float, training: bool) -> None:
    vocabulary = case.model.config.image_token_id
    set_alpha(case.model, alpha)
    case.model.train(training)
    try:
        with torch.no_grad():
            output = case.model(case.ids, labels=case.labels, **case.views)
    finally:
        case.model.eval()
        set_alpha(case.model, 1.0)
    logits = output.logits[0, :, :vocabulary]
    torch.testing.assert_close(logits, case.expected[f"train_logits.step{stage}"], **close)
    loss = F.cross_entropy(logits[:-1], case.labels[0, 1:], ignore_index=IGNORED)
    torch.testing.assert_close(loss, case.expected[f"train_loss.step{stage}"], **close)
    # The model's own loss normalises over the placeholder's row too, whose logit is 0.
    assert not output.logits[..., vocabulary:].any()
    own = F.cross_entropy(F.pad(logits, (0, 1))[:-1], case.labels[0, 1:], ignore_index=IGNORED)
    torch.testing.assert_close(output.loss, own)


def test_without_high_res_view_it_is_the_base_model(case: Case) -> None:
    with torch.no_grad():
        output = case.model(case.ids, pixel_values=case.low)
    logits = output.logits[0, -1, : case.model.config.image_token_id]
    torch.testing.assert_close(logits, case.expected["base_logits_last"], **close)


@pytest.mark.parametrize("wrong", ["policy", "layer", "margins", "positions"])
def test_the_comparison_notices_a_wrong_detail(case: Case, wrong: str) -> None:
    patch = get_patch(case.model)
    right, views = patch.config, case.views
    if wrong == "policy":
        patch.config = right.replace(policy=right.policy.dilated(1))
    elif wrong == "layer":
        patch.config = right.replace(select_from="same")
    elif wrong == "positions":
        patch.config = right.replace(positions="fractional")
    else:
        views["hd_image_sizes"] = torch.tensor([[400, 400]])
    try:
        with torch.no_grad():
            output = case.model(case.ids, **views)
    finally:
        patch.config = right
    error = output.logits[0, -1, :-1] - case.expected["prefill_logits_last"]
    assert error.abs().max() > 1e-3
