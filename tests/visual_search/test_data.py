"""Chats and batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexkit
from flexkit.visual_search.choices import Choice
from flexkit.visual_search.data import Chats, Collator, overview_and_tiles, prompts
from flexkit.visual_search.model import CELLS, IMAGE_TOKEN, LOW_RES, ZOOM, add_letters, build_model, build_processor
from flexkit.visual_search.questions import Question, questions
from flexkit.visual_search.scene import draw_scene

PROCESSOR = build_processor()
add_letters(build_model(), PROCESSOR)


@given(st.integers(0, 2**16), st.integers(1, 20))
def test_no_question_is_asked_twice(seed: int, turns: int) -> None:
    chat = Chats(seed, 1, {"attribute": 1.0, "low-res": 0.5, "conjunction": 0.0}, turns)[0]
    known = sum(len(questions(chat.scene, track)) for track in ("attribute", "low-res"))
    assert len({turn.text for turn in chat.turns}) == len(chat.turns) == min(turns, known)
    assert {turn.track for turn in chat.turns} <= {"attribute", "low-res"}


def test_close_ups_are_as_frequent_as_they_should_be() -> None:
    def close(share: float, count: int) -> float:
        chats = Chats(3, count, {"attribute": 1.0, "low-res": 1.0, "close-up": share})
        found = [chats[index] for index in range(count)]
        for chat in found:
            tracks = {"close-up"} if chat.scene.image.size == (LOW_RES, LOW_RES) else {"attribute", "low-res"}
            assert {turn.track for turn in chat.turns} <= tracks
        return sum(chat.scene.image.size == (LOW_RES, LOW_RES) for chat in found) / count

    assert close(0.0, 10) == 0
    assert close(2.0, 200) == pytest.approx(0.5, abs=0.1)


def test_objects_differ_in_colour_as_often_as_they_should() -> None:
    def distinct(share: float, count: int) -> float:
        chats = Chats(3, count, {"low-res": 1.0, "close-up": 1.0}, distinct=share)
        scenes = [chats[index].scene for index in range(count)]
        return sum(len({item.colour for item in scene.items}) == len(scene.items) for scene in scenes) / count

    assert distinct(1.0, 20) == 1
    assert distinct(0.0, 200) < distinct(0.5, 200) < 1


@pytest.mark.parametrize("in_sequence", [False, True])
def test_answers_alone_have_labels(in_sequence: bool) -> None:
    chats = [Chats(7, 2, {"attribute": 1.0, "low-res": 1.0}, turns, letters=0.5)[0] for turns in (2, 5)]
    assert {type(turn) for chat in chats for turn in chat.turns} == {Question, Choice}
    processor = PROCESSOR if in_sequence else flexkit.FlexProcessor(PROCESSOR, ZOOM)
    batch = Collator(processor, in_sequence=in_sequence)(chats)
    tokenizer = PROCESSOR.tokenizer
    for chat, ids, labels in zip(chats, batch["input_ids"], batch["labels"], strict=True):
        told = tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())
        assert told == [word for turn in chat.turns for word in (*turn.answer.split(), tokenizer.eos_token)]
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert (ids == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).sum() == CELLS**2 * (10 if in_sequence else 1)
    assert len(batch["pixel_values"]) == (20 if in_sequence else 2)
    assert ("hd_pixel_values" in batch) is not in_sequence


def test_tiles_are_the_high_res_view() -> None:
    image = draw_scene(5).image
    views = overview_and_tiles(image)
    tiles = PROCESSOR.image_processor(views[1:], return_tensors="pt")["pixel_values"]
    stitched = torch.cat([torch.cat(list(tiles[row * ZOOM : (row + 1) * ZOOM]), dim=-1) for row in range(ZOOM)], dim=-2)
    high_res = prompts(flexkit.FlexProcessor(PROCESSOR, ZOOM), [image], [" "])["hd_pixel_values"]
    assert torch.equal(stitched, high_res[0])
    assert views[0] is image and all(view.size == (LOW_RES, LOW_RES) for view in views[1:])


def test_tiles_of_other_sizes_are_those_of_the_trained_size() -> None:
    small, large = (overview_and_tiles(draw_scene(5, size).image) for size in (192, 1344))
    for tile, other in zip(small[1:], large[1:], strict=True):
        assert tile.size == other.size
        assert np.abs(np.asarray(tile, float) - np.asarray(other, float)).mean() < 5
