"""A small Qwen3-VL that reads scenes of any size: a token for every 8 x 8 pixels."""

import math
from typing import Any

import torch
from einops import rearrange
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SegformerConfig,
    SegformerModel,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from flexkit.visual_search import load_model
from flexkit.visual_search.labels import CLASS_WORDS
from flexkit.visual_search.questions import WORDS

TOKEN = 8
"""Side of what becomes one token, in pixels: four patches."""
LOW_RES, ZOOM = 64, 3
"""Side of the low-res view in pixels, and how much larger a scene is."""

_IMAGE, _START, _END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
_TOKENS = {token: index for index, token in enumerate(("<pad>", "</s>", "<unk>", _IMAGE, _START, _END, *WORDS))}
WORD_IDS = {name: [_TOKENS[word] for word in words] for name, words in CLASS_WORDS.items()}
"""By class, the tokens by which things are named; the ground is ``<unk>``."""
WORD_IDS["colour"].append(_TOKENS["<unk>"])
_CHAT_TEMPLATE = (
    """
{%- for message in messages -%}
{%- for part in message.content %}{% if part.type == 'image' %}"""
    f"{_START}{_IMAGE}{_END}"
    """{% else %} {{ part.text }}{% endif %}{% endfor %} {% endfor %}"""
)


class Tower(nn.Module):
    """The tower of the other small model, which takes pictures of any size, in the place of Qwen's.

    Patches that are cut side by side do not learn to read digits a few pixels high in minutes; it does.
    """

    spatial_merge_size = 2

    def __init__(self, vision: SegformerConfig, width: int) -> None:
        super().__init__()
        self.segformer = SegformerModel(vision)
        self.projector = nn.Sequential(
            nn.Linear(vision.hidden_size, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of what it takes."""
        dtype: torch.dtype = next(self.parameters()).dtype
        return dtype

    def seen(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """``(tokens, width)`` of all pictures, from patches in the order of their tokens."""
        grids = grid_thw.tolist()
        pictures = [
            rearrange(part, "(r c y x) (k h w) -> k (r y h) (c x w)", r=rows // 2, y=2, x=2, k=3, h=TOKEN // 2)
            for part, (_, rows, _) in zip(patches.split([math.prod(grid) for grid in grids]), grids, strict=True)
        ]
        tokens: dict[int, Tensor] = {}
        for shape in {picture.shape for picture in pictures}:
            alike = [index for index, picture in enumerate(pictures) if picture.shape == shape]
            found = self.segformer(torch.stack([pictures[index] for index in alike]), output_hidden_states=True)
            tokens.update(zip(alike, found.hidden_states[-1], strict=True))
        return torch.cat([tokens[index] for index in range(len(pictures))])

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **_: Any) -> BaseModelOutputWithDeepstackFeatures:
        """What Qwen's tower gives, but for features of layers in between."""
        projected = self.projector(self.seen(hidden_states, grid_thw))
        return BaseModelOutputWithDeepstackFeatures(pooler_output=projected, deepstack_features=[])


class NativeModel(Qwen3VLForConditionalGeneration):
    """A Qwen3-VL with another tower."""

    def __init__(self, config: Qwen3VLConfig) -> None:
        super().__init__(config)
        self.model.visual = Tower(SegformerConfig(**config.tower), config.text_config.hidden_size)


def build_model(layers: int = 4, width: int = 96, seed: int = 0) -> NativeModel:
    """Build the model, untrained but for its tower, which is the one that ships.

    Parameters
    ----------
    layers, width : int
        Of the language model.
    seed : int
        Of the weights. The global random state stays as it is.
    """
    text: dict[str, Any] = {
        "vocab_size": len(_TOKENS),
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": width // 4,
        "max_position_embeddings": 4096,
        "initializer_range": width**-0.5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [width // 24] * 3,
            "mrope_interleaved": True,
        },
        "pad_token_id": _TOKENS["<pad>"],
        "eos_token_id": _TOKENS["</s>"],
    }
    shipped = load_model("base")[0].model.vision_tower
    config = Qwen3VLConfig(
        tower=shipped.config.to_diff_dict(),
        vision_config={"depth": 0, "hidden_size": 8, "num_heads": 1, "deepstack_visual_indexes": []},
        text_config=text,
        image_token_id=_TOKENS[_IMAGE],
        video_token_id=len(_TOKENS),
        vision_start_token_id=_TOKENS[_START],
        vision_end_token_id=_TOKENS[_END],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NativeModel(config).eval()
    model.model.visual.segformer.load_state_dict(shipped.state_dict())
    return model


class PictureProcessor(Qwen3VLProcessor):
    """A processor without the part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = _IMAGE, "<|video_pad|>"
        self.image_token_id, self.video_token_id = _TOKENS[_IMAGE], None
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor(side: int) -> PictureProcessor:
    """Build the processor; pictures become as large as the model may see them.

    Parameters
    ----------
    side : int
        Of the largest square, in pixels.
    """
    core = Tokenizer(models.WordLevel(_TOKENS, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z0-9<>|_/ ]"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [_IMAGE, _START, _END]})
    images = Qwen2VLImageProcessorPil(
        patch_size=TOKEN // 2,
        temporal_patch_size=1,
        merge_size=2,
        size={"shortest_edge": (2 * TOKEN) ** 2, "longest_edge": side**2},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return PictureProcessor(images, tokenizer, _CHAT_TEMPLATE)
