"""Tiny models with random weights, one for each structure that flexkit must cope with, and prompts for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers as tf
from torch import Tensor

VOCABULARY, IMAGE, PAD = 96, 90, 0
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
GRID = (3, 3)
"""Low-res cells of an image, unless a prompt says otherwise (families of a fixed size cannot)."""

Grid = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    name: str
    config: Callable[[], tf.PreTrainedConfig]
    model_class: type
    views: Callable[[Sequence[Grid], Grid], dict[str, Tensor]]
    """Pixels of images of the given low-res grids, each zoomed."""
    grid: Grid = GRID
    any_grid: bool = False

    def model(self, seed: int = 0) -> tf.PreTrainedModel:
        """A model in eval mode, float64: exact enough to compare different orders of summation."""
        torch.manual_seed(seed)
        model = self.model_class(self.config()).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # the default initialisation hardly attends to anything
                    parameter.normal_(0, 0.3)
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = None
        return model


def _square(size: int) -> Callable[[Sequence[Grid], Grid], dict[str, Tensor]]:
    return lambda grids, zoom: {"pixel_values": torch.randn(len(grids), 3, size * zoom[0], size * zoom[1])}


def _patches(grids: Sequence[Grid], zoom: Grid) -> dict[str, Tensor]:
    sizes = torch.tensor([(1, 2 * rows * zoom[0], 2 * columns * zoom[1]) for rows, columns in grids])
    return {"pixel_values": torch.randn(int(sizes.prod(-1).sum()), 3 * 2 * 14 * 14), "image_grid_thw": sizes}


def _llava(text: type, **settings: object) -> Callable[[], tf.LlavaConfig]:
    return lambda: tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=42),
        text_config=text(**TEXT, **settings),
        image_token_id=IMAGE,
    )


def _qwen() -> tf.Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 32,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "patch_size": 14,
    }
    return tf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )


def _gemma3() -> tf.Gemma3Config:
    text = tf.Gemma3TextConfig(
        **TEXT,
        layer_types=["full_attention", "sliding_attention"] * 2,
        sliding_window=8,
        query_pre_attn_scalar=8,
    )
    vision = tf.SiglipVisionConfig(**VISION, image_size=56)
    return tf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_index=92,
        eoi_token_index=93,
    )


FAMILIES = {
    family.name: family
    for family in (
        Family("llava", _llava(tf.LlamaConfig), tf.LlavaForConditionalGeneration, _square(42)),
        Family("llava-qwen2", _llava(tf.Qwen2Config), tf.LlavaForConditionalGeneration, _square(42)),
        Family(
            "llava-mistral", _llava(tf.MistralConfig, sliding_window=16), tf.LlavaForConditionalGeneration, _square(42)
        ),
        Family("qwen2_5_vl", _qwen, tf.Qwen2_5_VLForConditionalGeneration, _patches, any_grid=True),
        Family("gemma3", _gemma3, tf.Gemma3ForConditionalGeneration, _square(56), grid=(2, 2)),
    )
}
MAIN = ("llava", "qwen2_5_vl", "gemma3")
"""Families that differ in structure; the others differ from these in their language model only."""


@dataclass(frozen=True)
class Row:
    """One row of a batch: the grids of its images, with a word before each, and words after them."""

    images: tuple[Grid | None, ...] = (None,)
    words: int = 4


def prompt(
    family: Family, rows: Sequence[Row] = (Row(),), *, zoom: Grid = (2, 2), padding: str = "left", seed: int = 1
) -> dict[str, Tensor]:
    """Inputs of both views for a batch; ``hd_*`` are missing if no row has an image."""
    torch.manual_seed(seed)
    grids = [grid or family.grid for row in rows for grid in row.images]
    sequences = [_tokens(row, family) for row in rows]
    length = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for index, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if padding == "left" else slice(0, len(sequence))
        ids[index, place], mask[index, place] = sequence, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    is_image = (ids == IMAGE).long()
    if family.any_grid:
        inputs["mm_token_type_ids"] = is_image
    if family.name == "gemma3":
        inputs["token_type_ids"] = is_image
    if grids:
        inputs |= _double(family.views(grids, (1, 1)))
        inputs |= {f"hd_{name}": value for name, value in _double(family.views(grids, zoom)).items()}
    return inputs


def low_res(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the base model among those of both views."""
    return {name: value for name, value in inputs.items() if not name.startswith("hd_")}


def _tokens(row: Row, family: Family) -> Tensor:
    parts = [torch.randint(3, 80, (1,))]
    for grid in row.images:
        rows, columns = grid or family.grid
        parts += [torch.tensor([92]), torch.full((rows * columns,), IMAGE), torch.tensor([93])]
    return torch.cat([*parts, torch.randint(3, 80, (row.words,))])


def _double(views: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in views.items()}
