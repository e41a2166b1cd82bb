"""Tensors of a checkpoint folder: read from safetensors only, and checked before any model is touched."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexkit.checkpoints.files import checkpoint_file, checkpoint_folder, read_json
from flexkit.checks import FLOATS
from flexkit.errors import CheckpointError

__all__ = ["INDEX", "check_tensors", "read_file", "read_index", "read_tensors"]

INDEX = "{}.safetensors.index.json"
"""Name of the file that says which shard holds which tensor, by that of the model's file without its ending."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_tensors(folder: str | PathLike[str], stem: str = "model") -> dict[str, Tensor]:
    """Read all tensors of a folder, from ``{stem}.safetensors`` or the shards of its ``.index.json``.

    Parameters
    ----------
    folder : str or os.PathLike
        The checkpoint.
    stem : str
        Name of the safetensors file, without its ending.

    Returns
    -------
    dict
        Name to tensor, on the CPU and in the dtype of the file, independent of the file from then on.

    Raises
    ------
    CheckpointError
        If there are no safetensors, or a shard is missing, damaged, outside of the folder or at odds with the
        index.
    """
    folder = checkpoint_folder(folder)
    index = INDEX.format(stem)
    if checkpoint_file(folder, index) is not None:
        return _read_shards(folder, index)
    return read_file(folder, f"{stem}.safetensors")[0]


def read_file(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of one safetensors file of a folder, and the notes in its header.

    Raises
    ------
    CheckpointError
        If it is missing, damaged, outside of the folder or not of safetensors.
    """
    path = checkpoint_file(folder, name)
    if path is None:
        raise CheckpointError(_no_safetensors(folder, name))
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned, because a tensor of the file is a view of it and changes when the file is written again.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download or save it again.") from error


def read_index(folder: Path, index: str) -> dict[str, str]:
    """Which file of a folder holds which tensor.

    Raises
    ------
    CheckpointError
        If the index is missing, or says nothing of the kind.
    """
    places = read_json(folder, index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f'{folder / index} has no "weight_map" of files, by names of tensors; download it again.')
    return places


def check_tensors(
    expected: Mapping[str, Sequence[int]], given: Mapping[str, Tensor], *, source: str | PathLike[str]
) -> None:
    """Check that the given tensors are the expected ones: none missing, none extra, all of the right shape.

    They are weights, so they have to be of 16, 32 or 64 bit floating point, and finite.

    Parameters
    ----------
    expected : mapping
        Name to shape.
    given : mapping
        Name to tensor.
    source : str or os.PathLike
        Where the tensors come from, for the message.

    Raises
    ------
    CheckpointError
        If they differ; the message lists the first few names of every kind of difference.
    """
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    misshaped = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != tuple(shape)
    ]
    weights = {name: given[name] for name in expected if name in given}
    untyped = [f"{name} of {weight.dtype}" for name, weight in weights.items() if weight.dtype not in FLOATS]
    infinite = [name for name, weight in weights.items() if weight.dtype in FLOATS and not _is_finite(weight)]
    kinds = {
        "missing": missing,
        "not expected": extra,
        "of another shape": misshaped,
        "not of 16, 32 or 64 bit floating point": untyped,
        "not finite": infinite,
    }
    complaints = [f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names]
    if complaints:
        raise CheckpointError(
            f"the tensors in {source} do not fit the model: {'; '.join(complaints)}. Nothing was loaded; use "
            "the model and the settings that the checkpoint was made with."
        )


def _read_shards(folder: Path, index: str) -> dict[str, Tensor]:
    places = read_index(folder, index)
    shards = dict.fromkeys(places.values())
    absent = [shard for shard in shards if checkpoint_file(folder, shard) is None]
    if absent:
        raise CheckpointError(f"{folder / index} names shards that are missing: {_first(absent)}; download them.")
    other = [folder / shard for shard in shards if not shard.endswith(".safetensors")]
    if other:
        raise CheckpointError(f"{other[0]} is not a safetensors file; only those are read. {_CONVERT}")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        content, _ = read_file(folder, shard)
        named = {name for name, place in places.items() if place == shard}
        if named != content.keys():
            different = _first(sorted(named ^ content.keys()))
            raise CheckpointError(f"{folder / shard} and {index} disagree about {different}; download both again.")
        tensors |= content
    return tensors


def _is_finite(weight: Tensor) -> bool:
    """In one pass and without a mask as large as the weight: minimum and maximum of what holds a NaN are NaN."""
    return not weight.numel() or all(bool(bound.isfinite()) for bound in weight.aminmax())


_CONVERT = (
    "Loading a pickle can run any code, so convert it once where you trust it: "
    'safetensors.torch.save_file(torch.load(path, weights_only=True), "model.safetensors").'
)


def _no_safetensors(folder: Path, name: str) -> str:
    missing = f"{folder} has neither {name} nor {name}.index.json"
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return f"{missing}, only {_first(pickles)}. {_CONVERT}"
    return f"{missing}; is it the folder of the checkpoint, completely downloaded?"


def _first(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    more = [f"and {len(names) - count} more"] if len(names) > count else []
    return ", ".join(names[:count] + more)
