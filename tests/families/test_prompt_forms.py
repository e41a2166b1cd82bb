"""``generate`` with high-res inputs takes a prompt in every form in which the base model's own takes one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flexkit
from flexkit import FlexConfig, HighResInputError
from tests.patching.ways import assert_close, generate
from tests.zoo import CONTEXT, IMAGE, MAIN, VOCABULARY, ZOO, Family, Row, low_res, prompt

Form = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]

_OF_WORDS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


def _without_words(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name not in _OF_WORDS}


def _without_ids(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "input_ids"}


def _as_inputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    main = model.main_input_name
    return {"inputs" if name == main else name: value for name, value in inputs.items()}


def _with_embeddings(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}


def _as_embeddings(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return _without_ids(model, _with_embeddings(model, inputs))


FORMS: tuple[Form, ...] = (_without_words, _without_ids, _as_inputs, _with_embeddings, _as_embeddings)
REFUSED = {("t5gemma2", _as_embeddings)}
"""Forms that do not say where images stand."""


def said(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    """``(rows, steps, vocabulary)``: raw logits of two steps."""
    given = {name: value.clone() for name, value in inputs.items()}  # some models write into their prompt
    # A second image would be one too many.
    settings["suppress_tokens"] = list(range(IMAGE, VOCABULARY))
    return torch.stack(generate(model, given, 2, **settings).logits, dim=1)


def tried(model: Any, inputs: dict[str, Tensor], form: Form, **settings: Any) -> dict[str, Tensor] | None:
    """The inputs in a form, and None if the base model takes none such."""
    try:
        made = form(model, inputs)
        said(model, low_res(made), **settings)
    except Exception:
        return None
    return made


def patched(family: Family, model: Any, **settings: Any) -> Any:
    flexkit.patch_model(model, FlexConfig(zoom=2, policy=flexkit.TopK(3), **settings), trained=True)
    return model


@pytest.mark.parametrize("name", [*(name for name in CONTEXT if name in ZOO), *MAIN])
def test_what_the_base_model_takes(name: str) -> None:
    """And where it hears the same words in two forms, it reads the same."""
    family, model, inputs = ZOO[name], ZOO[name].model(), prompt(ZOO[name], [Row()])
    if name == "blip":
        model.config.text_config.eos_token_id = 2  # ends the prompt that it makes where it is given none
    forms = {form: made for form in FORMS if (made := tried(model, inputs, form)) is not None}
    assert forms
    base, heard = said(model, low_res(inputs)), {form: said(model, low_res(made)) for form, made in forms.items()}
    patched(family, model)
    read = said(model, inputs)
    for form, made in forms.items():
        if (name, form) in REFUSED:
            with pytest.raises(HighResInputError, match="pass them in place of"):
                said(model, made)
            continue
        ours = said(model, made)
        if torch.equal(ours[:, 0], heard[form][:, 0]):  # then no word of the prompt stands for the image (IDEFICS2)
            other = {
                key: -value if "pixel" in key and value.is_floating_point() else value for key, value in made.items()
            }
            assert torch.equal(said(model, low_res(other))[:, 0], heard[form][:, 0]), form
        if torch.equal(heard[form][:, 0], base[:, 0]):
            assert_close(ours[:, 0], read[:, 0])


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("name", ("blip-2", "git", "idefics"))
def test_with_beams_and_without_a_cache(name: str, settings: dict[str, Any]) -> None:
    model, inputs = ZOO[name].model(), prompt(ZOO[name], [Row()])
    forms = [made for form in FORMS if (made := tried(model, inputs, form, **settings)) is not None]
    heard = [said(model, low_res(made), **settings) for made in forms]
    patched(ZOO[name], model)
    for made, base in zip(forms, heard, strict=True):
        assert not torch.equal(said(model, made, **settings)[:, 0], base[:, 0])


@pytest.mark.parametrize("name", ("git", "mllama", "llava"))
def test_a_gate_that_is_always_open_changes_nothing(name: str) -> None:
    """Though the model runs twice, and GIT writes positions into the embeddings that it is given."""
    model, inputs = ZOO[name].model(), prompt(ZOO[name], [Row()])
    given = _as_embeddings(model, inputs)
    expected = said(patched(ZOO[name], model), given)
    flexkit.unpatch_model(model)
    assert_close(said(patched(ZOO[name], model, gate=0.0), given), expected)
