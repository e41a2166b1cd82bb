"""A device that nobody has: its tensors hold numbers, and mix with those of the host no better than a GPU's do.

A process that knows of it is another one for all that asks which devices there are. So this is a program:
``python -m tests.ways.accelerators`` ends with an error where models on the device do not do what they do on the host.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import DynamicCache, StaticCache

import flexkit
from flexkit.measuring import count_launches
from tests.zoo import CONTEXT, ZOO, low_res, prompt

NAME = "pretended"
FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "internvl", "mllama")
READING: dict[str, Any] = {"zoom": 2, "policy": flexkit.Center(3)}
"""What is selected stays, so that tokens behind the first find it read."""
CONFIGS = {
    "projected": flexkit.FlexConfig(**READING, projection="full"),
    "lazy": flexkit.FlexConfig(**READING),
    "own states": flexkit.FlexConfig.training_free(**READING, gate=None, surer=None),
}
POLICIES = [
    (flexkit.TopK(3) | flexkit.Border()) & ~flexkit.Center(2),
    flexkit.Threshold(0.5).dilated(1),
    flexkit.TopP(0.5),
    flexkit.Random(0.3).pooled(2),
    flexkit.Everything() & flexkit.Nothing(),
]
WORDS = 2
_LIBRARY = torch.library.Library("aten", "IMPL")
_MOVES = ("_to_copy", "copy_")
_INDEXING = ("index", "index_put", "index_put_")
"""Their indices may be the host's."""


class OnDevice(Tensor):
    """A tensor that says it is on the device, around one of the host."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return Tensor._make_wrapper_subclass(cls, inner.size(), device=torch.device(NAME, 0), **layout)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"

    def tolist(self) -> Any:
        self.sum().item()  # one wait
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Making(TorchDispatchMode):
    """Tensors can be made on the device, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operator gives: on the device, if it is told so or one of its arguments is there."""
    name, device = func._schema.name.partition("::")[2], kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.ndim]
    if there and here and name not in (*_MOVES, *_INDEXING):
        raise AssertionError(f"{func} of tensors on two devices")
    stays = bool(there) if device is None else torch.device(device).type == NAME
    if name == "copy_":
        stays = isinstance(args[0], OnDevice)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(OnDevice, lambda tensor: tensor.inner, (args, kwargs))
    found = func(*args, **kwargs)
    if not stays:
        return found
    known = {id(tensor.inner): tensor for tensor in there}  # what is written in place stays the same tensor
    return tree_map_only(Tensor, lambda tensor: known[id(tensor)] if id(tensor) in known else OnDevice(tensor), found)


@contextmanager
def device() -> Iterator[None]:
    """Let tensors be made there; those of numbers are made here and moved, as ``FakeTensorMode`` has it."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Making():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def moved(module: nn.Module) -> Any:
    """A copy of a module on the device."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(OnDevice(parameter.data), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module


@torch.no_grad()
def answered(model: Any, inputs: Mapping[str, Tensor], *, static: bool) -> tuple[list[Tensor], int]:
    """Logits of a prompt and of words behind it, and how often the host waits for the last word.

    A step over a static cache is run as it is compiled: without what asks for numbers.
    """
    config = model.config.get_text_config()
    length = inputs["input_ids"].shape[1] + WORDS
    cache = StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)
    said = [model(**inputs, past_key_values=cache, logits_to_keep=1).logits]
    word = torch.full_like(inputs["input_ids"][:, :1], 7)

    def step() -> None:
        said.append(model(input_ids=word, past_key_values=cache, logits_to_keep=1).logits)

    step()
    with patch("torch.compiler.is_compiling", lambda: True) if static else nullcontext():
        waits = count_launches(step).waits
    return said, waits


def check_model(name: str) -> None:
    """A model says there what it says here, and a token of a patched one waits for no more than the base model's."""
    family = {**ZOO, **CONTEXT}[name]
    base = family.model().double()
    text = base.config.get_text_config()
    layers, kinds_of_layers = text.num_hidden_layers, {*getattr(text, "layer_types", ["full_attention"])}
    goes_back = name not in CONTEXT and kinds_of_layers == {"full_attention"}
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in prompt(family).items()}
    there = {key: OnDevice(value) for key, value in inputs.items()}
    kinds = (False,) if name in CONTEXT else (False, True)  # a static cache would have to fit the image, too
    with device():
        waits_of_base = {static: answered(moved(base), low_res(there), static=static)[1] for static in kinds}
    for way, config in CONFIGS.items():
        if way == "own states" and name in CONTEXT:
            continue
        model = flexkit.patch_model(copy.deepcopy(base), config, trained=True)
        for static in kinds:
            expected, _ = answered(model, inputs, static=static)
            with device():
                found, waits = answered(moved(model), there, static=static)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours.inner, theirs, msg=lambda text: f"{name}, {way}, {static=}: {text}")  # noqa: B023
            # Whether the row sees all of an image, or whether what is selected was read, once for all layers. A call
            # that cannot be taken back, as what slid out of a window cannot, asks in each layer before that computes;
            # one that joins own states to keys asks twice for each kind of mask, and what is decided, read and there.
            asked = 1
            if not goes_back:
                asked = {"projected": 1, "lazy": layers + 1, "own states": 2 * len(kinds_of_layers) + 3}[way]
            asked = 0 if static else asked
            more = waits - waits_of_base[static]
            assert more <= asked, f"{name}, {way}, {static=}: a token waits {more} times more than the base model's"


def check_policies() -> None:
    """Policies select there what they select here."""
    scores = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
    for policy in POLICIES:
        with device():
            found = policy(OnDevice(scores))
        assert torch.equal(found.inner, policy(scores)), f"{policy} selects something else"


def main() -> None:
    """Check all."""
    _setup_privateuseone_for_python_backend(NAME)
    _LIBRARY.impl("_local_scalar_dense", lambda tensor: tensor.inner.item(), "PrivateUse1")
    check_policies()
    for name in FAMILIES:
        check_model(name)


if __name__ == "__main__":
    main()
