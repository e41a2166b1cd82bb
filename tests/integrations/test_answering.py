"""Questions that are answered together are answered as each would be alone."""

import io
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageFile

import flexkit
from flexkit.errors import CheckpointError, HighResInputError, PolicyError
from flexkit.integrations.answering import Answerer, PictureQuestion, call_settings
from flexkit.visual_search import draw_scene, load_model, questions

SCENES = [draw_scene(seed, size) for seed, size in enumerate((250, 600, 400))]
ASKED = [next(each for each in questions(scene, "attribute") if each.about == "digit") for scene in SCENES]
SETTINGS = ("hd_policy", "hd_disabled")


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    folder = tmp_path_factory.mktemp("saved")
    model, processor = load_model()
    model.double().save_pretrained(folder)
    processor.save_pretrained(folder)
    return Answerer(folder, max_new_tokens=2)


def question(index: int, policy: Any = None, text: str | None = None) -> PictureQuestion:
    return PictureQuestion(SCENES[index].image, text or ASKED[index].text, policy)


@pytest.fixture
def calls(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """Rows of each ``generate``, and its settings."""
    made, generate = [], answerer.model.generate

    def watched(**inputs: Any) -> Any:
        made.append((len(inputs["input_ids"]), {name: inputs[name] for name in inputs if name in SETTINGS}))
        return generate(**inputs)

    monkeypatch.setattr(answerer.model, "generate", watched)
    return made


def test_one_generate_for_each_policy(answerer: Answerer, calls: Any) -> None:
    """Of equal policies, too, of which one selects a single cell and one all of them."""
    policies = [None, 1, 1.0, "disabled", {"type": "TopK", "k": 1}, None, "1.0", '"disabled"']
    asked = [question(index % 3, policy) for index, policy in enumerate(policies)]
    together = answerer.answer(asked)
    assert [repr(settings) for _, settings in calls] == [
        "{}",
        "{'hd_policy': TopK(k=1)}",
        "{'hd_policy': TopK(k=1.0)}",
        "{'hd_disabled': True}",
    ]
    assert [rows for rows, _ in calls] == [2, 2, 2, 2]
    assert together == [answer for each in asked for answer in answerer.answer([each])]
    assert together[0] == ASKED[0].answer and together[5] == ASKED[2].answer


def test_one_that_fails_does_so_alone(answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval turns it on, for all of a process
    (tmp_path / "text.png").write_text("no picture")
    SCENES[0].image.save(file := io.BytesIO(), "PNG")
    deep: dict[str, Any] = {"type": "Everything"}
    for _ in range(sys.getrecursionlimit()):
        deep = {"type": "Complement", "policy": deep}
    failing = [
        (question(0, policy=deep), RecursionError, ""),
        (question(0, text="How many <image> are here?"), ValueError, "image"),
        (question(0, policy="dis"), PolicyError, "'dis'"),
        (question(0, policy={"type": "TopK", "k": 0}), PolicyError, "k"),
        (PictureQuestion(SCENES[0].image, 5), HighResInputError, "a question is a text, got 5"),
        (PictureQuestion(tmp_path / "text.png", "?"), HighResInputError, "cannot be read: cannot identify"),
        (PictureQuestion(tmp_path / "none.png", "?"), HighResInputError, "No such file"),
        (PictureQuestion(file.getvalue()[:-1000], "?"), HighResInputError, "truncated"),
    ]
    between = [part for each, _, _ in failing for part in (question(1), each)]
    found = answerer.answer([*between, question(2)])
    assert found[::2] == [ASKED[1].answer] * len(failing) + [ASKED[2].answer]
    for error, (_, kind, message) in zip(found[1::2], failing, strict=True):
        assert isinstance(error, kind) and message in str(error)


def test_an_error_holds_nothing_of_its_call(answerer: Answerer) -> None:
    held = []

    def stop(tokens: torch.Tensor, *_: Any, **__: Any) -> None:
        held.append(weakref.ref(tokens))
        raise RuntimeError("out of memory")

    (error,) = answerer.answer([question(0)], stopping_criteria=[stop])
    assert isinstance(error, RuntimeError) and [each() for each in held] == [None]


def test_pictures_stand_upright_and_in_colour(answerer: Answerer) -> None:
    """However a file has them: turned, as a path, with few colours."""
    turned, exif = SCENES[1].image.rotate(90, expand=True), SCENES[1].image.getexif()
    exif[0x0112] = 6
    turned.save(file := io.BytesIO(), "PNG", exif=exif)
    few = SCENES[1].image.convert("P")
    found = answerer.answer([PictureQuestion(given, ASKED[1].text) for given in (file.getvalue(), few)])
    assert found == [ASKED[1].answer] * 2


def test_what_generate_is_told(answerer: Answerer) -> None:
    (long,) = answerer.answer([question(0)], max_new_tokens=4, min_new_tokens=4)
    assert len(str(long).split()) > 1
    (stopped,) = answerer.answer([question(0)], min_new_tokens=1, stopping_criteria=[lambda ids, *_: torch.ones(1) > 0])
    assert stopped == ASKED[0].answer


def test_policies_as_they_are_written() -> None:
    schedule = flexkit.Schedule({1: flexkit.TopK(2), 3: flexkit.TopK(4)})
    written = flexkit.FlexConfig(policy=schedule).to_dict()["policy"]
    assert call_settings(written) == {"hd_policy": schedule}
    assert call_settings(None) == call_settings("") == call_settings("null") == {}
    for wrong in (True, [0.1], "{", "Everything", 0, 1.5):
        with pytest.raises(PolicyError):
            call_settings(wrong)


def test_a_folder_that_nothing_was_saved_in(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Answerer(tmp_path)
