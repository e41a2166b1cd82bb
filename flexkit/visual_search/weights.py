"""What training wrote, and what flexkit is shipped with, by its stage."""

from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration

import flexkit
from flexkit.visual_search.choices import CHOICES
from flexkit.visual_search.stages import ADAPTER, WEIGHTS, load_whole, trained

__all__ = ["ADAPTER", "READERS", "WEIGHTS", "load_model", "trained"]

READERS = {"attribute": "tuned", "conjunction": "conjunction", "low-res": "tuned", CHOICES: "letters_in_sequence"}
"""For each track the stage whose model reads."""


def load_model(
    stage: str = "tuned", *, weights: Path = WEIGHTS, policy: Any = None
) -> tuple[LlavaForConditionalGeneration, Any]:
    """Load a trained model that searches scenes, and its processor.

    Parameters
    ----------
    stage : str
        ``"base"`` sees the low-res view only, ``"in_sequence"`` all high-res tokens in its sequence: they are not
        patched. ``"added"`` is the base with trained projections, ``"tuned"`` has its language model trained along, and
        ``"conjunction"`` has seen questions that take both colour and shape. ``"letters_in_sequence"``, with all tokens
        in its sequence, chooses among options: it says the right one and its letter.
    weights : pathlib.Path
        A folder that training wrote, from nothing or on a pretrained language model; by default what flexkit is shipped
        with.
    policy : Policy or callable, optional
        Takes the place of the one that a patched model was trained with.

    Returns
    -------
    model : transformers.LlavaForConditionalGeneration
        In float32 and eval mode.
    processor : FlexProcessor or transformers.ProcessorMixin
        Of both views if the model is patched.

    Raises
    ------
    CheckpointError
        If the folder does not hold that stage and the base, or a file of theirs is damaged.

    Examples
    --------
    >>> from flexkit.visual_search import draw_scene, load_model
    >>> model, processor = load_model()
    >>> question = "<image> Which digit is on the object that is yellow?"
    >>> inputs = processor(images=draw_scene(0).image, text=question, return_tensors="pt")
    >>> processor.decode(model.generate(**inputs, max_new_tokens=2)[0, -2:], skip_special_tokens=True)
    '9'
    """
    base, own = (trained(weights, name) for name in ("base", stage))
    whole = own if (own / "config.json").exists() else base
    if (whole / ADAPTER).exists():
        from flexkit.visual_search.pretrained import load_base  # needed for such a folder alone

        model, processor = load_base(weights)
    else:
        model, processor = load_whole(whole)
    if not (own / "flexkit.json").exists():
        return model, processor
    model = flexkit.load_flex(model, own, policy=policy)
    return model, flexkit.FlexProcessor(processor, model)
