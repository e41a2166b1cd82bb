"""Where the small model looks in a clip, and when it sees what it is asked for.

python -m studies.motion.picture motion/0 --output docs/evidence/motion.webp
"""

import argparse
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

import flexkit
from flexkit.demo.overlay import overlay
from flexkit.visual_search import draw_clip, questions
from flexkit.visual_search.clip import SAMPLED
from flexkit.visual_search.model import LOW_RES
from flexkit.visual_search.ways import likeliest
from studies.motion.model import ZOOM, ClipProcessor, high_res_frames

_SIDE = 384
"""Of the frames that are drawn, in pixels."""


def draw(folder: Path, seed: int) -> Figure:
    """A row for each frame that is sampled: it, and the frames of the high-res view that take its place."""
    model = flexkit.from_pretrained(folder / "motion", dtype="float32")
    clip, large, processor = draw_clip(seed), draw_clip(seed, _SIDE), ClipProcessor()
    question = questions(clip, "attribute")[0]
    with torch.no_grad(), flexkit.trace(model) as trace:
        logits = model(**processor([clip], [question.text]), logits_to_keep=1).logits[:, -1]
    first = trace.layers[0]
    masks, scores = trace.mask(0, first)[0], trace.scores(0, first)[0]
    shown = large.shown[clip.items.index(question.item)]
    figure = Figure(figsize=(10, 8.6), layout="constrained")
    axes = figure.subplots(len(SAMPLED), 1 + ZOOM[0])
    for row, frame in zip(axes, SAMPLED, strict=True):
        sampled = Image.fromarray(next(large.read([frame]))).resize((LOW_RES, LOW_RES), Image.Resampling.BICUBIC)
        row[0].imshow(sampled, interpolation="nearest")
        row[0].set_title(f"frame {frame}, sampled", fontsize=9)
    indices = high_res_frames(ZOOM).tolist()
    for place, (frame, pixels) in enumerate(zip(indices, large.read(indices), strict=True)):
        own = axes[place // ZOOM[0], 1 + place % ZOOM[0]]
        own.imshow(overlay(Image.fromarray(pixels), masks[place], scores[place // ZOOM[0]]))
        seen = frame in shown
        own.set_title(
            f"frame {frame}" + (", with the digit" if seen else ""), fontsize=9, weight="bold" if seen else None
        )
    for own in axes.flat:
        own.set(xticks=[], yticks=[])
    (answer,) = likeliest(processor, logits)
    figure.suptitle(f"{question.text} {answer}.", fontsize=12)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that `python -m studies.motion.training` wrote")
    parser.add_argument("--seed", type=int, default=2, help="of the clip")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    file = BytesIO()
    draw(options.folder, options.seed).savefig(file, dpi=100, format="png")
    Image.open(file).convert("RGB").save(options.output, quality=85)


if __name__ == "__main__":
    main()
