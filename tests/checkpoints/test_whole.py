"""A checkpoint is one thing: whoever is killed, fails or writes at the same time, it is whole, old or new."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flexkit
from flexkit.checkpoints import from_pretrained, load_flex, save_flex
from flexkit.errors import CheckpointError
from tests.patching.ways import patched, plain

FORK = multiprocessing.get_context("fork")
OURS = {"flexkit.json", "flexkit.weights"}
SAVES: dict[str, Callable[[Any, Path], None]] = {
    "save_flex": save_flex,
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
}


def numbered(number: int) -> Any:
    """A model whose every weight, and one setting, say which it is."""
    model = patched("llava", logit_bias=float(number))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    return model


def number_of(folder: Path, way: str) -> int:
    """Which model is in a folder, all of it."""
    model = from_pretrained(folder) if way == "save_pretrained" else load_flex(plain("llava"), folder)
    weights = model.parameters() if way == "save_pretrained" else flexkit.flex_parameters(model)
    numbers = {value for weight in weights for value in weight.unique().tolist()}
    numbers.add(flexkit.patching.get_patch(model).config.logit_bias)
    assert len(numbers) == 1
    return int(numbers.pop())


def save_and_die(folder: Path, number: int, moves: int) -> None:
    """Save in a process that ends once so many files have been put into place."""

    def save() -> None:
        torch.set_num_threads(1)
        replace, left = Path.replace, iter(range(moves))
        Path.replace = lambda path, target: os._exit(9) if next(left, None) is None else replace(path, target)
        save_flex(numbered(number), folder)

    process = FORK.Process(target=save)
    process.start()
    process.join()
    assert process.exitcode == (9 if moves < 2 else 0)


@pytest.mark.parametrize(("moves", "found"), [(0, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("older", [False, True])
def test_save_flex_killed_between_its_files(moves: int, found: int, older: bool, tmp_path: Path) -> None:
    save_flex(numbered(1), tmp_path)
    if older:
        settings = json.loads((tmp_path / "flexkit.json").read_text())
        del settings["digest"]
        (tmp_path / "flexkit.json").write_text(json.dumps(settings))
        save_file(load_file(tmp_path / "flexkit.weights"), tmp_path / "flexkit.weights", {"format": "pt"})
        assert number_of(tmp_path, "save_flex") == 1
    save_and_die(tmp_path, 2, moves)
    assert number_of(tmp_path, "save_flex") == found
    assert {path.name for path in tmp_path.iterdir()} > OURS or moves == 2
    save_flex(numbered(3), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == OURS
    assert number_of(tmp_path, "save_flex") == 3


def write(way: str, folder: Path, number: int, times: int) -> None:
    torch.set_num_threads(1)
    model = numbered(number)
    (folder.parent / f"ready{number}").touch()
    for _ in range(times):
        SAVES[way](model, folder)


@pytest.mark.parametrize("way", SAVES)
def test_a_process_killed_at_any_point(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    SAVES[way](numbered(1), folder)
    for turn in range(4):
        process = FORK.Process(target=write, args=(way, folder, 2, 10_000))
        process.start()
        while not (tmp_path / "ready2").exists():
            process.join(0.001)
        process.join(0.003 * turn)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        (tmp_path / "ready2").unlink()
        try:
            assert number_of(folder, way) in (1, 2)
        except CheckpointError as error:
            assert way == "save_pretrained" and "flexkit.json" in str(error)
        SAVES[way](numbered(1), folder)
        assert not [path for path in folder.iterdir() if path.name.startswith(".flexkit")]
        assert number_of(folder, way) == 1


@pytest.mark.parametrize("way", SAVES)
def test_two_writers_at_once(way: str, tmp_path: Path) -> None:
    writers = [FORK.Process(target=write, args=(way, tmp_path / "folder", number, 8)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert number_of(tmp_path / "folder", way) in (1, 2)
    assert not [path for path in (tmp_path / "folder").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", sorted(OURS))
def test_files_of_two_saves_are_refused(name: str, tmp_path: Path) -> None:
    for number in (1, 2):
        save_flex(numbered(number), tmp_path / str(number))
    shutil.copyfile(tmp_path / "1" / name, tmp_path / "2" / name)
    model = plain("llava")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"flexkit\.json and flexkit\.weights in .*2 are of two different saves"):
        load_flex(model, tmp_path / "2")
    assert not flexkit.is_patched(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_settings_may_be_edited_by_hand(tmp_path: Path) -> None:
    save_flex(numbered(1), tmp_path)
    text = (tmp_path / "flexkit.json").read_text()
    (tmp_path / "flexkit.json").write_text(text.replace('"logit_bias": 1.0', '"logit_bias": 0.5'))
    assert flexkit.patching.get_patch(load_flex(plain("llava"), tmp_path)).config.logit_bias == 0.5


def test_equal_saves_are_equal_files(tmp_path: Path) -> None:
    for folder in ("one", "other", "one"):
        save_flex(numbered(1), tmp_path / folder)
    for name in OURS:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("way", SAVES)
def test_a_full_disk_is_one_line_and_leaves_the_old(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SAVES[way](numbered(1), tmp_path)

    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left") as caught:
        SAVES[way](numbered(2), tmp_path)
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert number_of(tmp_path, way) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_failing_base_model_leaves_the_old(tmp_path: Path) -> None:
    numbered(1).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="nonsense"):
        numbered(2).save_pretrained(tmp_path, max_shard_size="nonsense")
    assert number_of(tmp_path, "save_pretrained") == 1


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_flex(numbered(1), folder)


def spoil(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path)


def infinite(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


BAD = {
    "nan": infinite(float("nan")),
    "inf": infinite(float("inf")),
    "-inf": infinite(float("-inf")),
    **{
        str(dtype): lambda tensor, dtype=dtype: torch.ones_like(tensor).to(dtype)
        for dtype in (torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)
    },
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("is_patched", [False, True])
def test_weights_that_are_none(bad: str, is_patched: bool, tmp_path: Path) -> None:
    save_flex(numbered(1), tmp_path)
    spoil(tmp_path / "flexkit.weights", BAD[bad])
    model: nn.Module = numbered(1) if is_patched else plain("llava")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"1 not (finite|of 16, 32 or 64 bit floating point): "):
        load_flex(model, tmp_path)
    assert flexkit.is_patched(model) == is_patched
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_beyond_what_the_model_can_hold(tmp_path: Path) -> None:
    save_flex(numbered(1), tmp_path)
    spoil(tmp_path / "flexkit.weights", lambda tensor: torch.full_like(tensor, 1e6, dtype=torch.float32))
    model = plain("llava").half()
    with pytest.raises(CheckpointError, match=r"values beyond torch\.float16, .* into a model of torch\.float32"):
        load_flex(model, tmp_path)
    assert not flexkit.is_patched(model)
    load_flex(model.bfloat16(), tmp_path)


@pytest.mark.parametrize("settings", ["{}", '{"alpha": 1.0}'])
def test_settings_that_say_nothing(settings: str, tmp_path: Path) -> None:
    save_flex(numbered(1), tmp_path)
    content = json.loads((tmp_path / "flexkit.json").read_text())
    content["config"] = json.loads(settings)
    (tmp_path / "flexkit.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match='"config" lacks start_layer, zoom, policy'):
        load_flex(plain("llava"), tmp_path)
