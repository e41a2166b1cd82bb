"""What a vision tower learns first: to tell, at every token, what is there."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from flexkit.visual_search.data import overview_and_tiles
from flexkit.visual_search.items import draw_crowd
from flexkit.visual_search.labels import CLASS_WORDS, CLASSES, UNKNOWN, token_labels
from flexkit.visual_search.model import CELLS, ZOOM, token_ids
from flexkit.visual_search.scene import paint_scene

__all__ = ["DenseReader", "DenseScenes", "Namer"]

_WEIGHTS = {"digit": 5.0}
"""Of the losses; digits are learned last, and by far."""
_WORD_IDS = {name: token_ids(words) for name, words in CLASS_WORDS.items()}
_WORD_IDS["colour"] += token_ids(["<unk>"])
"""The ground is ``<unk>``."""


class Namer(nn.Module):
    """What tells a vision tower to name what every token shows.

    A linear layer, thrown away later, tells from the tower's tokens, and behind the projector the language model's own
    words do: the model then finds a named object at once.

    Parameters
    ----------
    words : torch.nn.Linear
        From the language model's width to its vocabulary.
    width : int
        Of the tower's tokens.
    word_ids : mapping of str to list of int
        By class, those of the words that name what is of it; the ground is the last of the colours.
    """

    def __init__(self, words: nn.Module, width: int, word_ids: Mapping[str, list[int]]) -> None:
        super().__init__()
        self.words, self.head, self.word_ids = words, nn.Linear(width, sum(CLASSES.values())), word_ids

    def forward(self, tokens: Tensor, projected: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss, and the logits of every token for all classes.

        Parameters
        ----------
        tokens, projected : torch.Tensor
            ``(images, tokens, width)``: from the tower, and from the projector.
        labels : torch.Tensor
            ``(images, 5, tokens)``, as :func:`flexkit.visual_search.labels.token_labels` gives them.
        """
        logits, words = self.head(tokens), self.words(projected)
        told = zip(CLASSES, logits.split(list(CLASSES.values()), dim=-1), labels.unbind(1), strict=True)
        losses = []
        for name, by_head, target in told:
            losses += [_WEIGHTS.get(name, 1.0) * _loss(by_head, target), _loss(words[..., self.word_ids[name]], target)]
        return {"loss": torch.stack(losses).sum(), "logits": logits}


class DenseReader(nn.Module):
    """The vision tower and projector of a model, and what tells them to name what every token shows.

    Parameters
    ----------
    model : transformers.LlavaForConditionalGeneration
        Whose tower, projector and embeddings are trained.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.namer = Namer(model.lm_head, model.config.vision_config.hidden_size, _WORD_IDS)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss, and the logits of every token for all classes.

        Parameters
        ----------
        pixel_values : torch.Tensor
            ``(images, 3, height, width)``.
        labels : torch.Tensor
            ``(images, 5, tokens)``, as :class:`DenseScenes` gives them.
        """
        tokens = self.tower(pixel_values, output_hidden_states=True).hidden_states[-1]
        named: dict[str, Tensor] = self.namer(tokens, self.projector(tokens), labels)
        return named


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(rearrange(logits, "n t c -> n c t"), target, ignore_index=UNKNOWN)


class DenseScenes(Dataset[dict[str, Tensor]]):
    """Crowded scenes, each from afar and in its nine tiles, with what every token shows.

    Parameters
    ----------
    seed : int
        Of the scenes.
    count : int
        How many.
    image_processor : transformers.BaseImageProcessor
        Of the model.
    """

    def __init__(self, seed: int, count: int, image_processor: Any) -> None:
        self.seed, self.count, self.image_processor = seed, count, image_processor

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = np.random.default_rng([self.seed, index])
        scene = paint_scene(random, draw_crowd(random))
        tiles = [divmod(tile, ZOOM) for tile in range(ZOOM * ZOOM)]
        labels = [
            token_labels(scene.items, (0, 0), 1, CELLS),
            *(token_labels(scene.items, tile, ZOOM, CELLS) for tile in tiles),
        ]
        pixels = self.image_processor(overview_and_tiles(scene.image), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.from_numpy(np.stack(labels))}

    @staticmethod
    def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Examples one behind the other."""
        return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}
