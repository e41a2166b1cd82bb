from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from flexkit.demo.ask import Answer, ask
from flexkit.demo.cost import kept_bytes, measure
from flexkit.demo.task import draw_task
from flexkit.demo.ways import all_in_sequence, low_res_only, with_flexkit

WAYS = (low_res_only, with_flexkit, all_in_sequence)


@pytest.fixture(scope="module")
def answer() -> Answer:
    task = draw_task()
    return ask(task.image, task.question, new_tokens=2)


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


def test_what_each_way_costs(answer: Answer) -> None:
    costs = measure({way.__name__: partial(way, answer.model, answer.inputs, 2) for way in WAYS}, repeats=1)
    low_res, flexkit, everything = (costs[way.__name__] for way in WAYS)
    assert low_res.flops < flexkit.flops < everything.flops
    assert low_res.kept_bytes < flexkit.kept_bytes < everything.kept_bytes


def test_kept_bytes_are_those_of_the_tokens(answer: Answer) -> None:
    config = answer.model.config.text_config
    width, layers = config.hidden_size, config.num_hidden_layers
    kept = [kept_bytes(way(answer.model, answer.inputs, 1).past_key_values) // 4 // width for way in WAYS]
    low_res = 2 * layers * answer.prompt_tokens
    high_res = answer.high_res_tokens
    assert kept == [low_res, low_res + (2 * len(answer.layers) + 1) * high_res, low_res + 2 * layers * high_res]


def test_low_res_way_is_the_base_model(answer: Answer) -> None:
    base = {name: value for name, value in answer.inputs.items() if not name.startswith("hd_")}
    expected = answer.model.generate(**base, max_new_tokens=3, min_new_tokens=3)
    assert torch.equal(low_res_only(answer.model, answer.inputs, 3).sequences, expected)


def test_all_in_sequence_holds_every_token_in_its_place(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}
    monkeypatch.setattr(answer.model, "generate", lambda **inputs: seen.update(inputs))
    all_in_sequence(answer.model, answer.inputs, 1)
    sequence = seen["inputs_embeds"][0]
    assert len(sequence) == answer.prompt_tokens + answer.high_res_tokens == seen["attention_mask"].shape[1]
    ids = answer.inputs["input_ids"][0]
    text = answer.model.get_input_embeddings()(ids)
    first = int((ids == answer.model.config.image_token_id).nonzero()[0])
    assert torch.equal(sequence[:first], text[:first])
    behind = len(ids) - first - answer.low_res_tokens
    assert torch.equal(sequence[-behind:], text[-behind:])
    pixels = answer.inputs["hd_pixel_values"]
    corner = answer.model.get_image_features(pixel_values=pixels[..., :168, 336:]).pooler_output[0]
    high_res = sequence[first + answer.low_res_tokens :][: answer.high_res_tokens].reshape(36, 36, -1)
    torch.testing.assert_close(high_res[:12, 24:].flatten(0, 1), corner, atol=1e-4, rtol=1e-4)
