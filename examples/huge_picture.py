"""Ask about a picture of 100 megapixels that is never decoded as a whole, and see what that costs.

A scene is drawn ten times as long and wide as one of 1008 pixels, and saved as a TIFF of tiles. The small trained model
is asked about both: the language model computes the same, and of the large one only what is looked at is decoded. Then
the model reads three levels of zoom, of which it was trained on the first. Needs ``pip install 'flexkit-vlm[tiff]'``.

    python examples/huge_picture.py
"""

import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
import torch

import flexkit
from flexkit.measuring import count_flops
from flexkit.patching import get_patch
from flexkit.visual_search import Scene, draw_scene, load_model

SMALL, TIMES, TILE = 1008, 10, 480


def save_enlarged(scene: Scene, path: Path) -> None:
    """Write the scene with each pixel ``TIMES`` as long and wide, tile by tile."""
    pixels, step = np.asarray(scene.image), TILE // TIMES
    side = len(pixels) * TIMES

    def tiles() -> Iterator[np.ndarray]:
        for top in range(0, len(pixels), step):
            for left in range(0, len(pixels), step):
                tile = pixels[top : top + step, left : left + step].repeat(TIMES, axis=0).repeat(TIMES, axis=1)
                yield np.pad(tile, ((0, TILE - len(tile)), (0, TILE - tile.shape[1]), (0, 0)))

    options = {"tile": (TILE, TILE), "photometric": "rgb", "compression": "zlib"}
    tifffile.imwrite(path, tiles(), shape=(side, side, 3), dtype=np.uint8, **options)


def peak() -> float:
    """The most memory that this process has ever had, in MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


@torch.no_grad()
def ask(picture: object, question: str, levels: int = 1) -> tuple[float, float]:
    """Ask, and print a line of the table; the language model's operations, and how much the peak of memory rose."""
    model, processor = load_model()
    policy, before = flexkit.TopK(get_patch(model).config.policy.k // levels), peak()  # as many tokens on all levels
    get_patch(model).config = get_patch(model).config.replace(levels=levels, policy=policy)
    inputs = processor(images=picture, text=f"<image> {question}", return_tensors="pt")
    with flexkit.trace(model) as trace:
        words = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    rose, tiles = peak() - before, [rows * columns for rows, columns in processor.zooms]
    flops = count_flops(lambda: model(**inputs), without=("vision_tower", "multi_modal_projector"))
    answer = processor.decode(words, skip_special_tokens=True)
    encoded = f"{trace.steps[-1].tiles} of {sum(tiles)}"
    print(f"{answer:>7}{levels:>8}{encoded:>15}{flops / 1e9:>17.4f}{rose:>20.0f}")
    return flops, rose


def main(seed: int = 3) -> None:
    """Draw, save, and ask."""
    scene = draw_scene(seed, SMALL)
    item = next(item for item in scene.items if sum(other.colour == item.colour for other in scene.items) == 1)
    question = f"Which digit is on the object that is {item.colour}?"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.tif"
        save_enlarged(scene, path)
        source = flexkit.open_tiff(path)
        print(f"{question} (It is {item.digit}.)\n")
        print(f"{'':>16}{'answer':>7}{'levels':>8}{'tiles encoded':>15}{'LM GFLOP':>17}{'MiB more at peak':>20}")
        for levels in (1, 3):
            print(f"{source.size[0]:>6} x {source.size[1]:<7}", end="")
            ask(source, question, levels)
        print(f"{SMALL:>6} x {SMALL:<7}", end="")
        ask(scene.image, question)


if __name__ == "__main__":
    main()
