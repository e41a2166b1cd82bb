"""Whether a model can be patched, how, and what that adds and saves; without its weights."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from flexkit.accounting.cost import Cost, cost
from flexkit.accounting.known import KNOWN
from flexkit.accounting.shapes import config_of, without_weights
from flexkit.errors import ConfigError, UnsupportedModelError
from flexkit.patching import FlexConfig, patch_model, unpatch_model
from flexkit.patching.call.in_sequence import route_of
from flexkit.patching.geometry.base import Geometry, features_owner
from flexkit.patching.registry import find_geometry
from flexkit.patching.state import added_parameters, get_patch

__all__ = ["Inspection", "inspect_model"]


@dataclass(frozen=True)
class Inspection:
    """What patching does to a model.

    Attributes
    ----------
    model : str
        Its class.
    model_type : str
        As transformers calls it.
    default_shapes : bool
        Whether only a model type was given: layers and widths are then the defaults of its config class, and need not
        be those of any published model.
    view : str
        How its high-res view is encoded: ``"tiles"``, or ``"whole"`` as one larger image.
    zoom : tuple of int
        Of the high-res view, by default, along rows and columns.
    videos : str
        How they are read: the kind of their layout, as in the table of supported models, where they have a high-res
        view; ``"in low resolution"``; or ``"takes none"``.
    video_view : str, optional
        How their high-res view is encoded: ``"tiles"`` of frames, ``"frames"``, or ``"whole"``; None where they have
        none.
    image_tokens : int, optional
        Low-res tokens of one image; None where that depends on its size.
    layers : int
        Decoder layers whose attention sees the image.
    reading_layers : tuple of int
        Indices of those that read high-res tokens, by default: as published, with projections that are trained.
    parameters, added_parameters : int
        Of the model, and what the added projections have.
    training_free_bytes : int
        What the weights take up more of a model that is patched with :meth:`flexkit.FlexConfig.training_free`.
    costs : dict of str to Cost, optional
        As :func:`flexkit.cost` counts them for the default zoom; None for towers that it does not count.
    """

    model: str
    model_type: str
    default_shapes: bool
    view: str
    zoom: tuple[int, int]
    videos: str
    video_view: str | None
    image_tokens: int | None
    layers: int
    reading_layers: tuple[int, ...]
    parameters: int
    added_parameters: int
    training_free_bytes: int
    costs: dict[str, Cost] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = asdict(self)
        if self.costs is not None:
            plain["costs"] = {name: cost.to_dict() for name, cost in self.costs.items()}
        return plain


def inspect_model(given: PreTrainedModel | PretrainedConfig | str, config: FlexConfig | None = None) -> Inspection:
    """Patch a model without weights, and look at it.

    Parameters
    ----------
    given : transformers.PreTrainedModel or transformers.PretrainedConfig or str
        A model, its config, a folder or hub id, a name that :func:`flexkit.cost` knows, or a model type.
    config : FlexConfig, optional
        Settings of the patch.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be patched; the message says what it lacks.
    ConfigError
        If there is no such model, or the settings do not fit it.
    """
    shapes = config_of(given)
    model = without_weights(shapes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    training_free_bytes = _training_free_bytes(model)
    geometry = find_geometry(model)
    layers = len(route_of(geometry).layers(model, geometry.decoder(model)))
    patch = get_patch(patch_model(model, config, trained=True))
    grid = geometry.tile_grid(model)
    return Inspection(
        model=type(model).__name__,
        model_type=model.config.model_type,
        default_shapes=isinstance(given, str) and given not in KNOWN and given in CONFIG_MAPPING,
        view=_view(geometry, model),
        zoom=patch.config.zoom_pair,
        videos=_videos(geometry, model),
        video_view=None if geometry.video is None else _view(geometry.video, model),
        image_tokens=None if grid is None else len(geometry.layout(model, grid)),
        layers=layers,
        reading_layers=tuple(patch.reading),
        parameters=parameters,
        added_parameters=sum(parameter.numel() for parameter in added_parameters(model).values()),
        training_free_bytes=training_free_bytes,
        costs=_costs(shapes, config),
    )


def _view(geometry: Geometry, model: PreTrainedModel) -> str:
    if geometry.tile_grid(model) is not None:
        return "tiles"
    return "frames" if geometry.whole_frames else "whole"


def _videos(geometry: Geometry, model: PreTrainedModel) -> str:
    if geometry.video is not None:
        return type(geometry.video).__name__
    return "in low resolution" if hasattr(features_owner(model), "get_video_features") else "takes none"


def _training_free_bytes(model: PreTrainedModel) -> int:
    before = _bytes(model)
    try:
        patch_model(model, FlexConfig.training_free(gate=None, surer=None))
    except UnsupportedModelError:  # tokens cannot pass through its layers
        patch_model(model, FlexConfig.training_free(high_res_states="features", gate=None))
    added = _bytes(model) - before
    unpatch_model(model)
    return added


def _bytes(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _costs(shapes: PretrainedConfig, config: FlexConfig | None) -> dict[str, Cost] | None:
    try:
        return cost(shapes, config=config)
    except (ConfigError, UnsupportedModelError):
        return None  # of any size, of a kind that is not counted, or default sizes that do not fit together
