"""``pipeline("image-text-to-text")`` with a patched model and its processor."""

from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image

import flexkit
from tests.processors import PROCESSORS as TINY
from tests.tiny_processors import CHAT_TEMPLATE, tiny_gemma3_processor, tiny_llava_processor, tiny_qwen_processor
from tests.ways.questions import TOKENS, own_model, patch, six
from tests.zoo import END, IMAGE, START, VIDEO, VOCABULARY

_QWEN: dict[str, Any] = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)
PROCESSORS: dict[str, Any] = {
    "llava": lambda: tiny_llava_processor(42, image_token_id=IMAGE, vocab_size=VOCABULARY),
    "qwen2_5_vl": lambda: tiny_qwen_processor(14, vocab_size=VOCABULARY, **_QWEN),
    "qwen3_vl": lambda: tiny_qwen_processor(16, min_pixels=64 * 64, vocab_size=VOCABULARY, **_QWEN),
    "internvl": lambda: chatting("internvl"),
    "gemma3": lambda: tiny_gemma3_processor(
        image_token_id=IMAGE, boi_token_id=START, eoi_token_id=END, vocab_size=VOCABULARY
    ),
    "llava_next": lambda: chatting("llava_next"),
}
SETTINGS = {"max_new_tokens": TOKENS, "do_sample": False, "suppress_tokens": [0, 1, 2, 3, IMAGE, VIDEO, START, END]}


def chatting(name: str) -> Any:
    """The tiny processor of a model type, with a chat template."""
    processor = TINY[name].build("pil")
    processor.chat_template = CHAT_TEMPLATE.replace("IMAGE", TINY[name].prompt)
    return processor


def chat(seed: int) -> list[dict[str, Any]]:
    pixels = np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": f"w7 w{seed + 10}"}]
    return [{"role": "user", "content": content}]


def answer(model: Any, processor: Any, question: Any) -> list[str]:
    """What the pipeline should say."""
    inputs = processor.apply_chat_template(
        question, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    ).to(torch.float64)
    written = model.generate(**inputs, **SETTINGS)[0, inputs["input_ids"].shape[1] :]
    return list(processor.decode(written, skip_special_tokens=True).split())


@six
def test_pipeline(name: str) -> None:
    model = patch(own_model(name))
    processor = flexkit.FlexProcessor(PROCESSORS[name](), model)
    ask = tf.pipeline("image-text-to-text", model=model, processor=processor)
    asked = [chat(seed) for seed in range(4)]
    expected = [answer(model, processor, question) for question in asked]
    with flexkit.disabled(model):
        assert expected != [answer(model, processor, question) for question in asked]
    together = ask(text=asked, return_full_text=False, generate_kwargs=SETTINGS)
    assert [each["generated_text"].split() for (each,) in together] == expected
    (one,) = ask(text=asked[0], return_full_text=False, generate_kwargs=SETTINGS)
    assert one["generated_text"].split() == expected[0]
