"""``torch.compile`` of the decode step, as ``generate`` does it with a static cache."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as tf

import flexkit
from tests.patching.ways import assert_same_logits, generate
from tests.ways.graphs import compiled
from tests.ways.questions import TOKENS, patch, patched_model, question, six
from tests.zoo import ZOO, low_res, prompt

pytestmark = pytest.mark.usefixtures("forget_graphs")


def shallow_model(name: str, **settings: Any) -> tf.PreTrainedModel:
    """A model with one layer to look and one to read: tracing takes its time."""

    def config() -> Any:
        whole = ZOO[name].config()
        text = whole.get_text_config()
        vars(text).update({"num_hidden_layers": 2} | settings)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:2]
        return whole

    model = dataclasses.replace(ZOO[name], config=config).model()
    return patch(model)


def check_steps(model: tf.PreTrainedModel, name: str, count: int) -> list[torch.fx.GraphModule]:
    """Compiled steps say what others do, for two images, by so many graphs."""
    graphs: list[torch.fx.GraphModule] = []
    settings = compiled(graphs)
    for seed in (1, 2):
        inputs = prompt(ZOO[name], seed=seed)
        expected = generate(model, inputs, TOKENS)
        assert_same_logits(generate(model, inputs, TOKENS, **settings), expected)
        base = generate(model, low_res(inputs), TOKENS)
        assert (base.logits[1] - expected.logits[1]).abs().max() > 1e-3
        assert len(graphs) == count
    return graphs


@six
def test_the_decode_step_is_one_graph(name: str) -> None:
    """One for all steps and all images; two for Gemma 3, with and without: its windows fill up while it answers."""
    check_steps(shallow_model(name), name, 2 if name == "gemma3" else 1)


@pytest.mark.parametrize("low_res_keys", ["keep", "replace"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_what_an_answer_reads_of_own_states_is_in_the_graph(name: str, low_res_keys: Any) -> None:
    """Base kernels see it in the cache: the graph does no more than that of the base model, but for masks.

    Windows are as long as the cache: of shorter ones positions slide out.
    """
    windows = {"sliding_window": 64} if name == "gemma3" else {}
    model = flexkit.unpatch_model(shallow_model(name, **windows))
    config = flexkit.FlexConfig.training_free(zoom=2, policy=flexkit.TopK(3), low_res_keys=low_res_keys)
    base: list[torch.fx.GraphModule] = []
    generate(model, low_res(prompt(ZOO[name])), TOKENS, **compiled(base))
    graphs = check_steps(flexkit.patch_model(model, config.replace(gate=None, surer=None)), name, len(base))
    operators, of_base = (
        Counter(str(node.target) for graph in of for node in graph.graph.nodes if node.op.startswith("call"))
        for of in (graphs, base)
    )
    masks = 2 if windows else 1  # for layers with a window and without
    each_layer = 4 * 2  # two views of keys, and of values
    assert (operators - of_base).total() <= len(base) * (2 * masks + 2 * each_layer)


def test_whatever_number_of_tokens_an_answer_reads() -> None:
    """One graph for the first number, another one for all others."""
    model, graphs = flexkit.unpatch_model(shallow_model("llava")), []
    config = flexkit.FlexConfig.training_free(zoom=2, policy=flexkit.Threshold(0.5), gate=None, surer=None)
    flexkit.patch_model(model, config)
    settings, read = compiled(graphs), set()
    for seed in range(5):
        inputs = prompt(ZOO["llava"], seed=seed)
        with flexkit.trace(model) as trace:
            expected = generate(model, inputs, TOKENS)
        read.add(int(trace.mask(0, 1).sum()))
        assert_same_logits(generate(model, inputs, TOKENS, **settings), expected)
    assert len(read) > 2 and len(graphs) == 2


def test_a_graph_ends_with_its_patch() -> None:
    """There is one for the patched model, one while that is disabled, and one for the plain model again."""
    model, graphs = shallow_model("llava"), []
    settings, inputs = compiled(graphs), question("llava").inputs
    expected, base = (generate(model, given, TOKENS) for given in (inputs, low_res(inputs)))
    assert_same_logits(generate(model, inputs, TOKENS, **settings), expected)
    with flexkit.disabled(model, everywhere=True):
        assert_same_logits(generate(model, inputs, TOKENS, **settings), base)
    flexkit.unpatch_model(model)
    assert_same_logits(generate(model, low_res(inputs), TOKENS, **settings), base)
    assert len(graphs) == 3


@pytest.mark.gpu
@six
def test_cuda_graphs(name: str) -> None:
    """What ``generate`` does by itself on a GPU, given a static cache."""
    model, asked = patched_model(name), question(name)
    inputs = {key: value.cuda() for key, value in asked.inputs.items()}
    answer = generate(model.cuda(), inputs, TOKENS, cache_implementation="static")
    model.cpu()
    assert torch.equal(answer.sequences.cpu(), asked.answer.sequences)
