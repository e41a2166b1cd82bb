"""Where a checkpoint lies: a folder, or a repository on the Hugging Face hub that becomes one."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TypedDict, Unpack

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from flexkit.checkpoints.files import checkpoint_folder
from flexkit.checkpoints.tensors import INDEX, read_index
from flexkit.errors import CheckpointError, first_line

__all__ = ["HubOptions", "fetched", "fetched_tensors"]


class HubOptions(TypedDict, total=False):
    """What :meth:`transformers.PreTrainedModel.from_pretrained` takes about a place on the hub, with the same meaning.

    Of these, ``subfolder`` counts for local folders too.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | PathLike[str] | None
    force_download: bool
    local_files_only: bool
    subfolder: str


def fetched(
    source: str | PathLike[str],
    names: Sequence[str],
    *,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The local folder that holds the files; those of the hub are downloaded, unless they were before.

    Parameters
    ----------
    source : str or os.PathLike
        A folder, or the name of a repository. A folder comes first.
    names : sequence of str
        The files to download. Of a local folder none is looked at.
    subfolder, revision, token, cache_dir, force_download, local_files_only
        See :class:`HubOptions`.

    Raises
    ------
    CheckpointError
        If it is neither, the repository lacks one of the files, or the hub cannot be reached.
    """
    if not isinstance(source, str) or Path(source).exists():
        return checkpoint_folder(Path(source) / subfolder)
    try:
        paths = [
            hf_hub_download(
                source,
                name,
                subfolder=subfolder or None,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                force_download=force_download,
                local_files_only=local_files_only,
            )
            for name in names
        ]
    except HFValidationError:
        # Too many slashes, say: only a path can be meant.
        return checkpoint_folder(source)
    except (OSError, EntryNotFoundError) as error:
        raise CheckpointError(
            f"{source} is no folder here, and {' and '.join(names)} cannot be had from a repository of that name: "
            f"{first_line(error)}"
        ) from error
    return Path(paths[0]).parent


def fetched_tensors(source: str | PathLike[str], names: Sequence[str], **hub: Unpack[HubOptions]) -> Path:
    """The same, with ``model.safetensors`` or the shards that its index names.

    Parameters
    ----------
    source, names, **hub
        As for :func:`fetched`.

    Raises
    ------
    CheckpointError
        As for :func:`fetched`, or if the index names no shards.
    """
    folder = fetched(source, names, **hub)
    index = INDEX.format("model")
    try:
        fetched(source, (index,), **hub)
    except CheckpointError:  # whole, or neither: then that is told
        fetched(source, ("model.safetensors",), **hub)
        return folder
    if (folder / index).exists():
        fetched(source, sorted(set(read_index(folder, index).values())), **hub)
    return folder
