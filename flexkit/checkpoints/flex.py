"""What patching added to a model, in files of its own: projections of high-res features, and settings."""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import Unpack

from flexkit.checkpoints.files import path_inside, read_json, rewritten
from flexkit.checkpoints.hub import HubOptions, fetched
from flexkit.checkpoints.tensors import check_tensors, read_tensors
from flexkit.errors import CheckpointError, ConfigError, FlexkitError
from flexkit.patching import FlexConfig, added_parameters, get_patch, is_patched, patch_model, unpatch_model
from flexkit.patching.state import patched_model
from flexkit.selection import Policy, Schedule, as_policy, policy_to_dict

__all__ = ["SETTINGS", "STEM", "WEIGHTS", "load_added", "load_flex", "save_flex", "write_flex"]

Model = TypeVar("Model", bound=nn.Module)
AnyPolicy = Policy | Schedule | Callable[[Tensor], Tensor]

STEM = "flexkit"
WEIGHTS, SETTINGS = f"{STEM}.safetensors", f"{STEM}.json"
_FORMAT = 1


def save_flex(model: nn.Module, folder: str | PathLike[str], *, is_main_process: bool = True) -> None:
    """Save what patching added to a model, and nothing of the base model.

    Writes ``flexkit.safetensors``, the added projections under their names in ``model.state_dict()``, and
    ``flexkit.json``, the settings. ``model.save_pretrained`` of a patched model writes them beside the base model's
    files.

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
    write_flex(model, added_parameters(model), folder, is_main_process=is_main_process)


def write_flex(
    model: nn.Module, weights: Mapping[str, Tensor], folder: str | PathLike[str], *, is_main_process: bool
) -> None:
    """Write a model's settings with the given weights, as :func:`save_flex` does with the model's own."""
    settings = {
        "format_version": _FORMAT,
        "flexkit_version": version("flexkit-vlm"),
        "model_type": _model_type(model),
        "config": get_patch(model).config.to_dict(),
    }
    weights = {name: _on_cpu(weight) for name, weight in weights.items()}
    if not is_main_process:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with rewritten(folder / WEIGHTS) as draft:
        save_file(weights, draft, metadata={"format": "pt"})
    with rewritten(folder / SETTINGS) as draft:
        draft.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


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
        If the folder is incomplete, cannot be had from the hub, is of another format or for another model, or the
        settings do not agree.
    UnsupportedModelError
        If the model cannot be patched.
    """
    folder = fetched(folder, (SETTINGS, WEIGHTS), **hub)
    settings = _read_settings(folder, model)
    tensors = read_tensors(folder, STEM)
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
        If tensors are missing, extra or of another shape.
    """
    added = added_parameters(model)
    check_tensors({name: weight.shape for name, weight in added.items()}, tensors, source=source)
    for name, weight in added.items():
        if weight.is_meta:
            owner, _, own = name.rpartition(".")
            data = tensors[name].to(weight.dtype, copy=True)
            projection = patched_model(model).get_submodule(owner)
            setattr(projection, own, nn.Parameter(data, requires_grad=weight.requires_grad))
        else:
            weight.copy_(tensors[name])


def _read_settings(folder: Path, model: nn.Module) -> dict[str, Any]:
    """The saved FlexConfig as plain JSON."""
    path = path_inside(folder, SETTINGS)
    given = read_json(path)
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
    if not isinstance(given.get("config"), dict):
        raise CheckpointError(f'{path} has no "config" object; save it again.')
    settings: dict[str, Any] = given["config"]
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
    except (FlexkitError, TypeError) as error:
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


def _on_cpu(weight: Tensor) -> Tensor:
    """A copy of its own, which safetensors asks for; of a sharded weight (a DTensor) the whole."""
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _model_type(model: nn.Module) -> str | None:
    model = patched_model(model) if is_patched(model) else model
    return getattr(getattr(model, "config", None), "model_type", None)
