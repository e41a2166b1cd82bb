"""Which weights of a patched model are trained."""

from typing import Any, Literal

import torch
from torch import nn

from flexkit.errors import ConfigError
from flexkit.patching import flex_parameters, get_patch

__all__ = ["TRAINED", "trainable"]

TRAINED = ("added", "lora", "all")
_ADDED = ["k_proj_hd", "v_proj_hd"]


def trainable(model: Any, weights: Literal["added", "lora", "all"] = "added", *, rank: int = 16) -> Any:
    """Let some weights of a patched model be trained, and no others; what is trained is in float32.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A patched model.
    weights : {"added", "lora", "all"}
        ``"added"``: the added projections alone. ``"lora"``: these, if there are any, and low-rank adapters of PEFT on
        all linear layers of the language model. ``"all"``: everything but the vision tower.
    rank : int
        Of the adapters.

    Returns
    -------
    torch.nn.Module
        The model, or with ``"lora"`` PEFT's model around it; its ``merge_and_unload()`` is a patched model again.

    Raises
    ------
    ConfigError
        If nothing was added that could be trained alone, or ``weights`` is something else.
    PatchError
        If the model is not patched.

    Examples
    --------
    >>> import flexkit
    >>> from flexkit.training import trainable
    >>> from flexkit.visual_search import load_model
    >>> model, _ = load_model("base")
    >>> model = flexkit.patch_model(model, flexkit.FlexConfig.published(), trained=True)
    >>> model = trainable(model)
    >>> sum(parameter.requires_grad for parameter in model.parameters())
    6
    """
    if weights not in TRAINED:
        raise ConfigError(f"weights must be one of {TRAINED}, got {weights!r}.")
    decoder = get_patch(model).decoder
    added = list(flex_parameters(model))
    if weights == "added" and not added:
        raise ConfigError(
            'these settings add no weights that could be trained alone: train "lora" or "all", or patch the model with '
            "FlexConfig.published()."
        )
    model.requires_grad_(weights == "all")
    if weights == "all":
        tower = model.get_encoder(modality="image")
        if tower is not model:
            tower.requires_grad_(False)
    for parameter in added:
        parameter.requires_grad_(True)
    if weights == "lora":
        model = _with_adapters(model, decoder, rank, bool(added))
    for parameter in model.parameters():
        if parameter.requires_grad and _is_half(parameter):
            parameter.data = parameter.data.to(torch.float32)
    return model


def _with_adapters(model: Any, decoder: nn.Module, rank: int, added: bool) -> Any:
    from peft import LoraConfig, get_peft_model  # of the extra train

    inside = {id(module) for module in decoder.modules()}
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside and name.rpartition(".")[2] not in _ADDED
    ]
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=_ADDED if added else None
    )
    return get_peft_model(model, settings)


def _is_half(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.dtype.itemsize == 2
