"""
Where a model looks in a clip
=============================

A clip has 32 frames, of which a model samples four, 64 pixels a side. Objects drift, and each shows its digit in three
frames that lie between those. The view beside the sequence has four frames in the place of each one, three times as
large; what is read of them is what lies under the cells to which most attention goes.
"""

import torch
from PIL import Image
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

import flexkit
from flexkit.visual_search import draw_clip, load_model, questions

clip, sampled = draw_clip(2), [4, 12, 20, 28]
between = [frame + offset for frame in sampled for offset in (-3, -1, 1, 3)]
question = questions(clip, "attribute")[0]

# %%
# The small model that ships takes pictures. Its parts, in the classes of LLaVA-NeXT-Video, take videos; they have seen
# none in training, so that their answer is right for one clip of four (chance is one of ten).

shipped, processor = load_model()
config = LlavaNextVideoConfig(
    vision_config=shipped.config.vision_config,
    text_config=shipped.config.text_config,
    video_token_index=shipped.config.image_token_id,
    image_token_index=shipped.config.text_config.vocab_size,
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
    spatial_pool_stride=1,
    tie_word_embeddings=True,
)
model = LlavaNextVideoForConditionalGeneration(config).eval()
settings = flexkit.FlexConfig(start_layer=1, zoom=(4, 3, 3), policy=flexkit.TopK(2))
flexkit.patch_model(model, settings, trained=True)
model.load_state_dict(shipped.state_dict(), strict=False)

# %%
# Both views, without a video processor: frames as an image processor makes them.


def frames(indices: list[int], side: int) -> torch.Tensor:
    """``(1, frames, 3, side, side)``."""
    images = [Image.fromarray(pixels) for pixels in clip.read(indices)]
    made = processor.image_processor(images, size={"height": side, "width": side}, return_tensors="pt")
    return made["pixel_values"][None]


inputs = processor.tokenizer("<image>" * (len(sampled) * 64) + f" {question.text}", return_tensors="pt")
with flexkit.trace(model) as trace, torch.no_grad():
    output = model.generate(
        input_ids=inputs["input_ids"],
        pixel_values_videos=frames(sampled, 64),
        hd_pixel_values_videos=frames(between, 192),
        max_new_tokens=1,
    )
print(question.text, processor.decode(output[0, -1]))

# %%
# A column for each frame of the sequence. The cells that are read follow the object.

shown = [Image.fromarray(pixels) for pixels in clip.read(sampled)]
figure = flexkit.plot_selection(trace, shown, layers=[trace.layers[0]])
