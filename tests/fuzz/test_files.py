"""Whatever lies in a checkpoint's files: flexkit's own error in one line, and a model that is as it was."""

import copy
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexkit
from flexkit.checkpoints import load_flex, load_llava_flexattn, save_flex
from flexkit.errors import FlexkitError
from tests.patching.ways import patched, plain

PUBLISHED = Path(__file__).parents[1] / "data" / "reference" / "small-wide"

NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 9, 10**4, 10**9, 2**31, 2**63, 10**30, 1e400, -1e400, float("nan"), 0.5, 1e-320]
)
VALUES = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.sampled_from(["", "gelu", "\0", "../..", "/dev/zero", "9" * 5000, "linear", "\ud800", "a" * 300]),
    st.lists(NUMBERS, max_size=2),
    st.dictionaries(st.sampled_from(["type", "9" * 5000, "\0", "0"]), NUMBERS, max_size=2),
)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document."""
    if path:
        yield path
    items: Any = (
        content.items() if isinstance(content, dict) else enumerate(content if isinstance(content, list) else ())
    )
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, content: dict[str, Any]) -> bytes:
    """A JSON document with something else in some places, or bytes that are none."""
    content = copy.deepcopy(content)
    for path in draw(st.lists(st.sampled_from(list(places(content))), min_size=1, max_size=3)):
        owner: Any = content
        try:
            for key in path[:-1]:
                owner = owner[key]
            if draw(st.booleans()):
                owner[path[-1]] = draw(VALUES)
            elif isinstance(owner, dict):
                owner[draw(st.sampled_from(["type", "kind", "9" * 5000, "\0"]))] = owner.pop(path[-1])
            else:
                del owner[path[-1]]
        except (IndexError, KeyError, TypeError):  # an earlier change took the place away
            continue
    text = json.dumps(content).encode()
    damage = draw(st.sampled_from(["none", "none", "none", "none", "cut", "deep", "long", "bytes"]))
    at = draw(st.integers(0, len(text)))
    filling = {"none": b"", "cut": b"", "deep": b"[" * 100_000, "long": b"9" * 5000, "bytes": b"\xff\x00"}[damage]
    return text if damage == "none" else text[:at] + filling + (b"" if damage == "cut" else text[at:])


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def mutated_tensors(draw: st.DrawFn, path: Path) -> bytes:
    """A safetensors file with another header, another length of it, or other values."""
    header, data = header_of(path)
    for name in draw(st.lists(st.sampled_from([name for name in header if name != "__metadata__"]), max_size=2)):
        if not isinstance(header.get(name), dict):
            continue
        what = draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "swap"]))
        if what == "dtype":
            dtypes = ["BF16", "F64", "I32", "BOOL", "F8_E4M3", "U8", "C64", "nonsense"]
            header[name]["dtype"] = draw(st.sampled_from(dtypes))
        elif what == "shape":
            header[name]["shape"] = draw(
                st.sampled_from([[], [-1], [2**62], [0, 2**62], header[name].get("shape", [])[::-1]])
            )
        elif what == "data_offsets":
            header[name]["data_offsets"] = draw(st.sampled_from([[], [0, 0], [4, 0], [0, 2**63], [-1, 4]]))
        elif what == "name":
            header[draw(st.sampled_from(["", "\0", "lm_head.weight", name.replace("9", "9" * 5000)]))] = header.pop(
                name
            )
        else:
            other = draw(st.sampled_from(list(header)))
            header[name], header[other] = header[other], header[name]
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([len(text)] * 4 + [0, 2**63, len(text) - 1]))
    value = draw(st.sampled_from([b"", b"", b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\x01"]))
    at = draw(st.integers(0, len(data) // 4)) * 4
    data = data[:at] + value + data[at + len(value) :]
    return struct.pack("<Q", length) + text + data[: draw(st.sampled_from([len(data)] * 4 + [0, len(data) - 1]))]


def refused_or_loaded(load: Callable[[], Any]) -> None:
    try:
        load()
    except FlexkitError as error:
        assert str(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_flex(
        patched("llava", policy=flexkit.Schedule({0: flexkit.TopK(3) | ~flexkit.Threshold(0.1).pooled(2)})), folder
    )
    return folder


@given(st.data())
def test_what_save_flex_wrote(saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("folder")
    for path in saved.iterdir():
        shutil.copyfile(path, folder / path.name)
    which = data.draw(st.sampled_from(["json", "safetensors", "both"]))
    if which != "safetensors":
        content = json.loads((saved / "flexkit.json").read_text())
        (folder / "flexkit.json").write_bytes(data.draw(mutated(content)))
    if which != "json":
        (folder / "flexkit.weights").write_bytes(data.draw(mutated_tensors(saved / "flexkit.weights")))
    model = plain("llava")
    before = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    refused_or_loaded(lambda: load_flex(model, folder))
    shutil.rmtree(folder)
    if flexkit.is_patched(model):
        flexkit.unpatch_model(model)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(id(value) == before[name][0] and torch.equal(value, before[name][1]) for name, value in after.items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


@given(st.data())
def test_a_published_checkpoint(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("published")
    for name in ("config.json", "vision_tower/config.json", "model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(PUBLISHED / name, folder / name)
    name = data.draw(st.sampled_from(["config.json", "vision_tower/config.json", "model.safetensors", "index"]))
    if name == "model.safetensors":
        (folder / name).write_bytes(data.draw(mutated_tensors(PUBLISHED / name)))
    elif name == "index":
        header, _ = header_of(PUBLISHED / "model.safetensors")
        index = {"weight_map": {tensor: "model.safetensors" for tensor in header if tensor != "__metadata__"}}
        (folder / "model.safetensors.index.json").write_bytes(data.draw(mutated(index)))
    else:
        (folder / name).write_bytes(data.draw(mutated(json.loads((PUBLISHED / name).read_text()))))
    refused_or_loaded(lambda: load_llava_flexattn(folder))
    shutil.rmtree(folder)
