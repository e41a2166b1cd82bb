"""Ask any model about a picture or a video, and write a page of where it looked."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

import flexkit
from flexkit.checkpoints.pretrained import load_as_saved
from flexkit.demo.picture import read_picture
from flexkit.demo.question import check_question
from flexkit.encoding import FrameSource, open_video
from flexkit.errors import ConfigError, FlexkitError, HighResInputError, UnsupportedModelError
from flexkit.patching import get_patch
from flexkit.visual_search import load_model
from flexkit.visual_search.model import IMAGE_TOKEN
from flexkit.writing import writing

__all__ = ["look"]

_FRAMES = 8
"""Of a video, where nobody says how many."""


@torch.no_grad()
def look(
    path: Path,
    question: str,
    output: Path,
    name: str | None = None,
    added: str | None = None,
    new_tokens: int = 32,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    frame_rate: float | None = None,
) -> tuple[str, int]:
    """Answer, and write a page of where the model looked.

    Parameters
    ----------
    path : pathlib.Path
        A picture, a video, or a folder of pictures that are its frames.
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
    num_frames : int, optional
        Of a video, those that the sequence carries at most; 8 by default.
    fps : float, optional
        As many a second, in place of ``num_frames``.
    frame_rate : float, optional
        How many a second a folder holds.

    Returns
    -------
    answer : str
        In words.
    shut : int
        For how many of its tokens nothing was read, because the gate stayed shut.

    Raises
    ------
    FlexkitError
        If the file or the model cannot be read, the model reads no videos, the question cannot be asked, or the page
        cannot be written.
    """
    check_question(question)
    asked = _opened(path, frame_rate, as_video=(num_frames, fps) != (None, None))
    is_video = isinstance(asked, FrameSource)
    if is_video and name is None:
        raise ConfigError(
            f"{str(path)!r} is a video, and the small model reads pictures alone; say which model by model=."
        )
    model, processor = load_model() if name is None else _loaded(name, added)
    options = _sampling(model, processor, asked, num_frames, fps) if isinstance(asked, FrameSource) else {}
    inputs = _inputs(processor, "video" if is_video else "image", asked, question, options)
    before = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    _check_length(model, before + new_tokens)
    inputs = inputs.to(model.device, model.dtype)
    with flexkit.trace(model) as trace:
        tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0][before:]
    words = [processor.decode(token) for token in tokens]
    with writing(output):
        shown = processor.shown(asked, **options)
        flexkit.selection_page(trace, shown, output, words=words, question=question)
    shut = sum(bool(step.shut[0]) for step in trace.steps)
    return str(processor.decode(tokens, skip_special_tokens=True).strip()), shut


def _opened(path: Path, frame_rate: float | None, as_video: bool) -> Image.Image | FrameSource:
    """A picture; or a video, which is a folder, or a file that is no picture."""
    if path.is_dir():
        if frame_rate is None:
            raise ConfigError(f"the pictures of {str(path)!r} do not say how fast they follow; give frame_rate.")
        return open_video(path, frame_rate)
    if as_video:
        return open_video(path)
    try:
        return read_picture(path)
    except HighResInputError as no_picture:
        if not path.is_file():
            raise
        try:
            return open_video(path)
        except FlexkitError as no_video:
            raise HighResInputError(f"{no_picture}; and if it is a video: {no_video}") from no_video


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


def _sampling(
    model: Any, processor: Any, clip: FrameSource, num_frames: int | None, fps: float | None
) -> dict[str, Any]:
    """What the video processor is told of the frames that the sequence is to carry."""
    if get_patch(model).geometry.video is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} reads no videos in a high-res view; flexkit inspect says how models read them."
        )
    if getattr(processor, "video_processor", None) is None:
        raise UnsupportedModelError(
            f"{type(processor).__name__} has no video processor; those of transformers need torchvision."
        )
    most = num_frames or _FRAMES
    if fps is None and len(clip) <= most and processor.video_zoom[0] == 1:
        return {"do_sample_frames": False}  # all of a short one, of which many processors do not choose
    return {"do_sample_frames": True, "fps": fps, "num_frames": None if fps else min(most, len(clip))}


def _inputs(processor: Any, kind: str, asked: Any, question: str, options: dict[str, Any]) -> Any:
    """Inputs of a question about one ``image`` or ``video``."""
    for name in ("image_token", "video_token"):
        token = getattr(processor, name, None)
        if isinstance(token, str) and token in question:
            raise ConfigError(f"the question names {token}, which stands for what it is about; leave it out.")
    if getattr(processor, "chat_template", None) is None:
        token = getattr(processor, f"{kind}_token", IMAGE_TOKEN)
        given = {f"{kind}s": [asked] if kind == "video" else asked}
        return processor(**given, text=f"{token} {question}", return_tensors="pt", **options)
    content = [{"type": kind, kind: asked}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **({"processor_kwargs": options} if options else {}),
    )


def _check_length(model: Any, length: int) -> None:
    most = getattr(get_patch(model).decoder.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ConfigError(
            f"the question and its answer take {length} tokens, and {type(model).__name__} has positions for {most}; "
            "ask in fewer words, or about fewer frames."
        )
