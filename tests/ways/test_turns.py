"""A cache that is used again: one prompt with several endings, and conversations of several turns."""

import copy

import pytest
import torch
import transformers as tf
from torch import Tensor

from tests.patching.ways import assert_close, generate, logits_of, new_tokens
from tests.versions import finds_second_images
from tests.ways.questions import ONE, longer, patched_model, question, six, six_but
from tests.zoo import IMAGE, ZOO, low_res, prompt

ENDINGS = torch.tensor([[11, 12, 13], [21, 22, 23]])
ANSWER = 3


def queries_at(length: int, *places: slice) -> Tensor:
    mask = torch.zeros(1, length, dtype=torch.bool)
    for place in places:
        mask[:, place] = True
    return mask


@six
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("reads", [True, False])
def test_one_prefix_and_several_endings(name: str, kind: str, reads: bool) -> None:
    """The prefix is run once; with no querying position in it, its cache is the base model's."""
    model, inputs = patched_model(name), question(name).inputs
    config, start = model.config.get_text_config(), inputs["input_ids"].shape[1]

    def empty() -> tf.Cache:
        return tf.DynamicCache(config=config) if kind == "dynamic" else tf.StaticCache(config=config, max_cache_len=64)

    prefix = empty()
    named = {} if reads else {"hd_queries": queries_at(start)}
    prefilled = logits_of(model, inputs, past_key_values=prefix, **named)
    assert torch.equal(prefilled, logits_of(model, low_res(inputs), past_key_values=empty())) != reads
    for ending in ENDINGS:
        whole = longer(inputs, ending)
        answer = generate(model, {"input_ids": whole["input_ids"]}, ANSWER, past_key_values=copy.deepcopy(prefix))
        decoded = longer(whole, new_tokens(answer)[0, :-1])
        asked = slice(start + len(ending) - 1, None)
        prefix_end = slice(start - 1, start) if reads else slice(0)
        queries = queries_at(decoded["input_ids"].shape[1], prefix_end, asked)
        afresh = logits_of(model, decoded, hd_queries=queries)[0, asked]
        assert_close(torch.cat(answer.logits), afresh)
        assert (afresh - logits_of(model, low_res(decoded))[0, asked]).abs().max() > 1e-2


@six
@pytest.mark.parametrize("again", ["words only", "views again"])
def test_a_second_turn_of_words(name: str, again: str) -> None:
    model, inputs = patched_model(name), question(name).inputs
    first = generate(model, inputs, ANSWER)
    said = torch.cat([first.sequences, ENDINGS[:1]], dim=1)
    views = {key: value for key, value in inputs.items() if key.startswith("hd_")} if again == "views again" else {}
    second = generate(model, {"input_ids": said, **views}, ANSWER, past_key_values=first.past_key_values)

    start, held, asked = inputs["input_ids"].shape[1], first.sequences.shape[1] - 1, said.shape[1] - 1
    decoded = longer(inputs, second.sequences[0, start:-1])
    # What was said last in turn one was not run there, but as a word of turn two.
    queries = queries_at(decoded["input_ids"].shape[1], slice(start - 1, held), slice(asked, None))
    afresh = logits_of(model, decoded, hd_queries=queries)[0, asked:]
    assert_close(torch.cat(second.logits), afresh)
    assert (afresh - logits_of(model, low_res(decoded))[0, asked:]).abs().max() > 1e-2


def second_image(name: str, given: str, *, views: bool) -> tuple[Tensor, Tensor]:
    """Logits of the second turn of a conversation, which brings an image of its own, and the same from the start."""
    model, inputs, later = patched_model(name), question(name).inputs, prompt(ZOO[name], ONE, seed=50)
    if not views:
        inputs, later = low_res(inputs), low_res(later)
    first = generate(model, inputs, ANSWER)
    said = torch.cat([first.sequences, later["input_ids"]], dim=1)
    held = said.shape[1] - later["input_ids"].shape[1] - 1
    ids = said if given == "all ids" else said[:, held:]
    turn = dict(later, input_ids=ids, attention_mask=torch.ones_like(said)) | typed(later, ids)
    if given == "all ids" and "image_grid_thw" in later:
        turn["image_grid_thw"] = torch.cat([inputs["image_grid_thw"], later["image_grid_thw"]])
    second = generate(model, turn, ANSWER, past_key_values=first.past_key_values)

    whole = {key: torch.cat([inputs[key], later[key]]) for key in later if "pixel" in key or "image_" in key}
    whole["input_ids"] = torch.cat([said, new_tokens(second)[:, :-1]], dim=1)
    whole |= {"attention_mask": torch.ones_like(whole["input_ids"])} | typed(later, whole["input_ids"])
    start, asked = inputs["input_ids"].shape[1], slice(said.shape[1] - 1, None)
    if views:
        whole["hd_queries"] = queries_at(whole["input_ids"].shape[1], slice(start - 1, held), asked)
    return torch.cat(second.logits), logits_of(model, whole)[0, asked]


def typed(like: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Token types, where a model takes them."""
    return {key: (ids == IMAGE).long() for key in ("token_type_ids", "mm_token_type_ids") if key in like}


CAN_GO_ON = {"all ids": {"llava", "internvl", "gemma3", "llava_next"}, "new ids": {"llava", "internvl", "llava_next"}}
"""Which base models go on in their cache with a second image; the others refuse, or answer as if it stood elsewhere."""


@six_but("gemma3", finds_second_images)
@pytest.mark.parametrize("given", CAN_GO_ON)
def test_a_second_turn_with_an_image(name: str, given: str) -> None:
    if name not in CAN_GO_ON[given]:
        with pytest.raises((AssertionError, ValueError, LookupError, StopIteration, RuntimeError)):
            assert_close(*second_image(name, given, views=False))
        return
    ours, afresh = second_image(name, given, views=True)
    assert_close(ours, afresh)
    assert (afresh[0] - second_image(name, given, views=False)[1][0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_second_image_with_its_positions(name: str) -> None:
    """Told the positions, these go on too, as far as one can without ``generate``."""
    model, inputs, later = patched_model(name), question(name).inputs, prompt(ZOO[name], ONE, seed=50)
    whole = {key: torch.cat([inputs[key], later[key]], dim=int("ids" in key or "mask" in key)) for key in later}
    start, length = inputs["input_ids"].shape[1], whole["input_ids"].shape[1]
    named = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions, _ = model.model.get_rope_index(**{key: whole[key] for key in named})
    cache = tf.DynamicCache(config=model.config.get_text_config())
    logits_of(model, inputs | {"position_ids": positions[..., :start]}, past_key_values=cache)
    turn = later | {"position_ids": positions[..., start:], "attention_mask": whole["attention_mask"]}
    ours = logits_of(model, turn, past_key_values=cache)[:, -1]
    queries = queries_at(length, slice(start - 1, start), slice(-1, None))
    assert_close(ours, logits_of(model, whole, hd_queries=queries)[:, -1])
    assert (ours - logits_of(model, low_res(whole))[:, -1]).abs().max() > 1e-2
