"""What each of several processes runs: training on its share of every batch. Writes its losses and weights to a folder.

accelerate launch ... tests/training/processes.py FOLDER NAME...
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import flexkit
from flexkit.__main__ import main as command
from flexkit.patching import get_patch
from flexkit.visual_search import draw_scene
from flexkit.visual_search.weights import WEIGHTS
from tests.training import contexts
from tests.training.stripes import Example, doubled, examples, joined, model_for
from tests.training.trainers import losses_of, trainer_for
from tests.zoo import low_res

ROWS, STEPS = 4, 2
BESIDE = "florence2"
"""A model whose attention reads the image from a context beside the decoder's sequence."""
Result = dict[str, Any]


def batches(name: str) -> list[Example]:
    """The rows of every step."""
    return [joined(examples(name, ROWS, seed=step)) for step in range(STEPS)]


def share(batch: Example, rank: int, world: int) -> Example:
    """The rows of a batch that one process sees."""
    return {key: value.chunk(world)[rank] for key, value in batch.items()}


def ddp(model: nn.Module, **settings: Any) -> nn.Module:
    return DistributedDataParallel(model, **settings)


def fsdp(model: nn.Module, *, finely: bool = False) -> nn.Module:
    for layer in get_patch(model).decoder.layers:  # type: ignore[union-attr]
        if finely:
            fully_shard(layer.self_attn)
        fully_shard(layer)
    return fully_shard(model)


def loop(
    model: Any,
    parts: list[Example],
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    average: Callable[[Tensor], Any] = lambda loss: None,
) -> Result:
    """A training loop as anybody writes it, in float64: the order of summation must not show."""
    wrapped = wrap(model.double())
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.5)
    losses = []
    for part in map(doubled, parts):
        optimizer.zero_grad()
        loss = wrapped(**part).loss
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        average(loss)
        losses.append(loss)
    return {"losses": torch.stack(losses), "weights": whole(model)}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The weights, gathered where they are sharded."""
    state = model.state_dict()
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}


def mean(loss: Tensor) -> None:
    """That of all processes."""
    dist.all_reduce(loss)
    loss /= dist.get_world_size()


def with_checkpoints(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def loops(name: str, folder: Path) -> dict[str, Result]:
    """Training loops on all ways to share a model."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [share(batch, rank, world) for batch in batches(name)]

    results = {
        "ddp": loop(model_for(name), parts, ddp, mean),
        # Many a base model has layers that it does not use, such as the last of LLaVA's vision tower.
        "ddp everything": loop(
            model_for(name, trains_all=True), parts, partial(ddp, find_unused_parameters=True), mean
        ),
        "fsdp everything": loop(with_checkpoints(model_for(name, trains_all=True)), parts, fsdp, mean),
    }
    results["fsdp finely"] = loop(model_for(name), parts, partial(fsdp, finely=True), mean)
    # The second process meets no high-res view: the first waits for its gradients all the same.
    some = [part if rank == 0 else low_res(part) for part in parts]
    results |= {f"{wrap.__name__} some": loop(model_for(name), some, wrap, mean) for wrap in (ddp, fsdp)}
    sharded = model_for(name)
    results["fsdp"] = loop(sharded, parts, fsdp, mean)
    flexkit.save_flex(sharded, folder / name, is_main_process=rank == 0)
    return results


def loops_beside(name: str) -> dict[str, Result]:
    """The same where the image is read from a context."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [share(joined(contexts.examples(name, ROWS)), rank, world)] * STEPS

    def shard(model: Any) -> nn.Module:
        for layer in model.model.language_model.decoder.layers:
            fully_shard(layer)
        return fully_shard(model)

    return {
        "ddp": loop(contexts.model_for(name), parts, ddp, mean),
        "fsdp": loop(contexts.model_for(name), parts, shard, mean),
    }


def by_trainer(name: str, folder: Path) -> dict[str, Result]:
    """The same by transformers' Trainer, which shares the rows out itself."""
    model, world = model_for(name).double(), int(os.environ.get("WORLD_SIZE", 1))
    rows = [doubled(row) for step in range(STEPS) for row in examples(name, ROWS, seed=step)]
    trainer = trainer_for(model, rows, folder, per_device_train_batch_size=ROWS // world, max_steps=STEPS, optim="sgd")
    trainer.train()
    shared = isinstance(trainer.model_wrapped, DistributedDataParallel)
    return {"trainer": {"losses": losses_of(trainer), "weights": whole(model), "shared": shared}}


def by_command(folder: Path) -> None:
    """Training on conversations, one of which has a broken picture."""
    torn = draw_scene(0).image
    turns = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "7"}]
    own = folder / str(os.environ.get("RANK", 0))  # each process reads files of its own, and one folder is written
    own.mkdir()
    for name in "ab":
        torn.save(own / f"{name}.png")
    (own / "b.png").write_bytes((own / "b.png").read_bytes()[:999])
    (own / "data.json").write_text(json.dumps([{"image": f"{name}.png", "conversations": turns} for name in "aaba"]))
    given = ("--data", str(own / "data.json"), "--model", str(WEIGHTS / "base"), "--output", str(folder / "own"))
    assert command(["train", *given, "--on-broken", "skip", "--batch", "1", "--workers", "0", "--quiet"]) == 0


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    results = {names[0]: by_trainer(names[0], Path(folder))}  # joins the processes, as accelerate does it
    by_command(Path(folder))
    for name in names:
        results[name] = results.get(name, {}) | loops(name, Path(folder))
    results[BESIDE] = loops_beside(BESIDE)
    torch.save(results, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
