"""Checkpoints of strangers: what cannot be read, or should not be, is told in one line before anything is built."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexkit.checkpoints import load_flex, load_llava_flexattn, save_flex
from flexkit.errors import CheckpointError
from flexkit.visual_search.weights import WEIGHTS, load_model
from tests.patching.ways import patched, plain


def outside(path: Path) -> None:
    path.unlink(missing_ok=True)
    (path.parents[1] / "secret").write_text("{}")
    path.symlink_to(path.parents[1] / "secret")


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


KINDS = [outside, fifo, bound_socket, device, loop, dangling, directory]
PUBLISHED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "vision_tower/config.json",
]


def assert_refused(load: Callable[[], Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_a_published_checkpoint(published: Path, name: str, kind: Callable[[Path], None]) -> None:
    kind(published / name)
    assert_refused(lambda: load_llava_flexattn(published))


@pytest.mark.parametrize("name", ["flexkit.json", "flexkit.weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_a_saved_one(tmp_path: Path, name: str, kind: Callable[[Path], None]) -> None:
    save_flex(patched("llava"), tmp_path / "saved")
    kind(tmp_path / "saved" / name)
    assert_refused(lambda: load_flex(plain("llava"), tmp_path / "saved"))


TEXTS = {
    "nested": "[" * 100_000,
    "nested objects": '{"a":' * 100_000,
    "number": '{"a": ' + "9" * 5000 + "}",
    "bytes": "\0",
}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.endswith("json")])
@pytest.mark.parametrize("text", TEXTS)
def test_json_that_is_none(published: Path, name: str, text: str) -> None:
    (published / name).write_text(TEXTS[text])
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_llava_flexattn(published)


def test_json_of_any_size(published: Path) -> None:
    with (published / "config.json").open("r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(CheckpointError, match=r"cannot be read as JSON \(it has \d+ bytes"):
        load_llava_flexattn(published)


SETTINGS = [
    {name: value}
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_key_value_heads",
        "head_dim",
    )
    for value in (10**9, 2**62, 10**30, -1, 0, 1.5)
]


@pytest.mark.parametrize(
    "changes",
    [
        *SETTINGS,
        {"vocab_size": float("inf")},
        {"extra": {"zoom_ratio": float("inf")}},
        {"extra": {"zoom_ratio": "9" * 4000}},
        {"mm_vision_select_layer": float("-inf")},
        {"mm_vision_select_layer": 10**9},
        {"rope_theta": "many"},
        {"rope_scaling": {"type": "nonsense", "factor": 1.0}},
        {"hidden_act": "nonsense"},
        {"hidden_act": []},
        {"mm_vision_tower": "\0"},
        {"mm_vision_tower": "9" * 5000},
        {"mm_vision_tower": ["a"]},
        {"torch_dtype": "float8_e4m3fn"},
    ],
    ids=lambda changes: " ".join(f"{name}={value!r:.20}" for name, value in changes.items()),
)
def test_settings_that_no_model_has(published: Path, changes: dict[str, Any]) -> None:
    content = json.loads((published / "config.json").read_text())
    content |= {name: content[name] | value if name == "extra" else value for name, value in changes.items()}
    (published / "config.json").write_text(json.dumps(content))
    assert_refused(lambda: load_llava_flexattn(published))


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "image_size", "patch_size", "num_channels"])
@pytest.mark.parametrize("value", [10**9, 10**30, -1, 0, [2, 2], "x", 1.5, None])
def test_towers_that_no_model_has(published: Path, name: str, value: Any) -> None:
    path = published / "vision_tower" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert_refused(lambda: load_llava_flexattn(published))


@pytest.mark.parametrize("shard", ["\0", "a" * 5000, "\ud800", "."])
def test_names_of_shards_that_are_none(published: Path, shard: str) -> None:
    index = {"weight_map": {"model.norm.weight": shard}}
    (published / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(lambda: load_llava_flexattn(published))


@pytest.mark.parametrize("policy", [{"type": "Schedule", "policies": {"9" * 5000: {"type": "Nothing"}}}, {}, []])
def test_policies_that_are_none(policy: Any, tmp_path: Path, edit_json: Callable[..., None]) -> None:
    save_flex(patched("llava"), tmp_path)
    edit_json(tmp_path / "flexkit.json", config={"policy": policy})
    assert_refused(lambda: load_flex(plain("llava"), tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff\x00", None])
def test_damaged_weights_to_evaluate(tmp_path: Path, name: str, content: bytes | None) -> None:
    (tmp_path / "base").mkdir()
    for path in (WEIGHTS / "base").iterdir():
        if path.name != name:
            shutil.copyfile(path, tmp_path / "base" / path.name)
    if content is None:
        os.mkfifo(tmp_path / "base" / name)
    else:
        (tmp_path / "base" / name).write_bytes(content)
    assert_refused(lambda: load_model("base", weights=tmp_path))
