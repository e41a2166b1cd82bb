"""What each of several processes that share a model's heads runs. Writes what it found to a folder.

torchrun --nproc-per-node 2 tests/distributed/ranks.py FOLDER
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as tf
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

import flexkit
from flexkit.patching import added_parameters
from tests.patching.tiles import tiled_prompt
from tests.patching.ways import generate, new_tokens
from tests.versions import before
from tests.zoo import CONTEXT, ZOO, Row, low_res, prompt
from tests.zoo.exact import compute_exactly

Found = dict[str, Any]
DEEP = ("llava", "qwen2_5_vl")
"""Models on which everything is tried."""
OTHERS = [
    name
    for name in (
        "qwen2_vl",
        "qwen3_vl",
        "qwen3_5",  # some layers without attention
        "llava_onevision",
        "internvl",
        "mistral3",
        "gemma3",
        "kimi_k25",  # latent keys and values, all heads in each process
        "dots3_note",  # latent ones, shared out
        "mistral_large4-shared",  # layers that attend to the keys of others
        "minimax_m3_vl",  # projections shared out, and all heads in each process
        "idefics2",  # learned queries read the image
        "t5gemma2",  # a context beside the sequence
    )
    if name in ZOO and not (before("5.23") and name == "gemma3")  # whose tied head those run as if it were whole
]
"""Kinds of attention, and of plans for it."""
TRAINED = [name for name in ("qwen3_vl", "dots3_note", "minimax_m3_vl", "idefics2") if name in OTHERS]
"""Those of them whose gradients are looked at."""
FEATURES = {
    "top k": {"policy": flexkit.TopK(2)},
    "threshold": {"policy": flexkit.Threshold(0.3)},
    "everything": {"policy": flexkit.Everything()},
    "a head": {"policy": flexkit.TopK(2), "heads": (3,)},
    "heads of both": {"policy": flexkit.TopK(2), "heads": (2, 0), "reduce": "mean"},
    "largest": {"policy": flexkit.TopK(2), "heads": (1, 0), "reduce": "max"},
    "replacing": {"policy": flexkit.TopK(2), "low_res_keys": "replace"},
    "gate": {"policy": flexkit.TopK(2), "gate": 0.5},
}
_OWN = {"policy": flexkit.TopK(2), "high_res_states": "own", "start_layer": 0, "select_from": "same"}
OWN = {
    "own states": _OWN,
    "one selection": _OWN | {"select_layers": "all"},
    "the surer answer": flexkit.FlexConfig.training_free(zoom=2, surer=3.0).to_dict()
    | {"policy": flexkit.TopK(2), "select_layers": "all"},
}
"""Settings by which no weight is added."""


def config_of(name: str, settings: Found) -> flexkit.FlexConfig:
    """By default the last layer reads, which needs a map of every process."""
    start = {} if name in CONTEXT else {"start_layer": 3 if name == "qwen3_5" else 1}
    return flexkit.FlexConfig(**{"zoom": 2} | start | settings)


def with_config(model: Any, name: str, settings: Found) -> Any:
    """The model, patched again by other settings, with the weights that it had."""
    kept = {key: weight.detach().clone() for key, weight in added_parameters(model).items()}
    config = config_of(name, settings)
    if flexkit.is_patched(model):
        flexkit.unpatch_model(model)
    flexkit.patch_model(model, config, trained=True)
    with torch.no_grad():
        for key, weight in added_parameters(model).items():
            weight.copy_(kept[key])
    return model


def inputs_of(name: str) -> dict[str, Tensor]:
    rows = (Row(),) if ZOO[name].one_image or name in CONTEXT else (Row(), Row((None,), 6))
    return prompt(ZOO[name], rows)


@torch.no_grad()
def logits(model: Any, inputs: Found) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def asked(model: Any, inputs: Found, **settings: Any) -> Found:
    """Tokens, the logits of each, and what was selected in every layer."""
    with flexkit.trace(model) as trace:
        output = generate(model, inputs, 3, **settings)
    scores = [trace.scores(step, layer) for step in range(len(trace)) for layer in trace.layers]
    return {"tokens": new_tokens(output), "logits": torch.stack(output.logits), "scores": torch.stack(scores)}


def loss_and_gradients(model: Any, inputs: Found) -> Found:
    """Of a step that trains all weights, and of one that reads no high-res token."""
    model.train().requires_grad_(True)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    found = {}
    for kind, batch in {"reading": inputs, "not reading": low_res(inputs)}.items():
        model.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        gradients = {key: whole(of.grad) for key, of in model.named_parameters() if of.grad is not None}
        found[kind] = {"loss": loss.detach(), "gradients": gradients}
    model.eval().zero_grad()
    return found


def whole(tensor: Any) -> Tensor:
    """A tensor of which every process may have a part."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def deeply(name: str, model: Any) -> Found:
    """Everything that a patched model of a name is asked, in one process or in several."""
    inputs, found = inputs_of(name), {}
    with flexkit.disabled(model):
        found["disabled"] = logits(model, inputs)
    for key, settings in FEATURES.items():
        found[key] = logits(with_config(model, name, settings), inputs)
    with_config(model, name, FEATURES["top k"])
    found["asked"] = asked(model, inputs)
    found["static"] = asked(model, inputs, cache_implementation="static", disable_compile=True)
    found["training"] = loss_and_gradients(model, inputs)
    if name == "llava":
        pyramid = {"levels": 2, "policy": flexkit.TopK(2), "budget": 0.5}
        tiles = tiled_prompt(name, (Row(),), (2, 2), 2)
        found["pyramid"] = asked(with_config(model, name, pyramid), tiles)
    flexkit.unpatch_model(model)
    found["unpatched"] = logits(model, low_res(inputs))
    for key, settings in OWN.items():
        flexkit.patch_model(model, config_of(name, settings))
        found[key] = asked(model, inputs)
        flexkit.unpatch_model(model)
    flexkit.patch_model(model, config_of(name, FEATURES["top k"]), trained=True)
    found["copies"] = logits(model, inputs)
    flexkit.unpatch_model(model)
    return found


def shallowly(name: str, model: Any) -> Found:
    """That other models answer as one process does, and as well as their base model."""
    inputs = inputs_of(name)
    found: Found = {"patched": logits(model, inputs)}
    with flexkit.disabled(model):
        found["base"] = logits(model, low_res(inputs))
    if name in TRAINED:
        found["training"] = loss_and_gradients(model, inputs)
    return found


def loaded(folder: Path) -> Any:
    """A patched model, shared out while it is loaded."""
    model = flexkit.from_pretrained(folder, tp_plan="auto", dtype=torch.float64, experts_implementation="eager")
    compute_exactly(model)
    return model


def shared(folder: Path, **plan: Any) -> Any:
    """A base model, shared out."""
    config = DistributedConfig(**{"tp_plan": "auto"} | plan)
    return tf.AutoModelForImageTextToText.from_pretrained(folder, distributed_config=config, dtype=torch.float64)


def refusals(folder: Path) -> Found:
    """What is said of models that are shared out otherwise; by transformers, where that comes first."""

    keys = "model.language_model.layers.*.self_attn.k_proj"

    def with_fsdp() -> Any:
        model = shared(folder / "llava")
        fully_shard(model.model.vision_tower, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
        return model

    ways: dict[str, Callable[[], Any]] = {
        "one key head": lambda: shared(folder / "one key head"),
        "mixed": lambda: shared(folder / "llava", tp_plan={keys: "colwise_gather_output"}),
        "fsdp": lambda: shared(folder / "llava", tp_plan=None, fsdp_size=2),
        "fsdp of a part": with_fsdp,
        "stages": lambda: shared(folder / "chameleon", tp_plan=None, pp_size=2),
        "stages of most": lambda: shared(folder / "llava", tp_plan=None, pp_size=2),
    }
    if before("5.23"):
        ways["tied head"] = lambda: shared(folder / "gemma3")
    said = {}
    for way, make in ways.items():
        try:
            model = make()
            flexkit.patch_model(model, flexkit.FlexConfig(start_layer=1), trained=True)
        except (flexkit.UnsupportedModelError, AttributeError) as error:
            said[way] = f"{type(error).__name__}: {error}"
    return said


def tasks(folder: Path) -> Iterator[tuple[str, Callable[[], Found]]]:
    yield "refusals", lambda: refusals(folder)
    for name in DEEP:
        yield name, lambda name=name: deeply(name, loaded(folder / name))
    for name in OTHERS:
        yield name, lambda name=name: shallowly(name, loaded(folder / name))


def saved_again(folder: Path, name: str) -> None:
    """A folder that several processes write, and each of them reads at once."""
    model = loaded(folder / name)
    model.save_pretrained(folder / f"{name} again")
    again = loaded(folder / f"{name} again")
    for key, weight in model.state_dict().items():
        assert torch.equal(whole(weight), whole(again.state_dict()[key])), key


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tf.utils.logging.disable_progress_bar()
    tf.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    results = {name: task() for name, task in tasks(folder)}
    for name in DEEP:
        saved_again(folder, name)
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
