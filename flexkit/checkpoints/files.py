"""Paths and JSON of a checkpoint folder, which may come from a stranger."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from flexkit.errors import CheckpointError

__all__ = ["checkpoint_folder", "path_inside", "read_json", "rewritten"]


def checkpoint_folder(folder: str | PathLike[str]) -> Path:
    """The folder as a path.

    Raises
    ------
    CheckpointError
        If it does not exist or is a file.
    """
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; pass the folder of a checkpoint. huggingface_hub.snapshot_download(name) downloads one "
            "from the Hugging Face hub and returns its folder."
        )
    return path


def path_inside(folder: Path, name: str) -> Path:
    """The path of a file that a checkpoint names, which has to lie in the checkpoint's own folder.

    Links into the blobs that the Hugging Face cache keeps next to its snapshots count as inside.

    Raises
    ------
    CheckpointError
        If the name is absolute, or climbs or links out of the folder.
    """
    path, home = folder / name, folder.resolve()
    caches = (parent.parent for parent in home.parents if parent.name == "snapshots")
    if not any(path.resolve().is_relative_to(place) for place in (home, *(cache / "blobs" for cache in caches))):
        raise CheckpointError(
            f"the file {name!r} of {folder} lies outside of that folder; if you trust it, copy it there."
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    CheckpointError
        If there is no such file, it cannot be read, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} the folder of the checkpoint?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download or save it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, an object was expected.")
    return content


@contextmanager
def rewritten(path: Path) -> Iterator[Path]:
    """A draft that takes the place of a file once it is complete: a crash never leaves half of it."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
