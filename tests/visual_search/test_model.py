"""The small model: stock classes, loaded as any other."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import flexkit
from flexkit.visual_search.model import CELLS, IMAGE_TOKEN, build_model, build_processor


def test_weights_follow_the_seed_and_leave_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = build_model(seed=1), build_model(seed=1), build_model(seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert not first.training and all(weight.dtype == torch.float32 for weight in first.parameters())


@pytest.mark.parametrize("size", [(192, 192), (1, 1), (300, 40)])
def test_loads_by_auto_classes_and_takes_any_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    model = build_model()
    model.save_pretrained(tmp_path)
    build_processor().save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(images=Image.new("RGB", size), text=f"{IMAGE_TOKEN} Which digit?", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == CELLS**2
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Which digit is on the object that is red?", "which digit is on the object that is red"),
        ("my  RED\ncat!", "<unk> red <unk>"),
        ("naïve 你好 7", "<unk> <unk> 7"),
    ],
)
def test_words_are_lower_case_and_known_or_not(text: str, read: str) -> None:
    tokenizer = build_processor().tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids[1:]) == read


def test_chats_are_prompts() -> None:
    processor = build_processor()
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is on it?"}]}
    answer = {"role": "assistant", "content": "7"}
    assert processor.apply_chat_template([question, answer]) == "<image> Which digit is on it? 7</s> "


def test_is_patched_like_any_model() -> None:
    model = build_model()
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    flexkit.unpatch_model(flexkit.patch_model(model, flexkit.FlexConfig.training_free()))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
