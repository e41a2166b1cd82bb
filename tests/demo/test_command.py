from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import flexkit
import flexkit.demo.run
from flexkit.__main__ import main
from flexkit.demo.ask import Asked, ask
from flexkit.demo.cost import Cost, measure
from flexkit.demo.run import FIGURE
from flexkit.demo.task import draw_task
from flexkit.visual_search import load_model
from flexkit.visual_search.ways import Way


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed is the same, however costs were measured."""
    cost = Cost(flops=10**9, seconds=1.0, kept_bytes=2**20)
    monkeypatch.setattr(flexkit.demo.run, "measure", lambda ways: dict.fromkeys(ways, cost))


def test_drawn_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(flexkit.demo.run, "measure", partial(measure, repeats=1))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert main(["demo"]) == 0
    printed = capfd.readouterr()
    assert printed.err == "" and not recwarn.list
    assert torch.get_num_threads() == threads
    for expected in ("Which digit is on the", "right", "64 + ", "640", "Of 576 high-res tokens layer 1 read "):
        assert expected in printed.out
    assert max(map(len, printed.out.splitlines())) <= 100
    with Image.open(tmp_path / "flexkit-demo" / FIGURE) as figure:
        assert figure.mode == "RGB" and min(figure.size) > 1000


@pytest.mark.parametrize("size", [(1, 1), (3000, 8)])
def test_a_picture_of_ones_own(tmp_path: Path, capfd: pytest.CaptureFixture[str], size: tuple[int, int]) -> None:
    picture, output = tmp_path / "päint.png", tmp_path / "new" / "folder"
    Image.linear_gradient("L").resize(size).convert("P").save(picture)
    assert main(["demo", "--image", str(picture), "--output", str(output), "--seed", "7"]) == 0
    printed = capfd.readouterr()
    assert printed.err == "" and "right" not in printed.out and "wrong" not in printed.out
    assert f"{size[0]} x {size[1]} pixels" in printed.out and str(output / FIGURE) in printed.out
    assert (output / FIGURE).is_file()


def test_a_question_of_ones_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    question = "Où est-ce <s>?\n  {{ 7 }} 你好 " + "long " * 40
    assert main(["demo", "--question", question, "--output", str(tmp_path)]) == 0
    printed = capfd.readouterr()
    assert printed.err == "" and "right" not in printed.out
    assert f"Question  {' '.join(question.split())}\n" in printed.out
    assert "never taught these words, and read past them: Où, est-ce, long." in " ".join(printed.out.split())


def test_it_answers_what_it_was_trained_for() -> None:
    way = Way(*load_model())
    right = 0
    for seed in range(20):
        task = draw_task(seed)
        right += ask(Asked.of(way, task.image, task.question)).text == task.answer
    assert right >= 19


WRONG = {
    "missing": (["demo", "--image", "missing.png"], "no file 'missing.png'"),
    "folder": (["demo", "--image", "."], "no file"),
    "unreadable": (["demo", "--image", "text"], "'text' cannot be read as a picture"),
    "empty question": (["demo", "--question", "  "], "question is empty"),
    "long question": (["demo", "--question", "?" * 1001], "1001 characters"),
    "image token": (["demo", "--question", "a <image>?"], "<image>"),
    "bytes": (["demo", "--question", "\udcff"], "UTF-8"),
    "output": (["demo", "--output", "text"], "'text' cannot be written"),
    "no weights": (["eval", "visual-search", "--weights", "none", "--json"], "no trained 'base' in 'none'"),
    "no place to train": (["train", "visual-search", "--output", "text"], "'text' cannot be written"),
    "a stage too early": (["train", "visual-search", "--stage", "added"], "no trained 'base' in 'visual-search'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no picture")
    assert main(arguments) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("flexkit: ") and message in printed.err
    with pytest.raises(flexkit.FlexkitError):
        main([*arguments, "--debug"])


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "dance",
        "demo --nonsense",
        "demo --image",
        "eval",
        "eval visual-search --size 9",
        "train visual-search --stage x",
        "demo --seed -1",
    ],
)
def test_unknown_arguments_are_told_in_one_line(arguments: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    printed = capfd.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert "--help" in printed.err


@pytest.mark.parametrize(("argument", "expected"), [("--version", flexkit.__version__), ("--help", "demo")])
def test_help_and_version(argument: str, expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([argument])
    assert stopped.value.code == 0 and expected in capfd.readouterr().out


def test_interrupting_is_no_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flexkit.demo.run, "run", interrupted)
    assert main(["demo"]) == 130
    assert capfd.readouterr().err == ""
