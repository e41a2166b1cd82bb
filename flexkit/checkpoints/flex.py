"""What patching added to a model, in files of its own: projections of high-res features, and settings."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import Unpack

from flexkit.checkpoints.files import checkpoint_file, drafts, read_json, written
from flexkit.checkpoints.hub import HubOptions, fetched
from flexkit.checkpoints.tensors import check_tensors, read_file
from flexkit.errors import CheckpointError, ConfigError
from flexkit.patching import FlexConfig, added_parameters, get_patch, is_patched, patch_model, unpatch_model
from flexkit.patching.state import patched_model
from flexkit.selection import Policy, Schedule, as_policy, policy_to_dict

__all__ = [
    "SETTINGS",
    "WEIGHTS",
    "flex_draft",
    "flex_folder",
    "load_added",
    "load_flex",
    "read_flex",
    "save_flex",
    "weights_file",
]

Model = TypeVar("Model", bound=nn.Module)
AnyPolicy = Policy | Schedule | Callable[[Tensor], Tensor]

# Of safetensors, but engines take every *.safetensors of a folder for the base model's.
WEIGHTS, SETTINGS = "flexkit.weights", "flexkit.json"
_EARLIER_WEIGHTS = "flexkit.safetensors"
_FORMAT = 1
# In the header of the weights, where one rename puts them into place together: the settings that were saved with them,
# and the digest of the settings file that was there before. Where that still is, the writer was killed before it came
# to it.
_NOTE = "flexkit"
# A patched model has each of them; to leave one to the model would be to guess.
_REQUIRED = ("start_layer", "zoom", "policy")


def save_flex(model: nn.Module, folder: str | PathLike[str], *, is_main_process: bool = True) -> None:
    """Save what patching added to a model, and nothing of the base model.

    Writes ``flexkit.weights``, the added projections under their names in ``model.state_dict()`` in the format of
    safetensors, and ``flexkit.json``, the settings. ``model.save_pretrained`` of a patched model writes them beside the
    base model's files.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    folder : str or os.PathLike
        Made if it does not exist; it may be the base model's own.
    is_main_process : bool
        Whether this process writes. Of a model whose weights are sharded (FSDP2) all processes have to call this.

    Raises
    ------
    PatchError
        If the model is not patched.
    ConfigError
        If the model queries from a tensor of positions, which belongs to one batch.
    """
    with flex_draft(model, added_parameters(model), folder, is_main_process=is_main_process, replaces=True) as (
        _,
        commit,
    ):
        commit()


@contextmanager
def flex_draft(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    folder: str | PathLike[str],
    *,
    is_main_process: bool,
    replaces: bool = False,
) -> Iterator[tuple[Path | None, Callable[[], None]]]:
    """Write a model's settings with the given weights, for :func:`save_flex`, beside where they will be.

    The folder is held until the end. With ``replaces`` the settings of an earlier save stay until they are replaced,
    and count for nothing once the new weights are in place. The values are the folder of drafts, and what puts them
    into place, with whatever else was written there; None, and nothing, in processes that do not write.
    """
    settings = {
        "format_version": _FORMAT,
        "flexkit_version": version("flexkit-vlm"),
        "model_type": _model_type(model),
        "config": get_patch(model).config.to_dict(),
    }
    weights = {name: _on_cpu(weight) for name, weight in weights.items()}
    if not is_main_process:
        yield None, lambda: None
        return
    settings["digest"] = _digest(settings, weights)
    text = json.dumps(settings, indent=2) + "\n"
    folder = Path(folder)
    with drafts(folder) as place:
        with written(folder):
            note: dict[str, Any] = {"settings": settings}
            if (
                replaces
                and (folder / SETTINGS).is_file()
                and (before := (folder / SETTINGS).read_bytes()) != text.encode()
            ):
                note["before"] = sha256(before).hexdigest()
            # One key only: safetensors writes several in any order.
            save_file(weights, place / WEIGHTS, metadata={_NOTE: json.dumps(note)})
            (place / SETTINGS).write_text(text, encoding="utf-8")
        del weights

        def commit() -> None:
            with written(folder):
                (place / WEIGHTS).replace(folder / WEIGHTS)
                (place / SETTINGS).replace(folder / SETTINGS)
                (folder / _EARLIER_WEIGHTS).unlink(missing_ok=True)
                for other in filter(Path.is_file, place.iterdir()):
                    other.replace(folder / other.name)
                rmtree(place)  # what is pushed from here on is without it

        yield place, commit


def load_flex(
    model: Model,
    folder: str | PathLike[str],
    *,
    policy: AnyPolicy | None = None,
    **hub: Unpack[HubOptions],
) -> Model:
    """Load what :func:`save_flex` saved; if it fails the model is left as it was.

    Parameters
    ----------
    model : torch.nn.Module
        The base model, which is patched with the saved settings, or one patched already, whose settings have
        to agree. Weights take the model's dtype and device.
    folder : str or os.PathLike
        What :func:`save_flex` wrote, or the name of a repository on the Hugging Face hub that holds it.
    policy : Policy or callable or Schedule, optional
        Takes the place of the saved policy. Needed if that is not one of flexkit's own.
    **hub
        ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only`` and ``subfolder``, as in
        ``from_pretrained`` of transformers.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    CheckpointError
        If the folder is incomplete, cannot be had from the hub, is of another format or for another model, its files
        are of different saves, a weight is not finite or no floating-point number, or the settings do not agree.
    UnsupportedModelError
        If the model cannot be patched.
    """
    folder = flex_folder(folder, **hub)
    saved, tensors = read_flex(folder)
    settings = _settings(saved, folder, model)
    if is_patched(model):
        _check_agreement(settings, get_patch(model).config.to_dict(), policy, folder)
        load_added(model, tensors, source=folder)
        return model
    config = _config(settings, policy, folder)
    try:
        patch_model(model, config, trained=True)
    except ConfigError as error:
        raise CheckpointError(f"{folder / SETTINGS} does not fit this {type(model).__name__}: {error}") from error
    try:
        load_added(model, tensors, source=folder)
    except BaseException:
        unpatch_model(model)
        raise
    return model


@torch.no_grad()
def load_added(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str | PathLike[str]) -> None:
    """Copy weights into what patching added to a model, once all of them are known to fit.

    What is on the meta device gets the weights themselves, on the CPU.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    tensors : mapping
        Name in ``model.state_dict()`` to tensor.
    source : str or os.PathLike
        Where the tensors come from, for the message.

    Raises
    ------
    CheckpointError
        If tensors are missing, extra, of another shape, or hold what the model's weights cannot.
    """
    added = added_parameters(model)
    check_tensors({name: weight.shape for name, weight in added.items()}, tensors, source=source)
    narrow = [name for name, weight in added.items() if not _holds(weight.dtype, tensors[name])]
    if narrow:
        raise CheckpointError(
            f"{narrow[0]} in {source} has values beyond {added[narrow[0]].dtype}, the model's; load it into a model of "
            f"{tensors[narrow[0]].dtype}."
        )
    for name, weight in added.items():
        if weight.is_meta:
            owner, _, own = name.rpartition(".")
            data = tensors[name].to(weight.dtype, copy=True)
            projection = patched_model(model).get_submodule(owner)
            setattr(projection, own, nn.Parameter(data, requires_grad=weight.requires_grad))
        elif isinstance(weight, DTensor):  # shared out among processes, each of which has read all of it
            whole = tensors[name].to(weight.device, weight.dtype)
            weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None))
        else:
            weight.copy_(tensors[name])


def flex_folder(source: str | PathLike[str], **hub: Unpack[HubOptions]) -> Path:
    """The local folder of what :func:`save_flex` wrote, today or earlier (:func:`~flexkit.checkpoints.hub.fetched`)."""
    try:
        return fetched(source, (SETTINGS, WEIGHTS), **hub)
    except CheckpointError as error:
        try:
            return fetched(source, (SETTINGS, _EARLIER_WEIGHTS), **hub)
        except CheckpointError:
            raise error from error.__cause__


def weights_file(folder: Path) -> Path | None:
    """The file of added weights in a folder, under its name of today or of earlier; None if there is none."""
    return checkpoint_file(folder, WEIGHTS) or checkpoint_file(folder, _EARLIER_WEIGHTS)


def read_flex(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the weights that were saved together.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or they are of two saves.
    """
    settings = read_json(folder, SETTINGS)
    path = weights_file(folder) or folder / WEIGHTS
    tensors, header = read_file(folder, path.name)
    if _NOTE not in header:  # of an older version, or changed by hand
        return settings, tensors
    try:
        note = json.loads(header[_NOTE])
        own, before = note["settings"], note.get("before")
        digest = own["digest"]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error}); save it again.") from error
    if settings.get("digest") == digest:
        return settings, tensors
    if before == sha256((folder / SETTINGS).read_bytes()).hexdigest():
        return own, tensors
    raise CheckpointError(
        f"{SETTINGS} and {path.name} in {folder} are of two different saves; copy both from one, or save again."
    )


def _settings(given: dict[str, Any], folder: Path, model: nn.Module) -> dict[str, Any]:
    """The saved FlexConfig as plain JSON."""
    path = folder / SETTINGS
    if given.get("format_version") != _FORMAT:
        raise CheckpointError(
            f"{path} has format version {given.get('format_version')!r}, this flexkit reads {_FORMAT}; use "
            f"the flexkit that wrote it, {given.get('flexkit_version')}, or a newer one."
        )
    if given.get("model_type") != _model_type(model):
        raise CheckpointError(
            f"{path} was saved from a model of type {given.get('model_type')!r}, this one is "
            f"{_model_type(model)!r}; load it into the base model that it was trained on."
        )
    settings = given.get("config")
    if not isinstance(settings, dict):
        raise CheckpointError(f'{path} has no "config" object; save it again.')
    missing = [name for name in _REQUIRED if name not in settings]
    if missing:
        raise CheckpointError(f'{path}: "config" lacks {", ".join(missing)}; save it again.')
    return settings


def _config(settings: dict[str, Any], policy: AnyPolicy | None, folder: Path) -> FlexConfig:
    saved = settings.get("policy")
    if policy is None and isinstance(saved, dict) and saved.get("type") == "custom":
        raise CheckpointError(
            f"{folder} was saved with the policy {saved.get('name')!r}, which is not one of flexkit's own; "
            "make it and pass it as policy=..."
        )
    try:
        return FlexConfig.from_dict(settings, policy=policy)
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / SETTINGS}: {error}") from error


def _check_agreement(
    saved: dict[str, Any],
    present: dict[str, Any],
    policy: AnyPolicy | None,
    folder: Path,
) -> None:
    if policy is not None:
        described = policy if isinstance(policy, Schedule) else as_policy(policy)
        saved = saved | {"policy": policy_to_dict(described)}
    present = json.loads(json.dumps(present))
    differences = [
        f"{name} is {saved.get(name)!r} in the folder and {present.get(name)!r} in the model"
        for name in sorted(saved.keys() | present.keys())
        if saved.get(name) != present.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{folder} was saved with other settings than the model's: {'; '.join(differences)}. Unpatch the "
            "model first, and it is patched with the saved settings."
        )


def _holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    if not dtype.is_floating_point or not tensor.numel():
        return True
    largest = torch.finfo(dtype).max
    low, high = tensor.aminmax()
    return -largest <= low.item() and high.item() <= largest


def _digest(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    digest = sha256(json.dumps(settings).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _on_cpu(weight: Tensor) -> Tensor:
    """A copy of its own, which safetensors asks for; of a sharded weight (a DTensor) the whole."""
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _model_type(model: nn.Module) -> str | None:
    model = patched_model(model) if is_patched(model) else model
    return getattr(getattr(model, "config", None), "model_type", None)
