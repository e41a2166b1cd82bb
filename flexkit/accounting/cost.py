"""What one answer costs with each way of reading a high-res view, counted on the meta device."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from flexkit.accounting.language import HighResReading, own_states_cost, text_cost
from flexkit.accounting.shapes import config_of, counting, without_weights
from flexkit.accounting.towers import Tower
from flexkit.checks import is_int
from flexkit.errors import ConfigError, UnsupportedModelError
from flexkit.grids import Grid, zoomed
from flexkit.patching import FlexConfig, is_patched, patch_model, unpatch_model
from flexkit.patching.registry import find_geometry
from flexkit.patching.state import get_patch
from flexkit.selection import Policy, as_policy

__all__ = ["Cost", "cost"]


@dataclass(frozen=True)
class Cost:
    """What one answer costs.

    Attributes
    ----------
    vision_flops : int
        Operations of the vision tower and projector; a multiplication and an addition are two.
    language_flops : int
        Operations of the language model, those on high-res tokens among them.
    image_tokens : int
        In the language model's sequence.
    read_tokens : int
        High-res tokens that a layer reads beside it.
    kv_bytes : int
        Keys and values that are kept when the answer ends.
    """

    vision_flops: int
    language_flops: int
    image_tokens: int
    read_tokens: int
    kv_bytes: int

    @property
    def flops(self) -> int:
        """All operations."""
        return self.vision_flops + self.language_flops

    @property
    def tflops(self) -> float:
        """The same, in 10¹²."""
        return self.flops / 1e12

    def to_dict(self) -> dict[str, float]:
        """All numbers by name, :attr:`tflops` among them."""
        return {"tflops": self.tflops, **asdict(self)}


def cost(
    model_or_config: PreTrainedModel | PretrainedConfig | str,
    image_size: int | None = None,
    *,
    frames: int | None = None,
    prompt: int = 60,
    new_tokens: int = 5,
    selected: float = 0.1,
    policy: Policy | Callable[[torch.Tensor], torch.Tensor] | None = None,
    tiles: int | None = None,
    low_res_size: int | None = None,
    config: FlexConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Cost]:
    """Count what one answer about one square picture, or one video of such frames, costs, with each way of reading it.

    Nothing is loaded or computed: the model is built without weights, on the meta device.

    Parameters
    ----------
    model_or_config : transformers.PreTrainedModel or transformers.PretrainedConfig or str
        A model, its config, a folder or hub id, one of the names in :data:`flexkit.accounting.known.KNOWN`, or a model
        type, of which the default sizes are taken.
    image_size : int, optional
        Side of the high-res view in pixels; by default the default zoom times that of the low-res view.
    frames : int, optional
        Of a video, as many as are sampled into the sequence; a picture by default.
    prompt : int
        Text tokens, those between the frames of a video among them.
    new_tokens : int
        Tokens of the answer, each of which is run once.
    selected : float
        Share of the high-res tokens that each layer reads, the same ones at every step.
    policy : Policy or callable, optional
        Says how many are read, in the place of ``selected``; one that selects the same number by any map.
    tiles : int, optional
        How many high-res tiles the selected tokens lie in; of videos that are encoded frame by frame, how many frames.
        By default as many as a square of that area may touch, in every frame.
    low_res_size : int, optional
        Side of the low-res view in pixels; by default what the tower was made for, or, for towers that take any size,
        the high-res view's divided by the zoom.
    config : FlexConfig, optional
        Settings of the patch; by default those that a patched model has. The ``zoom`` of a video may have a third
        number, along frames.
    dtype : torch.dtype
        Of keys and values.

    Returns
    -------
    dict of str to Cost
        ``low_res``: the base model. ``high_res``: the base model whose tower takes the high-res view as its only one;
        no such row for models that cannot be built so. ``flexkit``: all tiles are encoded, K' and V' computed once for
        each token that is read. ``flexkit_on_demand``: only tiles that are looked at are encoded. ``flexkit_full``: K'
        and V' of all tokens, of which each position attends to as many as the policy selects at most (by default, and
        by most policies, all of them). ``recompute``: as the published code does it, K' and V' at every step.
        ``own_states``: one selection for an answer, the tokens of which pass through the language model; only tiles
        that are looked at are encoded; no such row for models through which they cannot pass. ``best_tile``: the base
        model is asked where to look, and asked again about one part, as large as the low-res view, in its place.
        ``all_in_sequence``: all tokens of both views in the language model's sequence.

    Raises
    ------
    ConfigError
        If the sizes do not fit the model or the zoom, a number is out of its range, or the policy's number depends on
        the map.
    UnsupportedModelError
        If the model cannot be patched, reads no videos, has a tower of another kind, or does not run without weights at
        these sizes.

    Examples
    --------
    >>> import flexkit
    >>> costs = flexkit.cost("llava-1.5-7b", 1008, prompt=60, new_tokens=5, selected=0.1)
    >>> round(costs["flexkit"].tflops, 1), round(costs["recompute"].tflops, 1)
    (13.4, 17.4)
    """
    numbers = {"prompt": prompt, "new_tokens": new_tokens, "tiles": tiles}
    sizes = {"image_size": image_size, "low_res_size": low_res_size, "frames": frames}
    for name, number in (numbers | sizes).items():
        least = int(name in sizes)
        if number is not None and not is_int(number, minimum=least):
            raise ConfigError(f"{name} must be an int of at least {least}, got {number!r}.")
    shapes = config_of(model_or_config)
    if low_res_size is not None:
        _resize(shapes, low_res_size)
    model = without_weights(shapes, dtype)
    settings = config or _settings_of(model_or_config)
    tower = _tower(model, frames is not None)
    low_side, zoom = _views(tower, image_size, low_res_size, settings)
    front: Grid = ()
    if frames is not None:
        in_time = 1 if settings.zoom is None else settings.video_zoom[0]
        front, zoom = (tower.frames(frames),), (in_time, *zoom)
    passes_tokens = _passes_tokens(model)
    patch_model(model, settings.replace(zoom=zoom), trained=True)
    patch, grid = get_patch(model), (*front, *tower.grid(low_side))
    tokens = math.prod(zoomed(grid, zoom))
    share = selected if policy is None else _share_of(policy, grid)
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"selected is a share of the high-res tokens, from 0 to 1, got {selected!r}.")
    own = len(tower.geometry.layout(model, grid))

    reading, read = HighResReading(patch), round(share * tokens)
    most = (patch.config if policy is None else patch.config.replace(policy=policy)).selector.most(grid, zoom)
    high_front = zoomed(front, zoom[:-2])
    with counting(model):
        low_res = _base(model, tower, front, low_side, prompt, new_tokens)
        whole = text_cost(model, patch.decoder, own + tokens + prompt, new_tokens)
        asked = text_cost(model, patch.decoder, own + prompt, 0)
        once, full = reading.projection(read), reading.projection(tokens)
        overview = low_res.vision_flops
        cut, views = zoom[-1] if tower.cuts_frames else 1, math.prod(high_front)
        tile = tower.flops(low_side * zoom[-1] // cut)
        everything = views * cut * cut * tile
        touched = views * _touched(share, cut) if tiles is None else tiles
        looked_at = min(everything, touched * tile) if tower.encodes_tiles else everything
        own_states = {}
        if passes_tokens:
            added = own_states_cost(model, patch.decoder, own, own + prompt, new_tokens, read)
            language, kept = low_res.language_flops + added.flops, low_res.kv_bytes + added.kv_bytes
            own_states["own_states"] = Cost(overview + looked_at, language, own, read, kept)

    def flex(vision: int, projections: int, kept: int, among: int = read) -> Cost:
        attention = reading.attention_flops(own + prompt, new_tokens + 1, among)
        language = low_res.language_flops + attention + projections
        return Cost(overview + vision, language, own, read, low_res.kv_bytes + kept)

    return {
        "low_res": low_res,
        **_high_res(shapes, model, tower, high_front, low_side * zoom[-1], prompt, new_tokens),
        "flexkit": flex(everything, once.flops, once.kv_bytes),
        "flexkit_on_demand": flex(looked_at, once.flops, once.kv_bytes),
        "flexkit_full": flex(everything, full.flops, full.kv_bytes, max(read, most)),
        "recompute": flex(everything, (new_tokens + 1) * once.flops, 0),
        **own_states,
        "best_tile": replace(low_res, vision_flops=2 * overview, language_flops=asked.flops + low_res.language_flops),
        "all_in_sequence": Cost(overview + everything, whole.flops, own + tokens, 0, whole.kv_bytes),
    }


def _tower(model: PreTrainedModel, of_videos: bool) -> Tower:
    """What encodes pictures, or frames of videos."""
    geometry = find_geometry(model)
    if not of_videos:
        return Tower(model, geometry)
    if geometry.video is None:
        raise UnsupportedModelError(f"{type(model).__name__} reads no videos in a high-res view; leave out frames=.")
    return Tower(model, geometry.video)


def _base(model: PreTrainedModel, tower: Tower, front: Grid, side: int, prompt: int, new_tokens: int) -> Cost:
    """The base model, which sees a view of this side; of a video, of so many frames."""
    own = len(tower.geometry.layout(model, (*front, *tower.grid(side))))
    text = text_cost(model, tower.geometry.decoder(model), own + prompt, new_tokens)
    return Cost(math.prod(front) * tower.flops(side), text.flops, own, 0, text.kv_bytes)


def _passes_tokens(model: PreTrainedModel) -> bool:
    """Whether high-res tokens can pass through the layers of a model."""
    try:
        patch_model(model, FlexConfig.training_free())
    except UnsupportedModelError:
        return False
    unpatch_model(model)
    return True


def _high_res(
    shapes: PretrainedConfig, model: PreTrainedModel, tower: Tower, front: Grid, side: int, prompt: int, new_tokens: int
) -> dict[str, Cost]:
    """The base model, which sees a view of this side in place of the low-res one; nothing where its tower cannot."""
    try:
        if tower.side is not None:
            _resize(shapes, side)
            model = without_weights(shapes, model.dtype)
            tower = _tower(model, bool(front))
        if tower.side not in (None, side):
            return {}
        with counting(model):
            return {"high_res": _base(model, tower, front, side, prompt, new_tokens)}
    except UnsupportedModelError:
        return {}


def _resize(shapes: Any, side: int) -> None:
    """Have a config ask for a tower that is made for this side, where one is made for a side."""
    vision: Any = getattr(shapes, "vision_config", None)
    given = getattr(vision, "image_size", None)
    if given is not None:
        vision.image_size = side if isinstance(given, int) else [side, side]


def _settings_of(given: object) -> FlexConfig:
    return get_patch(given).config if isinstance(given, PreTrainedModel) and is_patched(given) else FlexConfig()


def _views(tower: Tower, image_size: int | None, low_res_size: int | None, settings: FlexConfig) -> tuple[int, Grid]:
    """Side of the low-res view, and the zoom along rows and columns."""
    given = None if settings.zoom is None else settings.zoom_pair
    if given is not None and given[0] != given[1]:
        raise ConfigError(f"views are square, and zoom {given} makes another of them; give as much for both sides.")
    default = tower.geometry.default_zoom if given is None else given[0]
    if tower.side is not None:
        low = tower.side
        size = default * low if image_size is None else image_size
        if size % low or size < low:
            raise ConfigError(f"image_size must be a multiple of the {low} pixels that the tower takes, got {size}.")
    else:
        if image_size is None and low_res_size is None:
            raise ConfigError("this model's tower takes any size; say which by image_size.")
        size = default * low_res_size if image_size is None else image_size  # type: ignore[operator]
        low = size // default if low_res_size is None else low_res_size
        step = tower.step
        if low < step or low % step or size % low:
            raise ConfigError(
                f"image_size must be a zoom of the low-res view, and that a multiple of {step} pixels, for example "
                f"{max(1, round(size / default / step)) * step * default}; got {size} and {low}."
            )
    if given is not None and size != default * low:
        raise ConfigError(
            f"image_size must be {default * low}, {default} times {low} pixels as zoom= says, got {size}; leave one of "
            "them out."
        )
    return low, (size // low, size // low)


def _share_of(policy: Any, grid: Grid) -> float:
    generator = torch.Generator().manual_seed(0)
    frames = (1, *grid)[-3:]  # of a picture one
    maps = torch.rand(8, *frames, generator=generator) ** torch.arange(1, 9).view(8, 1, 1, 1)
    shares = as_policy(policy)(maps).float().mean((-3, -2, -1))
    if shares.min() != shares.max():
        raise ConfigError(f"how much {policy!r} selects depends on the map; give selected= instead.")
    return float(shares[0])


def _touched(share: float, zoom: int) -> int:
    """Tiles that a square of this share of the picture may touch."""
    along = min(zoom, math.ceil(share**0.5 * zoom) + 1) if share else 0
    return along * along
