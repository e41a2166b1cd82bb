"""Every image-text-to-text model type that transformers knows: patched, or refused with a reason."""

import re
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as HEADS

import flexkit
from flexkit import FlexConfig, UnsupportedModelError
from flexkit.patching import get_patch
from flexkit.patching.families import REFUSED as REASONS
from tests.matrix import COLUMNS
from tests.zoo import CONTEXT, REFUSED, ZOO

MODELS = ZOO | {family.name: family for family in REFUSED}


@pytest.mark.parametrize("model_type", sorted(HEADS))
def test_type(model_type: str, fact: Any) -> None:
    family = MODELS[model_type]
    with torch.device("meta"):
        model = family.model_class(family.config())
    assert model.config.model_type == model_type
    if model_type not in flexkit.supported_models():
        reason = REASONS[model_type]
        with pytest.raises(UnsupportedModelError, match=re.escape(reason)):
            flexkit.patch_model(model)
        assert not flexkit.is_patched(model)
        fact(model_type, dict.fromkeys(COLUMNS[1:], "") | {"patched": "no: " + reason})
        return
    flexkit.patch_model(model, FlexConfig(start_layer=0, select_from="same"), trained=True)
    patch = get_patch(model)
    beside = family.name in CONTEXT
    every = patch.layers if beside else patch.decoder.layers
    names = {name for layer in patch.layers.values() for name, _ in layer.attention.named_children() if "_hd" in name}
    facts = {
        "patched": "yes",
        "image tokens": type(patch.geometry).__name__,
        "read in": "attention to the image"
        if beside
        else "every layer"
        if len(patch.layers) == len(every)
        else "layers with attention",
        "added": ", ".join(sorted(names)),
        "videos": _videos(model, [*patch.views]),
    }
    fact(model_type, facts)


def _videos(model: Any, geometries: Any) -> str:
    if len(geometries) == 2:
        return type(geometries[1]).__name__
    takes_some = any(hasattr(part, "get_video_features") for part in (model, getattr(model, "model", None)))
    return "in low resolution" if takes_some else "takes none"


def test_every_type_with_videos_is_in_the_laws() -> None:
    read = {name for name, family in MODELS.items() if family.video is not None}
    for name in flexkit.supported_models():
        family = MODELS.get(name)
        if family is None or name in REASONS:
            continue
        with torch.device("meta"):
            model = family.model_class(family.config())
        flexkit.patch_model(model, FlexConfig(start_layer=0, select_from="same"), trained=True)
        assert (len(get_patch(model).views) == 2) == (name in read)


def test_the_list_of_supported_models() -> None:
    assert set(flexkit.supported_models()) & set(HEADS) == set(HEADS) - set(REASONS)
    assert not set(flexkit.supported_models()) & set(REASONS)
