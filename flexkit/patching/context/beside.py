"""The second route: attention reads the image from a context beside the decoder's sequence.

High-res features come without encoding code for any family: the model is shown a tile, and what its attention is given
is seen. To encode a tile, it takes the place of the image in the model's inputs, and the model runs until its first
reading attention, or what stands around that, is given the context. What that is given to make keys and values of, at
the columns of the image's cells, are the features: exactly what low-res keys are made of, with all that lies between
tower and attention.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import local
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationMixin, PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Grid
from flexkit.patching.call.call import FlexCall
from flexkit.patching.call.forward import base_forward, take_high_res
from flexkit.patching.call.generation import EXPAND
from flexkit.patching.call.inputs import check_inputs, checked_views
from flexkit.patching.call.route import Prompt, Route
from flexkit.patching.config import FlexConfig
from flexkit.patching.context.carriers import Carried, Carrier, Keyword, argument, carried, held, held_in, read_beside
from flexkit.patching.context.readers import Reader, Reading, Words
from flexkit.patching.context.sites import Site, find_sites
from flexkit.patching.geometry.base import PREFIX, Geometry
from flexkit.patching.memory.high_res import HighResMemory, cached_length, cached_memory
from flexkit.patching.memory.tokens import ImageSpan
from flexkit.patching.seam.decoder import DecoderLayer
from flexkit.patching.state import Patch, get_patch, of_class

__all__ = ["Beside", "Context", "Places"]

_POSITIONS = ("position_ids", "decoder_position_ids")
"""Inputs that may be one row for all."""


@dataclass(frozen=True)
class Places:
    """Where the cells of all images stand among the keys of the context."""

    batch: int
    """Rows of the context."""
    rows: list[int]
    """Row of each image."""
    columns: list[Tensor]
    """Columns of its cells, in raster order; negative ones count from the end."""
    positions: Sequence[Tensor | None] = ()
    """``(axes, cells)`` of each: the rotary positions of its cells, if their keys are rotated."""


class Context(Geometry):
    """Images whose cells are keys of a context that attention modules read.

    Parameters
    ----------
    route : Beside
        Which modules these are, and how a call reaches them.
    """

    route: "Beside"

    def __init__(self, route: "Beside") -> None:
        self.route = route

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return self.route.decoder(model)

    @abstractmethod
    def places(self, model: PreTrainedModel, inputs: Mapping[str, Any], grids: Sequence[Grid]) -> Places:
        """Where the images of the base model's inputs stand in the context.

        Raises :class:`~flexkit.errors.HighResInputError` if these are not as many as the grids.
        """


class Beside(Route):
    """Attention modules read the image by an argument of their own.

    Parameters
    ----------
    sites : str
        Names of these modules in the model, with ``*`` for a number.
    source : str
        Their argument that keys and values are made of.
    reader : Reader
        Whose queries attend.
    carrier : Carrier
        How a call reaches the modules.
    norm : str, optional
        The norm of the site's layer that the source passes first.
    behind_text : bool
        Whether the keys of the context stand behind those of the text.
    encoder : str, optional
        The module that rotates keys of the context, if they are.
    """

    single_reader = True

    def __init__(
        self,
        sites: str,
        source: str,
        *,
        reader: Reader | None = None,
        carrier: Carrier | None = None,
        norm: str | None = None,
        behind_text: bool = False,
        encoder: str | None = None,
    ) -> None:
        self._sites = sites
        self._source = source
        self._reader = reader or Words()
        self._carrier = carrier or Keyword()
        self._norm = norm
        self._behind_text = behind_text
        self._encoder = encoder

    def decoder(self, model: nn.Module) -> nn.Module:
        """What rotates keys of the context; the model itself, if nothing does."""
        return model.get_submodule(self._encoder or "")  # what reads may be no decoder

    def layers(self, model: nn.Module, decoder: nn.Module) -> list[DecoderLayer]:
        return list(self._find(model))

    def check_config(self, config: FlexConfig) -> None:
        self._reader.check_config(config)

    def hooks(self, model: nn.Module, layers: Sequence[DecoderLayer]) -> Iterator[RemovableHandle]:
        sites = [site for site in layers if isinstance(site, Site)]
        yield from _watch(model, self._first(model), self._source)
        yield from (read_beside(site, self._carrier.find) for site in sites if site.has_own_code)
        yield from self._carrier.hooks(model, sites)

    def methods(self, model: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
        yield model, "generate", _generate
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                yield module, EXPAND, _expand_inputs

    def run(self, forward: Callable[..., Any], call: FlexCall, inputs: Mapping[str, Any]) -> Any:
        return self._carrier.run(forward, call, inputs)

    def prepare(
        self,
        model: nn.Module,
        patch: Patch,
        high_res: dict[str, Any],
        inputs: dict[str, Any],
        prompt: Prompt | None,
    ) -> FlexCall | None:
        named = high_res.pop("hd_queries", None)
        memory = cached_memory(inputs.get("past_key_values"))
        if self._reader.needs_generation(inputs, memory) and isinstance(reading := held(patch), Reading):
            return reading(inputs)
        if memory is not None and high_res:
            self._reader.check_later(inputs, patch.geometry.inputs[0])
        elif high_res:
            memory = self.read(model, patch, high_res, inputs)
        if memory is None:
            return None
        return self._reader.call(patch, memory, inputs, named, training=model.training)

    def hold(self, model: nn.Module, patch: Patch, high_res: dict[str, Any], inputs: dict[str, Any]) -> Carried:
        """What a generation from these inputs carries."""
        named = high_res.pop("hd_queries", None)
        memory = self.read(model, patch, high_res, inputs)
        return self._reader.held(patch, memory, named, training=model.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a model that is shown a tile ends by an exception
    def read(self, model: Any, patch: Patch, high_res: dict[str, Any], inputs: Mapping[str, Any]) -> HighResMemory:
        """Encode the high-res views and find the low-res cells that they belong to."""
        geometry: Any = patch.geometry
        absent = [name for name in geometry.inputs if not isinstance(inputs.get(name), Tensor)]
        if absent:
            raise HighResInputError(f"the high-res view came without the base model's {absent}; pass both in one call.")
        (view,) = checked_views(model, patch, high_res, inputs)
        zoom = patch.config.zoom_pair
        places: Places = geometry.places(model, inputs, view.grids)
        both = {**inputs, **{PREFIX + name: value for name, value in view.inputs.items()}}
        features = geometry.encode(model, both, view.grids, zoom)
        spans = [
            ImageSpan(row, columns.to(image.device), grid, zoom, 0, 0, margin, 0, positions)
            for row, columns, image, grid, margin, positions in zip(
                places.rows,
                places.columns,
                features,
                view.grids,
                (None if margin is None else margin.to(features[0].device) for margin in view.margins),
                places.positions or [None] * len(places.rows),
                strict=True,
            )
        ]
        return HighResMemory.pack(features, spans, places.batch, in_sequence=False)

    @torch.no_grad()
    def show(
        self, model: nn.Module, inputs: Mapping[str, Any], images: int, times: int = 1, /, **view: Tensor
    ) -> Tensor:
        """The context of inputs with other views in the place of theirs.

        Parameters
        ----------
        model : torch.nn.Module
            The patched model.
        inputs : mapping
            The base model's inputs.
        images : int
            How many images these have.
        times : int
            How many batches of such inputs are shown, one behind the other in one.
        **view : torch.Tensor
            What takes the place of inputs, in all of these batches.

        Returns
        -------
        torch.Tensor
            ``(times * rows, columns, dim)``.

        Raises
        ------
        HighResInputError
            If no attention reads an image then.
        """
        own = {name: value for name, value in inputs.items() if not name.startswith(PREFIX)}
        shown = self._reader.shown(own, images).items()
        again = {name: _again(name, value, times) for name, value in shown if name not in view}
        _thread.shows = True
        try:
            base_forward(model)(**again, **view)
        except _Shown as end:
            return end.states
        finally:
            _thread.shows = False
        raise HighResInputError(
            f"{type(model).__name__} looked at no image for these inputs; pass those of its images."
        )

    def _find(self, model: nn.Module) -> list[Site]:
        return find_sites(
            model,
            self._sites,
            self._source,
            norm=self._norm,
            behind_text=self._behind_text,
            rotated=self._encoder is not None,
        )

    def _first(self, model: nn.Module) -> str:
        """Name of the module that is given the context first: a site, or its layer where that has a norm for it."""
        attention = self._find(model)[0].attention
        name: str = next(name for name, module in model.named_modules() if module is attention)
        return name if self._norm is None else name.rpartition(".")[0]


class _Thread(local):
    """What a thread does; see the carriers."""

    def __init__(self) -> None:
        self.shows = False


_thread = _Thread()


class _Shown(Exception):  # noqa: N818 - not an error: it ends the run of a model that is shown a tile
    def __init__(self, states: Tensor) -> None:
        self.states = states


def _again(name: str, value: Any, times: int) -> Any:
    """An input of so many batches in one."""
    if times == 1 or not isinstance(value, Tensor) or not value.ndim or (name in _POSITIONS and len(value) == 1):
        return value
    return torch.cat([value] * times)


def _watch(model: nn.Module, name: str, source: str) -> Iterator[RemovableHandle]:
    """Let runs of :meth:`Beside.show` end where a module is given the context: that of a name, or one around it.

    What stands around it may have layers of its own in front: those of a language model need not run for each tile.
    """
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = model.get_submodule(".".join(parts[:end]))
        if source in inspect.signature(type(module).forward).parameters:
            yield module.register_forward_pre_hook(partial(_stop, source=source), with_kwargs=True)


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, source: str) -> None:
    if _thread.shows and isinstance(states := argument(module, args, kwargs, source), Tensor):
        raise _Shown(states)


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of a patched model: high-res views are read before it begins, and carried until it ends."""
    patch = get_patch(self, here=True)
    base = patch.own_method(self, "generate")
    high_res, _ = take_high_res(patch, kwargs)
    if patch.disabled or not high_res:
        return base(*args, **kwargs)
    check_inputs(self, patch, high_res)
    inputs = {name: value for name, value in kwargs.items() if name in self.forward.__signature__.parameters}
    if args or kwargs.get("inputs") is not None:
        inputs.setdefault(self.main_input_name, args[0] if args else kwargs["inputs"])
    reading = cast(Beside, patch.route).hold(self, patch, high_res, inputs)
    with carried(reading):
        output = base(*args, **kwargs)
    if isinstance(reading, FlexCall):
        reading.finish(None)
    return output


def _expand_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``_expand_inputs_for_generation`` of what generates: it sees the whole prompt, and no guesses of what follows."""
    reading = held_in(self)
    if isinstance(reading, Reading):
        # Embeddings that come with ids are what is run; without, the ids may be empty.
        given = (kwargs.get(name) for name in (reading.reader.prefix + "inputs_embeds", "input_ids"))
        reading.prompt = next((each.shape[1] for each in given if each is not None and each.shape[1]), None)
        reading.cached = int(cached_length(kwargs.get("past_key_values")))
    return of_class(self, EXPAND)(*args, **kwargs)
