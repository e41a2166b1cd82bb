import threading
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import flexkit
from flexkit.errors import HighResInputError
from tests.patching.ways import (
    ROWS,
    assert_close,
    decoding,
    families,
    generate,
    inputs_of,
    logits_of,
    new_tokens,
    patched,
    row_of,
)
from tests.versions import expands_images_by_row, resets_by_emptying
from tests.zoo import IMAGE, Row

MIXED = (Row((None, None), 3), Row((None,), 5), Row((None, None, None), 2), Row((), 4))
BEAMS = {
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2, "top_k": 0},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
}


@families
def test_returned_beams_are_those_of_their_own_row(name: str) -> None:
    model, inputs = patched(name), inputs_of(name, MIXED)
    settings = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    together = generate(model, inputs, **settings)
    for row in range(len(MIXED)):
        alone = generate(model, row_of(name, inputs, row, MIXED), **settings)
        returned = slice(2 * row, 2 * row + 2)
        assert torch.equal(new_tokens(together)[returned], new_tokens(alone))
        assert_close(together.sequences_scores[returned], alone.sequences_scores)


@expands_images_by_row
@families
@pytest.mark.parametrize("way", BEAMS)
def test_every_returned_sequence_saw_the_images_of_its_row(name: str, way: str) -> None:
    """Teacher forcing of each returned sequence, alone with its row's images, gives the logits it was made from."""
    settings = BEAMS[way]
    returned = settings["num_return_sequences"]
    model, inputs = patched(name), inputs_of(name, MIXED)
    tf.set_seed(0)
    output = generate(model, inputs, suppress_tokens=[IMAGE], **settings)
    assert len(output.sequences) == returned * len(MIXED)
    tokens = new_tokens(output)
    beams = getattr(output, "beam_indices", None)
    for index, written in enumerate(tokens):
        alone = row_of(name, inputs, index // returned, MIXED)
        start = alone["input_ids"].shape[1]
        longer = dict(alone, input_ids=torch.cat([alone["input_ids"], written[None, :-1]], dim=1))
        for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            if key in longer:
                more = alone[key].new_full((1, len(written) - 1), int(key == "attention_mask"))
                longer[key] = torch.cat([alone[key], more], dim=1)
        queries = torch.arange(start)[None] == start - 1
        views = {"hd_queries": queries} if "hd_pixel_values" in alone else {}
        forced = logits_of(model, longer, **views)[0, start - 1 :]
        for step, logits in enumerate(output.logits):
            source = index if beams is None else int(beams[index, step])
            assert_close(logits[source], forced[step])


@expands_images_by_row
@families
def test_sampled_sequences_of_a_sure_model_are_greedy(name: str) -> None:
    model, inputs = patched(name), inputs_of(name, MIXED)
    greedy = new_tokens(generate(model, inputs))
    sampled = new_tokens(generate(model, inputs, do_sample=True, top_k=1, num_return_sequences=2))
    assert torch.equal(sampled, greedy.repeat_interleave(2, dim=0))


class Decoder:
    """Decodes given tokens in the cache of a batch, with the rotary positions that each row has there."""

    def __init__(self, name: str, inputs: dict[str, Tensor], model: tf.PreTrainedModel, cache: Any = None) -> None:
        self.model, self.name = model, name
        with torch.no_grad():
            self.cache = model(**inputs, past_key_values=cache, use_cache=True).past_key_values
        self.mask = inputs["attention_mask"]
        self.deltas = getattr(model.model, "rope_deltas", None)

    def select(self, rows: Tensor) -> None:
        """What a caller keeps beside the cache."""
        self.mask = self.mask[rows]
        self.deltas = None if self.deltas is None else self.deltas[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, vocabulary)`` after one more token."""
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        call = decoding(tokens, self.mask, self.deltas)
        return logits_of(self.model, call, past_key_values=self.cache)[:, -1]


WORDS = torch.tensor([[11, 21], [12, 22], [13, 23], [14, 24]])
SURGERY = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), torch.arange(4).repeat_interleave(2)),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0, 2])), torch.tensor([2, 0, 2])),
    "select by mask": (
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True, True])),
        torch.tensor([0, 2, 3]),
    ),
    "select from the end": (lambda cache: cache.batch_select_indices(torch.tensor([-1, -2])), torch.tensor([3, 2])),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 3, 0, 2])), torch.tensor([1, 3, 0, 2])),
    "reorder with copies": (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0, 1])), torch.tensor([2, 2, 0, 1])),
    "no row with an image": (lambda cache: cache.batch_select_indices(torch.tensor([3])), torch.tensor([3])),
}


@families
@pytest.mark.parametrize("way", SURGERY)
def test_cache_surgery_takes_the_images_along(name: str, way: str) -> None:
    cut, rows = SURGERY[way]
    model, inputs = patched(name), inputs_of(name, MIXED)
    untouched, decoder = (Decoder(name, inputs, model) for _ in range(2))
    assert_close(decoder.step(WORDS[:, :1]), untouched.step(WORDS[:, :1]))
    cut(decoder.cache)
    decoder.select(rows)
    for column in (slice(1, 2), slice(0, 1)):
        assert_close(decoder.step(WORDS[rows, column]), untouched.step(WORDS[:, column])[rows])


@families
def test_reordering_twice_comes_back(name: str) -> None:
    model, inputs = patched(name), inputs_of(name, MIXED)
    untouched, decoder = (Decoder(name, inputs, model) for _ in range(2))
    for order in ([1, 2, 3, 0], [3, 0, 1, 2]):
        decoder.cache.reorder_cache(torch.tensor(order))
        decoder.select(torch.tensor(order))
    assert torch.equal(decoder.step(WORDS[:, :1]), untouched.step(WORDS[:, :1]))


@resets_by_emptying
@families
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_reset_cache_forgets_the_images(name: str, kind: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    text = model.config.get_text_config()
    cache = tf.DynamicCache(config=text) if kind == "dynamic" else tf.StaticCache(config=text, max_cache_len=64)
    Decoder(name, inputs, model, cache)
    cache.reset()
    other = inputs_of(name, (Row((), 5), Row((), 5), Row((), 7)))
    afresh = tf.DynamicCache(config=text)
    with flexkit.disabled(model):
        reference = logits_of(model, other, past_key_values=afresh)
    assert_close(logits_of(model, other, past_key_values=cache), reference)
    cache.reset()
    again = inputs_of(name, ROWS, seed=7)
    assert_close(logits_of(model, again, past_key_values=cache), logits_of(model, again))


@families
def test_a_cache_of_another_batch_is_refused(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    decoder = Decoder(name, inputs, model)
    with pytest.raises(HighResInputError, match="of 3 rows, the inputs have 2"):
        logits_of(model, {"input_ids": WORDS[:2, :1]}, past_key_values=decoder.cache)


@families
def test_threads_do_not_meet(name: str) -> None:
    """Two threads, each with images of its own.

    Images and prompts have one size: the position shift of Qwen2.5-VL is an attribute of transformers' model, which
    threads share also where flexkit is not there.
    """
    model = patched(name)
    jobs = [[inputs_of(name, (Row((None,), 4),), seed=10 * thread + job) for job in range(10)] for thread in range(2)]
    expected = [[generate(model, inputs, 3) for inputs in row] for row in jobs]
    found: list[list[Any]] = [[], []]
    barrier = threading.Barrier(2)

    def work(thread: int) -> None:
        barrier.wait()
        found[thread].extend(generate(model, inputs, 3) for inputs in jobs[thread])

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        for output, reference in zip(ours, theirs, strict=True):
            assert all(torch.equal(*steps) for steps in zip(output.logits, reference.logits, strict=True))
    assert len({tuple(new_tokens(output)[0].tolist()) for row in expected for output in row}) > 1
