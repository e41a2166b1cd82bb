"""Strategies of decoding where attention reads the image from a context beside the decoder's sequence."""

import threading
from typing import Any

import pytest
import torch
import transformers as tf

import flexkit
from tests.patching.ways import assert_close, assert_same_logits, logits_of, new_tokens
from tests.tiny_processors import tiny_tokenizer
from tests.versions import marked, runs_images_in_chunks
from tests.ways.contexts import LEARNED, each_that_decodes, forced_logits, longer, question, said
from tests.ways.questions import TOKENS, patch, patched_model, plain_model
from tests.zoo import CONTEXT, IMAGE, VOCABULARY, low_res


@each_that_decodes
def test_an_answer_is_that_of_a_call_over_all_of_it(name: str) -> None:
    asked, model = question(name), patched_model(name)
    (tokens,) = new_tokens(asked.answer)
    assert_close(torch.cat(asked.answer.logits), forced_logits(name, model, asked.inputs, tokens))
    assert asked.distance > 1e-2


@each_that_decodes
def test_sampling(name: str) -> None:
    model, inputs = patched_model(name), question(name).inputs
    tf.set_seed(7)
    settings = {"do_sample": True, "top_k": 0, "temperature": 2.0, "num_return_sequences": 3}
    written = new_tokens(said(model, inputs, **settings))
    forced = torch.stack([forced_logits(name, model, inputs, row) for row in written])
    tf.set_seed(7)
    for step in range(TOKENS):
        probabilities = (forced[:, step].float() / 2.0).softmax(-1)
        assert torch.equal(torch.multinomial(probabilities, 1)[:, 0], written[:, step])
    assert len(written.unique(dim=0)) > 1


@each_that_decodes
def test_beams(name: str) -> None:
    model, inputs = patched_model(name), question(name).inputs
    output = said(model, inputs, num_beams=3, num_return_sequences=2, output_scores=True)
    for row, score in zip(new_tokens(output), output.sequences_scores, strict=True):
        chosen = forced_logits(name, model, inputs, row).log_softmax(-1).gather(1, row[:, None])
        assert_close(score, chosen.mean())


CANNOT_GUESS = {
    "prompt lookup": ("mllama",),  # its cross-attention mask grows by one word at a time
    "patched assistant": ("mllama", "blip", "blip-2"),  # of the latter, generate needs pixels, which are not handed on
}
"""Base models that fail."""


@each_that_decodes
@pytest.mark.parametrize("kind", CANNOT_GUESS)
def test_words_that_are_guessed_ahead(name: str, kind: str) -> None:
    """They are read in one call: all that are kept have read the high-res view."""
    asked = question(name)
    settings: dict[str, Any] = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    if kind != "prompt lookup":
        settings = {"assistant_model": patch(CONTEXT[name].model(seed=3))}
    if name in CANNOT_GUESS[kind]:
        with pytest.raises((RuntimeError, TypeError)):
            said(plain_model(name), low_res(asked.inputs), **settings)
        return
    model, calls = patched_model(name), []
    counting = model.register_forward_pre_hook(lambda *given: calls.append(1))
    with flexkit.trace(model) as trace:
        assert torch.equal(said(model, asked.inputs, **settings).sequences, asked.answer.sequences)
    counting.remove()
    if name != "blip":  # calls its decoder past its forward
        assert len(trace) == (1 if name in LEARNED else len(calls))  # and the assistant has read nothing


@pytest.mark.parametrize(
    "name",
    marked(
        ["florence2", "pix2struct", "blip", "aria", "idefics2"],
        aria=runs_images_in_chunks,
        idefics2=runs_images_in_chunks,
    ),
)
def test_chunks(name: str) -> None:
    """Where the base model takes a prompt in chunks."""
    asked = question(name)
    assert_same_logits(said(patched_model(name), asked.inputs, prefill_chunk_size=2), asked.answer)


@pytest.mark.parametrize("name", ["mllama", "blip", "vision-encoder-decoder-gpt2", "idefics2"])
def test_streaming_from_a_thread(name: str) -> None:
    asked, tokenizer = question(name), tiny_tokenizer({"image_token": ("<image>", IMAGE)}, VOCABULARY)
    streamer = tf.TextIteratorStreamer(tokenizer, timeout=60)
    thread = threading.Thread(target=said, args=(patched_model(name), asked.inputs), kwargs={"streamer": streamer})
    thread.start()
    words = "".join(streamer).split()
    thread.join()
    assert words[-TOKENS:] == tokenizer.decode(asked.tokens[0]).split()


@pytest.mark.parametrize("name", ["mllama", "idefics", "aria", "idefics2"])
def test_a_second_turn(name: str) -> None:
    """In the cache of the first: its image is read by the words of both."""
    model, inputs = patched_model(name), question(name).inputs
    first = said(model, inputs)
    spoken = torch.cat([new_tokens(first)[0], torch.tensor([11, 12])])
    turn = low_res(longer(name, inputs, spoken))
    kept = {"input_ids", "attention_mask", "cross_attention_mask", "image_attention_mask"}
    if name == "idefics":  # keeps no keys of images, but makes them again
        kept.add("pixel_values")
    turn = {key: value for key, value in turn.items() if key in kept}
    second = said(model, turn, past_key_values=first.past_key_values)
    whole = longer(name, inputs, torch.cat([spoken, new_tokens(second)[0, :-1]]))
    if name not in LEARNED:
        places = torch.arange(whole["input_ids"].shape[1])
        start, held, asked = inputs["input_ids"].shape[1], turn["input_ids"].shape[1] - 3, turn["input_ids"].shape[1]
        whole["hd_queries"] = ((places >= start - 1) & (places < held) | (places >= asked - 1))[None]
    afresh = logits_of(model, whole, use_cache=False)[0, -TOKENS:]
    assert_close(torch.cat(second.logits), afresh)
    assert (afresh - logits_of(model, low_res(whole), use_cache=False)[0, -TOKENS:]).abs().max() > 1e-2
