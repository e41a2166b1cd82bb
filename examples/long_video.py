"""Ask about a video of ten minutes of which few frames are ever decoded, and see what that costs.

Two files are written, of ten seconds and of ten minutes, 25 frames a second. A model of the classes of LLaVA-OneVision,
with random weights, is shown eight frames of each, small, in its sequence. It looks closer where its attention is
largest: at tiles of 3 x 3 times the resolution, and at four frames in the place of each one. So what it says means
nothing; what is decoded, encoded and computed is what a trained model of its size would need. Needs PyAV and
torchvision (``pip install 'flexkit-vlm[video]' torchvision``).

    python examples/long_video.py
"""

import resource
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

import flexkit
from flexkit.measuring import count_flops

RATE, HEIGHT, WIDTH = 25, 360, 640
TOKENS = {"<pad>": 0, "<image>": 1, "<video>": 2, "what": 3, "happens": 4, "?": 5}
SPECIAL = {"image_token": "<image>", "video_token": "<video>"}
SIDE, PATCH, FRAMES, ZOOM = 112, 14, 8, (4, 3, 3)


def write(path: Path, seconds: int) -> None:
    """A bright square that wanders over a grey picture."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=RATE, width=WIDTH, height=HEIGHT, options={"g": "50"})
        stream.pix_fmt = "yuv420p"
        for index in range(seconds * RATE):
            pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
            left = 7 * index % (WIDTH - 40)
            pixels[100:140, left : left + 40] = (250, 220, index % 256)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())


def build() -> tuple[torch.nn.Module, flexkit.FlexProcessor]:
    """A patched model with random weights, and its processor."""
    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    tower = tf.SiglipVisionConfig(**size, num_hidden_layers=4, image_size=SIDE, patch_size=PATCH, vision_use_head=False)
    text = tf.Qwen2Config(**size, num_hidden_layers=8, num_key_value_heads=4, vocab_size=len(TOKENS))
    config = tf.LlavaOnevisionConfig(vision_config=tower, text_config=text, image_token_index=1, video_token_index=2)
    model = tf.LlavaOnevisionForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    flexkit.patch_model(model, flexkit.FlexConfig(zoom=ZOOM, policy=flexkit.TopK(12).over_frames()), trained=True)
    core = Tokenizer(models.WordLevel(TOKENS, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    square = {"height": SIDE, "width": SIDE}
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size=square),
        tf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", extra_special_tokens=SPECIAL),
        tf.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )
    return model, flexkit.FlexProcessor(processor, model)


def peak() -> float:
    """The most memory that this process has ever had, in MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


@torch.no_grad()
def ask(path: Path, model: torch.nn.Module, processor: flexkit.FlexProcessor) -> tuple[float, float]:
    """Ask, and print a line of the table; the language model's operations, and how much the peak of memory rose."""
    before, source = peak(), flexkit.open_video(path)
    text = "<video> what happens ?"
    inputs = processor(text=text, videos=[source], do_sample_frames=True, num_frames=FRAMES, return_tensors="pt")
    sampled = source.decoded
    with flexkit.trace(model) as trace:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    rose, tiles = peak() - before, trace.steps[-1].tiles
    flops = count_flops(lambda: model(**inputs), without=("vision_tower", "multi_modal_projector"))
    total = FRAMES * ZOOM[0] * ZOOM[1] * ZOOM[2]
    print(
        f"{source.seconds:>6.0f} s{len(source):>9}{sampled:>10}{source.decoded - sampled:>9}"
        f"{f'{tiles} of {total}':>15}{flops / 1e9:>12.3f}{rose:>20.0f}"
    )
    return flops, rose


def main() -> None:
    """Write, and ask."""
    model, processor = build()
    with tempfile.TemporaryDirectory() as folder:
        columns = ("", 8), ("frames", 9), ("sampled", 10), ("read", 9), ("tiles encoded", 15), ("LM GFLOP", 12)
        print("".join(f"{name:>{width}}" for name, width in (*columns, ("MiB more at peak", 20))))
        for seconds in (10, 600):
            path = Path(folder) / f"{seconds}.mp4"
            write(path, seconds)
            ask(path, model, processor)


if __name__ == "__main__":
    main()
