"""What a model is asked to return, and the forms in which it is called."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from torch import Tensor

import flexkit
from tests.patching.ways import assert_close, assert_same_logits, generate, logits_of, through_a_file
from tests.ways.questions import TOKENS, own_model, patch, patched_model, plain_model, question, six
from tests.zoo import low_res

WANTED = {"output_attentions": True, "output_hidden_states": True}


@six
@pytest.mark.parametrize("keep", [0, 1, 3, [-1], [-1, -4]], ids=str)
def test_logits_to_keep(name: str, keep: int | list[int]) -> None:
    model, inputs = patched_model(name), question(name).inputs
    length = inputs["input_ids"].shape[1]
    places = torch.arange(length)[-keep:] if isinstance(keep, int) else torch.arange(length)[keep]
    kept = logits_of(model, inputs, logits_to_keep=keep if isinstance(keep, int) else torch.tensor(keep))
    queries = torch.isin(torch.arange(length), places if keep else torch.tensor([length - 1]))[None]
    whole = logits_of(model, inputs, hd_queries=queries)
    assert_close(kept, whole[:, places])
    assert (kept[:, -1] - question(name).base.logits[0]).abs().max() > 1e-2 or keep == [-1, -4]


@six
def test_attentions_and_hidden_states(name: str) -> None:
    """Both are the base model's in form; the states are those of the patched model, the attentions over base keys."""
    model, inputs = own_model(name), question(name).inputs
    model.set_attn_implementation("eager")
    with torch.no_grad():
        base = model(**low_res(inputs), **WANTED)
        ours = patch(model)(**inputs, **WANTED)
    assert_close(ours.logits[:, -1].float(), logits_of(model, inputs)[:, -1].float())
    for field in ("attentions", "hidden_states"):
        mine, theirs = ours[field], base[field]
        assert [tensor.shape for tensor in mine] == [tensor.shape for tensor in theirs]
        assert torch.equal(mine[0], theirs[0])
        assert all(torch.equal(a[..., :-1, :], b[..., :-1, :]) for a, b in zip(mine, theirs, strict=True))
        assert not torch.equal(mine[-1][..., -1, :], theirs[-1][..., -1, :])
    torch.testing.assert_close(ours.attentions[-1].sum(-1), torch.ones_like(ours.attentions[-1][..., 0]))


@six
def test_attentions_and_hidden_states_of_every_step(name: str) -> None:
    model, inputs = own_model(name), question(name).inputs
    model.set_attn_implementation("eager")
    base = generate(model, low_res(inputs), 3, **WANTED)
    ours = generate(patch(model), inputs, 3, **WANTED)
    for field in ("attentions", "hidden_states"):
        for mine, theirs in zip(ours[field], base[field], strict=True):
            assert [tensor.shape for tensor in mine] == [tensor.shape for tensor in theirs]


@six
def test_tuples(name: str) -> None:
    model, inputs = patched_model(name), question(name).inputs
    with torch.no_grad():
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)


def embedded(model: tf.PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompt as embeddings; what its ids alone would tell goes along."""
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    with torch.no_grad():
        rest["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    if hasattr(model.model, "get_rope_index"):
        named = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        rest["position_ids"], _ = model.model.get_rope_index(**{key: inputs[key] for key in named})
    return rest


@six
def test_embeddings(name: str) -> None:
    model, inputs = patched_model(name), question(name).inputs
    with flexkit.disabled(model):
        assert_close(logits_of(model, embedded(model, inputs)), logits_of(model, inputs))
    assert_close(logits_of(model, embedded(model, inputs)), logits_of(model, inputs))


@six
def test_an_answer_to_embeddings(name: str) -> None:
    """Where the base model gives one."""
    model, asked = patched_model(name), question(name)
    given = embedded(model, asked.inputs)
    try:
        base = generate(plain_model(name), low_res(given), TOKENS)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        pytest.skip(f"{name} itself generates nothing from embeddings with an image: {error}")
    if not torch.equal(base.logits[-1], asked.base.logits[-1]):
        pytest.skip(f"{name} itself answers otherwise from embeddings")
    answer = generate(model, given, TOKENS)
    assert all(torch.equal(*steps) for steps in zip(answer.logits, asked.answer.logits, strict=True))


@six
def test_inference_mode(name: str) -> None:
    asked = question(name)
    with torch.inference_mode():
        answer = generate(patched_model(name), asked.inputs, TOKENS)
        logits = patched_model(name)(**asked.inputs).logits
    assert_same_logits(answer, asked.answer)
    assert logits.is_inference()
    # What was read in inference mode is not asked for outside.
    assert_same_logits(generate(patched_model(name), asked.inputs, TOKENS), asked.answer)


@six
def test_autocast(name: str) -> None:
    asked = question(name)
    model = own_model(name).float()
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in asked.inputs.items()}
    patch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, base = logits_of(model, inputs), logits_of(model, low_res(inputs))
    assert bool(ours.isfinite().all())
    exact = logits_of(model, inputs)
    assert (ours - exact)[:, -1].abs().mean() < (base - exact)[:, -1].abs().mean()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda inputs: pickle.loads(pickle.dumps(inputs)),
    "file": through_a_file,
    "BatchFeature": lambda inputs: tf.BatchFeature(dict(inputs)).to("cpu"),
}


@six
@pytest.mark.parametrize("way", COPIES)
def test_copied_inputs(name: str, way: str) -> None:
    asked = question(name)
    before = {key: value.clone() for key, value in asked.inputs.items()}
    copied = COPIES[way](asked.inputs)
    assert_same_logits(generate(patched_model(name), copied, TOKENS), asked.answer)
    assert copied.keys() == before.keys() and all(torch.equal(copied[key], before[key]) for key in before)
