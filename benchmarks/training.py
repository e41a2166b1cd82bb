"""What a training step takes: seconds, and bytes kept for the backward pass.

python -m benchmarks.training --width 512 --layers 12 --output benchmarks/results/training-512.json
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import flexkit
from benchmarks.models import build_as, low_res, question
from benchmarks.report import benchmark_parser, facts, ratios, write
from benchmarks.ways import in_sequence, wait
from flexkit.measuring import alternate

WORDS, ZOOM, ANSWER, TENTH = 64, 3, 8, 0.1


def step(model: Any, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """Forward, backward, and the gradients dropped."""

    def run() -> None:
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)
        wait(model)

    return run


def kept(model: Any, inputs: dict[str, Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    del loss
    return sum(found.values())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of every way of training, by those of the base model trained as a whole."""
    base = build_as(options).train()
    for module in (base.model.vision_tower, base.model.multi_modal_projector):
        module.requires_grad_(False)
    inputs = question(base, WORDS, ZOOM)
    whole = in_sequence(base, inputs, ZOOM, WORDS)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -ANSWER:] = inputs["input_ids"][:, -ANSWER:]
    longer = torch.full(whole["inputs_embeds"].shape[:2], -100, device=labels.device)
    longer[:, -ANSWER:] = labels[:, -ANSWER:]
    cells = (base.config.vision_config.image_size // base.config.vision_config.patch_size) ** 2
    config = flexkit.FlexConfig(zoom=ZOOM, policy=flexkit.TopK(round(TENTH * cells)))
    tuned, added = (flexkit.patch_model(copy.deepcopy(base), config, trained=True) for _ in range(2))
    added.requires_grad_(False)
    for parameter in flexkit.flex_parameters(added):
        parameter.requires_grad_(True)
    ways = {
        "base": (base, {**low_res(inputs), "labels": labels}),
        "flexkit": (tuned, {**inputs, "labels": labels}),
        "flexkit_added": (added, {**inputs, "labels": labels}),
        "all_in_sequence": (base, {**whole, "labels": longer}),
    }
    memory = {name: kept(model, given) / 2**20 for name, (model, given) in ways.items()}
    seconds = alternate({name: step(model, given) for name, (model, given) in ways.items()}, options.rounds)
    return {
        **facts(base, options),
        "image_tokens": cells,
        "high_res_tokens": cells * ZOOM**2,
        "text_tokens": WORDS,
        "answer_tokens": ANSWER,
        "kept_mib": memory,
        "seconds": seconds,
        "ratios": ratios(seconds, "base"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one language model."""
    options = benchmark_parser(__doc__, 512).parse_args(arguments)
    write(options.output, measure(options))


if __name__ == "__main__":
    main()
