"""Whatever is wrong with what a command is given, it says so in one line, in the words in which it was typed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import flexkit
from flexkit.__main__ import main
from flexkit.visual_search.weights import WEIGHTS

BASE = str(WEIGHTS / "base")
QUESTION = "Which digit is on the object that is red?"
BAD_NAME = os.fsdecode(b"none\xff.png")
CONFIGS = {
    "nothing": "",
    "no object": "[]",
    "no type": "{}",
    "cut off": '{"model_type": "llava"',
    "type of types": '{"model_type": [1]}',
    "nested": "[" * 100_000,
    "no text": b"\xff\xfe",
    "a number for a part": '{"model_type": "llava", "text_config": 3}',
}
SETTINGS: dict[str, Any] = {
    "num_hidden_layers": -1,
    "num_attention_heads": 7,
    "hidden_size": "wide",
    "hidden_act": "nope",
    "num_key_value_heads": 0,
    "vocab_size": 10**30,
}
WRONG = (
    ["cost", "{missing}"],
    ["cost", BASE, "--image-size", "100"],
    ["cost", BASE, "--start-layer", "99"],
    ["cost", BASE, "--image-size", "64", "--low-res-size", "3"],
    ["cost", BASE, "--image-size", "640000"],
    ["cost", BASE, "--zoom", "1", "2", "3", "4"],
    ["cost", BASE, "--zoom", "2", "3"],
    ["cost", BASE, "--frames", "4"],
    ["cost", "qwen2.5-vl-7b"],
    ["cost", "qwen2.5-vl-7b", "--image-size", "57"],
    ["cost", "bert"],
    ["inspect", ""],
    ["inspect", "{folder}"],
    ["inspect", "{file}"],
    ["inspect", "a\0b"],
    ["inspect", BAD_NAME],
    ["inspect", "timm_wrapper"],
    ["trace", "{missing}", QUESTION],
    ["trace", "{folder}", QUESTION],
    ["trace", "{file}", QUESTION],
    ["trace", "{empty}", QUESTION],
    ["trace", BAD_NAME, QUESTION],
    ["trace", "{picture}", "\ud800"],
    ["trace", "{picture}", QUESTION, "--added", "{folder}"],
    ["trace", "{picture}", QUESTION, "--model", "{file}"],
    ["trace", "{picture}", QUESTION, "--model", BASE, "--added", "{folder}"],
    ["trace", "{picture}", QUESTION, "--new-tokens", "1", "--output", "{folder}"],
    ["trace", "{picture}", QUESTION, "--new-tokens", "1", "--output", "/dev/full"],
    ["demo", "--image", "{empty}"],
    ["demo", "--output", "{file}"],
    ["eval", "visual-search", "--questions", "1", "--weights", "{folder}"],
    ["eval", "visual-search", "--questions", "1", "--weights", "{file}"],
)
NUMBERS = ("-1", "nan", "inf", "1e9", "", "１", "9" * 5000, "0x10")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "text").write_text("no picture")
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "picture.png")
    names = {"file": "text", "empty": "empty", "folder": "folder", "picture": "picture.png", "missing": "none"}
    return {key: str(folder / name) for key, name in names.items()}


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command ends with."""
    try:
        code: Any = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Loading weights")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("flexkit"), lines
    return lines[0]


@pytest.mark.parametrize("arguments", WRONG, ids=range(len(WRONG)))
def test_one_line(arguments: list[str], places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    if "/dev/full" in arguments and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    told([part.format(**places) for part in arguments], capsys)


@pytest.mark.parametrize(
    "option",
    ["--image-size", "--low-res-size", "--zoom", "--frames", "--prompt", "--new-tokens", "--selected", "--tiles"],
)
def test_numbers_that_are_none(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number in NUMBERS:
        if (option, number) != ("--selected", "１"):  # a digit to float()
            assert option in told(["cost", BASE, f"{option}={number}"], capsys)


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_configs_that_are_none(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in ("inspect", "cost"):
        assert "cannot be loaded" in told([command, str(tmp_path)], capsys)


@pytest.mark.parametrize("name", SETTINGS)
def test_configs_of_no_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((WEIGHTS / "base" / "config.json").read_text())
    config["text_config"][name] = SETTINGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    told(["inspect", str(tmp_path)], capsys)


@pytest.mark.parametrize("name", ["diffusion_gemma", "gemma3n"])
def test_models_that_cannot_be_built(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    if name not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have it")

    def build(*_: Any, **__: Any) -> None:
        raise ImportError("it needs timm,\nwhich is not installed")

    if name == "gemma3n":  # with timm installed it could be built
        monkeypatch.setattr(AutoModelForImageTextToText, "from_config", build)
    assert f"no {name} can be built from this config" in told(["inspect", name], capsys)


def test_options_are_named_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--image-size must be a multiple" in told(["cost", BASE, "--image-size", "100"], capsys)
    assert "--start-layer must be" in told(["cost", BASE, "--start-layer", "99"], capsys)
    assert "say which by --image-size." in told(["cost", "qwen2.5-vl-7b"], capsys)
    assert "/image_size/x" in told(["cost", "/image_size/x"], capsys)


@pytest.mark.skipif(os.name != "posix", reason="names are text")
def test_names_that_are_no_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture, output = tmp_path / "p.png", tmp_path / BAD_NAME
    Image.new("RGB", (40, 30)).save(picture)
    assert main(["trace", str(picture), QUESTION, "--new-tokens", "1", "--output", str(output)]) == 0
    assert output.is_file() and "none\\udcff.png" in capfd.readouterr().out


def test_added_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--added goes with --model" in told(["trace", "any.png", QUESTION, "--added", "any"], capsys)


def test_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert main(["cost", BASE, "--json"]) == 141


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(flexkit, "cost", full)
    assert "No space left on device" in told(["cost", BASE], capsys)
    with pytest.raises(OSError, match="No space"):
        main(["cost", BASE, "--debug"])


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flexkit, "cost", stopped)
    assert main(["cost", BASE]) == 130


@pytest.mark.parametrize(
    "start", [["-m", "flexkit", "demo"], ["-c", "import sys; sys.argv[0] = 'bin/flexkit'; import flexkit"]]
)
def test_ctrl_c_during_imports(start: list[str], tmp_path: Path) -> None:
    """The first heavy import is one that Ctrl-C stops."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    paths = [str(tmp_path), str(Path(flexkit.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, *start], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == -signal.SIGINT and done.stderr == ""
    done = subprocess.run([sys.executable, "-c", "import flexkit"], capture_output=True, text=True, env=environment)
    assert "KeyboardInterrupt" in done.stderr, "who imports flexkit keeps the tracebacks"


def test_amounts_of_small_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", BASE]) == 0
    printed = capsys.readouterr().out
    assert "MFLOP" in printed and "KiB" in printed and "high_res" in printed and " 0.00" not in printed
    assert main(["inspect", BASE]) == 0
    printed = capsys.readouterr().out
    assert "55.3 k" in printed and "MFLOP" in printed and "published" in printed and "defaults" not in printed


def test_counts_from_python() -> None:
    for name, value in (("prompt", -1), ("new_tokens", 1.5), ("tiles", -1), ("image_size", 0), ("low_res_size", 0)):
        with pytest.raises(flexkit.ConfigError, match=name):
            flexkit.cost(BASE, **{name: value})
    nothing = flexkit.cost(BASE, selected=0.0)
    assert nothing["flexkit"].read_tokens == 0 and nothing["flexkit_on_demand"].kv_bytes == nothing["low_res"].kv_bytes
