"""Models whose attention reads the image from a context, with a compiled decode step."""

import dataclasses
from typing import Any

import pytest
import torch

import flexkit
from tests.patching.ways import assert_same_logits, logits_of
from tests.ways.contexts import said
from tests.ways.graphs import collecting, compiled
from tests.ways.questions import patch
from tests.zoo import CONTEXT, low_res, prompt

SHALLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "mllama": ("text_config", {"num_hidden_layers": 2, "cross_attention_layers": [1]}),
    "florence2": ("text_config", {"encoder_layers": 2, "decoder_layers": 2}),
    "idefics2": ("text_config", {"num_hidden_layers": 1}),
    "vision-encoder-decoder-gpt2": ("decoder", {"n_layer": 1}),
    "blip": ("text_config", {"num_hidden_layers": 1}),
    "kosmos-2": ("text_config", {"layers": 1}),
}
"""Few layers, since tracing takes its time."""


def shallow(name: str) -> Any:
    """A patched model."""

    def config() -> Any:
        whole, (key, layers) = CONTEXT[name].config(), SHALLOW[name]
        vars(getattr(whole, key)).update(layers)
        return whole

    return patch(dataclasses.replace(CONTEXT[name], config=config).model())


@pytest.mark.usefixtures("forget_graphs")
@pytest.mark.parametrize("name", ("mllama", "florence2", "idefics2", "vision-encoder-decoder-gpt2"))
def test_the_decode_step_is_compiled(name: str) -> None:
    """To one graph, unless the call is handed to attention with the tensor that it reads, which no graph can hold."""
    whole = name != "vision-encoder-decoder-gpt2"
    model, inputs, graphs = shallow(name), prompt(CONTEXT[name]), []
    expected = said(model, inputs, 3 if whole else 2)
    answer = said(model, inputs, len(expected.logits), **compiled(graphs, fullgraph=whole))
    assert_same_logits(answer, expected)
    assert len(graphs) == 1 if whole else len(graphs) > 1
    assert not torch.equal(said(model, low_res(inputs), 2).logits[1], expected.logits[1])


@pytest.mark.usefixtures("forget_graphs")
@pytest.mark.parametrize("name", ("blip", "kosmos-2"))
def test_the_base_model_is_one_graph_still(name: str) -> None:
    """Whatever carries a call to attention: without high-res inputs, and while the patch is disabled."""
    model, inputs, graphs = shallow(name), low_res(prompt(CONTEXT[name])), []

    def forward() -> torch.Tensor:
        return logits_of(whole, {key: value.clone() for key, value in inputs.items()})

    whole = torch.compile(model, fullgraph=True, dynamic=False, backend=collecting(graphs))
    expected = logits_of(model, {key: value.clone() for key, value in inputs.items()})
    assert torch.equal(forward(), expected)
    with flexkit.disabled(model, everywhere=True):
        assert torch.equal(forward(), expected)
    assert graphs
