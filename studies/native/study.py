"""What a model that reads pictures of any size loses with a small picture, and gets back by looking closer.

python -m studies.native.training --seed 1 --output native/1        # and other seeds
python -m studies.native.study native/* --questions 400 --output docs/evidence/native.json

Nothing is trained for the high-res view. All of a large picture in the sequence is what such models read otherwise.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import flexkit
from flexkit.measuring import count_flops
from flexkit.probing import patched
from flexkit.visual_search.data import prompts
from flexkit.visual_search.evaluation import Batch
from flexkit.visual_search.scene import SIZE
from flexkit.visual_search.ways import Oracle, likeliest
from studies.command import study_parser, write
from studies.native.model import LOW_RES, ZOOM, NativeModel, build_processor

BATCH = 50
SIDES = (LOW_RES, 96, 128, SIZE)
"""Of pictures in the sequence, in pixels."""
ZOOMS = {LOW_RES: ZOOM, 96: 2}
"""How much larger the high-res view is than each of some."""
SHARES = (0.05, 0.1, 0.2, 0.4, 1.0)
"""Of the cells that are always read."""
_TENTH = 0.1
ALL = f"{SIZE} px"
"""The way that reads all of the picture."""


def ways(oracle: Oracle) -> Iterator[tuple[str, int, flexkit.FlexConfig | None]]:
    """Name, side of the picture in the sequence, and how a high-res view is read beside it."""
    for side in SIDES:
        yield f"{side} px", side, None
    always = partial(flexkit.FlexConfig.training_free, gate=None, surer=None)
    for side, zoom in ZOOMS.items():
        yield f"{side} px, training_free", side, flexkit.FlexConfig.training_free(zoom=zoom)
        yield f"{side} px, surer=3", side, flexkit.FlexConfig.training_free(zoom=zoom, surer=3.0)
        yield f"{side} px, beside {_TENTH:.0%}", side, always(zoom=zoom, low_res_keys="keep")
        for share in SHARES:
            yield f"{side} px, always {share:.0%}", side, always(zoom=zoom, policy=flexkit.TopK(share))
    policies = {"oracle": oracle, "random": flexkit.Random(_TENTH), "centre": flexkit.Center(_TENTH)}
    for name, policy in policies.items():
        yield f"{LOW_RES} px, always {_TENTH:.0%}, {name}", LOW_RES, always(zoom=ZOOM, policy=policy)


@torch.no_grad()
def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs, logits_to_keep=1).logits[:, -1]
    return logits


def study(folder: Path, seed: int, count: int) -> dict[str, Any]:
    """Ask one model in all ways: shares of right answers, and what the language model computes for a question."""
    model = NativeModel.from_pretrained(folder / "base", dtype="float32").eval()
    oracle, flops = Oracle(), dict[str, float]()
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    parts = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
    for track, part in tqdm([*product(("attribute", "low-res"), parts)], desc=folder.name, unit="batch"):
        batch = Batch.draw(track, seed, part)
        texts, oracle.places = [question.text for question in batch.asked], batch.places
        for name, side, config in ways(oracle):
            plain = build_processor(side)
            processor = plain if config is None else flexkit.FlexProcessor(plain, config.zoom)
            inputs = prompts(processor, batch.images, texts)
            with nullcontext() if config is None else patched(model, config):
                if name not in flops:
                    run = partial(_logits, model, inputs)
                    flops[name] = count_flops(run, without=("visual",)) / len(part) / 1e9
                words = likeliest(plain, _logits(model, inputs))
            for word, question in zip(words, batch.asked, strict=True):
                right[name][question.about].append(word == question.answer)
    accuracy = {name: {about: sum(of) / len(of) for about, of in by.items()} for name, by in right.items()}
    return {"accuracy": accuracy, "lm_gflops": flops}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the study of some models."""
    options = study_parser(__doc__).parse_args(arguments)
    found = {folder.name: study(folder, options.seed, options.questions) for folder in options.folders}
    write(options.output, {"questions": options.questions, "models": found})


if __name__ == "__main__":
    main()
