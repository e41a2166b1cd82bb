"""Settings of one call, or of one thread or task: a policy, none at all, a trace. Nobody else sees them."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch

import flexkit
from flexkit.errors import ConfigError, PatchError, PolicyError
from flexkit.patching import get_patch
from tests.patching.ways import generate, inputs_of, logits_of, patched
from tests.ways.graphs import compiled
from tests.ways.questions import TOKENS, patched_model, question, six
from tests.zoo import low_res

POLICIES = [
    flexkit.TopK(1),
    flexkit.TopK(3),
    flexkit.TopK(8),
    flexkit.Everything(),
    flexkit.Nothing(),
    flexkit.Threshold(0.5),
    flexkit.Random(2, seed=1),
    flexkit.Center(2),
]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(*steps) for steps in zip(one.logits, other.logits, strict=True))


def set_and_generate(name: str, policy: Any) -> Any:
    """What a model of its own says by this policy."""
    model = patched_model(name)
    before = get_patch(model).config.policy
    flexkit.set_policy(model, policy)
    try:
        return generate(model, question(name).inputs, TOKENS)
    finally:
        flexkit.set_policy(model, before)


def test_blocks_that_end_in_another_order() -> None:
    """What was opened later stays open, and nothing is left when all have ended."""
    name = "llava"
    model, inputs = patched_model(name), question(name).inputs
    base, own = question(name).base, generate(model, question(name).inputs, TOKENS)
    disabled, tracing, policy = ExitStack(), ExitStack(), ExitStack()
    disabled.enter_context(flexkit.disabled(model))
    trace = tracing.enter_context(flexkit.trace(model))
    policy.enter_context(flexkit.using_policy(model, flexkit.Nothing()))
    disabled.close()
    assert same(generate(model, inputs, TOKENS), base) and len(trace)
    policy.close()
    steps = len(trace)
    assert same(generate(model, inputs, TOKENS), own) and len(trace) > steps
    tracing.close()
    steps = len(trace)
    assert same(generate(model, inputs, TOKENS), own) and len(trace) == steps


@six
def test_a_call_with_settings_of_its_own(name: str) -> None:
    model, asked = patched_model(name), question(name)
    for policy in (flexkit.Nothing(), flexkit.Everything(), flexkit.TopK(1)):
        expected = set_and_generate(name, policy)
        assert same(generate(model, asked.inputs, TOKENS, hd_policy=policy), expected)
        with flexkit.using_policy(model, policy):
            assert same(generate(model, asked.inputs, TOKENS), expected)
            assert same(generate(model, asked.inputs, TOKENS, hd_disabled=True), asked.base)
            with flexkit.disabled(model):
                assert same(generate(model, asked.inputs, TOKENS), asked.base)
                assert same(generate(model, asked.inputs, TOKENS, hd_disabled=False), expected)
    trace = flexkit.Trace()
    assert same(generate(model, asked.inputs, TOKENS, hd_trace=trace), asked.answer)
    with flexkit.trace(model) as other:
        generate(model, asked.inputs, TOKENS)
    assert len(trace) == len(other) > 0
    assert all(torch.equal(trace.mask(0, layer), other.mask(0, layer)) for layer in other.layers)
    assert get_patch(model).overrides == get_patch(model).disabled == 0


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_forward_with_settings_of_its_own(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    by_default, base = logits_of(model, inputs), logits_of(model, low_res(inputs))
    trace = flexkit.Trace()
    assert torch.equal(logits_of(model, inputs, hd_disabled=True), base)
    assert torch.equal(logits_of(model, inputs, hd_policy=flexkit.Nothing(), hd_trace=trace), base)
    assert trace.layers and not any(trace.mask(0, layer).any() for layer in trace.layers)
    assert torch.equal(logits_of(model, inputs), by_default) and not torch.equal(by_default, base)
    flexkit.set_policy(model, flexkit.Nothing())
    assert not torch.equal(logits_of(model, inputs, hd_policy=flexkit.TopK(3)), base)


@six
def test_eight_threads_with_a_policy_each(name: str) -> None:
    model, asked = patched_model(name), question(name)
    ways = [{"hd_policy": policy} for policy in POLICIES[:4]]
    expected = [generate(model, asked.inputs, TOKENS, **way) for way in ways]
    together = threading.Barrier(len(POLICIES))
    wrong: list[str] = []

    def work(index: int) -> None:
        together.wait()
        for _ in range(2):
            if index % 2:
                output = generate(model, asked.inputs, TOKENS, **ways[index // 2])
            else:
                with flexkit.using_policy(model, ways[index // 2]["hd_policy"]), flexkit.trace(model) as trace:
                    output = generate(model, asked.inputs, TOKENS)
                if len(trace) > TOKENS:
                    wrong.append(f"{index} traced {len(trace)}")
            if not same(output, expected[index // 2]):
                wrong.append(f"{index} said something else")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(POLICIES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not all(same(output, expected[0]) for output in expected[1:])


def test_tasks_of_one_thread() -> None:
    """A block that waits for others while it is open does not hold for them."""
    model, inputs = patched("llava"), inputs_of("llava")
    expected = {policy: logits_of(model, inputs, hd_policy=policy) for policy in POLICIES}

    async def ask(policy: flexkit.Policy) -> bool:
        with flexkit.using_policy(model, policy):
            await asyncio.sleep(0)
            here = logits_of(model, inputs)
            there = await asyncio.to_thread(logits_of, model, inputs)
        return torch.equal(here, expected[policy]) and torch.equal(there, expected[policy])

    async def ask_all() -> list[bool]:
        return await asyncio.gather(*map(ask, POLICIES))

    with ThreadPoolExecutor(1) as pool:  # in this thread a browser's loop may be running
        assert all(pool.submit(asyncio.run, ask_all()).result())


BLOCKS: dict[str, Callable[[Any, bool], AbstractContextManager[Any]]] = {
    "disabled": lambda model, everywhere: flexkit.disabled(model, everywhere=everywhere),
    "trace": lambda model, everywhere: flexkit.trace(model, everywhere=everywhere),
}


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_who_is_in_a_block(block: str, everywhere: bool) -> None:
    model, inputs = patched("llava"), inputs_of("llava")
    said = {}
    before = logits_of(model, inputs)
    with BLOCKS[block](model, everywhere) as trace:
        thread = threading.Thread(target=lambda: said.update(logits=logits_of(model, inputs)))
        thread.start()
        thread.join()
    if block == "trace":
        assert len(trace) == everywhere and torch.equal(said["logits"], before)
    else:
        assert torch.equal(said["logits"], before) != everywhere


@pytest.mark.usefixtures("forget_graphs")
def test_a_compiled_step_with_settings_of_its_own() -> None:
    """Its graph holds no settings, of this call or of others."""
    model, asked = patched_model("llava"), question("llava")
    settings = compiled([], fullgraph=False)
    for _ in range(2):
        for policy in (None, flexkit.Nothing(), flexkit.TopK(8)):
            expected = generate(model, asked.inputs, TOKENS, hd_policy=policy)
            found = generate(model, asked.inputs, TOKENS, hd_policy=policy, **settings)
            for one, other in zip(found.logits, expected.logits, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_settings_that_are_none() -> None:
    model, inputs = patched("llava"), inputs_of("llava")
    with pytest.raises(ConfigError, match=r"hd_trace must be a flexkit\.Trace.*got bool"):
        logits_of(model, inputs, hd_trace=True)
    with pytest.raises((ConfigError, PolicyError), match="policy"):
        logits_of(model, inputs, hd_policy="all")
    flexkit.unpatch_model(model)
    for block in (flexkit.disabled(model), flexkit.using_policy(model, flexkit.TopK(1)), flexkit.trace(model)):
        with pytest.raises(PatchError, match="not patched"), block:
            pass
