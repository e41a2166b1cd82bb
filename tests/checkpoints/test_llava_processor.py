from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flexkit
from flexkit.checkpoints import load_llava_flexattn, load_llava_flexattn_processor
from flexkit.errors import CheckpointError
from flexkit.integrations.loading import load_model_and_processor
from flexkit.patching import get_patch
from tests.checkpoints.test_hub import cached
from tests.tiny_processors import tiny_tokenizer

VOCABULARY = 128


@pytest.fixture
def complete(published: Path) -> Path:
    """A published checkpoint with its tokenizer."""
    tiny_tokenizer({}, VOCABULARY).save_pretrained(published)
    return published


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pictures_are_padded_to_squares(complete: Path) -> None:
    processor = load_llava_flexattn_processor(complete)
    pixels = processor(images=picture(60, 120), text="<image>", return_tensors="pt")["pixel_values"]
    mean = pixels[0, :, :20]
    assert pixels.shape == (1, 3, 126, 126)
    # The mean colour in whole numbers of 255: at most one of them off, in units of the standard deviation.
    assert (mean.abs() < 1 / 255 / 0.26).all()


def test_the_prompt_is_that_of_llava(complete: Path) -> None:
    processor = load_llava_flexattn_processor(complete)
    content = [{"type": "text", "text": "w7 w8?"}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text.startswith("A chat between a curious user") and text.endswith(" USER: <image>\nw7 w8? ASSISTANT:")
    turns = [{"role": role, "content": text} for role, text in (("system", "S."), ("user", "U"), ("assistant", "A"))]
    assert processor.apply_chat_template(turns) == "S. USER: U ASSISTANT: A</s>"


def test_it_fits_the_model(complete: Path) -> None:
    model, processor = load_llava_flexattn(complete), load_llava_flexattn_processor(complete)
    both = flexkit.FlexProcessor(processor, model)
    inputs = both(images=[picture(90, 90)] * 2, text=["<image> w7", "<image> w7 w8"], padding=True, return_tensors="pt")
    assert inputs["input_ids"].max() == model.config.image_token_id == VOCABULARY
    assert inputs["attention_mask"][0, 0] == 0 and inputs["input_ids"][0, 0] == processor.tokenizer.unk_token_id
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_both_come_from_the_hub(complete: Path, tmp_path: Path) -> None:
    cached(tmp_path / "cache", complete, "them/theirs")
    options: Any = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded, local = load_llava_flexattn("them/theirs", **options), load_llava_flexattn(complete)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.parameters(), local.parameters(), strict=True))
    assert load_llava_flexattn_processor("them/theirs", **options).image_token == "<image>"
    with pytest.raises(CheckpointError, match="them/others is no folder here"):
        load_llava_flexattn("them/others", **options)


def test_shards_come_from_the_hub(complete: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(complete / "model.safetensors")
    (complete / "model.safetensors").unlink()
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    for number, names in enumerate(halves):
        save_file({name: tensors[name] for name in names}, complete / f"part-{number}.safetensors")
    weights = ", ".join(
        f'"{name}": "part-{number}.safetensors"' for number, names in enumerate(halves) for name in names
    )
    (complete / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weights}}}}}')
    cached(tmp_path / "cache", complete, "them/theirs")
    options: Any = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert flexkit.is_patched(load_llava_flexattn("them/theirs", **options))
    (complete / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    cached(tmp_path / "other", complete, "them/theirs")
    with pytest.raises(CheckpointError, match='has no "weight_map" of files'):
        load_llava_flexattn("them/theirs", **options | {"cache_dir": tmp_path / "other"})


def test_a_name_is_enough(complete: Path) -> None:
    model, processor = load_model_and_processor(str(complete), settings={"policy": flexkit.TopK(2)}, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert get_patch(model).config.policy == flexkit.TopK(2) and processor.chat_template


def test_mistakes(complete: Path, edit_json: Callable[..., None]) -> None:
    with pytest.raises(CheckpointError, match=r"has 96 tokens, and .* was trained with 128; pass tokenizer="):
        load_llava_flexattn_processor(complete, tokenizer=tiny_tokenizer({}, 96))
    (complete / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be loaded: .*; pass tokenizer="):
        load_llava_flexattn_processor(complete)
    edit_json(complete / "config.json", model_type="llava")
    with pytest.raises(CheckpointError, match="says model_type 'llava'"):
        load_llava_flexattn_processor(complete)
