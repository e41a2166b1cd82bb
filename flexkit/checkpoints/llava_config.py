"""Settings of a published checkpoint, read into the configurations of transformers and flexkit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from flexkit.checkpoints.files import path_inside, read_json
from flexkit.checks import FLOATS, is_int
from flexkit.errors import CheckpointError
from flexkit.patching import FlexConfig
from flexkit.selection import Threshold

__all__ = ["START_LAYER", "PublishedSettings", "read_settings"]

# The published code has it written in: keys from layer 9 on, the first map from layer 8.
START_LAYER = 9
_POOLED = 9

_FIXED = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "hidden_act",
    "attention_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class PublishedSettings:
    """What the ``config.json`` of a published checkpoint says.

    Attributes
    ----------
    text : transformers.LlamaConfig
        The language model, with one more row of vocabulary for the image placeholder.
    flex : flexkit.FlexConfig
        The high-resolution settings.
    dtype : torch.dtype
        In which the weights were saved.
    vision_tower : str or pathlib.Path
        Folder or hub name of the vision tower.
    low_res_size : int
        Side of the low-res view in pixels.
    vision_width : int or None
        Width of the tower's features, if it is said.
    feature_layer : int
        Hidden state of the tower that the projector reads.
    """

    text: LlamaConfig
    flex: FlexConfig
    dtype: torch.dtype
    vision_tower: str | Path
    low_res_size: int
    vision_width: int | None
    feature_layer: int

    @property
    def image_token_id(self) -> int:
        """The placeholder's id, the last of the vocabulary."""
        return int(self.text.vocab_size) - 1

    def llava_config(self, vision: CLIPVisionConfig) -> LlavaConfig:
        """Configuration of the whole model.

        Parameters
        ----------
        vision : transformers.CLIPVisionConfig
            The vision tower's.

        Raises
        ------
        CheckpointError
            If the tower is not the one that the checkpoint was made with.
        """
        for name in ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers"):
            if not is_int(number := getattr(vision, name), minimum=1):
                raise CheckpointError(
                    f"the vision tower of the checkpoint has {name} {number!r}, where a positive whole number is "
                    "expected; pass the vision_config of the tower that it was trained with."
                )
        size, patch = vision.image_size, vision.patch_size
        if size != self.low_res_size:
            raise CheckpointError(
                f"the checkpoint's lowres_size is {self.low_res_size} pixels, but its vision tower takes "
                f"images of {size}; pass the vision_config of the tower that it was trained with."
            )
        if patch > size:
            raise CheckpointError(f"the vision tower of the checkpoint has patches of {patch} pixels in {size}.")
        if not -vision.num_hidden_layers - 1 <= self.feature_layer <= vision.num_hidden_layers:
            raise CheckpointError(
                f"the checkpoint's mm_vision_select_layer is {self.feature_layer}, but its vision tower has "
                f"{vision.num_hidden_layers} layers; pass the vision_config of the tower that it was trained with."
            )
        if self.vision_width not in (None, vision.hidden_size):
            raise CheckpointError(
                f"the checkpoint's mm_hidden_size is {self.vision_width}, but its vision tower is "
                f"{vision.hidden_size} wide; pass the vision_config of the tower that it was trained with."
            )
        return LlavaConfig(
            vision_config=vision,
            text_config=self.text,
            image_token_index=self.image_token_id,
            image_seq_length=(size // patch) ** 2,
            projector_hidden_act="gelu",
            vision_feature_layer=self.feature_layer,
            vision_feature_select_strategy="default",
            tie_word_embeddings=self.text.tie_word_embeddings,
        )


def read_settings(folder: Path) -> PublishedSettings:
    """Read the ``config.json`` of a published checkpoint.

    Parameters
    ----------
    folder : pathlib.Path
        The checkpoint.

    Raises
    ------
    CheckpointError
        If it is another kind of checkpoint, a setting is missing, or settings contradict each other.
    """
    path = folder / "config.json"
    given = read_json(folder, path.name)
    if given.get("model_type") != "llava_llama":
        raise CheckpointError(
            f"{path} says model_type {given.get('model_type')!r}; a published FlexAttention checkpoint says "
            "'llava_llama'. What flexkit itself saved is loaded with load_flex."
        )
    extra = given.get("extra")
    if not isinstance(extra, Mapping):
        raise CheckpointError(f'{path} has no "extra" object with high-res settings; is it plain LLaVA?')
    for key, value in _FIXED.items():
        if given.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {given[key]!r}, only {value!r} can be loaded.")
    zoom = _number(extra, "zoom_ratio", path)
    low, high = _number(extra, "lowres_size", path), _number(extra, "highres_size", path)
    if zoom < 1 or high != zoom * low:
        raise CheckpointError(f"{path}: highres_size {high} is not lowres_size {low} times zoom_ratio {zoom}.")
    text = _text_config(given, path)
    if text.num_hidden_layers <= START_LAYER:
        raise CheckpointError(
            f"{path}: num_hidden_layers is {text.num_hidden_layers}, but published checkpoints read high-res "
            f"keys from layer {START_LAYER} on."
        )
    threshold = _number(extra, "threshold", path)
    if not 0 <= threshold < 255:
        raise CheckpointError(f"{path}: threshold is {threshold}, it has to be in 0 ... 254.")
    return PublishedSettings(
        text=text,
        flex=FlexConfig.published(
            start_layer=START_LAYER, zoom=zoom, policy=Threshold(threshold / 255).pooled(_POOLED)
        ),
        dtype=_dtype(given, path),
        vision_tower=_vision_tower(given, folder),
        low_res_size=low,
        vision_width=given.get("mm_hidden_size"),
        feature_layer=_number(given, "mm_vision_select_layer", path),
    )


def _text_config(given: Mapping[str, Any], path: Path) -> LlamaConfig:
    missing = [key for key in _REQUIRED if key not in given]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; download it again.")
    fields = {key: given[key] for key in (*_REQUIRED, *_OPTIONAL) if key in given}
    fields["vocab_size"] = _number(given, "vocab_size", path) + 1
    try:
        return LlamaConfig(**fields)
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(f"{path} does not describe a language model ({' '.join(str(error).split())}).") from error


def _vision_tower(given: Mapping[str, Any], folder: Path) -> str | Path:
    name = given.get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder / 'config.json'} lacks mm_vision_tower, where the vision tower is.")
    try:
        inside = (folder / name).is_dir() and not Path(name).is_absolute()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: mm_vision_tower is no name ({error}).") from error
    return path_inside(folder, name) if inside else name


def _number(settings: Mapping[str, Any], key: str, path: Path) -> int:
    """A whole number, which the published code writes as a string."""
    if key not in settings:
        raise CheckpointError(f"{path} lacks {key}; download it again.")
    try:
        return int(settings[key])
    except (OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {key} has to be a whole number, got {settings[key]!r}.") from error


def _dtype(given: Mapping[str, Any], path: Path) -> torch.dtype:
    name = given.get("torch_dtype", "float32")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if dtype not in FLOATS:
        raise CheckpointError(f"{path}: torch_dtype {name!r} is not a floating dtype of torch.")
    return dtype  # type: ignore[no-any-return]
