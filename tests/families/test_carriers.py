"""Calls reach the attention that reads in training, in threads, in copies, and in every kind of generation."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flexkit
from flexkit import FlexConfig
from flexkit.errors import ConfigError, HighResInputError
from tests.versions import counts_positions_once, marked
from tests.zoo import CONTEXT, Row, low_res, prompt

CARRIERS = ("mllama", "florence2", "git", "aria", "blip-2", "idefics2", "blip", "vision-encoder-decoder-gpt2")
"""By keyword, by hand, through doors, by tag; through transformers' interface and past it."""
WORDS = ("mllama", "idefics", "git", "blip", "florence2", "t5gemma2", "vision-encoder-decoder-trocr")
every_carrier = pytest.mark.parametrize("name", CARRIERS)


def built(name: str, **settings: Any) -> Any:
    settings = {"zoom": 2, "policy": flexkit.TopK(3)} | settings
    model = flexkit.patch_model(CONTEXT[name].model(), FlexConfig(**settings), trained=True)
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(model):
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    return model


def batch(name: str, seed: int = 1) -> dict[str, Tensor]:
    return prompt(CONTEXT[name], [Row(), Row(words=2)], padding="right", seed=seed)


def said(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    inputs = {name: value.clone() for name, value in inputs.items()}
    return model.generate(**inputs, max_new_tokens=4, do_sample=False, **options)


@pytest.mark.parametrize("name", [name for name in CARRIERS if name != "git"])  # GIT has no checkpointing
def test_gradient_checkpointing(name: str) -> None:
    model, inputs = built(name), batch(name)
    added = list(flexkit.flex_parameters(model))

    def gradients() -> list[Tensor]:
        model.requires_grad_(False)
        for parameter in added:
            parameter.requires_grad_(True).grad = None
        model.train()
        model(**inputs).logits.double().pow(2).mean().backward()
        return [parameter.grad.clone() for parameter in added if parameter.grad is not None]

    expected = gradients()
    assert len(expected) == len(added) and any(gradient.any() for gradient in expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_carrier
def test_threads_do_not_meet(name: str) -> None:
    model, inputs = built(name), [batch(name, seed) for seed in (1, 2, 3)]

    def answer(index: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return model(**inputs[index]).logits, said(model, inputs[index])

    expected = [answer(index) for index in range(3)]
    equal: list[bool] = []

    def work(index: int) -> None:
        for _ in range(3):
            equal.append(all(map(torch.equal, answer(index), expected[index])))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 9


@every_carrier
def test_copies_are_patched_models_of_their_own(name: str) -> None:
    model, inputs = built(name), batch(name)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        for parameter in flexkit.flex_parameters(model):
            parameter.zero_()
        assert torch.equal(twin(**inputs).logits, expected)
        flexkit.unpatch_model(twin)
        assert not torch.equal(twin(**low_res(inputs)).logits, expected)


@pytest.mark.parametrize("name", (*CARRIERS, "udop", "t5gemma2"))
def test_what_was_added_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, inputs = built(name), batch(name)
    with torch.no_grad():
        expected = model(**inputs).logits
    flexkit.save_flex(model, tmp_path)
    other = flexkit.load_flex(CONTEXT[name].model(), tmp_path)
    with torch.no_grad():
        assert torch.equal(other(**inputs).logits, expected)


@every_carrier
def test_beams_are_those_of_each_row(name: str) -> None:
    model = built(name)
    rows = [Row(), Row(words=4)]
    together = said(model, prompt(CONTEXT[name], rows), num_beams=2)
    for index in range(2):
        alone = said(model, prompt(CONTEXT[name], rows, only=index), num_beams=2)
        assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize("name", marked(WORDS, git=counts_positions_once))
def test_without_a_cache(name: str) -> None:
    """Positions behind the prompt read as they do with one."""
    model, inputs = built(name), prompt(CONTEXT[name], [Row()])
    with_cache, without = (
        said(model, inputs, use_cache=use, return_dict_in_generate=True, output_logits=True) for use in (True, False)
    )
    torch.testing.assert_close(torch.stack(without.logits), torch.stack(with_cache.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in WORDS if name != "blip"])
def test_the_gate(name: str) -> None:
    inputs = batch(name)
    closed, opened, free = (built(name, gate=gate) for gate in (1e9, 0.0, None))
    flexkit.set_alpha(closed, 1.0)
    with flexkit.disabled(free):
        expected = said(free, inputs)
    assert torch.equal(said(closed, inputs), expected)
    assert torch.equal(said(opened, inputs), said(free, inputs))


@pytest.mark.parametrize("name", ["mllama", "florence2", "git", "vision-encoder-decoder-gpt2"])
def test_training_free(name: str) -> None:
    model = flexkit.patch_model(
        CONTEXT[name].model(), FlexConfig.training_free(high_res_states="features", zoom=2, gate=0.0)
    )
    inputs = batch(name)
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, model(**low_res(inputs)).logits)


def test_settings_of_words_mean_nothing_to_learned_queries() -> None:
    for settings in ({"gate": 1.0}, {"share_selection": True}):
        with pytest.raises(ConfigError, match=f"learned queries .* set {next(iter(settings))}=None"):
            built("aria", **settings)
    model, inputs = built("aria"), batch("aria")
    with pytest.raises(HighResInputError, match="learned queries read; leave it out"):
        model(**inputs, hd_queries=inputs["input_ids"] > 0)


def test_a_kernel_that_hides_most_of_an_image() -> None:
    model, inputs = built("kosmos-2"), batch("kosmos-2")
    model.image_to_text_projection.x_attn.is_causal = True  # as in early versions
    model.set_attn_implementation("sdpa")
    with pytest.raises(flexkit.UnsupportedModelError, match=r"first patches .* attn_implementation='eager'"):
        model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, model(**low_res(inputs)).logits)


def test_a_gate_past_which_the_model_generates() -> None:
    with pytest.raises(ConfigError, match="set gate=None"):
        said(built("blip", gate=1.0), batch("blip"))


@pytest.mark.parametrize("name", ["florence2", "vision-encoder-decoder", "pix2struct"])
def test_labels_of_a_decoder_are_its_inputs_shifted(name: str) -> None:
    model, inputs = built(name), prompt(CONTEXT[name], [Row()])
    labels = torch.tensor([[-100, 5, 6, -100]])
    inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
    with flexkit.trace(model) as trace, torch.no_grad():
        model(**inputs, labels=labels)
    assert trace.steps[0].queries.tolist() == [[1, 2]]


@every_carrier
def test_generation_is_traced(name: str) -> None:
    model, inputs = built(name), batch(name)
    with flexkit.trace(model) as trace:
        said(model, inputs)
    assert len(trace) == (1 if CONTEXT[name].learned_queries else 4)
    assert all(trace.mask(0, layer).any() for layer in trace.layers)


def refused(name: str, message: str, **changes: Any) -> None:
    model, inputs = built(name), batch(name)
    given = inputs | {key: change(inputs[key]) if callable(change) else change for key, change in changes.items()}
    for call in (lambda: model(**given), lambda: said(model, given)):
        with pytest.raises(HighResInputError, match=message):
            call()


def test_views_that_do_not_fit() -> None:
    refused(
        "florence2", r"last two \(2, 2\) times those of pixel_values", hd_pixel_values=lambda pixels: pixels[..., :-1]
    )
    refused("florence2", r"expected \(images, 3, height, width\)", hd_pixel_values=lambda pixels: pixels[None])
    refused("florence2", "shows 2 images .* zoom of 1 images", hd_pixel_values=lambda pixels: pixels[:1])
    refused(
        "instructblipvideo",
        r"expected \(videos, frames, 3, height, width\)",
        hd_pixel_values=lambda pixels: pixels[0],
    )
    refused("pix2struct", "one patch in each", hd_flattened_patches=lambda patches: patches[:, 1:])
    other = prompt(CONTEXT["pix2struct"], [Row(((1, 3),))] * 2)["hd_flattened_patches"]
    refused("pix2struct", r"grids \[\(2, 3\), \(2, 3\)\]; .* is a zoom of", hd_flattened_patches=other)
    refused("mllama", "prepare the prompt with flexkit.FlexProcessor", aspect_ratio_ids=lambda ratios: ratios + 1)
    refused("florence2", "row 1 of the prompt holds", input_ids=lambda ids: ids.roll(1, 0).tril())


def test_boxes_that_are_integers() -> None:
    """A tokenizer gives them as they are given; the model puts words with such boxes in the last cell."""
    model, inputs = built("udop"), batch("udop")
    boxes = (inputs["bbox"] * 1000).round()
    with torch.no_grad():
        found, expected = (model(**inputs | {"bbox": given}).logits for given in (boxes.long(), boxes.float()))
        low = model(**low_res(inputs) | {"bbox": boxes.long()}).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, low)


def test_a_view_without_its_images() -> None:
    model, inputs = built("florence2"), batch("florence2")
    del inputs["pixel_values"]
    with pytest.raises(HighResInputError, match=r"without the base model's \['pixel_values'\]"):
        model(**inputs)


def test_a_cache_takes_no_second_view() -> None:
    model, inputs = built("mllama"), batch("mllama")
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    with pytest.raises(HighResInputError, match="holds a high-res view already"):
        model(**inputs, past_key_values=cache)


def test_an_encoder_and_a_decoder_that_are_not_known() -> None:
    config = CONTEXT["vision-encoder-decoder"].config()
    config.decoder.model_type = "prophetnet"
    model = CONTEXT["vision-encoder-decoder"].model()
    model.config = config
    with pytest.raises(flexkit.UnsupportedModelError, match="'prophetnet' in a vision encoder-decoder"):
        flexkit.patch_model(model)
