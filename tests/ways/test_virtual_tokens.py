"""Positions that no token stands for: PEFT's prompts are embeddings in front of a prompt, or keys and values."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import flexkit
from flexkit.errors import HighResInputError
from flexkit.patching.call.route import Prompt
from flexkit.patching.seam.config_view import PROMPT
from tests.patching.ways import assert_close, assert_same_logits, generate, logits_of, new_tokens
from tests.versions import before, places_embeddings
from tests.ways.questions import ONE, TOKENS, longer, own_model, patch, patched_model, question
from tests.zoo import CONTEXT, ZOO, Row, low_res, prompt

VIRTUAL = 3
TWO = (Row((None,), 7), Row((None,), 4))
TYPES = [1] * VIRTUAL
CPT = {"cpt_token_ids": [5, 6, 7], "cpt_mask": TYPES, "cpt_tokens_type_mask": TYPES}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": (peft.PromptTuningConfig, {}),
    "p": (peft.PromptEncoderConfig, {"encoder_hidden_size": 8}),
    "multitask": (peft.MultitaskPromptTuningConfig, {"num_tasks": 2}),
    "cpt": (peft.CPTConfig, CPT),
    "prefix": (peft.PrefixTuningConfig, {}),
}
SHAPE = {"num_layers": 4, "token_dim": 32, "num_attention_heads": 4, "num_transformer_submodules": 2}
"""What PEFT cannot read off some models."""
CASES = [
    *(pytest.param("llava", kind, id=f"llava-{kind}") for kind in (*KINDS, "lora")),
    *(
        pytest.param(name, kind, id=f"{name}-{kind}")
        for name in ("gemma3", "internvl")
        for kind in ("prompt", "prefix")
    ),
    # Qwen places a prompt on three axes by its ids, and can do so neither behind a prefix nor with padding.
    *(
        pytest.param(name, "prompt", id=f"{name}-prompt", marks=places_embeddings)
        for name in ("qwen2_5_vl", "qwen3_vl")
    ),
    pytest.param("llava_next", "prompt", id="llava_next-prompt"),
]
each = pytest.mark.parametrize(("name", "kind"), CASES)
each_with_padding = pytest.mark.parametrize(
    ("name", "kind"),
    [case for case in CASES if not case.values[0].startswith("qwen")],  # type: ignore[union-attr]
)


def tuned(model: Any, kind: str, task: str = "CAUSAL_LM", **shape: Any) -> Any:
    """A model of PEFT's whose prompt has random values."""
    if kind == "lora":
        config: Any = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    else:
        of, settings = KINDS[kind]
        config = of(task_type=task, num_virtual_tokens=VIRTUAL, **settings, **shape)
    wrapped = peft.get_peft_model(model, config).eval().to(model.dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "prompt_encoder" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return wrapped


def asked(name: str, kind: str, rows: tuple[Row, ...]) -> dict[str, Tensor]:
    inputs = prompt(ZOO[name], rows)
    return inputs | ({"task_ids": torch.zeros(len(rows), dtype=torch.long)} if kind == "multitask" else {})


@each
def test_generating_is_as_calling(name: str, kind: str) -> None:
    if name == "gemma3" and before("5.23"):
        pytest.skip("earlier versions of Gemma 3 mask an image behind virtual tokens otherwise, patched or not")
    model, inputs = tuned(patch(own_model(name)), kind), asked(name, kind, ONE)
    answer = generate(model, inputs, TOKENS)
    virtual, start = 0 if kind == "lora" else VIRTUAL, inputs["input_ids"].shape[1]
    whole = longer(inputs, new_tokens(answer)[0, :-1])
    last = torch.arange(virtual + start)[None] == virtual + start - 1
    expected = logits_of(model, whole, hd_queries=last)[0, -TOKENS:]
    assert_close(torch.cat(answer.logits), expected)
    assert (expected - logits_of(model, low_res(whole))[0, -TOKENS:]).abs().max() > 1e-2


def first_call(model: Any, inputs: dict[str, Any], **settings: Any) -> tuple[Tensor, Tensor]:
    """The first logits of ``generate``, and those of the same call by somebody who has noted nothing."""
    calls: list[dict[str, Any]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not calls:
            calls.append(copy.deepcopy(kwargs))

    patched = flexkit.patching.state.patched_model(model)
    hook = patched.register_forward_pre_hook(keep, with_kwargs=True)
    answer = generate(model, inputs, 2, **settings)
    hook.remove()
    given = dict(calls[0])
    prompt = Prompt(repeats=given.pop(PROMPT).repeats)
    return answer.logits[0], logits_of(patched, given, **{PROMPT: prompt})[:, -1]


@each_with_padding
@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_in_batches(name: str, kind: str, way: dict[str, Any]) -> None:
    model, inputs = tuned(patch(own_model(name)), kind), asked(name, kind, TWO)
    if kind == "multitask" and way:
        pytest.skip("PEFT does not repeat the tasks of a batch for its beams")
    ours, expected = first_call(model, inputs, **way)
    assert_close(ours, expected)
    with flexkit.disabled(model):
        base = generate(model, inputs, 1, **way).logits[0]
    assert bool(((ours - base).abs().amax(-1) > 1e-3).all())


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_without_a_cache(name: str) -> None:
    """The virtual tokens are put in front again at every step."""
    model, inputs = tuned(patch(own_model(name)), "prompt"), asked(name, "prompt", TWO)
    assert_same_logits(generate(model, inputs, TOKENS, use_cache=False), generate(model, inputs, TOKENS))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_named_queries_are_those_of_the_prompt(kind: str) -> None:
    inputs = asked("llava", kind, ONE)
    named = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    named[:, [-4, -1]] = True
    model = tuned(patch(own_model("llava")), kind)
    with flexkit.trace(model) as trace:
        answer = generate(model, inputs, 2, hd_queries=named)
    whole = torch.nn.functional.pad(named, (VIRTUAL, 0))
    assert trace.steps[0].queries.tolist() == [whole.nonzero()[:, 1].tolist()]
    assert_close(answer.logits[0], logits_of(model, inputs, hd_queries=whole)[:, -1])


class Rewriting:
    """``prepare_inputs_for_generation`` of a user who changes the ids of a prompt."""

    def __init__(self, model: Any, change: Any) -> None:
        self.own, self.change = model.prepare_inputs_for_generation, change

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = self.own(input_ids, *args, **kwargs)
        if given["input_ids"].shape[1] > 1:
            given["input_ids"] = ids = self.change(given["input_ids"])
            for key in ("attention_mask", "position_ids"):
                given.pop(key, None)
            given["attention_mask"] = torch.ones_like(ids)
        return given


def test_words_put_in_front_of_a_prompt() -> None:
    model, inputs = patch(own_model("llava")), question("llava").inputs
    words = torch.tensor([[11, 12, 13, 14]])
    model.prepare_inputs_for_generation = Rewriting(model, lambda ids: torch.cat([words, ids], dim=1))
    answer = generate(model, inputs, 1)
    ids = torch.cat([words, inputs["input_ids"]], dim=1)
    given = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_close(answer.logits[0], logits_of(patched_model("llava"), given)[:, -1])


def test_a_prompt_that_is_another() -> None:
    model, inputs = patch(own_model("llava")), question("llava").inputs
    model.prepare_inputs_for_generation = Rewriting(model, lambda ids: torch.cat([ids[:, :3], ids[:, 2:]], dim=1))
    with pytest.raises(HighResInputError, match=r"generate was given a prompt of 19 positions .* given 20"):
        generate(model, inputs, 1)


def test_rows_that_are_moved_apart() -> None:
    model, inputs = patch(own_model("llava")), asked("llava", "prompt", TWO)

    def moved(ids: Tensor) -> Tensor:
        first, second = ids.tolist()
        return torch.tensor([[11, *first], [*second, 11]])

    model.prepare_inputs_for_generation = Rewriting(model, moved)
    with pytest.raises(HighResInputError, match="as many positions in front of every row"):
        generate(model, inputs, 1)


BESIDE = [("git", "prompt", "CAUSAL_LM"), ("florence2", "prefix", "SEQ_2_SEQ_LM"), ("udop", "prefix", "SEQ_2_SEQ_LM")]
"""Models that read the image beside the sequence, and what PEFT can put in front of their words."""


@pytest.mark.parametrize(("name", "kind", "task"), BESIDE)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("named", [False, True])
def test_beside_the_sequence(name: str, kind: str, task: str, rows: int, named: bool) -> None:
    model = patch(CONTEXT[name].model())
    shape = SHAPE if task == "SEQ_2_SEQ_LM" else {}
    inputs = prompt(CONTEXT[name], [Row(), Row(words=2)][:rows])
    wrapped = tuned(model, kind, task, **shape)
    text = "decoder_input_ids" if task == "SEQ_2_SEQ_LM" else "input_ids"
    queries = torch.arange(inputs[text].shape[1]).expand_as(inputs[text]) == inputs[text].shape[1] - 1
    ours = generate(wrapped, inputs, 1, **({"hd_queries": queries} if named else {}))
    assert_close(ours.logits[0], logits_of(wrapped, dict(inputs))[:, -1])
    base = generate(wrapped, low_res(inputs), 1)
    assert bool(((ours.logits[0] - base.logits[0]).abs().amax(-1) > 1e-3).all())
