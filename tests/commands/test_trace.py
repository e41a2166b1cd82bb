"""``flexkit trace`` answers, and writes a page of where the model looked."""

import json
import shutil
from pathlib import Path

import pytest

import flexkit
from flexkit.__main__ import main
from flexkit.visual_search import draw_scene, load_model
from flexkit.visual_search.weights import WEIGHTS

QUESTION = "Which digit is on the object that is pink?"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    draw_scene(3, 600).image.save(path)
    return path


def page_of(path: Path) -> dict[str, object]:
    page = path.read_text(encoding="utf-8")
    found: dict[str, object] = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    return found


def test_the_small_model_answers(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    assert main(["trace", str(picture), QUESTION, "--output", str(output)]) == 0
    answer, _, where = capsys.readouterr().out.strip().splitlines()
    assert answer == "2" and where == f"Where it looked: {output}"
    data = page_of(output)
    assert data["words"][0] == "2" and data["layers"] == [0, 1, 2, 3]  # type: ignore[index]
    assert QUESTION in output.read_text(encoding="utf-8")


def test_a_model_of_ones_own(picture: Path, tmp_path: Path) -> None:
    output, added = tmp_path / "page.html", tmp_path / "added"
    base = ["trace", str(picture), QUESTION, "--model", str(WEIGHTS / "base"), "--output", str(output)]
    assert main(base) == 0
    assert page_of(output)["layers"] == [0, 1, 2, 3]
    model, _ = load_model("added")
    flexkit.save_flex(model, added)
    assert main([*base, "--added", str(added), "--new-tokens", "1"]) == 0
    assert len(page_of(output)["words"]) == 1  # type: ignore[arg-type]


def test_a_patched_model_that_was_saved(picture: Path, tmp_path: Path) -> None:
    output, folder = tmp_path / "page.html", tmp_path / "patched"
    model, processor = load_model("base")
    flexkit.patch_model(model, flexkit.FlexConfig.published(start_layer=2), trained=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert main(["trace", str(picture), QUESTION, "--model", str(folder), "--output", str(output)]) == 0
    assert page_of(output)["layers"] == [1, 2, 3]


def test_damaged_weights_are_told_in_one_line(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(WEIGHTS / "base", tmp_path / "base")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert main(["trace", str(picture), QUESTION, "--model", str(folder)]) == 2
    assert "cannot be loaded" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{tmp}/none.png", QUESTION], "there is no file"),
        (["{picture}", " "], "the question is empty"),
        (["{picture}", QUESTION, "--model", "{tmp}"], "cannot be loaded"),
        (["{picture}", QUESTION, "--output", "{tmp}/no/folder/page.html"], "cannot be written"),
    ],
)
def test_wrong_uses_are_told_in_one_line(
    arguments: list[str], told: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", *(part.format(tmp=tmp_path, picture=picture) for part in arguments)]) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1
