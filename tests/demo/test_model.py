import pytest
import torch

import flexkit
from flexkit.demo import small_llava


@pytest.mark.parametrize("text", ["USER: what?", "naïve café", "你好 🎈", "  two  spaces\nand lines "])
def test_any_text_comes_back(text: str) -> None:
    _, processor = small_llava()
    assert processor.decode(processor(text=text).input_ids[0], skip_special_tokens=True) == text


def test_weights_follow_the_seed_and_leave_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    (first, _), (again, _), (other, _) = small_llava(1), small_llava(1), small_llava(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert not first.training and all(weight.dtype == torch.float32 for weight in first.parameters())


def test_answers_are_printable() -> None:
    model, processor = small_llava()
    inputs = processor(text="Anything", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=5.0)
    answer = processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert answer.isascii() and answer.isprintable()


def test_is_patched_like_any_model() -> None:
    model, _ = small_llava()
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    flexkit.unpatch_model(flexkit.patch_model(model, flexkit.FlexConfig.training_free()))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
