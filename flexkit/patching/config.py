"""How a patched model selects and reads high-res tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

from torch import Tensor

from flexkit.checks import is_count, is_int, is_integer, is_number
from flexkit.errors import ConfigError
from flexkit.grids import Grid, Pair, pyramid, zoom_along
from flexkit.selection import AttentionMapSelector, Policy, Schedule, TopK, as_policy, policy_from_dict, policy_to_dict
from flexkit.selection.threshold import PUBLISHED_POLICY, PUBLISHED_THRESHOLD

__all__ = ["FlexConfig"]

_CHOICES = {
    "high_res_states": ("features", "own"),
    "select_from": ("previous", "same"),
    "low_res_keys": ("keep", "replace"),
    "positions": ("interpolated", "fractional"),
    "reduce": ("sum", "mean", "max"),
    "tiles": ("on_demand", "all"),
    "projection": ("lazy", "full", "recompute", "auto"),
}


@dataclass(frozen=True, eq=False)
class FlexConfig:
    """Settings of :func:`flexkit.patch_model`; what is None follows the model.

    Parameters
    ----------
    start_layer : int, optional
        First decoder layer that attends to high-res keys (*s* in the paper). By default about the first quarter of the
        layers stays plain, as in the paper (9 of 32), and the map comes from a layer that sees the whole image.
    zoom : int or tuple of int, optional
        Side of the high-res view over the low-res view, for both axes or as (rows, columns). By default 3 for towers of
        a fixed size, 2 for those that take any size.
    levels : int
        How many times the high-res view zooms in, ``zoom`` times further each time (3, 9, 27, ...): where a layer
        looks in the tokens of one level, the next layer reads those of the level below. Only for towers of a fixed
        size, and with images given tile by tile, as :class:`flexkit.FlexProcessor` then does.
    policy : Policy or callable or Schedule, optional
        Which cells a querying row reads; see :doc:`/howto/policy`. By default the paper's threshold, 48/255.
    queries : {"last", "all"} or torch.Tensor
        Which positions read high-res keys. ``"last"``: the last prompt position and every decoded one, as in the
        published code; more generally the positions whose logits ``logits_to_keep`` asks for. ``"all"``: every
        position, with one selection from the last one (paper, Eq. 6-7). A bool tensor ``(batch, length)`` names the
        positions of one prompt. With ``labels`` given, the label-predicting positions query instead.
    select_from : {"previous", "same"}
        Whether a layer reads what the map of the layer before it selected, or what its own map selects.
    high_res_states : {"features", "own"}
        What keys and values of high-res tokens are made of. ``"features"``: their image features, by projections that
        are added and trained, as in the paper. ``"own"``: their own hidden states in each layer, by the layer's own
        projections: a token that is read first passes through the text model once, where it sees what stands in front
        of the end of its image, and itself. Adds no weights, and rotates at fractional positions.
    select_layers : sequence of int or "all", optional
        Layers whose maps together make one selection, which all layers that read share, and all positions of an answer:
        its first one, the last of the prompt, selects. By default each layer has its own. Needs own states.
    low_res_keys : {"keep", "replace"}
        Whether a querying row still sees the low-res keys of the cells whose high-res tokens it reads.
    replace_dilation : int
        With ``low_res_keys="replace"``: how many cells around the selected ones are hidden too.
    logit_bias : float
        Added to every high-res logit.
    key_norm : bool
        Whether the high-res features pass the layer's input norm before W'_K and W'_V.
    gate : float, optional
        Entropy in nats: a querying row whose low-res answer is more certain than this stays low-res. With one selection
        for an answer the first position decides for all of it. Costs a second pass where it opens, but not with one
        selection; used in eval mode only.
    surer : float, optional
        How many times the entropy of its low-res answer that of the first position's answer may be which reads; if it
        is more, all of the answer stays low-res. At 1 the surer of the two answers stands. Needs one selection; used in
        eval mode only.
    positions : {"interpolated", "fractional"}
        Rotary positions of high-res keys: interpolated tables (as published) or a rotation at fractional positions.
    share_selection : bool, optional
        One selection for all querying rows, from the last one's map. By default only with ``queries="all"``.
    reduce : {"sum", "mean", "max"}
        How the heads' maps become one.
    heads : sequence of int, optional
        The heads whose maps count; all by default.
    tiles : {"on_demand", "all"}
        Whether high-res tiles are encoded once a layer reads in them, or all at once; the results are the same. Views
        that are encoded as one larger image, by towers that take any size, always are at once; of videos, frames take
        the place of tiles where such a tower sees each by itself.
    projection : {"lazy", "full", "recompute", "auto"}
        When W'_K and W'_V are applied; the results are the same. ``"lazy"``: to a token once a layer reads it.
        ``"full"``: to all tokens, in the first call. Both keep K' and V' with the cache. ``"recompute"``: in every call
        to the tokens that are read in it, as in the published code. ``"auto"``: ``"full"`` where the model's shapes
        make that cheap, ``"lazy"`` elsewhere. With a static cache, whose decode steps may be compiled, ``"lazy"`` is
        ``"full"``.
    kept : int or float, optional
        At most so many high-res tokens, or this share of them, keep K' and V' in a layer that computes them lazily. If
        there were more, only those that are being read stay; others are computed again if they are read again. By
        default all that have been read.
    budget : int or float, optional
        At most so many high-res tokens (or this fraction of those of the first level) are selected for one image and
        querying row, on each level.
    alpha : float
        Weight of the hierarchical output for querying rows, against the base model's; training ramps it from 0 to 1.

    Raises
    ------
    ConfigError
        If a setting is out of its range.
    """

    start_layer: int | None = None
    zoom: int | Grid | None = None
    levels: int = 1
    policy: Policy | Schedule | Callable[[Tensor], Tensor] | None = None
    queries: Literal["last", "all"] | Tensor = "last"
    select_from: Literal["previous", "same"] = "previous"
    high_res_states: Literal["features", "own"] = "features"
    select_layers: Sequence[int] | Literal["all"] | None = None
    low_res_keys: Literal["keep", "replace"] = "keep"
    replace_dilation: int = 0
    logit_bias: float = 0.0
    key_norm: bool = False
    gate: float | None = None
    surer: float | None = None
    positions: Literal["interpolated", "fractional"] = "interpolated"
    share_selection: bool | None = None
    reduce: Literal["sum", "mean", "max"] = "sum"
    heads: Sequence[int] | None = None
    tiles: Literal["on_demand", "all"] = "on_demand"
    projection: Literal["lazy", "full", "recompute", "auto"] = "lazy"
    kept: int | float | None = None
    budget: int | float | None = None
    alpha: float = 1.0

    selector: AttentionMapSelector = field(init=False, repr=False)
    """The selector that these settings describe; only of a config that has a policy."""
    zoom_pair: Pair = field(init=False, repr=False)
    """Zoom of pictures, along rows and columns; only of a config that has one."""
    video_zoom: Grid = field(init=False, repr=False)
    """That of videos, along frames, rows and columns; only of a config that has one."""
    full_zoom: Grid = field(init=False, repr=False)
    """That along rows and columns; along frames, too, if it was given for these. Only of a config that has one."""
    zooms: tuple[Pair, ...] = field(init=False, repr=False)
    """That of every level; only of a config that has one."""
    shares_selection: bool = field(init=False, repr=False)
    """Whether all querying rows read what the last one selected."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if not isinstance(self.queries, Tensor) and self.queries not in ("last", "all"):
            raise ConfigError(f'queries must be "last", "all" or a bool tensor, got {self.queries!r}.')
        if not isinstance(self.key_norm, bool):
            raise ConfigError(f"key_norm must be True or False, got {self.key_norm!r}.")
        if not isinstance(self.share_selection, bool | None):
            raise ConfigError(f"share_selection must be True, False or None, got {self.share_selection!r}.")
        if not is_number(self.alpha) or not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha must lie in [0, 1], got {self.alpha!r}.")
        if not is_number(self.logit_bias) or not math.isfinite(self.logit_bias):
            raise ConfigError(f"logit_bias must be a finite number, got {self.logit_bias!r}.")
        if self.gate is not None and (not is_number(self.gate) or not self.gate >= 0.0):
            raise ConfigError(f"gate is an entropy in nats, at least 0, or None; got {self.gate!r}.")
        if self.surer is not None and (not is_number(self.surer) or not self.surer > 0.0):
            raise ConfigError(f"surer is a ratio of two entropies, above 0, or None; got {self.surer!r}.")
        if self.surer is not None and self.select_layers is None:
            raise ConfigError("surer needs select_layers, by which one selection is made for an answer.")
        if not is_int(self.levels, minimum=1):
            raise ConfigError(f"levels must be an int of at least 1, got {self.levels!r}.")
        if not is_int(self.replace_dilation, minimum=0):
            raise ConfigError(f"replace_dilation must be an int of at least 0, got {self.replace_dilation!r}.")
        if self.start_layer is not None and not is_integer(self.start_layer):
            raise ConfigError(f"start_layer must be an int or None, got {self.start_layer!r}.")
        if self.kept is not None and not is_count(self.kept):
            raise ConfigError(f"kept must be a number of tokens, or a share of them in (0, 1]; got {self.kept!r}.")
        if self.select_layers is not None:
            layers = self.select_layers
            indices = isinstance(layers, Sequence) and layers and all(is_int(layer, minimum=0) for layer in layers)
            if layers != "all" and not indices:
                raise ConfigError(f'select_layers must be indices of layers, "all" or None; got {layers!r}.')
            if self.high_res_states != "own" or self.levels > 1:
                raise ConfigError('select_layers need high_res_states="own" and levels=1.')
        if self.heads is not None and not isinstance(self.heads, Sequence):
            raise ConfigError(f"heads must be a sequence of ints or None, got {self.heads!r}.")
        # What follows is worked out once: a call asks for it in every layer.
        if self.policy is not None:
            policy = self.policy if isinstance(self.policy, Schedule) else as_policy(self.policy)
            selector = AttentionMapSelector(policy, reduce=self.reduce, heads=self.heads, budget=self.budget)
            vars(self).update(policy=policy, selector=selector)
        if self.zoom is not None:
            rows, columns = zoom_along(self.zoom, 2)
            vars(self).update(full_zoom=zoom_along(self.zoom), video_zoom=zoom_along(self.zoom, 3))
            vars(self).update(zoom_pair=(rows, columns), zooms=pyramid((rows, columns), self.levels))
        queries_all = isinstance(self.queries, str) and self.queries == "all"
        vars(self).update(shares_selection=queries_all if self.share_selection is None else self.share_selection)

    @classmethod
    def published(cls, **settings: Any) -> Self:
        """The paper's mechanism: read in layer l what layer l - 1 selected, with trained projections.

        Parameters
        ----------
        **settings
            Any field of this class, in place of the preset's.
        """
        return cls(**({"policy": PUBLISHED_POLICY} | settings))

    @classmethod
    def training_free(cls, **settings: Any) -> Self:
        """For frozen models, without a weight that is added: one selection for an answer, read as own states.

        The maps of all layers together select a tenth of the cells. Their tokens pass through the model, all layers
        read them in the place of the low-res ones of their cells and of those around, and of the answer with them and
        that without the surer one stands. What that gives is measured in :doc:`/evidence`.

        With ``high_res_states="features"``, for models through which tokens cannot pass (:doc:`/support`), every layer
        reads image features, by copies of its own projections: those that its own map selects, behind its input norm,
        and only where the low-res answer is uncertain (by 1 nat). On small models that were trained from nothing that
        reads details that one look finds; on a pretrained language model of 30 layers, nothing.

        Parameters
        ----------
        **settings
            Any field of this class, in place of the preset's.
        """
        preset: dict[str, Any] = {"start_layer": 0, "select_from": "same", "positions": "fractional"}
        if settings.get("low_res_keys", "replace") == "replace":
            preset |= {"low_res_keys": "replace", "replace_dilation": 1}
        if settings.get("high_res_states", "own") == "own":
            one_selection = settings.get("select_layers", "all") is not None and settings.get("levels", 1) == 1
            preset |= {
                "high_res_states": "own",
                "select_layers": "all" if one_selection else None,
                "policy": TopK(0.1),
                "gate": 0.05,
                "surer": 1.0 if one_selection else None,
            }
        else:
            preset |= {"key_norm": True, "gate": 1.0, "policy": PUBLISHED_THRESHOLD}
        return cls(**(preset | settings))

    def replace(self, **settings: Any) -> Self:
        """A copy with other settings, checked again."""
        return replace(self, **settings)

    def __getattr__(self, name: str) -> Any:
        if name in ("selector", "zoom_pair", "video_zoom", "full_zoom", "zooms"):
            setting = "policy" if name == "selector" else "zoom"
            raise ConfigError(f"this config leaves the {setting} to the model; patch a model, or set {setting}.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def limit_kept(self, tokens: int) -> int:
        """How many of so many high-res tokens may keep K' and V' in a layer."""
        if self.kept is None:
            return tokens
        return int(self.kept * tokens) if isinstance(self.kept, float) else self.kept

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a policy that is not one of flexkit's is only named.

        Raises
        ------
        ConfigError
            If ``queries`` is a tensor: it belongs to one batch.
        """
        if isinstance(self.queries, Tensor):
            raise ConfigError(
                'a tensor of queries belongs to one batch and is not saved; set queries to "last" or "all".'
            )
        plain = {setting.name: getattr(self, setting.name) for setting in fields(self) if setting.init}
        plain["policy"] = policy_to_dict(self.policy) if isinstance(self.policy, Policy | Schedule) else None
        plain["zoom"] = None if self.zoom is None else list(self.full_zoom)
        for name in ("heads", "select_layers"):
            if not isinstance(plain[name], str | None):
                plain[name] = list(plain[name])
        return plain

    @classmethod
    def from_dict(
        cls, plain: dict[str, Any], policy: Policy | Schedule | Callable[[Tensor], Tensor] | None = None
    ) -> Self:
        """Rebuild a config from :meth:`to_dict`; ``policy`` takes the place of the saved one.

        Raises
        ------
        ConfigError
            If a key is not a setting of this version.
        """
        unknown = sorted(set(plain) - {setting.name for setting in fields(cls) if setting.init})
        if unknown:
            raise ConfigError(f"unknown settings {unknown}; was this written by a newer flexkit?")
        settings = dict(plain)
        if policy is None and settings.get("policy") is not None:
            policy = policy_from_dict(settings["policy"])
        settings["policy"] = policy
        for name in ("zoom", "heads", "select_layers"):
            if isinstance(settings.get(name), list):
                settings[name] = tuple(settings[name])
        return cls(**settings)
