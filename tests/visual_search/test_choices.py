"""Questions with options, and lists of options without a picture."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexkit.visual_search.choices import LETTERS, Choice, instruct, pose, tell
from flexkit.visual_search.data import Chat, Chats
from flexkit.visual_search.lookups import LookupCollator, Lookups
from flexkit.visual_search.model import add_layer, add_letters, build_model, build_processor
from flexkit.visual_search.questions import TRACKS, VALUES, Question, questions
from flexkit.visual_search.scene import draw_scene

SCENE = draw_scene(5)
ASKED = [question for track in TRACKS for question in questions(SCENE, track)]


def listed(text: str) -> dict[str, str]:
    """What stands under the letters, read from the text."""
    words = text.split()
    return {letter: words[words.index(f"{letter}.") + 1] for letter in LETTERS}


@given(st.integers(0, 2**16), st.sampled_from(ASKED))
def test_the_letter_of_a_choice_is_that_of_the_right_option(seed: int, question: Question) -> None:
    choice = pose(np.random.default_rng(seed), question)
    options = listed(choice.text)
    assert tuple(options.values()) == choice.options and options[choice.letter] == question.answer
    assert choice.answer == f"{question.answer} {choice.letter}"
    assert len(set(choice.options)) == len(LETTERS) and set(choice.options) <= set(VALUES[question.about])
    assert choice.text.startswith(question.text) and (choice.item, choice.track) == (question.item, question.track)


def test_letters_and_wrong_options_are_drawn_by_chance() -> None:
    count, question = 600, ASKED[0]
    drawn = [pose(np.random.default_rng([3, index]), question) for index in range(count)]
    letters, options = (Counter(each) for each in ([c.letter for c in drawn], [o for c in drawn for o in c.options]))
    del options[question.answer]
    for found, kinds, share in ((letters, 4, 1 / 4), (options, 9, 3 / 9)):
        five_deviations = 5 * (count * share * (1 - share)) ** 0.5
        assert len(found) == kinds
        assert all(abs(times - count * share) < five_deviations for times in found.values())


@given(st.integers(0, 2**16), st.sampled_from(ASKED))
def test_words_behind_a_question_do_not_change_its_answer(seed: int, question: Question) -> None:
    instructed = instruct(np.random.default_rng(seed), question)
    assert instructed.text.startswith(question.text) and instructed.answer == question.answer


@given(st.integers(0, 2**16), st.integers(1, 6))
def test_told_values_have_the_letters_that_they_stand_under(seed: int, turns: int) -> None:
    first, *others = told = tell(np.random.default_rng(seed), turns)
    options = listed(first.text)
    assert len(told) == turns and all(options[each.answer] == each.text.split()[-1] for each in told)
    assert all(each.text in options.values() for each in others)


def test_batches_of_lookups_are_lists_or_scenes() -> None:
    scenes = Chats(3, 80, {"low-res": 1.0, "close-up": 1.0})
    lookups = Lookups(scenes, batch=2, lists=5)
    batches = [lookups[index] for index in range(len(lookups))]
    assert len(batches) == 40 and batches[7] == lookups[7]
    kinds = Counter((len(batch), not isinstance(batch[0], Chat)) for batch in batches)
    assert set(kinds) == {(5, True), (2, False)} and kinds[5, True] > kinds[2, False]


def test_a_list_of_options_shows_no_picture() -> None:
    processor = build_processor()
    add_letters(build_model(), processor)
    lookups = Lookups(Chats(1, 8, {"low-res": 1.0}), batch=1, lists=3)
    lesson = next(lesson for lesson in (lookups[index] for index in range(8)) if len(lesson) == 3)
    inputs = LookupCollator(processor)([lesson])
    assert "pixel_values" not in inputs and len(inputs["input_ids"]) == 3
    for turns, labels in zip(lesson, inputs["labels"], strict=True):
        assert isinstance(turns, tuple)
        said = processor.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())
        assert said == [word for turn in turns for word in (turn.answer, "</s>")]


@pytest.mark.parametrize("text", ["A. 7\nB. a", "(A) 7 (B) a", "A 7, B: A"])
def test_letters_are_tokens_of_their_own(text: str) -> None:
    model, processor = build_model(), build_processor()
    before = len(processor.tokenizer)
    add_letters(model, processor)
    assert len(processor.tokenizer) == model.get_input_embeddings().num_embeddings == before + len(LETTERS)
    tokens = processor.tokenizer.tokenize(text)
    assert tokens == ["A", "7", "B", text[-1]]
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == " ".join(tokens)
    assert processor.tokenizer.tokenize("BAD Cat") == ["<unk>", "<unk>"]


def test_one_more_layer_changes_nothing_before_it_is_trained() -> None:
    model, tokens = build_model(layers=2), torch.arange(5, 15)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        add_layer(model)
        assert model.config.text_config.num_hidden_layers == 3
        assert torch.equal(model(input_ids=tokens).logits, before)


def test_choices_are_as_frequent_as_they_should_be() -> None:
    turns = [turn for index in range(60) for turn in Chats(3, 60, {"attribute": 1.0}, letters=0.5)[index].turns]
    assert sum(isinstance(turn, Choice) for turn in turns) / len(turns) == pytest.approx(
        0.5, abs=5 * 0.5 / len(turns) ** 0.5
    )
    assert not any(isinstance(turn, Choice) for turn in Chats(3, 1, {"attribute": 1.0})[0].turns)
