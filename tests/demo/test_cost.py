from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

import flexkit
from flexkit.demo.ask import Answer, Asked, ask
from flexkit.demo.cost import measure
from flexkit.demo.task import draw_task
from flexkit.measuring import kept_bytes
from flexkit.visual_search import load_model
from flexkit.visual_search.ways import Way

WAYS = {"low-res": ("base", False), "flexkit": ("tuned", False), "all": ("base", True)}


@pytest.fixture(scope="module")
def ways() -> dict[str, Asked]:
    task = draw_task()
    return {
        name: Asked.of(Way(*load_model(stage), in_sequence), task.image, task.question)
        for name, (stage, in_sequence) in WAYS.items()
    }


@pytest.fixture(scope="module")
def answer(ways: dict[str, Asked]) -> Answer:
    return ask(ways["flexkit"])


def test_counts_matrix_products_and_fused_attention() -> None:
    left, right, query = torch.ones(4, 8), torch.ones(8, 3), torch.ones(1, 2, 5, 16)

    def products() -> SimpleNamespace:
        left @ right
        F.scaled_dot_product_attention(query, query, query)
        return SimpleNamespace(past_key_values=DynamicCache())

    cost = measure({"products": products}, repeats=2)["products"]
    assert cost.flops == 2 * 4 * 8 * 3 + 2 * (2 * 2 * 5 * 5 * 16)
    assert cost.kept_bytes == 0 and cost.seconds > 0


def test_runs_take_turns() -> None:
    order: list[str] = []

    def way(name: str) -> SimpleNamespace:
        order.append(name)
        return SimpleNamespace(past_key_values=DynamicCache())

    measure({name: partial(way, name) for name in "ab"}, repeats=2)
    assert order == list("ababab")


def test_what_each_way_costs(ways: dict[str, Asked]) -> None:
    costs = measure({name: asked.generate for name, asked in ways.items()}, repeats=1)
    low_res, flexkit, everything = (costs[name] for name in WAYS)
    assert low_res.flops < flexkit.flops < everything.flops
    assert low_res.kept_bytes < flexkit.kept_bytes < everything.kept_bytes


def test_kept_bytes_are_those_of_the_tokens(ways: dict[str, Asked], answer: Answer) -> None:
    config = ways["low-res"].way.model.config.text_config
    width, layers = config.hidden_size, config.num_hidden_layers
    with flexkit.trace(ways["flexkit"].way.model) as trace:
        kept = [kept_bytes(asked.generate().past_key_values) // 4 // width for asked in ways.values()]
    # The second token of the answer is not read again.
    low_res = 2 * layers * (64 + ways["low-res"].text_tokens + 1)
    masks = [torch.stack([trace.mask(step, source) for step in range(2)]) for source in answer.layers.values()]
    read = sum(int(mask.any(0).sum()) for mask in masks)
    features = kept[1] - low_res - 2 * read
    assert [kept[0], kept[2]] == [low_res, low_res + 2 * layers * 576]
    assert features % 64 == 0 and trace.steps[-1].tiles <= features // 64 <= 1.5 * trace.steps[-1].tiles
    assert answer.tiles[0] <= answer.tiles[1] == 9


def test_counts_of_tokens(ways: dict[str, Asked], answer: Answer) -> None:
    assert [asked.image_tokens for asked in ways.values()] == [64, 64, 640]
    assert len({asked.text_tokens for asked in ways.values()}) == 1
    assert answer.high_res_tokens == 576 and list(answer.layers.items()) == [(1, 0), (2, 1), (3, 2)]
    for layer, count in answer.read_tokens.items():
        assert count == int(answer.trace.mask(0, layer - 1).sum()) <= 54
