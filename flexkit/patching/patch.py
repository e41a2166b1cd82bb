"""Patching a model in place, and undoing it."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkit.errors import ConfigError, PatchError, UnsupportedModelError
from flexkit.patching.call.forward import forward, place_images
from flexkit.patching.call.generation import CANDIDATES, EXPAND, candidate_generator, expand_inputs, generate
from flexkit.patching.call.in_sequence import route_of
from flexkit.patching.call.route import Route
from flexkit.patching.call.runs import read_own_states
from flexkit.patching.config import FlexConfig
from flexkit.patching.drift import watch_drift
from flexkit.patching.geometry.base import Geometry
from flexkit.patching.registry import find_geometry
from flexkit.patching.seam.config_view import divert, restore
from flexkit.patching.seam.decoder import DecoderLayer
from flexkit.patching.seam.packed import watch_packed
from flexkit.patching.seam.projections import add_projections, own_projections, remove_projections
from flexkit.patching.seam.tensor_parallel import check_shares, share_of
from flexkit.patching.state import (
    ATTRIBUTE,
    LOCK,
    Method,
    Patch,
    added_parameters,
    get_patch,
    is_patched,
    overridden,
    patched_model,
    refuse_sharing,
    state_of_copies,
)
from flexkit.selection import Policy, Schedule

__all__ = [
    "UntrainedProjectionsWarning",
    "disabled",
    "flex_parameters",
    "patch_model",
    "set_alpha",
    "set_policy",
    "unpatch_model",
    "using_policy",
]

Model = TypeVar("Model", bound=nn.Module)

_METHODS: dict[str, Callable[..., Any] | str] = {
    "forward": forward,
    "generate": generate,
    EXPAND: expand_inputs,
    CANDIDATES: candidate_generator,
    "__getstate__": state_of_copies,
    "_replicate_for_data_parallel": refuse_sharing,
    # By name what stands on patching, and is imported when a model is patched.
    "save_pretrained": "flexkit.checkpoints.pretrained:save_pretrained",
    "load_state_dict": "flexkit.checkpoints.pretrained:load_state_dict",
    "_upload_modified_files": "flexkit.checkpoints.pretrained:upload_modified_files",
}
"""What stands for methods of every patched model; its geometry and its route may add some, or have their own."""


class UntrainedProjectionsWarning(UserWarning):
    """A model reads high-res tokens through projections that are only copies of its own."""


def patch_model(model: Model, config: FlexConfig | None = None, *, trained: bool = False) -> Model:
    """Give a vision-language model a second, high-resolution view that it reads only where it looks.

    Nothing changes until the model is called with high-res inputs (``hd_*``, from :class:`flexkit.FlexProcessor`).
    Layers from ``start_layer`` on get two projections each, ``k_proj_hd`` and ``v_proj_hd``: trainable submodules that
    start as copies of the layer's own. If patching fails, whatever the reason, the model is what it was.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face vision-language model with its generation head; patched in place.
    config : FlexConfig, optional
        Settings; by default those of the paper, with what depends on the model taken from the model.
    trained : bool
        Whether trained projections are about to be loaded: no warning that they are untrained.

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    UnsupportedModelError
        If the model lacks what patching needs; the message names it.
    PatchError
        If the model is patched already, or shares its language model with one that is.
    ConfigError
        If the settings do not fit the model.

    Warns
    -----
    UntrainedProjectionsWarning
        If the settings need trained projections.
    FeatureDriftWarning
        In the first call that reads, if the model's hidden states turn out to be unlike the image features that
        untrained projections read.

    Examples
    --------
    >>> import flexkit
    >>> from flexkit.visual_search import load_model
    >>> model, processor = load_model("base")
    >>> model = flexkit.patch_model(model, flexkit.FlexConfig.training_free())
    >>> flexkit.is_patched(model), flexkit.is_patched(flexkit.unpatch_model(model))
    (True, False)
    """
    if not isinstance(model, PreTrainedModel):
        held = next((type(module).__name__ for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        mend = f"patch the {held} that it wraps (PEFT: model.get_base_model()), best before it is wrapped"
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model; "
            f"{mend if held else 'build with flexkit.HierarchicalSelfAttention instead'}."
        )
    geometry = find_geometry(model)
    _check(model)
    decoder = geometry.decoder(model)
    route = route_of(geometry)
    layers = [
        replace(layer, share=share_of(model, layer.attention, layer.source, own_projections(layer.source)))
        for layer in route.layers(model, decoder)
    ]
    config = _resolved(config or FlexConfig(), geometry, route, decoder, layers)
    if config.levels > 1 and geometry.tile_grid(model) is None:
        raise ConfigError(f"{type(model).__name__} encodes a high-res view as a whole, not in tiles: set levels to 1.")
    reading = [layer for layer in layers if layer.index >= config.start_layer]  # type: ignore[operator]
    first = layers.index(reading[0]) - (config.select_from == "previous" and reading[0] is not layers[0])
    if config.high_res_states == "own":  # tokens pass through all layers
        first = 0
    patched = {layer.index: layer for layer in layers[first:]}
    patch = Patch(model, find_geometry, route, config, decoder, patched, earlier=[], hooks=[])
    if len(patch.views) == 1 and config.video_zoom[0] > 1:
        raise ConfigError(
            f"zoom is {config.zoom}, and flexkit reads no videos of {type(model).__name__}, which could be zoomed in "
            f"time: set it to {config.zoom_pair}."
        )
    try:
        _put_on(patch)
    except BaseException:
        _take_off(patch)
        raise
    if config.select_from == "previous" and config.high_res_states == "features" and not trained:
        warnings.warn(
            "the added projections are untrained copies, read one layer late: they displace what the low-res view "
            "says, so that the model may read some details and no longer know where things are. Train them or load "
            "trained ones (flexkit.load_flex), or do without, by FlexConfig.training_free().",
            UntrainedProjectionsWarning,
            stacklevel=2,
        )
    return model


def unpatch_model(model: Model) -> Model:
    """Make a patched model exactly what it was; the added projections are dropped.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    PatchError
        If the model is not patched, its forward was wrapped since, or a call of it is running.
    """
    patch, patched = get_patch(model), patched_model(model)
    forward = vars(patched).get("forward")
    if isinstance(forward, Method):
        if forward.is_shared:
            refuse_sharing(patched)
    elif forward is not None:
        raise PatchError("the forward of this model was replaced after patching; undo that first, then unpatch.")
    with LOCK:
        if patch.running:
            raise PatchError(
                f"{patch.running} calls of this {type(patched).__name__} are running, in other threads or around this "
                "one; unpatch it when they have ended."
            )
        _take_off(patch)
    return model


@contextmanager
def disabled(model: nn.Module, *, everywhere: bool = False) -> Iterator[None]:
    """Run a patched model as the base model for as long as the block lasts.

    High-res inputs are accepted and ignored, so that the same call can be made with and without them.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    everywhere : bool
        Whether this holds for calls of all threads, and not for those of the calling thread and ``asyncio`` task alone.

    Raises
    ------
    PatchError
        If the model is not patched.
    """
    patch = get_patch(model)
    with patch.counted("disabled") if everywhere else overridden(patch, disabled=1):
        yield


@contextmanager
def using_policy(model: nn.Module, policy: Policy | Schedule | Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Select by another policy for as long as the block lasts, in calls of the calling thread and task alone.

    The other settings are those at its beginning. One call or ``generate`` takes ``hd_policy=policy`` for the same.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    policy : Policy or callable or Schedule
        Takes the place of the one in the config.

    Raises
    ------
    PatchError
        If the model is not patched.
    """
    config = get_patch(model, here=True).config.replace(policy=policy)
    with overridden(get_patch(model), config=config):
        yield


def flex_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that patching added, for an optimiser that trains nothing else.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.

    Yields
    ------
    torch.nn.Parameter
        Weights and biases of ``k_proj_hd`` and ``v_proj_hd``, layer by layer.
    """
    yield from added_parameters(model).values()


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Set the weight of the hierarchical output, which training ramps from 0 to 1 (paper: ``min(1, 10 * epoch)``).

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    alpha : float
        Querying rows get ``(1 - alpha) * base + alpha * hierarchical``.
    """
    patch = get_patch(model)
    patch.config = patch.config.replace(alpha=alpha)


def set_policy(model: nn.Module, policy: Policy | Schedule | Callable[[Tensor], Tensor]) -> None:
    """Select by another policy from now on, in calls of all threads; see :func:`using_policy` for one.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    policy : Policy or callable or Schedule
        Takes the place of the one in the config.
    """
    patch = get_patch(model)
    patch.config = patch.config.replace(policy=policy)


def _check(model: PreTrainedModel) -> None:
    """Raise an error for a model that has been patched, itself or in part, and for one without its head."""
    name = type(model).__name__
    if ATTRIBUTE in vars(model):
        raise PatchError(f"this {name} is patched already; call flexkit.unpatch_model(model) first.")
    if is_patched(model):
        raise PatchError(
            f"layers of this {name} belong to another model that is patched already; unpatch that first, or give this "
            "one layers of its own (copy.deepcopy)."
        )
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{name} has no head that generates; patch the whole model of which it is the inner part, such as "
            f"{type(model).__name__.removesuffix('Model')}ForConditionalGeneration."
        )
    check_shares(model)


def _put_on(patch: Patch) -> None:
    """Change the model as its patch says; where that fails half-way, :func:`_take_off` undoes what was done."""
    model = patch.model
    vars(model)[ATTRIBUTE] = patch
    if patch.config.high_res_states == "features":
        for layer in patch.reading.values():
            add_projections(layer.attention, layer.source, model.dtype, layer.share)
        if patch.config.select_from == "same":  # of others patch_model warns at once
            watch_drift(patch)
    for layer in patch.layers.values():
        if not layer.has_own_code:
            divert(layer.attention, layer.index)
    patch.hooks.append(patch.decoder.register_forward_pre_hook(place_images, with_kwargs=True))
    if patch.config.high_res_states == "own":
        patch.hooks.append(patch.decoder.register_forward_hook(read_own_states, with_kwargs=True))
    patch.hooks.extend(watch_packed(model))
    patch.hooks.extend(patch.route.hooks(model, list(patch.layers.values())))
    methods = {(model, name): function for name, function in _METHODS.items()}
    for module, name, function in (*patch.geometry.methods(model), *patch.route.methods(model)):
        methods[module, name] = function
    for (module, name), method in methods.items():
        function = resolve_name(method) if isinstance(method, str) else method
        patch.earlier.append((module, name, vars(module).get(name)))
        vars(module)[name] = Method(name, function, module, patch)


def _take_off(patch: Patch) -> None:
    """Make the model what it was before, however much of the patch is on it."""
    while patch.earlier:
        module, name, earlier = patch.earlier[-1]
        vars(module).pop(name, None)
        if earlier is not None:
            vars(module)[name] = earlier
        patch.earlier.pop()
    for hook in patch.hooks:
        hook.remove()
    for layer in patch.layers.values():
        restore(layer.attention)
        remove_projections(layer.attention)
    vars(patch.model).pop(ATTRIBUTE, None)


def _check_own_states(decoder: nn.Module, route: Route, layers: list[DecoderLayer]) -> None:
    """Raise :class:`~flexkit.errors.UnsupportedModelError` if tokens cannot pass through the layers as others do."""
    all_layers: Any = getattr(decoder, "layers", ())
    without = sorted(set(range(len(all_layers))) - {layer.index for layer in layers})
    reasons = {
        "it reads the image beside the sequence, as it is": not route.runs_tokens,
        "some of its layers keep a state in the place of keys, and none of an image's end": without,
        "its layers choose among keys by an index of their own": any(layer.is_sparse for layer in layers),
        "its cache forgets some of what was decoded": any(layer.keeps_prompt for layer in layers),
        "its text model takes pictures itself": "pixel_values" in inspect.signature(decoder.forward).parameters,
        "its attention is biased by whole distances": any(
            hasattr(layer.attention, "rel_logits_proj") for layer in layers
        ),
    }
    reason = next((words for words, holds in reasons.items() if holds), None)
    if reason is not None:
        raise UnsupportedModelError(
            f"tokens cannot pass through {type(decoder).__name__} for states of their own: {reason}. Set "
            'high_res_states to "features".'
        )


def _resolved(
    config: FlexConfig, geometry: Geometry, route: Route, decoder: nn.Module, layers: list[DecoderLayer]
) -> FlexConfig:
    """Fill in what follows the model, and check the rest against it."""
    config = config.replace(
        start_layer=_default_start(layers) if config.start_layer is None else config.start_layer,
        zoom=geometry.default_zoom if config.zoom is None else config.full_zoom,
        policy=geometry.default_policy if config.policy is None else config.policy,
        select_layers=[layer.index for layer in layers] if config.select_layers == "all" else config.select_layers,
    )
    route.check_config(config)
    alone = len(layers) == 1 and route.single_reader
    before = config.select_from == "previous" and config.select_layers is None
    needs_map_before = before and config.selector.uses_scores and not alone
    lowest = layers[0].index + 1 if needs_map_before else 0
    start = config.start_layer
    if not isinstance(start, int) or not lowest <= start <= layers[-1].index:
        reason = " The map that it would need comes from no layer." if start in range(lowest) else ""
        raise ConfigError(
            f"start_layer must be an int from {lowest} to {layers[-1].index} for the {len(layers)} layers with "
            f"attention of this model, got {start!r}.{reason}"
        )
    unknown = sorted(set(map(int, config.select_layers or ())) - {layer.index for layer in layers})
    if unknown:
        raise ConfigError(f"select_layers holds {unknown}; layers with attention are {[of.index for of in layers]}.")
    if config.key_norm and any(layer.input_norm is None for layer in layers):
        raise ConfigError("key_norm needs the norm in front of the attention, and here is none that flexkit knows.")
    if config.high_res_states == "own":
        _check_own_states(decoder, route, layers)
    if config.projection == "auto":
        config = config.replace(projection=_cheapest_projection(layers, config))
    return config


def _cheapest_projection(layers: list[DecoderLayer], config: FlexConfig) -> Literal["lazy", "full"]:
    """Project all tokens at once where that costs at most half of the attention's projections of the low-res ones."""
    reading = [layer for layer in layers if layer.index >= config.start_layer]  # type: ignore[operator]
    added = sum(_size(layer.source.get_submodule(name)) for layer in reading for name in own_projections(layer.source))
    own = sum(_size(layer.attention) for layer in layers)
    return "full" if 2 * math.prod(config.zoom_pair) * added <= own else "lazy"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _default_start(layers: list[DecoderLayer]) -> int:
    """The paper's quarter (9 of 32), moved on to where the layer before sees the whole image."""
    quarter = min(max(1, round(len(layers) * 9 / 32)), len(layers) - 1)
    seeing = (start for start in range(quarter, len(layers)) if not layers[start - 1].is_windowed)
    return layers[next(seeing, quarter)].index
