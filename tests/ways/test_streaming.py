"""Answers that are read while they are written, in this thread and in others."""

import threading
from typing import Any

import pytest
import torch
import transformers as tf

from tests.patching.ways import assert_same_logits, generate, logits_of
from tests.tiny_processors import tiny_tokenizer
from tests.ways.questions import TOKENS, patched_model, question, six
from tests.zoo import IMAGE, VOCABULARY, ZOO, low_res, prompt


@pytest.fixture(scope="module")
def tokenizer() -> tf.PreTrainedTokenizerFast:
    return tiny_tokenizer({"image_token": ("<image>", IMAGE)}, VOCABULARY)


@six
def test_text_streamer(name: str, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    asked = question(name)
    streamer = tf.TextStreamer(tokenizer, skip_prompt=True)
    generate(patched_model(name), asked.inputs, TOKENS, streamer=streamer)
    assert capsys.readouterr().out.split() == tokenizer.decode(asked.tokens[0]).split()


@six
def test_text_iterator_streamer(name: str, tokenizer: Any) -> None:
    asked = question(name)
    streamer = tf.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=patched_model(name).generate, kwargs={**asked.inputs, **settings})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 1
    assert "".join(pieces).split() == tokenizer.decode(asked.tokens[0]).split()


@six
def test_two_threads_answer_as_one(name: str) -> None:
    """Two threads ask many questions each, with images of their own, of one patched model: always two at a time.

    Prompts have one shape: models with positions in rows and columns keep the shift behind an image as an attribute of
    their own, which threads would share without flexkit too.
    """
    count = 20 if name == "llava" else 6
    model, asked = patched_model(name), [prompt(ZOO[name], seed=seed) for seed in range(count)]
    expected = [generate(model, inputs, 2) for inputs in asked]
    found: list[dict[int, Any]] = [{}, {}]
    together = threading.Barrier(2)

    def work(thread: int) -> None:
        together.wait()
        for step in range(count):
            index = (step + count // 2 * thread) % count
            found[thread][index] = generate(model, asked[index], 2)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs in found:
        for index, alone in enumerate(expected):
            assert torch.equal(outputs[index].sequences, alone.sequences)
            assert all(torch.equal(*steps) for steps in zip(outputs[index].logits, alone.logits, strict=True))
    for inputs, alone in zip(asked[:4], expected, strict=False):
        assert (logits_of(model, low_res(inputs))[:, -1] - alone.logits[0]).abs().max() > 1e-3
    assert len({tuple(alone.sequences[0, -2:].tolist()) for alone in expected}) > 1


@six
def test_calls_with_and_without_views_side_by_side(name: str) -> None:
    asked, model = question(name), patched_model(name)
    outputs: dict[str, Any] = {}

    def ask(kind: str, inputs: dict[str, Any]) -> None:
        outputs[kind] = [generate(model, inputs, TOKENS) for _ in range(4)]

    pairs = (("both", asked.inputs), ("low", low_res(asked.inputs)))
    threads = [threading.Thread(target=ask, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kind, expected in (("both", asked.answer), ("low", asked.base)):
        for output in outputs[kind]:
            assert_same_logits(output, expected)
