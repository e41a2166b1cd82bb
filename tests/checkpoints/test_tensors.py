import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from flexkit.checkpoints.tensors import check_tensors, read_tensors
from flexkit.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def some_tensors() -> dict[str, Tensor]:
    return {
        "embed": torch.randn(5, 3),
        "norm": torch.randn(3).half(),
        "bias": torch.randn(()).bfloat16(),
        "ids": torch.arange(4),
    }


def save_shards(folder: Path, tensors: dict[str, Tensor], places: dict[str, str]) -> None:
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def same(given: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return given.keys() == expected.keys() and all(
        given[name].dtype == tensor.dtype and torch.equal(given[name], tensor) for name, tensor in expected.items()
    )


def test_reads_one_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({"other": torch.ones(2)}, tmp_path / "flexkit.safetensors")
    assert same(read_tensors(tmp_path), tensors)
    assert same(read_tensors(str(tmp_path), "flexkit"), {"other": torch.ones(2)})


def test_reads_a_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    assert read_tensors(tmp_path) == {}


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=4, max_size=4))
def test_shards_read_like_one_file(shards: list[str]) -> None:
    tensors = some_tensors()
    places = {name: f"{shard}.safetensors" for name, shard in zip(tensors, shards, strict=True)}
    with TemporaryDirectory() as folder:
        save_shards(Path(folder), tensors, places)
        assert same(read_tensors(folder), tensors)


def test_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(8)}, path)
    weight = read_tensors(tmp_path)["weight"]
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x01\x01\x01\x01")
    assert not weight.any()


def test_reads_a_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"weight": torch.ones(3)}, blobs / "1234")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/1234"))
    assert same(read_tensors(snapshot), {"weight": torch.ones(3)})


def two_shards(folder: Path) -> Path:
    folder.mkdir()
    places = {"embed": "a.safetensors", "norm": "a.safetensors", "bias": "b.safetensors", "ids": "b.safetensors"}
    save_shards(folder, some_tensors(), places)
    return folder


def with_index(folder: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / INDEX).write_text(text)


def point_to(place: str) -> Callable[[Path], None]:
    return lambda folder: with_index(folder, {"weight_map": {"embed": place}})


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    save_file({"embed": torch.ones(1)}, outside)
    (folder / "linked.safetensors").symlink_to(outside)
    point_to("linked.safetensors")(folder)


def climb_out(folder: Path) -> None:
    save_file({"embed": torch.ones(1)}, folder.parent / "outside.safetensors")
    point_to("../outside.safetensors")(folder)


def absolute(folder: Path) -> None:
    save_file({"embed": torch.ones(1)}, folder.parent / "outside.safetensors")
    point_to(str(folder.parent / "outside.safetensors"))(folder)


def pickled_shard(folder: Path) -> None:
    torch.save({"embed": torch.ones(1)}, folder / "a.bin")
    point_to("a.bin")(folder)


def truncate(folder: Path) -> None:
    path = folder / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def garble(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes(b"\xff" * 64)


def only_pickles(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    torch.save({"embed": torch.ones(1)}, folder / "pytorch_model.bin")


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def absent_tensor(folder: Path) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    with_index(folder, {"weight_map": places | {"head": "b.safetensors"}})


def unlisted_tensor(folder: Path) -> None:
    with_index(folder, {"weight_map": {"embed": "a.safetensors"}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (absolute, r"outside\.safetensors.* lies outside of that folder.*copy it"),
        (climb_out, r"'\.\./outside\.safetensors'.* lies outside of that folder"),
        (link_out, r"linked\.safetensors.* lies outside of that folder"),
        (point_to("c.safetensors"), r"shards that are missing: c\.safetensors; download"),
        (pickled_shard, r"a\.bin is not a safetensors file.*convert"),
        (truncate, r"b\.safetensors cannot be read .*; download or save it again"),
        (garble, r"b\.safetensors cannot be read"),
        (absent_tensor, r"b\.safetensors and model\.safetensors\.index\.json disagree about head; download"),
        (unlisted_tensor, r"disagree about norm"),
        (only_pickles, r"only pytorch_model\.bin.*convert it once"),
        (nothing, r"neither model\.safetensors nor .*completely downloaded"),
        (lambda folder: with_index(folder, "{"), r"index\.json cannot be read as JSON"),
        (lambda folder: with_index(folder, []), r"holds a JSON list, an object was expected"),
        (lambda folder: with_index(folder, {"weight_map": {"embed": 1}}), r'no "weight_map"'),
        (lambda folder: with_index(folder, {}), r'no "weight_map"'),
    ],
)
def test_refuses(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "checkpoint")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(folder)


def test_refuses_a_single_file_linked_from_outside(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"embed": torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match="lies outside"):
        read_tensors(folder)


def test_refuses_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing does not exist; .*snapshot_download"):
        read_tensors(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file is a file"):
        read_tensors(tmp_path / "file")


shapes = st.dictionaries(
    st.text("abcdef.", min_size=1, max_size=4), st.lists(st.integers(1, 3), max_size=2), max_size=6
)


@given(shapes, shapes)
def test_check_names_every_difference(expected: dict[str, list[int]], found: dict[str, list[int]]) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in found.items()}
    kinds = {
        "missing": expected.keys() - found.keys(),
        "not expected": found.keys() - expected.keys(),
        "of another shape": {name for name in expected.keys() & found if expected[name] != found[name]},
    }
    if not any(kinds.values()):
        check_tensors(expected, tensors, source="here")
        return
    with pytest.raises(CheckpointError, match="in here do not fit") as caught:
        check_tensors(expected, tensors, source="here")
    for kind, names in kinds.items():
        assert (f"{len(names)} {kind}: " in str(caught.value)) == bool(names)


def test_check_shows_the_first_names_and_both_shapes() -> None:
    expected = {f"layer{index}": (2, 2) for index in range(9)} | {"last": (4,)}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(expected, {"last": torch.zeros(3)}, source="here")
    assert "9 missing: layer0, layer1, layer2, layer3, and 5 more" in str(caught.value)
    assert "1 of another shape: last (3,) instead of (4,)" in str(caught.value)
