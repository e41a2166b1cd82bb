"""A patched layer and HierarchicalSelfAttention are one core: the same functions, called with the same tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import flexkit.attention.hierarchical as module
import flexkit.patching.call.call as patched_call
from flexkit import FlexConfig, HierarchicalSelfAttention, TopK
from flexkit.attention.layer import Looked, Read
from flexkit.attention.select import Selection
from flexkit.patching import get_patch
from flexkit.patching.call.call import FlexCall
from flexkit.patching.seam.decoder import high_res_rotary
from tests.patching.ways import inputs_of, patched
from tests.zoo import Row

CORE = ("look", "select_tokens", "read")
SETTINGS = st.fixed_dictionaries(
    {
        "select_from": st.sampled_from(["previous", "same"]),
        "share_selection": st.booleans(),
        "queries": st.sampled_from(["last", "all"]),
        "low_res_keys": st.sampled_from(["keep", "replace"]),
        "logit_bias": st.floats(-2, 2),
        "alpha": st.floats(0, 1),
        "policy": st.integers(1, 3).map(TopK),
    }
)


@contextmanager
def spied(place: Any) -> Iterator[list[tuple[str, Any]]]:
    """What the functions of the core, as a file imports them, returned in this block."""
    found: list[tuple[str, Any]] = []

    def spy(name: str, function: Any) -> Any:
        def spying(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            found.append((name, result))
            return result

        return spying

    with pytest.MonkeyPatch.context() as patches:
        for name in CORE:
            patches.setattr(place, name, spy(name, getattr(place, name)))
        yield found


def tensors_of(results: list[tuple[str, Any]]) -> dict[str, Tensor]:
    """The tensors of one layer's step, by their names."""
    shown: dict[str, Tensor] = {}
    for name, result in results:
        if isinstance(result, Looked):
            shown |= {f"{name} logits": result.logits, f"{name} normaliser": result.normaliser}
        elif isinstance(result, Read):
            shown |= {f"{name} output": result.output, f"{name} map": result.attention()}
        elif isinstance(result, Selection):
            shown |= {f"{name} mask": result.masks[0], f"{name} scores": result.scores[0]}
    return shown


def of_layer(attention: Any, config: FlexConfig) -> HierarchicalSelfAttention:
    """The module with the weights of a patched layer."""
    own = attention.config
    layer = HierarchicalSelfAttention(
        own.hidden_size,
        own.num_attention_heads,
        own.num_key_value_heads,
        attention.head_dim,
        selector=config.selector,
        share_selection=config.shares_selection,
        select_from=config.select_from,
        low_res_keys=config.low_res_keys,
        replace_dilation=config.replace_dilation,
        logit_bias=config.logit_bias,
        alpha=config.alpha,
    ).double()
    layer.load_state_dict(attention.state_dict())
    return layer


@settings(max_examples=30)
@given(chosen=SETTINGS, dilation=st.integers(0, 1), seed=st.integers(0, 2**31))
@torch.no_grad()
def test_the_module_with_a_patched_layers_weights_is_that_layer(
    chosen: dict[str, Any], dilation: int, seed: int
) -> None:
    torch.manual_seed(seed)
    if chosen["low_res_keys"] == "replace":
        chosen["replace_dilation"] = dilation
    model = patched("llava", zoom=2, start_layer=1, **chosen).double()
    inputs = inputs_of("llava", [Row(), Row(words=4)])
    inputs = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
    patch, given, calls = get_patch(model), dict[str, Any](), list[FlexCall]()
    of = patch.layers[2]
    patch.recorders.append(calls.append)
    with spied(patched_call) as found:

        def begin(attention: nn.Module, args: Any) -> None:
            found.clear()

        def end(attention: nn.Module, args: Any, options: dict[str, Any], output: Any) -> None:
            given.update(options, output=output[0], ours=list(found))

        hooks = of.attention.register_forward_pre_hook(begin), of.attention.register_forward_hook(end, with_kwargs=True)
        model(**inputs)
        for hook in hooks:
            hook.remove()
    (call,) = calls
    memory, config = call.memory, patch.config
    first = memory.images[0]
    tables = [
        high_res_rotary(
            patch.decoder, of, given["hidden_states"], each.positions[:, None], each.grid, each.zoom, config.positions
        )
        for each in memory.images
    ]
    selected = None
    if config.select_from == "previous":
        selected = call.selections[1].tokens(memory.batch, memory.tokens)
    with spied(module) as found:
        output = of_layer(of.attention, config)(
            given["hidden_states"],
            memory.features.of(memory.all_tokens, memory.images, call.encode),
            grid=first.grid,
            zoom=first.zoom,
            image_positions=torch.stack([each.columns for each in memory.images]),
            selected=selected,
            queries=call.rows.mask,
            rotary=given["position_embeddings"],
            high_res_rotary=tuple(torch.cat(parts) for parts in zip(*tables, strict=True)),
            attention_mask=given["attention_mask"],
            layer=2,
        )
    torch.testing.assert_close(output.hidden_states, given["output"], rtol=1e-10, atol=1e-10)
    ours, theirs = tensors_of(given["ours"]), tensors_of(found)
    assert [name for name, _ in given["ours"]] == [name for name, _ in found] == list(CORE)
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, ours[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text)


def test_both_import_the_same_functions() -> None:
    for name in CORE:
        assert getattr(module, name) is getattr(patched_call, name)
