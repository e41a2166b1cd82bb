"""The loss that tells attention where to look."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexkit.visual_search.data import Chats
from flexkit.visual_search.grounding import GroundedCollator, grounding_loss
from flexkit.visual_search.model import CELLS, build_processor


@given(st.integers(0, 2**32 - 1))
def test_it_is_minus_the_log_of_the_share_on_the_object(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    batch, heads, length, tokens = 2, 3, 9, 4
    attention = torch.rand(batch, heads, length, length, generator=random, dtype=torch.float64).softmax(-1)
    is_image = torch.zeros(batch, length, dtype=torch.bool)
    is_image[0, 1:5] = is_image[1, 2:6] = True
    cells = torch.rand(batch, length, tokens, generator=random) < 0.15
    losses = []
    for sample in range(batch):
        columns = is_image[sample].nonzero()[:, 0].tolist()
        for row in range(length):
            wanted = [column for column, cell in zip(columns, cells[sample, row], strict=True) if cell]
            if wanted:
                mean = attention[sample, :, row].mean(0)
                losses.append(
                    -math.log(sum(mean[column] for column in wanted) / sum(mean[column] for column in columns))
                )
    expected = sum(losses) / len(losses) if losses else 0.0
    assert float(grounding_loss(attention, is_image, cells)) == pytest.approx(expected)


def test_only_its_track_is_told_and_only_in_front_of_answers() -> None:
    chats = [Chats(5, 3, {"conjunction": 1.0, "attribute": 1.0, "low-res": 1.0})[index] for index in range(3)]
    batch = GroundedCollator(build_processor())(chats)
    end = build_processor().tokenizer.eos_token_id
    told = batch["cells"].any(-1)
    count = 0
    for chat, row, labels in zip(chats, batch["cells"], batch["labels"], strict=True):
        answers = [int(place) for place in ((labels != -100) & (labels != end)).nonzero()]
        for turn, place in zip(chat.turns, answers, strict=True):
            found = row[place - 1].view(CELLS, CELLS)
            assert bool(found.any()) == (turn.track == "conjunction")
            if found.any():
                count += 1
                left, top, right, bottom = (CELLS * edge for edge in turn.item.box)
                rows, columns = found.nonzero().unbind(1)
                assert ((top - 1 < rows) & (rows < bottom)).all() and ((left - 1 < columns) & (columns < right)).all()
                assert found[int((top + bottom) / 2), int((left + right) / 2)]
    assert told.sum() == count > 0
