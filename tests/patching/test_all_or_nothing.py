"""Patching that fails, whatever fails in it, leaves the model that came in; what is patched is not patched again."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor

import flexkit
from flexkit.patching import get_patch, patch
from tests.patching.test_laws_unpatch import anatomy
from tests.patching.ways import SETTINGS, generate, inputs_of, logits_of, plain
from tests.zoo import ZOO, Row, low_res

CONFIG = flexkit.FlexConfig(**SETTINGS)


class BrokenError(Exception):
    """What no code of flexkit raises."""


@contextmanager
def breaking(owner: Any, name: str, after: int) -> Iterator[list[None]]:
    """Let a function fail when it has been called so many times."""
    function: Callable[..., Any] = getattr(owner, name)
    calls: list[None] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == after:
            raise BrokenError
        calls.append(None)
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(owner, name, counted)
        yield calls


STEPS = {
    "copies": (flexkit.patching.seam.projections, "trainable_copy"),
    "layers": (patch, "divert"),
    "hooks": (nn.Module, "register_forward_pre_hook"),
    "methods": (patch, "Method"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["llava", "blip", "blip-2"])
def test_whatever_step_fails(name: str, step: str) -> None:
    model = ZOO[name].model()
    before = anatomy(model)
    for after in range(100):
        try:
            with breaking(*STEPS[step], after):
                flexkit.patch_model(model, CONFIG, trained=True)
        except BrokenError:
            assert anatomy(model) == before
            assert not flexkit.is_patched(model)
        else:
            break
    assert 0 < after < 100 or step == "layers"
    flexkit.unpatch_model(model)
    assert anatomy(model) == before


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_projection_that_cannot_be_copied() -> None:
    model, inputs = plain("llava"), inputs_of("llava", (Row(),))
    norm = torch.nn.utils.weight_norm(model.model.language_model.layers[2].self_attn.k_proj)
    base, before = logits_of(model, low_res(inputs)), anatomy(model)
    norm(torch.zeros(1, norm.in_features, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="deepcopy"):
        flexkit.patch_model(model, CONFIG, trained=True)
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before["attributes"]
    assert torch.equal(logits_of(model, low_res(inputs)), base)
    torch.nn.utils.remove_weight_norm(norm)
    assert flexkit.is_patched(flexkit.patch_model(model, CONFIG, trained=True))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "llava_next"])
def test_an_inner_model_is_refused(name: str) -> None:
    model = ZOO[name].model()
    before = anatomy(model)
    kind = type(model.model).__name__
    with pytest.raises(flexkit.UnsupportedModelError, match=f"{kind} has no head.*{kind[:-5]}ForConditionalGeneration"):
        flexkit.patch_model(model.model, CONFIG)
    assert anatomy(model) == before


@pytest.mark.parametrize("name", ["llava", "blip", "mllama"])
def test_parts_of_a_patched_model(name: str) -> None:
    """The state is seen where it lies: in the layers too, whoever holds them."""
    model = ZOO[name].model()
    flexkit.patch_model(model, CONFIG, trained=True)
    layer = next(iter(get_patch(model).reading.values()))
    part = next(each for each in model.children() if any(module is layer.attention for module in each.modules()))
    assert flexkit.is_patched(part) and flexkit.is_patched(nn.Sequential(model))
    for use in (flexkit.unpatch_model, lambda inner: flexkit.disabled(inner).__enter__()):
        with pytest.raises(flexkit.PatchError, match="part of a patched model"):
            use(part)
    flexkit.unpatch_model(model)
    assert not flexkit.is_patched(part)


@pytest.mark.parametrize("name", ["llava", "blip"])
def test_a_language_model_of_two(name: str) -> None:
    one, other = ZOO[name].model(), ZOO[name].model(seed=1)
    shared = {"llava": "model.language_model", "blip": "text_decoder"}[name]
    other.set_submodule(shared, one.get_submodule(shared))
    before = anatomy(other)
    flexkit.patch_model(one, CONFIG, trained=True)
    with pytest.raises(flexkit.PatchError, match=r"layers of this .* belong to another model.*copy\.deepcopy"):
        flexkit.patch_model(other, CONFIG, trained=True)
    flexkit.unpatch_model(one)
    assert anatomy(other) == before
    flexkit.unpatch_model(flexkit.patch_model(other, CONFIG, trained=True))
    assert anatomy(other) == before


def test_not_while_a_call_runs() -> None:
    """Neither from another thread, nor from inside the call, nor between two words of an answer."""
    model, inputs = plain("llava"), inputs_of("llava", (Row(),))
    base = logits_of(model, low_res(inputs))
    expected = generate(flexkit.patch_model(model, CONFIG, trained=True), inputs, 6).sequences
    running, refused = threading.Event(), threading.Event()

    def between_words(ids: Any, scores: Any) -> bool:
        running.set()
        assert refused.wait(60)
        return False

    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(generate(model, inputs, 6, stopping_criteria=[between_words]).sequences)
    )
    thread.start()
    assert running.wait(60)
    with pytest.raises(flexkit.PatchError, match=r"1 call.*running.*unpatch it when"):
        flexkit.unpatch_model(model)
    refused.set()
    thread.join()
    assert torch.equal(answers[0], expected)
    hook = model.lm_head.register_forward_hook(lambda *_: flexkit.unpatch_model(model))
    with pytest.raises(flexkit.PatchError, match="running"):
        logits_of(model, inputs)
    hook.remove()
    assert torch.equal(logits_of(flexkit.unpatch_model(model), low_res(inputs)), base)


def test_a_method_that_outlives_the_patch() -> None:
    model, inputs = plain("llava"), inputs_of("llava", (Row(),))
    forward = flexkit.patch_model(model, CONFIG, trained=True).forward
    flexkit.unpatch_model(model)
    with pytest.raises(flexkit.PatchError, match="not patched"):
        forward(**inputs)


def test_threads_that_disable() -> None:
    """The count of open blocks loses none of them."""
    model = flexkit.patch_model(plain("llava"), CONFIG, trained=True)

    def switch() -> None:
        for _ in range(2000):
            with flexkit.disabled(model), flexkit.disabled(model, everywhere=True):
                pass

    threads = [threading.Thread(target=switch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get_patch(model).disabled == get_patch(model).overrides == 0


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_weights_that_are_shared_out(one_process: Any) -> None:
    model = plain("llava")
    projection = model.model.language_model.layers[0].self_attn.k_proj
    projection.weight = nn.Parameter(distribute_tensor(projection.weight.data, one_process, [Replicate()]))
    before = anatomy(model)
    with pytest.raises(flexkit.UnsupportedModelError, match=r"not by transformers' tp_plan alone: .* before FSDP"):
        flexkit.patch_model(model, CONFIG)
    assert anatomy(model) == before


def test_a_plan_that_the_weights_do_not_follow() -> None:
    """transformers notes on the model how many processes share it, and says so by a property."""
    model = plain("llava")
    assert model.tp_size is None
    model._tp_size = 2
    before = anatomy(model)
    with pytest.raises(flexkit.UnsupportedModelError, match="how LlamaAttention is shared out among 2 processes"):
        flexkit.patch_model(model, CONFIG)
    assert anatomy(model) == before


def test_the_patch_tells_in_a_line_what_it_is() -> None:
    shown = repr(get_patch(flexkit.patch_model(plain("llava"), CONFIG, trained=True)))
    assert shown == "<patch of LlavaForConditionalGeneration: layers 1 to 3 read, by TopK(k=3)>"
