"""Own states of high-res tokens: however they are run, kept and trained on, the same comes out."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import flexkit
from flexkit import FlexConfig, HighResInputError
from flexkit.patching import get_patch
from flexkit.patching.memory import cached_memory
from tests.patching.tiles import tiled_prompt
from tests.patching.ways import ROWS, assert_close, assert_same_logits, families, generate, inputs_of, logits_of, plain
from tests.ways.test_caches import cache_of
from tests.zoo import Row, low_res

OWN = {"high_res_states": "own", "select_from": "same", "start_layer": 1, "zoom": 2, "policy": flexkit.TopK(3)}


def patched(name: str, **settings: Any) -> Any:
    return flexkit.patch_model(plain(name), FlexConfig(**OWN | settings))


@families
def test_nothing_is_added(name: str) -> None:
    before = plain(name).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = patched(name, select_from="previous")
    assert not list(flexkit.flex_parameters(model))
    assert model.state_dict().keys() == before.keys()


@families
def test_the_preset(name: str) -> None:
    """It reads where it says so, and where no image is, it is the base model."""
    model = flexkit.patch_model(plain(name), FlexConfig.training_free(gate=None, surer=None))
    zoom = get_patch(model).config.zoom_pair
    inputs = inputs_of(name, zoom=zoom)
    base = logits_of(plain(name), low_res(inputs))[:, -1]
    found = logits_of(model, inputs)[:, -1]
    assert torch.equal(found[2], base[2]) and not any(torch.allclose(found[row], base[row]) for row in (0, 1))
    unsure = flexkit.patch_model(plain(name), FlexConfig.training_free(gate=1e9))
    assert torch.equal(logits_of(unsure, inputs)[:, -1], base)


@families
@pytest.mark.parametrize("settings", [{"projection": "full"}, {"projection": "recompute"}, {"kept": 2}], ids=str)
@pytest.mark.parametrize("select_layers", [None, (0, 1)])
def test_lazy_equals_eager(name: str, settings: dict[str, Any], select_layers: Any) -> None:
    inputs, lazy = inputs_of(name), patched(name, select_layers=select_layers)
    eager = patched(name, select_layers=select_layers, **settings)
    assert_same_logits(generate(eager, inputs), generate(lazy, inputs))


@families
@pytest.mark.parametrize("ways", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_caches_do_not_matter(name: str, ways: dict[str, Any]) -> None:
    model, inputs = patched(name), inputs_of(name)
    assert_same_logits(generate(model, inputs, **ways), generate(model, inputs))


@families
def test_beams_share_what_was_run(name: str) -> None:
    """In a static cache all tokens are run at once; beams that are as likely may change places."""
    model, inputs = patched(name), inputs_of(name)
    lazy, eager = (generate(model, inputs, num_beams=3, cache_implementation=kind) for kind in (None, "static"))
    assert torch.equal(lazy.sequences, eager.sequences)


@families
def test_tokens_pass_once(name: str) -> None:
    """Later calls run those alone that nobody has selected before."""
    model, inputs = patched(name), inputs_of(name, [Row()])
    passed = []
    decoder = model.get_decoder()
    forward = decoder.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        if type(kwargs["flexkit_call"]).__name__ == "Passing":
            passed.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    decoder.forward = counted
    cache = DynamicCache(config=decoder.config)
    with torch.no_grad():
        for _ in range(3):
            output = model(**inputs, past_key_values=cache)
            inputs = {"input_ids": output.logits[:, -1:].argmax(-1)}
    memory = cached_memory(cache)
    assert memory is not None
    held = next(iter(memory.projected.values()))
    assert sum(passed) == int(held.tokens.mask.sum()) > 0
    assert len(passed) < 3 * model.config.get_text_config().num_hidden_layers


@families
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_kernels_read_as_rows_do(name: str, implementation: str) -> None:
    """One selection is read by the base kernels; a bias that adds nothing is by joint attention."""
    # Eager attention masks in float32 what overflows there: a padded row is NaN without flexkit, too.
    inputs, found = inputs_of(name, [Row()] if implementation == "eager" else ROWS), []
    for bias in (0.0, 1e-300):
        model = patched(name, select_layers=(0, 1), logit_bias=bias)
        model.set_attn_implementation(implementation)
        found.append(generate(model, inputs))
    assert_same_logits(*found)


@families
@torch.no_grad()
def test_two_answers_at_once_are_those_of_two_turns(name: str) -> None:
    """Each has a selection of its own, which its first position makes before it has read."""
    model, inputs = patched(name, select_layers=(0, 1)), inputs_of(name, [Row(words=9)])
    length = inputs["input_ids"].shape[1]
    stops = [length - 6, length - 5, length - 2, length - 1, length]
    queries = torch.zeros(1, length, dtype=torch.bool)
    queries[:, [stop - 1 for stop in stops]] = True
    whole = model(**inputs, hd_queries=queries).logits
    cache, begin, found = DynamicCache(config=model.config.get_text_config()), 0, []
    for stop in stops:
        part = {key: value[:, begin:stop] for key, value in inputs.items() if value.shape[:2] == (1, length)}
        part.pop("attention_mask", None)
        views = inputs if begin == 0 else {}
        views = {key: value for key, value in views.items() if value.shape[:2] != (1, length)}
        found.append(model(**part, **views, past_key_values=cache).logits[:, -1])
        begin = stop
    torch.testing.assert_close(torch.stack(found, 1), whole[:, [stop - 1 for stop in stops]], rtol=1e-5, atol=1e-5)


@families
def test_all_rows_share_what_the_last_one_selects(name: str) -> None:
    """Rows in front of the image are among them, and select nothing."""
    inputs = inputs_of(name, [Row(words=5)])
    model = patched(name, select_layers=(0, 1), queries="all")
    with flexkit.trace(model) as trace:
        logits_of(model, inputs)
    last = patched(name, select_layers=(0, 1))
    with flexkit.trace(last) as alone:
        logits_of(last, inputs)
    assert bool(alone.mask(0, 2).any())
    assert torch.equal(trace.mask(0, 2), alone.mask(0, 2))


@families
@pytest.mark.parametrize(("rank", "surer"), [(None, 1.0), (1, None), (1, 1.0), (None, 1.02), (0, 0.98)])
def test_the_surer_answer(name: str, rank: int | None, surer: float | None) -> None:
    """Row by row, of the low-res one and the one that reads; what follows it reads as little or as much."""
    inputs = inputs_of(name, [Row(), Row(words=3), Row(words=7), Row((), 5)])
    reads = patched(name, select_layers=(0, 1))
    low, high = generate(plain(name), low_res(inputs)), generate(reads, inputs)
    doubts = [torch.distributions.Categorical(logits=each.logits[0].double()).entropy() for each in (low, high)]
    gate = None if rank is None else float(doubts[0].sort().values[rank : rank + 2].mean())
    found = generate(patched(name, select_layers=(0, 1), surer=surer, gate=gate), inputs)
    for row, (of_low, of_high) in enumerate(zip(*doubts, strict=True)):
        is_high = (gate is None or of_low >= gate) and (surer is None or of_high <= surer * of_low)
        for step, logits in enumerate(found.logits):
            assert_close(logits[row], (high if is_high else low).logits[step][row])


@families
def test_gradient_checkpointing(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    model.train()
    labels = inputs["input_ids"].clone()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}

    at_once = gradients()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), at_once)
    with flexkit.disabled(model):
        base = gradients()
    moved = [key for key, gradient in at_once.items() if not torch.allclose(gradient, base[key])]
    assert any("k_proj" in key for key in moved)
    assert any("v_proj" in key for key in moved)


@families
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, inputs = patched(name), inputs_of(name)
    model.save_pretrained(tmp_path)
    loaded = flexkit.from_pretrained(tmp_path, dtype=model.dtype)
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(model, inputs))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@torch.no_grad()
def test_a_pyramid_is_read_in_steps_as_at_once(name: str) -> None:
    model = patched(name, levels=2, policy=flexkit.TopK(2))
    inputs = tiled_prompt(name, [Row(words=4)], (2, 2), 2)
    length = inputs["input_ids"].shape[1]
    queries = torch.arange(length)[None] >= length - 2
    whole = model(**inputs, hd_queries=queries).logits
    cache = DynamicCache(config=model.config.get_text_config())
    first = {key: value[:, :-1] if key in ("input_ids", "token_type_ids") else value for key, value in inputs.items()}
    first["attention_mask"] = inputs["attention_mask"][:, :-1]
    found = [model(**first, past_key_values=cache).logits[:, -1]]
    last = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"]}
    found.append(model(**last, past_key_values=cache).logits[:, -1])
    torch.testing.assert_close(torch.stack(found, 1), whole[:, -2:], rtol=1e-5, atol=1e-5)


def test_a_quantised_cache_is_refused() -> None:
    model, inputs = patched("llava"), inputs_of("llava")
    with pytest.raises(HighResInputError, match="quantised"):
        model(**inputs, past_key_values=cache_of("lossless", model))
