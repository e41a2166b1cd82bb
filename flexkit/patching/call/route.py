"""How a call reaches the attention that reads high-res tokens: by what the image stands in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexkit.patching.call.call import FlexCall
from flexkit.patching.call.following import Following
from flexkit.patching.config import FlexConfig
from flexkit.patching.seam.decoder import DecoderLayer
from flexkit.patching.state import Patch

__all__ = ["Prompt", "Route"]


@dataclass(frozen=True)
class Prompt:
    """What ``generate`` knows of its prompt when it begins; it travels along as one argument."""

    image_tokens: Tensor | None = None
    """``(kinds, batch, prompt)``, bool: where it holds tokens of images, and of videos."""
    queries: Tensor | None = None
    """``(batch, prompt)``, bool: the positions that read; later ones do, too."""
    repeats: int = 1
    """How many successive batch rows continue one sample (beams)."""


class Route(ABC):
    """One way; it holds no state of a model or a call."""

    single_reader: ClassVar[bool] = False
    """Whether a model may have one layer only, which then reads what it has selected itself."""

    runs_tokens: ClassVar[bool] = False
    """Whether high-res tokens can pass through the layers, as the low-res ones of the image do."""

    @abstractmethod
    def layers(self, model: nn.Module, decoder: nn.Module) -> list[DecoderLayer]:
        """The layers whose attention sees the image, in the order in which they run."""

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        patch: Patch,
        high_res: dict[str, Any],
        inputs: dict[str, Any],
        prompt: Prompt | None,
    ) -> FlexCall | Following | None:
        """The call that high-res and base inputs describe together; None if they ask for the base model."""

    @abstractmethod
    def run(self, forward: Callable[..., Any], call: Any, inputs: Mapping[str, Any]) -> Any:
        """Run the base model's forward so that its attention gets the call."""

    def check_config(self, config: FlexConfig) -> None:
        """Raise :class:`~flexkit.errors.ConfigError` if a setting means nothing to models of this kind."""
        return

    def hooks(self, model: nn.Module, layers: Sequence[DecoderLayer]) -> Iterable[RemovableHandle]:
        """Hooks that a model carries while these layers of it are patched, besides those of every patched model.

        Each is registered when it is asked for, so that those that are there can be removed if a later one fails.
        """
        return ()

    def methods(self, model: nn.Module) -> Iterable[tuple[nn.Module, str, Callable[..., Any]]]:
        """Functions that stand for methods of the model's parts while it is patched: module, name, function."""
        return ()
