"""Prompts that are run in chunks, which may end within an image."""

import pytest

from tests.patching.ways import assert_same_logits, generate
from tests.ways.questions import SIX_HERE, TOKENS, patched_model, question, six
from tests.zoo import Row, low_res

SEVERAL = (Row((None, None), 5), Row((None,), 8))
"""Two rows with images in different chunks."""


@six
@pytest.mark.parametrize("size", [3, 8])
def test_chunks(name: str, size: int) -> None:
    model, asked = patched_model(name), question(name)
    base = generate(model, low_res(asked.inputs), TOKENS, prefill_chunk_size=size)
    if name == "gemma3" and size == 3:
        # The tokens of an image see each other there, which they cannot in chunks: the base model answers otherwise.
        with pytest.raises(AssertionError):
            assert_same_logits(base, asked.base)
        return
    assert_same_logits(base, asked.base)
    assert_same_logits(generate(model, asked.inputs, TOKENS, prefill_chunk_size=size), asked.answer)


@pytest.mark.parametrize("name", [name for name in SIX_HERE if name != "gemma3"])
@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_chunks_of_a_batch(name: str, way: dict[str, object]) -> None:
    model, asked = patched_model(name), question(name, SEVERAL)
    whole = asked.answer if not way else generate(model, asked.inputs, TOKENS, **way)
    assert_same_logits(generate(model, asked.inputs, TOKENS, prefill_chunk_size=6, **way), whole)
