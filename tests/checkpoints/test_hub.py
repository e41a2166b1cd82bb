import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import flexkit.checkpoints.hub
from flexkit.checkpoints import from_pretrained, load_flex, save_flex
from flexkit.checkpoints.hub import HubOptions, fetched
from flexkit.errors import CheckpointError
from flexkit.patching import added_parameters
from tests.patching.ways import patched, plain

FILES = ("flexkit.json", "flexkit.weights")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, content: Path, repository: str = "me/mine", branch: str = "main") -> Path:
    """Put a folder where the hub's client keeps what it downloaded: links into its blobs. Returns the snapshot."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for index, path in enumerate(sorted(path for path in content.rglob("*") if path.is_file())):
        link, blob = snapshot / path.relative_to(content), home / "blobs" / str(index)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(blob)
    (home / "refs").mkdir()
    (home / "refs" / branch).write_text(COMMIT)
    return snapshot


def trained() -> Any:
    model = patched("llava")
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(model):
            parameter.normal_()
    return model


def assert_same_added(one: Any, other: Any) -> None:
    ours, theirs = added_parameters(one), added_parameters(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("subfolder", ["", "epoch-3"])
def test_load_flex_from_the_hub(subfolder: str, tmp_path: Path) -> None:
    model = trained()
    save_flex(model, tmp_path / "saved" / subfolder)
    cached(tmp_path / "cache", tmp_path / "saved")
    loaded = load_flex(plain("llava"), "me/mine", cache_dir=tmp_path / "cache", subfolder=subfolder)
    assert_same_added(loaded, model)


def test_from_pretrained_from_the_hub(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "saved")
    cached(tmp_path / "cache", tmp_path / "saved", branch="v2")
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = from_pretrained("me/mine", revision="v2", dtype=torch.float32, **options)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert_same_added(loaded, model.float())
    with pytest.raises(CheckpointError, match="me/mine is no folder here"):
        from_pretrained("me/mine", revision="v3", **options)


def test_a_base_model_on_the_hub_is_not_a_patched_one(tmp_path: Path) -> None:
    plain("llava").save_pretrained(tmp_path / "saved")
    cached(tmp_path / "cache", tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"flexkit\.json and flexkit\.weights cannot be had") as caught:
        from_pretrained("me/mine", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["me/mine", "mine"])
def test_what_is_nowhere_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is no folder here, and .* cannot be had") as caught:
        load_flex(plain("llava"), name, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, LocalEntryNotFoundError)


@pytest.mark.parametrize("name", ["runs/today/checkpoint-3", "/nowhere", "not a name"])
def test_a_path_is_not_sought_on_the_hub(name: str) -> None:
    for source in (name, Path(name)):
        with pytest.raises(CheckpointError, match=f"{name} does not exist; pass the folder"):
            load_flex(plain("llava"), source)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "flexkit.json").touch()
    with pytest.raises(CheckpointError, match=r"flexkit\.json is a file"):
        load_flex(plain("llava"), str(tmp_path / "flexkit.json"))


def test_every_option_reaches_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def download(repository: str, name: str, **options: Any) -> str:
        calls.append((repository, name, options))
        return str(tmp_path / "snapshot" / options["subfolder"] / name)

    monkeypatch.setattr(flexkit.checkpoints.hub, "hf_hub_download", download)
    options = {
        "revision": "v2",
        "token": "secret",
        "cache_dir": tmp_path,
        "force_download": True,
        "local_files_only": False,
        "subfolder": "sub",
    }
    assert options.keys() == HubOptions.__annotations__.keys()
    assert fetched("me/mine", FILES, **options) == tmp_path / "snapshot" / "sub"
    assert calls == [("me/mine", name, options) for name in FILES]


@pytest.mark.parametrize("error", [OSError("first line\nsecond line"), ConnectionError()])
def test_a_failing_hub_is_one_line(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(flexkit.checkpoints.hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match=r": (first line|ConnectionError)$"):
        fetched("me/mine", FILES)


def test_a_folder_comes_before_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model = trained()
    save_flex(model, "me/mine")
    assert_same_added(load_flex(plain("llava"), "me/mine"), model)
