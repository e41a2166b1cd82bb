"""The ways of looking that an evaluation compares: one model each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

import flexkit
from flexkit.patching import get_patch
from flexkit.selection.threshold import PUBLISHED_THRESHOLD
from flexkit.visual_search.choices import CHOICES
from flexkit.visual_search.questions import heard
from flexkit.visual_search.recipe import READS_CHOICES
from flexkit.visual_search.weights import READERS, load_model

__all__ = ["BUDGET", "Oracle", "Place", "Way", "likeliest", "load_ways", "read_fraction"]

BUDGET = 6
"""How many of the 64 cells are read where their number is fixed."""

Place = tuple[float, float]
"""x and y, as shares of a scene's side."""


class Oracle(flexkit.Policy):
    """The cells nearest to the digit that is asked for, which it has to be told; a policy of selection.

    Parameters
    ----------
    cells : int
        How many; of a clip, in each frame.
    """

    sees_frames = True

    def __init__(self, cells: int = BUDGET) -> None:
        self.cells = cells
        self.places: Sequence[Place] | Sequence[Sequence[Place]] = ()
        """Of the digits: one for each image of the batch, or for each frame of each clip."""

    @override
    def mask(self, scores: Tensor) -> Tensor:
        frames, rows, columns = scores.shape[-3:]
        x, y = torch.tensor(self.places, device=scores.device).view(-1, frames, 2).unbind(-1)
        down = (torch.arange(rows, device=scores.device) + 0.5) / rows - y[..., None]
        across = (torch.arange(columns, device=scores.device) + 0.5) / columns - x[..., None]
        near = -torch.hypot(down[..., :, None], across[..., None, :])
        return flexkit.TopK(self.cells)(near)[:, None].expand_as(scores)


POLICIES = {
    "topk": flexkit.TopK(BUDGET),
    "threshold": PUBLISHED_THRESHOLD,
    "top_p": flexkit.TopP(0.5),
    "random": flexkit.Random(BUDGET),
    "center": flexkit.Center(BUDGET),
    "everything": flexkit.Everything(),
}
"""What takes the place of the policy that a model was trained with."""


@dataclass(frozen=True)
class Way:
    """A model and how it is given scenes.

    Attributes
    ----------
    model : torch.nn.Module
        Patched or not.
    processor : FlexProcessor or transformers.ProcessorMixin
        Of the model.
    in_sequence : bool
        Whether the prompt holds all tiles of a scene.
    oracle : Oracle, optional
        Has to be told where the digits are.
    """

    model: Any
    processor: Any
    in_sequence: bool = False
    oracle: Oracle | None = None

    @torch.no_grad()
    def answer(
        self, inputs: Mapping[str, Tensor], places: Sequence[Place] | Sequence[Sequence[Place]], words: int = 1
    ) -> list[str]:
        """The last word of every answer, each word of which is the most likely one.

        Parameters
        ----------
        inputs : dict
            Of the processor.
        places : sequence
            Where the digits are, as for :class:`Oracle`.
        words : int
            Of an answer.
        """
        if self.oracle is not None:
            self.oracle.places = places
        if words > 1:
            said = self.model.generate(**inputs, max_new_tokens=words, min_new_tokens=words, do_sample=False)
            return [heard(self.processor.tokenizer.decode([token])) for token in said[:, -1].tolist()]
        return likeliest(self.processor, self.model(**inputs, logits_to_keep=1).logits[:, -1])


def likeliest(processor: Any, logits: Tensor) -> list[str]:
    """The most likely words, as answers to questions.

    Parameters
    ----------
    processor : FlexProcessor or transformers.ProcessorMixin
        Whose tokens these are.
    logits : torch.Tensor
        ``(batch, vocabulary)``.
    """
    return [heard(processor.tokenizer.decode([token])) for token in logits.argmax(-1).tolist()]


def read_fraction(model: Any, trace: flexkit.Trace) -> float:
    """Share of the high-res tokens that a layer reads, on average over reading layers and images.

    Parameters
    ----------
    model : torch.nn.Module
        Patched.
    trace : Trace
        Of one call.
    """
    return float(torch.stack([trace.selected_fraction(0, layer) for layer in get_patch(model).sources]).mean())


def load_ways(folder: Path, reader: str, device: str = "cpu") -> dict[str, Way]:
    """Load the models of all ways from what training wrote.

    Parameters
    ----------
    folder : pathlib.Path
        Holds a folder of each stage.
    reader : str
        The stage whose patched model is taken.
    device : str
        Where the models run.
    """

    def way(stage: str, oracle: Oracle | None = None, policy: Any = None) -> Way:
        model, processor = load_model(stage, weights=folder, policy=oracle or policy)
        return Way(model.to(device), processor, stage.endswith("in_sequence"), oracle)

    def frozen(oracle: Oracle | None = None, policy: Any = None) -> Way:
        model, processor = load_model(reader, weights=folder)
        config = READS_CHOICES.replace(policy=oracle or policy or READS_CHOICES.policy)
        flexkit.patch_model(model.to(device), config)
        return Way(model, flexkit.FlexProcessor(processor, model), oracle=oracle)

    if reader == READERS[CHOICES]:
        ways = {"low_res": frozen(policy=flexkit.Nothing()), "flexkit": frozen()}
        ways |= {name: frozen(policy=policy) for name, policy in POLICIES.items()}
        return {**ways, "oracle": frozen(Oracle()), "all_in_sequence": way(reader)}
    ways = {"low_res": way("base"), "flexkit": way(reader)}
    ways |= {name: way(reader, policy=policy) for name, policy in POLICIES.items()}
    ways["oracle"] = way(reader, Oracle())
    if (folder / "in_sequence").exists():
        ways["all_in_sequence"] = way("in_sequence")
    return ways
