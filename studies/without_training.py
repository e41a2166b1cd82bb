"""What a frozen base reads that nobody trained for a second view: by own states, by copied projections, or otherwise.

flexkit train visual-search --stage tower --stage base --layers 12 --seed 1 --output bases/12-layers-1
python -m studies.without_training bases/* --output docs/evidence/without_training.json

--way asks in some ways alone. A base on a pretrained language model (flexkit train visual-search --language-model) is
asked in the same ways, and with --short in few words, which moves what its maps point at to other layers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import flexkit
from flexkit.probing import patched, without_high_res
from flexkit.visual_search import TRACKS, load_model
from flexkit.visual_search.data import Chats, Collator
from flexkit.visual_search.evaluation import Batch, Score, score
from flexkit.visual_search.model import ZOOM
from flexkit.visual_search.pretrained.answers import AnswerCollator
from flexkit.visual_search.questions import CLOSE_UP
from flexkit.visual_search.ways import BUDGET, Oracle, Way, likeliest
from flexkit.visual_search.weights import ADAPTER
from studies.baselines import Looker, insert_selected, zoom_in
from studies.command import study_parser, write

BATCH = 50
PROBED = 32
"""Scenes by which the layer that localises is found."""
Answer = Callable[[Mapping[str, Tensor]], Tensor]
"""From inputs of both views to the logits of the answer."""


def ways(model: Any, layer: int, oracle: Oracle) -> dict[str, Answer]:
    """All ways of answering; ``layer`` is the one whose map localises."""
    own = partial(flexkit.FlexConfig.training_free, zoom=ZOOM)
    always = partial(own, gate=None, surer=None)
    features = partial(own, high_res_states="features", policy=flexkit.Threshold(48 / 255))
    probed = partial(features, start_layer=layer)
    same = partial(probed, low_res_keys="keep", key_norm=False, gate=None)
    replace = partial(same, low_res_keys="replace", replace_dilation=0)
    published = partial(flexkit.FlexConfig.published, start_layer=layer + 1, zoom=ZOOM)
    look = Looker(model, layer, flexkit.Threshold(48 / 255))
    configs = {
        "published schedule": published(),
        "published schedule, input norm": published(key_norm=True),
        "published schedule, gated to zero": published(alpha=0.0),
        "same layer": same(),
        "same layer, input norm": same(key_norm=True),
        "same layer, input norm, bias of 2": same(key_norm=True, logit_bias=2.0),
        "same layer, replace": replace(),
        "same layer, replace, nothing added": replace(logit_bias=-1e4),
        "features": features(),
        "features, no gate": features(gate=None),
        "features, probed layer": probed(),
        "features, probed layer, no gate": probed(gate=None),
        "features, probed layer, no gate, top 6": probed(gate=None, policy=flexkit.TopK(BUDGET)),
        "features, probed layer, no gate, oracle": probed(gate=None, policy=oracle),
        "training_free": own(),
        "training_free, gate of 0.5": own(gate=0.5),
        "training_free, always": always(),
        "training_free, always, oracle": always(policy=oracle),
        "training_free, always, beside": always(low_res_keys="keep"),
    }
    return {
        "low-res only": partial(_base, model),
        **{name: partial(_patched, model, config) for name, config in configs.items()},
        "two passes": partial(insert_selected, look),
        "best tile": partial(zoom_in, look),
    }


@torch.no_grad()
def _base(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**without_high_res(inputs), logits_to_keep=1).logits[:, -1]
    return logits


@torch.no_grad()
def _patched(model: Any, config: flexkit.FlexConfig, inputs: Mapping[str, Tensor]) -> Tensor:
    with patched(model, config):
        logits: Tensor = model(**inputs, logits_to_keep=1).logits[:, -1]
    return logits


def study(folder: Path, seed: int, count: int, *, short: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """Score one base: by way, or by some of them, then by what is asked, the share of right answers."""
    model, plain = load_model("base", weights=folder)
    processor = flexkit.FlexProcessor(plain, ZOOM)
    chats = Chats(seed + 1, PROBED, {"attribute": 1.0}, turns=3)
    adapted = (folder / "base" / ADAPTER).exists()
    collator = AnswerCollator(processor, short=short) if adapted else Collator(processor)
    found = flexkit.probe_start_layer(model, [collator([chats[index] for index in range(PROBED)])])
    oracle = Oracle()
    right: dict[str, dict[str, list[bool]]] = {}
    parts = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
    for track, part in tqdm([*product(TRACKS, parts)], desc=folder.name, unit="batch"):
        batch = Batch.draw(track, seed, part, short=short)
        inputs, oracle.places = batch.inputs(processor), batch.places
        every = ways(model, found.layer, oracle)
        for name, answer in {name: every[name] for name in only or every}.items():
            words = likeliest(processor, answer(inputs))
            for word, question in zip(words, batch.asked, strict=True):
                kind = question.about if track == "low-res" else track
                right.setdefault(name, {}).setdefault(kind, []).append(word == question.answer)
    near = [Batch.draw(CLOSE_UP, seed, part, short=short) for part in parts]
    return {
        "layers": model.config.text_config.num_hidden_layers,
        "close-ups": Score.mean([score(Way(model, plain), batch) for batch in near]).accuracy,
        "losses": {"base": found.base_loss, **{str(layer): loss for layer, loss in found.losses.items()}},
        "layer": found.layer,
        "accuracy": {way: {kind: sum(hits) / len(hits) for kind, hits in of.items()} for way, of in right.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the study of some bases."""
    parser = study_parser(__doc__)
    parser.add_argument("--short", action="store_true", help="ask in few words, the last of which names the object")
    parser.add_argument("--way", action="append", default=[], help="of answering, as a table names it; default: all")
    options = parser.parse_args(arguments)
    found = {
        folder.name: study(folder, options.seed, options.questions, short=options.short, only=options.way)
        for folder in options.folders
    }
    write(options.output, {"questions": options.questions, "bases": found})


if __name__ == "__main__":
    main()
