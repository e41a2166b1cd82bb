"""Ask any model about a picture, and write a page of where it looked."""

from pathlib import Path
from typing import Any

import torch

import flexkit
from flexkit.checkpoints.pretrained import load_as_saved
from flexkit.demo.picture import read_picture
from flexkit.demo.question import check_question
from flexkit.errors import UnsupportedModelError
from flexkit.visual_search import load_model
from flexkit.visual_search.model import IMAGE_TOKEN
from flexkit.writing import writing

__all__ = ["look"]


@torch.no_grad()
def look(
    image: Path, question: str, output: Path, name: str | None = None, added: str | None = None, new_tokens: int = 32
) -> tuple[str, int]:
    """Answer, and write a page of where the model looked.

    Parameters
    ----------
    image : pathlib.Path
        A picture.
    question : str
        About it.
    output : pathlib.Path
        The page.
    name : str, optional
        Of the model; by default the small one.
    added : str, optional
        Where its trained projections are; by default a model that was not saved patched reads without any.
    new_tokens : int
        At most.

    Returns
    -------
    answer : str
        In words.
    shut : int
        For how many of its tokens nothing was read, because the gate stayed shut.

    Raises
    ------
    FlexkitError
        If the picture or the model cannot be read, the question cannot be asked, or the page cannot be written.
    """
    check_question(question)
    picture = read_picture(image)
    model, processor = load_model() if name is None else _loaded(name, added)
    inputs = _inputs(processor, picture, question).to(model.device, model.dtype)
    with flexkit.trace(model) as trace:
        tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0]
    if not model.config.is_encoder_decoder:
        tokens = tokens[inputs["input_ids"].shape[1] :]
    words = [processor.decode(token) for token in tokens]
    with writing(output):
        flexkit.selection_page(trace, processor.shown(picture), output, words=words, question=question)
    shut = sum(bool(step.shut[0]) for step in trace.steps)
    return str(processor.decode(tokens, skip_special_tokens=True).strip()), shut


def _loaded(name: str, added: str | None) -> tuple[Any, Any]:
    model, processor = load_as_saved(name)
    if added is not None:
        model = flexkit.load_flex(model, added)
    elif not flexkit.is_patched(model):
        try:
            model = flexkit.patch_model(model, flexkit.FlexConfig.training_free())
        except UnsupportedModelError:  # tokens cannot pass through its layers
            model = flexkit.patch_model(model, flexkit.FlexConfig.training_free(high_res_states="features"))
    return model.eval(), flexkit.FlexProcessor(processor, model)


def _inputs(processor: Any, picture: Any, question: str) -> Any:
    if getattr(processor, "chat_template", None) is None:
        token = getattr(processor, "image_token", IMAGE_TOKEN)
        return processor(images=picture, text=f"{token} {question}", return_tensors="pt")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
