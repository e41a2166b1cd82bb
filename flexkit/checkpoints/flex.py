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

from flexkit.checkpoints.files import checkpoint_folder, path_inside, read_json, rewritten
from flexkit.checkpoints.tensors import check_tensors, read_tensors
from flexkit.errors import CheckpointError, ConfigError, FlexkitError
from flexkit.patching import FlexConfig, added_parameters, get_patch, is_patched, patch_model, unpatch_model
from flexkit.selection import Policy, Schedule, as_policy, policy_to_dict

__all__ = ["load_added", "load_flex", "save_flex"]

Model = TypeVar("Model", bound=nn.Module)
AnyPolicy = Policy | Schedule | Callable[[Tensor], Tensor]

_STEM = "flexkit"
_SETTINGS = "flexkit.json"
_FORMAT = 1


def save_flex(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Save what patching added to a model, and nothing of the base model.

    Writes ``flexkit.safetensors``, the projections W'_K and W'_V under their names in ``model.state_dict()``,
    and ``flexkit.json``, the settings.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    folder : str or os.PathLike
        Made if it does not exist; it may be the base model's own.

    Raises
    ------
    PatchError
        If the model is not patched.
    ConfigError
        If the model queries from a tensor of positions, which belongs to one batch.
    """
    patch = get_patch(model)
    settings = {
        "format_version": _FORMAT,
        "flexkit_version": version("flexkit-vlm"),
        "model_type": _model_type(model),
        "config": patch.config.to_dict(),
    }
    weights = {name: weight.detach().cpu().contiguous() for name, weight in added_parameters(model).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with rewritten(folder / f"{_STEM}.safetensors") as draft:
        save_file(weights, draft)
    with rewritten(folder / _SETTINGS) as draft:
        draft.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_flex(
    model: Model,
    folder: str | PathLike[str],
    *,
    policy: AnyPolicy | None = None,
) -> Model:
    """Load what :func:`save_flex` saved; if it fails the model is left as it was.

    Parameters
    ----------
    model : torch.nn.Module
        The base model, which is patched with the saved settings, or one patched already, whose settings have
        to agree. Weights take the model's dtype and device.
    folder : str or os.PathLike
        What :func:`save_flex` wrote.
    policy : Policy or callable or Schedule, optional
        Takes the place of the saved policy. Needed if that is not one of flexkit's own.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    CheckpointError
        If the folder is incomplete, of another format or for another model, or the settings do not agree.
    UnsupportedModelError
        If the model cannot be patched.
    """
    folder = checkpoint_folder(folder)
    settings = _read_settings(folder, model)
    tensors = read_tensors(folder, _STEM)
    if is_patched(model):
        _check_agreement(settings, get_patch(model).config.to_dict(), policy, folder)
        load_added(model, tensors, source=folder)
        return model
    config = _config(settings, policy, folder)
    try:
        patch_model(model, config, trained=True)
    except ConfigError as error:
        raise CheckpointError(f"{folder / _SETTINGS} does not fit this {type(model).__name__}: {error}") from error
    try:
        load_added(model, tensors, source=folder)
    except BaseException:
        unpatch_model(model)
        raise
    return model


@torch.no_grad()
def load_added(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str | PathLike[str]) -> None:
    """Copy weights into what patching added to a model, once all of them are known to fit.

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
        weight.copy_(tensors[name])


def _read_settings(folder: Path, model: nn.Module) -> dict[str, Any]:
    """The saved FlexConfig as plain JSON."""
    path = path_inside(folder, _SETTINGS)
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
        raise CheckpointError(f"{folder / _SETTINGS}: {error}") from error


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


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)
