"""What a family says of how its attention reads an image from a context."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationMixin, PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Pair
from flexkit.patching.call import FlexCall
from flexkit.patching.config import FlexConfig
from flexkit.patching.context.carriers import Carried, Carrier, Keyword, held
from flexkit.patching.context.generate import expand_inputs, generate
from flexkit.patching.context.own_code import read_beside
from flexkit.patching.context.readers import Reader, Reading, Words
from flexkit.patching.context.show import show, watch
from flexkit.patching.context.sites import Site, find_sites
from flexkit.patching.decoder import DecoderLayer
from flexkit.patching.generation import EXPAND
from flexkit.patching.geometry.base import Geometry
from flexkit.patching.memory import HighResMemory, ImageSpan, cached_memory
from flexkit.patching.state import Patch
from flexkit.patching.views import PREFIX, checked_view

__all__ = ["Context", "Places"]


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
    """An image that attention modules read by an argument of their own.

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

    @abstractmethod
    def places(self, model: PreTrainedModel, inputs: Mapping[str, Any], grids: Sequence[Pair]) -> Places:
        """Where the images of the base model's inputs stand in the context.

        Raises :class:`~flexkit.errors.HighResInputError` if these are not as many as the grids.
        """

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self._encoder or "")  # what reads may be no decoder

    def layers(self, model: PreTrainedModel) -> list[DecoderLayer]:
        return list(self._find(model))

    def check_config(self, config: FlexConfig) -> None:
        self._reader.check_config(config)

    def hooks(self, model: PreTrainedModel, layers: Sequence[DecoderLayer]) -> Iterator[RemovableHandle]:
        sites = [site for site in layers if isinstance(site, Site)]
        yield watch(model.get_submodule(self._first(model)), self._source)
        yield from (read_beside(site, self._carrier.find) for site in sites if site.has_own_code)
        yield from self._carrier.hooks(model, sites)

    def methods(self, model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
        yield model, "generate", generate
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                yield module, EXPAND, expand_inputs

    def run(self, forward: Callable[..., Any], call: FlexCall, inputs: Mapping[str, Any]) -> Any:
        return self._carrier.run(forward, call, inputs)

    def prepare(
        self, model: nn.Module, patch: Patch, high_res: dict[str, Any], inputs: dict[str, Any]
    ) -> FlexCall | None:
        named = high_res.pop("hd_queries", None)
        high_res.pop("hd_repeats", None)
        memory = cached_memory(inputs.get("past_key_values"))
        if self._reader.needs_generation(inputs, memory) and isinstance(reading := held(patch), Reading):
            return reading(inputs)
        if memory is not None and high_res:
            self._reader.check_later(inputs, self.inputs[0])
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
        absent = [name for name in self.inputs if not isinstance(inputs.get(name), Tensor)]
        if absent:
            raise HighResInputError(f"the high-res view came without the base model's {absent}; pass both in one call.")
        view = checked_view(model, patch, high_res, inputs)
        zoom = patch.config.zoom_pair
        places = self.places(model, inputs, view.grids)
        spans = [
            ImageSpan(row, columns, grid, zoom, 0, 0, margins, positions)
            for row, columns, grid, margins, positions in zip(
                places.rows,
                places.columns,
                view.grids,
                view.margins,
                places.positions or [None] * len(places.rows),
                strict=True,
            )
        ]
        both = {**inputs, **{PREFIX + name: value for name, value in view.inputs.items()}}
        features = self.encode(model, both, view.grids, zoom)
        return HighResMemory.pack(features, spans, places.batch, in_sequence=False)

    def show(self, model: PreTrainedModel, inputs: Mapping[str, Any], images: int, **view: Tensor) -> Tensor:
        """The context ``(rows, columns, dim)`` of inputs with another view in the place of theirs."""
        own = {name: value for name, value in inputs.items() if not name.startswith(PREFIX)}
        return show(model, self._reader.shown(own, images) | view)

    def _find(self, model: PreTrainedModel) -> list[Site]:
        return find_sites(
            model,
            self._sites,
            self._source,
            norm=self._norm,
            behind_text=self._behind_text,
            rotated=self._encoder is not None,
        )

    def _first(self, model: PreTrainedModel) -> str:
        """Name of the module that is given the context first: a site, or its layer where that has a norm for it."""
        attention = self._find(model)[0].attention
        name: str = next(name for name, module in model.named_modules() if module is attention)
        return name if self._norm is None else name.rpartition(".")[0]
