"""Strategies of decoding: whatever chooses the tokens, it chooses by logits that saw the high-res view."""

import contextlib
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import flexkit
from tests.patching.ways import assert_close, generate, new_tokens
from tests.ways.questions import TOKENS, forced_logits, own_model, patch, patched_model, plain_model, question, six
from tests.zoo import IMAGE, ZOO, Row, low_res, prompt

TWO = (Row((None,), 7), Row((None,), 4))
"""Two questions, the second padded."""


def alone(name: str, row: int) -> dict[str, Tensor]:
    """One of two questions as a batch of its own."""
    return prompt(ZOO[name], TWO, only=row)


def both(name: str) -> dict[str, Tensor]:
    return prompt(ZOO[name], TWO)


@six
def test_answers_are_the_likeliest_tokens(name: str) -> None:
    """What all other ways are compared with, against a call without a cache."""
    asked = question(name)
    forced = forced_logits(patched_model(name), asked.inputs, asked.tokens[0])
    assert_close(torch.cat(asked.answer.logits), forced)
    assert torch.equal(forced.argmax(-1), asked.tokens[0])
    assert asked.distance > 1e-2


@six
@pytest.mark.parametrize("returned", [1, 3])
def test_sampling(name: str, returned: int) -> None:
    model, inputs = patched_model(name), both(name)
    tf.set_seed(7)
    settings = {"do_sample": True, "top_k": 0, "temperature": 2.0, "num_return_sequences": returned}
    written = new_tokens(generate(model, inputs, TOKENS, suppress_tokens=[IMAGE], **settings))
    forced = torch.stack(
        [forced_logits(model, alone(name, index // returned), row) for index, row in enumerate(written)]
    )
    forced[..., IMAGE] = -torch.inf
    tf.set_seed(7)
    for step in range(TOKENS):
        probabilities = (forced[:, step].float() / 2.0).softmax(-1)
        assert torch.equal(torch.multinomial(probabilities, 1)[:, 0], written[:, step])
    assert len(written.unique(dim=0)) > 1


@six
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3}], ids=str)
def test_beams(name: str, settings: dict[str, Any]) -> None:
    """Every returned beam has the score that its tokens have alone; the best is at least as good as the greedy one."""
    model = patched_model(name)
    output = generate(model, both(name), TOKENS, output_scores=True, **settings)
    returned = settings.get("num_return_sequences", 1)

    def score(row: int, tokens: Tensor) -> Tensor:
        chosen = forced_logits(model, alone(name, row), tokens).log_softmax(-1).gather(1, tokens[:, None])
        return chosen.mean()

    scores = [score(index // returned, tokens) for index, tokens in enumerate(new_tokens(output))]
    assert_close(output.sequences_scores, torch.stack(scores))
    base = generate(model, low_res(both(name)), TOKENS, output_scores=True, **settings)
    assert not torch.equal(base.sequences_scores, output.sequences_scores)


@six
def test_processors_and_criteria_of_ones_own(name: str) -> None:
    model, asked = patched_model(name), question(name)
    banned = asked.tokens[0, 0]
    seen: list[Tensor] = []

    def ban(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, banned[None], -torch.inf)

    def enough(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        seen.append(ids)
        return torch.full((len(ids),), len(seen) == 3)

    written = model.generate(
        **asked.inputs,
        do_sample=False,
        max_new_tokens=TOKENS,
        logits_processor=tf.LogitsProcessorList([ban]),
        stopping_criteria=tf.StoppingCriteriaList([enough]),
    )[0, asked.inputs["input_ids"].shape[1] :]
    assert len(written) == len(seen) == 3
    forced = forced_logits(model, asked.inputs, written).index_fill(1, banned[None], -torch.inf)
    assert torch.equal(written, forced.argmax(-1))


@six
def test_a_loop_of_ones_own(name: str) -> None:
    """``generate`` prepares, a function decodes."""

    def greedy(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("logits_processor"), kwargs.pop("stopping_criteria")
        for step in range(TOKENS):
            given = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=None if step == 0 else 1, is_first_iteration=step == 0, **kwargs
            )
            output = model(**given)
            kwargs = model._update_model_kwargs_for_generation(output, kwargs)
            input_ids = torch.cat([input_ids, output.logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    asked = question(name)
    with torch.no_grad():
        written = patched_model(name).generate(**asked.inputs, max_new_tokens=TOKENS, custom_generate=greedy)
    assert torch.equal(written, asked.answer.sequences)


@six
def test_prompt_lookup(name: str) -> None:
    asked = question(name)
    settings = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    assert torch.equal(
        generate(patched_model(name), asked.inputs, TOKENS, **settings).sequences, asked.answer.sequences
    )


@six
@pytest.mark.parametrize("kind", ["itself", "patched", "disabled", "plain"])
def test_an_assistant_proposes(name: str, kind: str) -> None:
    """Whatever an assistant proposes, the answer stays what it was; a plain one proposes from the low-res view."""
    asked = question(name)
    assistant = own_model(name)
    if kind != "itself":
        tf.set_seed(3)
        with torch.no_grad():
            assistant.get_input_embeddings().weight.normal_(0, 0.3)
    if kind != "plain":
        patch(assistant)
    calls: list[int] = []
    assistant.register_forward_pre_hook(lambda *args: calls.append(1))
    settings = {"assistant_model": assistant, "suppress_tokens": [IMAGE]}
    with flexkit.disabled(assistant) if kind == "disabled" else contextlib.nullcontext():
        answer = generate(patched_model(name), asked.inputs, TOKENS, **settings)
    assert torch.equal(answer.sequences, asked.answer.sequences)
    assert calls


REMOTE = {
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
    "group beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
}


@six
@pytest.mark.parametrize("way", REMOTE)
def test_strategies_that_transformers_no_longer_has(name: str, way: str) -> None:
    """Their code is on a hub: no model runs them here, patched or not."""
    for model in (plain_model(name), patched_model(name)):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            generate(model, low_res(question(name).inputs), **REMOTE[way])
