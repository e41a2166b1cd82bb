from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import flexkit
from flexkit.patching import get_patch
from tests.patching.ways import (
    ROWS,
    assert_close,
    assert_same_logits,
    every_family,
    families,
    generate,
    inputs_of,
    logits_of,
    new_tokens,
    patched,
    plain,
)
from tests.versions import expands_images_by_row
from tests.zoo import IMAGE, Row, low_res

ONE = (Row((None,), 6),)


def steps_of(model: tf.PreTrainedModel, inputs: dict[str, Tensor], tokens: int) -> list[Tensor]:
    """Greedy decoding by forward calls from the start, without a cache; named rows query."""
    length = inputs["input_ids"].shape[1]
    queries = torch.zeros(len(inputs["input_ids"]), length, dtype=torch.bool)
    queries[:, -1] = True
    inputs, found = dict(inputs), []
    for _ in range(tokens):
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        placed = {} if "mm_token_type_ids" in inputs else {"position_ids": positions}
        found.append(logits_of(model, inputs, hd_queries=queries, use_cache=False, **placed)[:, -1])
        token = found[-1].argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.cat([mask, torch.ones_like(token)], dim=1)
        for kind in ("token_type_ids", "mm_token_type_ids"):
            if kind in inputs:
                inputs[kind] = torch.cat([inputs[kind], torch.zeros_like(token)], dim=1)
    return found


@families
def test_greedy_is_the_step_by_step_loop(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    output = generate(model, inputs)
    assert not torch.equal(output.logits[0][:2], generate(model, low_res(inputs)).logits[0][:2])
    for ours, theirs in zip(output.logits, steps_of(model, inputs, 4), strict=True):
        assert_close(ours, theirs)


@families
@pytest.mark.parametrize("way", ["no cache", "static", "own cache", "lazy cache", "empty views"])
def test_caches_do_not_matter(name: str, way: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    reference = generate(model, inputs)
    ways: dict[str, dict[str, Any]] = {
        "no cache": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "own cache": {"past_key_values": tf.DynamicCache(config=model.config.get_text_config())},
        "lazy cache": {"past_key_values": tf.DynamicCache()},
        "empty views": {"hd_image_sizes": None},
    }
    assert_same_logits(generate(model, inputs, **ways[way]), reference)


@families
def test_words_only(name: str) -> None:
    model, inputs = patched(name), inputs_of(name, (Row(()), Row((), 2)))
    assert_same_logits(generate(model, inputs, hd_image_sizes=None, hd_queries=None), generate(plain(name), inputs))


@families
def test_labels_of_a_processor_do_not_matter(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    ignored = torch.full_like(inputs["input_ids"], -100)
    assert_same_logits(generate(model, inputs, labels=ignored), generate(model, inputs))


@expands_images_by_row
@families
def test_no_cache_with_beams(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    settings = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    cached, uncached = generate(model, inputs, **settings), generate(model, inputs, use_cache=False, **settings)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(cached.sequences_scores, uncached.sequences_scores)


@families
def test_no_cache_with_every_position_querying(name: str) -> None:
    model, inputs = patched(name, queries="all", policy=flexkit.Everything()), inputs_of(name, ONE)
    output = generate(model, inputs, 3, use_cache=False)
    longer = dict(inputs, input_ids=output.sequences[:, :-1])
    for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            more = inputs[key].new_full((1, 2), int(key == "attention_mask"))
            longer[key] = torch.cat([inputs[key], more], dim=1)
    assert_close(output.logits[-1], logits_of(model, longer)[:, -1])


@families
def test_a_generated_image_token_is_no_image(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)

    def always_image(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([IMAGE]), 0.0)

    always = tf.LogitsProcessorList([always_image])
    output, base = (generate(model, given, 3, logits_processor=always) for given in (inputs, low_res(inputs)))
    assert (new_tokens(output) == IMAGE).all()
    assert (output.logits[-1] - base.logits[-1])[:2].abs().max() > 1e-3


@families
def test_rows_that_differ_in_their_image_alone(name: str) -> None:
    model, inputs = patched(name), inputs_of(name, (Row((None,), 4), Row((None,), 4)))
    for key in ("input_ids", "pixel_values"):
        half = len(inputs[key]) // 2
        inputs[key] = torch.cat([inputs[key][:half]] * 2)
    base = generate(model, low_res(inputs), 1).logits[0]
    ours = generate(model, inputs, 1).logits[0]
    assert_close(base[0], base[1])
    assert (ours[0] - ours[1]).abs().max() > 1e-3


@families
def test_forward_arguments_by_position(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    reference = logits_of(model, inputs)
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    with torch.no_grad():
        assert torch.equal(model(inputs["input_ids"], **rest).logits, reference)
        with pytest.raises(TypeError, match="too many positional"):
            model(inputs["input_ids"], *[None] * 60)
        with pytest.raises(TypeError, match="input_ids"):
            model(inputs["input_ids"], **inputs)


@families
def test_tuples_hidden_states_and_attentions(name: str) -> None:
    model, inputs = plain(name), inputs_of(name, ONE)
    model.set_attn_implementation("eager")
    wanted = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        base = model(**low_res(inputs), **wanted)
        flexkit.patch_model(model, flexkit.FlexConfig(start_layer=1, zoom=2, policy=flexkit.TopK(3)), trained=True)
        ours = model(**inputs, **wanted)
        as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], ours.logits)
    assert len(ours.attentions) == len(base.attentions) == 4
    assert len(ours.hidden_states) == len(base.hidden_states) == 5
    for layer in range(2):
        assert torch.equal(ours.hidden_states[layer], base.hidden_states[layer])
        assert torch.equal(ours.attentions[layer], base.attentions[layer])
    for layer in (2, 3, 4):
        assert torch.equal(ours.hidden_states[layer][:, :-1], base.hidden_states[layer][:, :-1])
        assert not torch.equal(ours.hidden_states[layer][:, -1], base.hidden_states[layer][:, -1])


@every_family
def test_eager_and_sdpa_agree(name: str) -> None:
    model, inputs = patched(name), inputs_of(name, (Row((None,), 5), Row((None,), 5)))
    sdpa = generate(model, inputs)
    exact = logits_of(model, inputs)
    model.set_attn_implementation("eager")
    # The eager kernel's own softmax is in float32.
    torch.testing.assert_close(logits_of(model, inputs), exact, rtol=0, atol=2e-5)
    assert torch.equal(generate(model, inputs).sequences, sdpa.sequences)


@families
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([-1, -3]), torch.tensor([9, 12])], ids=str)
def test_positions_whose_logits_are_kept_query(name: str, keep: int | Tensor) -> None:
    model, inputs = patched(name), inputs_of(name, (Row((None,), 7), Row((None,), 7)))
    length = inputs["input_ids"].shape[1]
    positions = torch.arange(length)[-keep:] if isinstance(keep, int) else torch.arange(length)[keep]
    queries = torch.zeros(2, length, dtype=torch.bool)
    queries[:, positions] = True
    with flexkit.trace(model) as trace:
        kept = logits_of(model, inputs, logits_to_keep=keep)
    assert trace.steps[0].queries.tolist() == [sorted(positions.tolist())] * 2
    named = logits_of(model, inputs, hd_queries=queries)[:, positions]
    assert_close(kept, named)


@families
def test_settings_name_the_queries_of_one_prompt(name: str) -> None:
    inputs = inputs_of(name, ONE)
    queries = torch.zeros(1, inputs["input_ids"].shape[1], dtype=torch.bool)
    queries[:, -3:-1] = True
    model = patched(name)
    reference = logits_of(model, inputs, hd_queries=queries)
    assert torch.equal(logits_of(patched(name, queries=queries), inputs), reference)
    assert not torch.equal(logits_of(model, inputs), reference)


@every_family
@pytest.mark.parametrize("preset", ["published", "training_free"])
def test_presets_run_everywhere(name: str, preset: str) -> None:
    config = getattr(flexkit.FlexConfig, preset)(
        **({"high_res_states": "features", "gate": None} if preset == "training_free" else {})
    )
    model = patched(name, config)
    zoom = get_patch(model).config.zoom_pair
    rows = tuple(Row(row.images, row.words + 2) for row in ROWS)
    inputs = inputs_of(name, rows, zoom=zoom)
    output = generate(model, inputs, 3)
    base = generate(model, low_res(inputs), 3)
    assert all(bool(step.isfinite().all()) for step in output.logits)
    assert torch.equal(output.sequences[2], base.sequences[2])
    assert (logits_of(model, inputs)[:2, -1] - base.logits[0][:2]).abs().max() > 1e-3
