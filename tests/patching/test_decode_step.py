"""What a decoded token of a patched model launches, moves and waits for, and that it reads the same by any way."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import flexkit
from flexkit.measuring import Launches, count_launches
from flexkit.patching import get_patch
from flexkit.patching.call.call import FlexCall
from tests.patching.ways import inputs_of, patched
from tests.zoo import FAMILIES, Row

MAIN = ("llava", "qwen2_5_vl")
READ = 3
POLICIES = [*[flexkit.Center(2)] * 3, *[flexkit.Border(1)] * 2, flexkit.TopK(3)]
"""What a generation selects by, token by token: what the one before has read, and something else."""


def tokens(model: Any, inputs: dict[str, Tensor], count: int, policies: Any = None) -> tuple[list[Tensor], Launches]:
    """Logits of a prompt and of tokens behind it, and what the last of them asks for."""
    cache = DynamicCache(config=model.config.get_text_config())
    step = torch.full((len(inputs["input_ids"]), 1), 5)
    with torch.no_grad():
        logits = [model(**inputs, past_key_values=cache, logits_to_keep=1).logits]
        mask = inputs["attention_mask"]
        for number in range(count):
            if policies is not None:
                flexkit.set_policy(model, policies[number % len(policies)])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            given = {"attention_mask": mask} if bool((mask == 0).any()) else {}

            def run(given: dict[str, Tensor] = given) -> None:
                logits.append(model(input_ids=step, past_key_values=cache, **given).logits)

            launches = count_launches(run)
    return logits, launches


@pytest.mark.parametrize(
    ("name", "rows"),
    [*product(MAIN, [[Row()], [Row(), Row()]]), ("llava", [Row(), Row(words=5)])],
    ids=["one", "two", "qwen, one", "qwen, two", "padded"],
)
def test_a_token_that_finds_what_it_reads_asks_once_and_others_ask_again(name: str, rows: list[Row]) -> None:
    inputs = inputs_of(name, rows)
    lazy = patched(name, zoom=2, start_layer=1, policy=flexkit.Center(2), projection="lazy").double()
    full = patched(name, zoom=2, start_layer=1, policy=flexkit.Center(2), projection="full").double()
    inputs = {key: each.double() if each.is_floating_point() else each for key, each in inputs.items()}
    (own, _), (other, _) = (tokens(model, inputs, 2 * len(POLICIES), POLICIES) for model in (lazy, full))
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize(
    ("projection", "policy", "waits"),
    [
        ("lazy", flexkit.Center(2), 1),
        ("lazy", flexkit.Threshold(0.0) & flexkit.Center(3), 1),
        ("full", flexkit.TopK(READ), 0),
        ("full", flexkit.Threshold(0.1), 0),
    ],
    ids=["lazy", "lazy, by scores", "full, bounded", "full, unbounded"],
)
def test_how_often_a_token_waits(name: str, projection: str, policy: Any, waits: int) -> None:
    model = patched(name, zoom=2, start_layer=1, policy=policy, projection=projection)
    _, launches = tokens(model, inputs_of(name, [Row()]), 4)
    assert launches.waits <= waits


@pytest.mark.parametrize("name", MAIN)
def test_a_token_launches_a_bounded_number_of_kernels_a_layer(name: str) -> None:
    """So many operators beside those of the base model, whatever the number of keys: none over all of them."""
    inputs = inputs_of(name, [Row()])
    base = FAMILIES[name].model()
    _, plain = tokens(base, {key: each for key, each in inputs.items() if not key.startswith("hd_")}, 4)
    model = patched(name, zoom=2, start_layer=1, policy=flexkit.TopK(READ), projection="full")
    _, launches = tokens(model, inputs, 4)
    patch = get_patch(model)
    assert launches.kernels - plain.kernels <= 14 * len(patch.sources) + 13 * len(patch.reading) + 12


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("states", [{}, {"high_res_states": "own", "select_layers": "all"}], ids=["features", "own"])
def test_what_one_more_picture_launches_does_not_grow_with_the_layers_that_read(
    name: str, states: dict[str, str]
) -> None:
    """They are put together before any layer sees them."""

    def more(start_layer: int) -> int:
        model, found = patched(name, zoom=2, start_layer=start_layer, policy=flexkit.TopK(READ), **states), []
        for pictures in (2, 3):
            inputs = inputs_of(name, [Row()] * pictures)
            with torch.no_grad():
                found.append(count_launches(lambda inputs=inputs: model(**inputs, logits_to_keep=1)).kernels)
        return int(found[1] - found[0])

    last = len(get_patch(patched(name)).layers) - 1
    assert more(1) == more(last)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("positions", ["interpolated", "fractional"])
def test_tables_of_some_tokens_are_those_of_all(name: str, positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are very many tokens, position embeddings are made of those that are wanted."""
    inputs = {
        key: each.double() if each.is_floating_point() else each
        for key, each in inputs_of(name, [Row((None, None))] * 2).items()
    }
    model = patched(name, zoom=2, start_layer=1, policy=flexkit.TopK(READ), positions=positions).double()
    some, _ = tokens(model, inputs, 3)
    made: list[Any] = []
    own = FlexCall._tables_of
    monkeypatch.setattr(FlexCall, "_tables_of", lambda *given: made.append(given) or own(*given))
    monkeypatch.setattr("flexkit.patching.call.call._ALL_TABLES", 0)
    for one, other in zip(some, tokens(model, inputs, 3)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert made
