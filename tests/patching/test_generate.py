import copy
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
from tests.versions import expands_images_by_row, finds_second_images
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
def test_speculative_decoding_changes_nothing(name: str) -> None:
    model, inputs = patched(name), inputs_of(name, ONE)
    greedy = generate(model, inputs, 10)
    looked_up = generate(model, inputs, 10, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert torch.equal(looked_up.sequences, greedy.sequences)


@families
def test_sampling_is_reproducible(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)

    def sample(seed: int) -> Tensor:
        tf.set_seed(seed)
        return new_tokens(generate(model, inputs, 6, do_sample=True, top_k=0, temperature=3.0))

    assert torch.equal(sample(3), sample(3))
    assert any(not torch.equal(sample(3), sample(seed)) for seed in range(4, 8))


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
def test_streamer_gets_every_token(name: str) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.put_tokens: list[Tensor] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.put_tokens.append(value.reshape(-1))

        def end(self) -> None:
            self.ended = True

    model, inputs, streamer = patched(name), inputs_of(name, ONE), Streamer()
    output = generate(model, inputs, streamer=streamer)
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.put_tokens), output.sequences[0])


@families
@pytest.mark.parametrize("again", ["words only", "views again"])
def test_conversation_goes_on_in_the_kept_cache(name: str, again: str) -> None:
    model, inputs = patched(name), inputs_of(name, ONE)
    first = generate(model, inputs, 3)
    said = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    views = {key: value for key, value in inputs.items() if key.startswith("hd_")} if again == "views again" else {}
    second = generate(model, {"input_ids": said, **views}, 3, past_key_values=first.past_key_values)

    longer, start = dict(inputs, input_ids=second.sequences), inputs["input_ids"].shape[1]
    queries = torch.zeros(1, second.sequences.shape[1], dtype=torch.bool)
    # The last position of each prompt, and all that were run as decoded ones; what was said last in turn one was not.
    queries[:, start - 1 : start + 2] = queries[:, said.shape[1] - 1 :] = True
    for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            more = inputs[key].new_full((1, queries.shape[1] - start), int(key == "attention_mask"))
            longer[key] = torch.cat([inputs[key], more], dim=1)
    afresh = logits_of(model, longer, hd_queries=queries)[0, said.shape[1] - 1 : -1]
    assert_close(torch.cat(second.logits), afresh)
    with flexkit.disabled(model):
        base = logits_of(model, longer)[0, said.shape[1] - 1 : -1]
    assert (base - afresh).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("llava", "all ids"),
        ("llava", "new ids"),
        pytest.param("gemma3", "all ids", marks=finds_second_images),
    ],
)
def test_a_second_turn_brings_a_second_image(name: str, given: str) -> None:
    """Where the base model can: Gemma 3 given new ids alone answers otherwise, Qwen2.5-VL misses the earlier grids."""
    model, inputs, later = patched(name), inputs_of(name, ONE), inputs_of(name, ONE, seed=5)
    first = generate(model, inputs, 3)
    said = torch.cat([first.sequences, later["input_ids"]], dim=1)
    held, start, length = first.past_key_values.get_seq_length(), inputs["input_ids"].shape[1], said.shape[1]
    ids = said if given == "all ids" else said[:, held:]
    turn = dict(later, input_ids=ids, attention_mask=torch.ones_like(said))
    if "token_type_ids" in later:
        turn["token_type_ids"] = (ids == IMAGE).long()
    second = generate(model, turn, 3, past_key_values=first.past_key_values)

    longer = {key: torch.cat([inputs[key], later[key]]) for key in inputs if key.endswith("pixel_values")}
    longer |= {"input_ids": second.sequences, "attention_mask": torch.ones_like(second.sequences)}
    if given == "new ids":
        longer["input_ids"] = torch.cat([said[:, :held], second.sequences], dim=1)
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "token_type_ids" in later:
        longer["token_type_ids"] = (longer["input_ids"] == IMAGE).long()
    queries = torch.zeros_like(longer["input_ids"], dtype=torch.bool)
    queries[:, start - 1 : held] = queries[:, length - 1 :] = True
    afresh = logits_of(model, longer, hd_queries=queries)[0, length - 1 : -1]
    assert_close(torch.cat(second.logits), afresh)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_embeddings_instead_of_ids(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    embedded = {key: value for key, value in inputs.items() if key != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    assert torch.equal(logits_of(model, embedded), logits_of(model, inputs))


def test_generating_from_embeddings() -> None:
    model, inputs = patched("llava"), inputs_of("llava")
    embedded = {key: value for key, value in inputs.items() if key != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    assert_same_logits(generate(model, embedded), generate(model, inputs))


def test_embeddings_with_explicit_positions() -> None:
    """Qwen finds the positions of images by their ids alone: given the positions, it needs none."""
    model, inputs = patched("qwen2_5_vl"), inputs_of("qwen2_5_vl")
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    embedded = {key: value for key, value in inputs.items() if key != "input_ids"} | {"position_ids": positions}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    assert torch.equal(logits_of(model, embedded), logits_of(model, inputs))


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
    config = getattr(flexkit.FlexConfig, preset)(**({"gate": None} if preset == "training_free" else {}))
    model = patched(name, config)
    zoom = get_patch(model).config.zoom_pair
    rows = tuple(Row(row.images, row.words + 2) for row in ROWS)
    inputs = inputs_of(name, rows, zoom=zoom)
    output = generate(model, inputs, 3)
    base = generate(model, low_res(inputs), 3)
    assert all(bool(step.isfinite().all()) for step in output.logits)
    assert torch.equal(output.sequences[2], base.sequences[2])
    assert (logits_of(model, inputs)[:2, -1] - base.logits[0][:2]).abs().max() > 1e-3


@families
def test_a_copied_cache_goes_on_alike(name: str) -> None:
    model, inputs = patched(name), inputs_of(name, ONE)
    with torch.no_grad():
        kept = model(**inputs).past_key_values
        copied = copy.deepcopy(kept)
        token = torch.tensor([[5]])
        first = model(input_ids=token, past_key_values=kept).logits
        assert torch.equal(model(input_ids=token, past_key_values=copied).logits, first)
        with flexkit.disabled(model):
            assert not torch.equal(
                model(input_ids=token, past_key_values=model(**inputs).past_key_values).logits, first
            )
