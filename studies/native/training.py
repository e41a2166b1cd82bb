"""From nothing to a model that reads scenes of any size.

python -m studies.native.training --seed 0 --output native/0
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import set_seed

from flexkit.training.processes import alone
from flexkit.visual_search.data import Chat, Chats, Collator, overview_and_tiles
from flexkit.visual_search.dense import Namer
from flexkit.visual_search.items import draw_crowd
from flexkit.visual_search.labels import CLASSES, token_labels
from flexkit.visual_search.questions import CLOSE_UP
from flexkit.visual_search.recipe import Stage
from flexkit.visual_search.running import Run
from flexkit.visual_search.scene import SIZE, paint_scene
from studies.native.model import LOW_RES, TOKEN, WORD_IDS, ZOOM, NativeModel, build_model, build_processor

SIDES = (LOW_RES, 96, 128, 160, SIZE, SIZE)
"""Of pictures of scenes, in pixels; one is drawn of them."""
STAGES = {
    "tower": Stage(600, 2, 2e-3, {}),
    "base": Stage(3000, 8, 2e-3, {"attribute": 1.5, "low-res": 4.0, "close-up": 0.5}),
}
_WHOLE = 0.75
"""How often the tower sees scenes as a whole, in several sizes; else from afar and in tiles."""


class Reader(nn.Module):
    """The tower, and what tells it to name what every token shows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, width = model.model.visual, model.model.visual.segformer.config.hidden_size
        self.namer = Namer(model.lm_head, width, WORD_IDS)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss, and the logits of every token for all classes; labels ``(1, 5, tokens)`` are of all images."""
        tokens = self.tower.seen(pixel_values, image_grid_thw)[None]
        named: dict[str, Tensor] = self.namer(tokens, self.tower.projector(tokens), labels)
        return named


class Views(Dataset[dict[str, Tensor]]):
    """Crowded scenes from afar and in tiles, or from afar, nearer and in full, with what every token shows."""

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count, self.processor = seed, count, build_processor(SIZE).image_processor

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = np.random.default_rng([self.seed, index])
        scene = paint_scene(random, draw_crowd(random))
        views = _whole_views(scene) if random.random() < _WHOLE else _tiled_views(scene)
        inputs = self.processor([image for image, _ in views], return_tensors="pt")
        labels = np.concatenate([told for _, told in views], axis=-1)
        return {**inputs, "labels": torch.from_numpy(labels)[None]}

    @staticmethod
    def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Examples one behind the other."""
        along = {"labels": -1}
        return {
            name: torch.cat([example[name] for example in examples], dim=along.get(name, 0)) for name in examples[0]
        }


def _tiled_views(scene: Any) -> list[tuple[Image, Any]]:
    image, *tiles = overview_and_tiles(scene.image)
    side = LOW_RES // TOKEN
    return [
        (image.resize((LOW_RES, LOW_RES)), token_labels(scene.items, (0, 0), 1, side)),
        *((tile, token_labels(scene.items, divmod(at, ZOOM), ZOOM, side)) for at, tile in enumerate(tiles)),
    ]


def _whole_views(scene: Any) -> list[tuple[Image, Any]]:
    sides = (LOW_RES, 128, SIZE)
    views = [(scene.image.resize((side, side)), token_labels(scene.items, (0, 0), 1, side // TOKEN)) for side in sides]
    digits, side = list(CLASSES).index("digit"), LOW_RES // TOKEN
    near = (token_labels(scene.items, divmod(at, ZOOM), ZOOM, side) for at in range(ZOOM**2))
    tokens = np.stack([told[digits] for told in near])
    views[-1][1][digits] = rearrange(tokens, "(y x) (r c) -> (y r x c)", y=ZOOM, r=side)
    return views


class SizedChats(Chats):
    """Chats about pictures of several sizes."""

    def __getitem__(self, index: int) -> Chat:
        chat = super().__getitem__(index)
        if chat.turns[0].track == CLOSE_UP:
            return chat
        side = int(np.random.default_rng([self.seed, index, 2]).choice(SIDES))
        return replace(chat, scene=replace(chat.scene, image=chat.scene.image.resize((side, side))))


def train(folder: Path, seed: int = 0, layers: int = 4, workers: int = 1) -> None:
    """Train the stages that a folder lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        for number, (name, stage) in enumerate(STAGES.items()):
            run = Run(folder, name, stage, 10 * seed + number, workers, quiet=False)
            if not run.log.exists():
                model = build_model(layers, seed=seed)
                set_seed(run.seed)  # for the layers that only the reader has
                run.finish(model.save_pretrained, _TRAINERS[name](run, model))


def _tower(run: Run, model: Any) -> list[dict[str, float]]:
    return run.fit(Reader(model), Views(run.seed, run.stage.steps * run.stage.batch), Views.collate)


def _base(run: Run, model: Any) -> list[dict[str, float]]:
    tower = NativeModel.from_pretrained(run.folder / "tower", dtype="float32").model.visual
    model.model.visual = tower.requires_grad_(False)
    chats = SizedChats(run.seed, run.stage.steps * run.stage.batch, run.stage.tracks)
    return run.fit(model, chats, Collator(build_processor(SIZE)))


_TRAINERS = {"tower": _tower, "base": _base}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    train(options.output, options.seed, options.layers)


if __name__ == "__main__":
    main()
