"""Published FlexAttention checkpoints, loaded into the LLaVA of transformers."""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from flexkit.checkpoints.files import checkpoint_file, read_json
from flexkit.checkpoints.flex import load_added
from flexkit.checkpoints.hub import HubOptions, fetched_tensors
from flexkit.checkpoints.llava_config import START_LAYER, PublishedSettings, read_settings
from flexkit.checkpoints.tensors import check_tensors, read_tensors
from flexkit.checkpoints.vision import vision_settings, vision_weights
from flexkit.errors import CheckpointError
from flexkit.patching import added_parameters, patch_model

__all__ = ["load_llava_flexattn"]

_TOWER = "model.vision_tower."
# From the names in a LLaVA of transformers to those of the file; the first match wins.
_PUBLISHED = {
    "model.vision_tower.vision_model.": "model.vision_tower.vision_tower.vision_model.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
}
_PROJECTION = re.compile(r"(.*\.layers\.(\d+)\.self_attn\.[kv]_proj)(_hd)?(\.\w+)")
_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_channels",
    "patch_size",
)
# Older versions of transformers saved what follows from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")


def load_llava_flexattn(
    folder: str | PathLike[str],
    vision_config: CLIPVisionConfig | Mapping[str, Any] | str | PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    **hub: Unpack[HubOptions],
) -> LlavaForConditionalGeneration:
    """Load a published FlexAttention checkpoint as a patched LLaVA.

    The settings are the published ones: high-res keys from layer 9 on, thresholded maps pooled to 9 x 9
    (section 3.2 of the paper). The vocabulary gets one more row, the image placeholder
    ``model.config.image_token_id``, which is never generated: its logit is always 0 and it is among the
    ``suppress_tokens``.

    Parameters
    ----------
    folder : str or os.PathLike
        The checkpoint: ``config.json`` with ``model_type`` "llava_llama" and safetensors, in shards or whole; or the
        name of a repository on the Hugging Face hub that holds it, such as ``"senfu/llava-v1.5-7b-flexattn"``.
    vision_config : transformers.CLIPVisionConfig, mapping, str or os.PathLike, optional
        The vision tower's configuration, the same as plain JSON, or the folder of a CLIP. By default that of
        the tower that the checkpoint names, in its own folder or on the hub. If the checkpoint holds no
        vision weights they are read from that folder or tower too.
    dtype : torch.dtype, optional
        Of the weights, by default the checkpoint's own.
    **hub
        ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only`` and ``subfolder``, as in
        ``from_pretrained`` of transformers.

    Returns
    -------
    transformers.LlavaForConditionalGeneration
        On the CPU, in eval mode.

    Raises
    ------
    CheckpointError
        If the checkpoint is of another kind, incomplete, inconsistent or not in safetensors.
    """
    folder = fetched_tensors(folder, ("config.json",), **hub)
    settings = read_settings(folder)
    tower = vision_config if isinstance(vision_config, str | PathLike) else settings.vision_tower
    config = settings.llava_config(vision_settings(tower if vision_config is None else vision_config))
    tensors = _used_tensors(folder)
    if not any(name.startswith(_TOWER) for name in tensors):
        tensors |= {_published(f"{_TOWER}{name}"): weight for name, weight in vision_weights(tower).items()}
    _check_sizes(config, tensors, folder)
    base = _base_shapes(config)
    check_tensors(_expected(base), tensors, source=folder)

    state = _with_placeholder({name: tensors[_published(name)] for name in base})
    model = LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype or settings.dtype
    )
    model.generation_config = _generation_config(folder, settings)
    patch_model(model, settings.flex, trained=True)
    load_added(model, {name: tensors[_published(name)] for name in added_parameters(model)}, source=folder)
    return model.eval()


def _published(name: str) -> str:
    for ours, theirs in _PUBLISHED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _used_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the file but those that no one reads: it has added projections for early layers too."""
    tensors = read_tensors(folder)
    for name in list(tensors):
        projection = _PROJECTION.fullmatch(name)
        if name.endswith(_DERIVED) or (projection and projection[3] and int(projection[2]) < START_LAYER):
            del tensors[name]
    return tensors


def _check_sizes(config: LlavaConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """What is described has to be of the order of what the files hold, before it is built."""
    layers, most = len(tensors), max((tensor.numel() for tensor in tensors.values()), default=0)
    for part in (config.text_config, config.vision_config):
        said = {name: getattr(part, name, None) for name in _SIZES} | {"num_hidden_layers": part.num_hidden_layers}
        for name, size in said.items():
            limit = layers if name == "num_hidden_layers" else most
            # The vocabulary has one row more than the file.
            if size is not None and not (isinstance(size, int) and 0 < size <= limit + 1):
                raise CheckpointError(
                    f"{folder / 'config.json'} does not fit its weights: {name} is {size!r}, but there are {layers} "
                    f"tensors of at most {most} values; download both again."
                )


def _base_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes in the checkpoint, under the names of transformers: without the placeholder's row."""
    try:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(config)
    except Exception as error:  # an activation that there is not, a base that is no number: each has its own
        raise CheckpointError(f"the settings describe no LLaVA ({type(error).__name__}: {error}).") from error
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[_HEAD]
    for name in shapes.keys() & {_EMBEDDING, _HEAD}:
        shapes[name] = (shapes[name][0] - 1, shapes[name][1])
    return shapes


def _expected(base: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes in the checkpoint, under its own names: W'_K and W'_V are shaped like W_K and W_V."""
    expected = {_published(name): shape for name, shape in base.items()}
    for name, shape in list(expected.items()):
        projection = _PROJECTION.fullmatch(name)
        if projection and not name.startswith(_TOWER) and int(projection[2]) >= START_LAYER:
            expected[f"{projection[1]}_hd{projection[4]}"] = shape
    return expected


def _with_placeholder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One more row of vocabulary: an embedding like any other, and a logit of 0."""
    embedding = state[_EMBEDDING]
    mean = embedding.float().mean(0, keepdim=True).to(embedding.dtype)
    state = state | {_EMBEDDING: torch.cat([embedding, mean])}
    if _HEAD in state:
        state[_HEAD] = torch.cat([state[_HEAD], torch.zeros_like(state[_HEAD][:1])])
    return state


def _generation_config(folder: Path, settings: PublishedSettings) -> GenerationConfig:
    name = "generation_config.json"
    saved = read_json(folder, name) if checkpoint_file(folder, name) else {}
    tokens = {name: getattr(settings.text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig.from_dict(tokens | saved | {"suppress_tokens": [settings.image_token_id]})
