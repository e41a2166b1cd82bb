"""Files of a checkpoint folder, which may come from a stranger, and which others may be writing."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from flexkit.errors import CheckpointError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "checked_folder",
    "checkpoint_file",
    "checkpoint_folder",
    "drafts",
    "held",
    "path_inside",
    "read_json",
    "written",
]

_LARGEST_JSON = 2**26
_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_DRAFTS = ".flexkit-", ".draft"


def checkpoint_folder(folder: str | PathLike[str]) -> Path:
    """The folder as a path.

    Raises
    ------
    CheckpointError
        If it does not exist or is a file.
    """
    path = Path(folder)
    try:
        found, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); pass the folder of a checkpoint.") from error
    if not found:
        what = "is a file" if exists else "does not exist"
        raise CheckpointError(
            f"{path} {what}; pass the folder of a checkpoint. huggingface_hub.snapshot_download(name) downloads one "
            "from the Hugging Face hub and returns its folder."
        )
    return path


def path_inside(folder: Path, name: str) -> Path:
    """The path of what a checkpoint names, which has to lie in the checkpoint's own folder.

    Links into the blobs that the Hugging Face cache keeps next to its snapshots count as inside.

    Raises
    ------
    CheckpointError
        If the name is absolute, climbs or links out of the folder, or is no name at all.
    """
    try:
        path, home = folder / name, folder.resolve()
        place = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a NUL
        raise CheckpointError(f"the file {name!r} of {folder} cannot be read ({error}); download it again.") from error
    caches = (parent.parent for parent in home.parents if parent.name == "snapshots")
    if not any(place.is_relative_to(allowed) for allowed in (home, *(cache / "blobs" for cache in caches))):
        raise CheckpointError(
            f"the file {name!r} of {folder} lies outside of that folder; if you trust it, copy it there."
        )
    return path


def checkpoint_file(folder: Path, name: str) -> Path | None:
    """The path of a file in the checkpoint's own folder, None if there is none of that name.

    Every file of a checkpoint is opened by the path that this returns.

    Raises
    ------
    CheckpointError
        If it lies outside of the folder, or is a pipe, a device or anything else that is no file.
    """
    path = path_inside(folder, name)
    try:
        if not os.path.lexists(path):
            return None
        if not path.is_symlink() or path.exists():
            if path.is_file():
                return path
            raise CheckpointError(f"{path} is no regular file; download or save it again.")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download or save it again.") from error
    raise CheckpointError(f"{path} cannot be read (a link that leads nowhere); download or save it again.")


def checked_folder(folder: str | PathLike[str]) -> Path:
    """A folder whose files another library will open by itself: each is checked as :func:`checkpoint_file` does."""
    folder = checkpoint_folder(folder)
    for path in folder.iterdir():
        if not path.is_dir():
            checkpoint_file(folder, path.name)
    return folder


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises
    ------
    CheckpointError
        If there is no such file, it cannot be read, or it holds something else.
    """
    path = checkpoint_file(folder, name)
    if path is None:
        raise CheckpointError(f"{folder / name} is missing; is {folder} the folder of the checkpoint?")
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"it has {path.stat().st_size} bytes, at most {_LARGEST_JSON} were expected")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download or save it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, an object was expected.")
    return content


@contextmanager
def held(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a folder against all who hold it too, in this process and others; a process that dies lets go of it.

    The value is False where the system knows no such locks.

    Raises
    ------
    BlockingIOError
        If another holds it and ``wait`` is False.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            alone = True
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            alone = False
        yield alone
    finally:
        os.close(descriptor)


@contextmanager
def drafts(folder: Path) -> Iterator[Path]:
    """Hold a checkpoint's folder, made if need be, with a folder for drafts in it that is gone afterwards.

    What writers that were killed have left is removed.
    """
    with ExitStack() as stack:
        with written(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(held(folder)):
                for left in folder.glob("*".join(_DRAFTS)):
                    shutil.rmtree(left, ignore_errors=True)
            place = TemporaryDirectory(prefix=_DRAFTS[0], suffix=_DRAFTS[1], dir=folder, ignore_cleanup_errors=True)
        yield Path(stack.enter_context(place))


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Name what is being written, where that fails.

    Raises
    ------
    CheckpointError
        In the place of what the system or safetensors raises.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
