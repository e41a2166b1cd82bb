"""The layer to start reading from, asked of the data that a model will be trained on."""

from typing import Any

import numpy as np
import torch

from flexkit.errors import DataError
from flexkit.patching import FlexConfig, get_patch
from flexkit.probing import LayerProbe, patched, probe_start_layer
from flexkit.processing import FlexProcessor
from flexkit.training.collator import ConversationCollator
from flexkit.training.dataset import ConversationDataset

__all__ = ["choose_start_layer"]


def choose_start_layer(
    model: Any,
    processor: Any,
    dataset: ConversationDataset,
    config: FlexConfig,
    *,
    samples: int = 32,
    chat_template: str | None = None,
) -> tuple[FlexConfig, LayerProbe]:
    """Probe the layers of a model with samples of a dataset, and start behind the one that localises.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched; it is the same afterwards.
    processor : transformers.ProcessorMixin
        Its processor.
    dataset : ConversationDataset
        Of which samples with images are taken, evenly spaced.
    config : FlexConfig
        The settings to be trained with.
    samples : int
        How many, at most.
    chat_template : str, optional
        As for :class:`ConversationCollator`.

    Returns
    -------
    config : FlexConfig
        With the start layer; as it was if no layer lowers the loss by two standard errors.
    probe : LayerProbe
        See :func:`flexkit.probe_start_layer`.

    Raises
    ------
    DataError
        If no sample has an image.
    """
    with patched(model, config):
        zoom = get_patch(model).config.zoom_pair
    collator = ConversationCollator(FlexProcessor(processor, zoom), chat_template=chat_template)
    chosen = np.linspace(0, len(dataset), min(samples, len(dataset)), endpoint=False).astype(int)
    conversations = [conversation for conversation in map(dataset.__getitem__, chosen.tolist()) if conversation.images]
    if not conversations:
        raise DataError(f"none of {len(chosen)} samples has an image by which layers could be told apart.")
    batches = [
        {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in collator([each]).items()}
        for each in conversations
    ]
    free = FlexConfig.training_free(high_res_states="features", gate=None, zoom=zoom)
    probe = probe_start_layer(model, batches, free)
    if not is_sure(probe):
        return config, probe
    layer = probe.layer + (config.select_from == "previous")
    return config.replace(start_layer=min(layer, max(probe.losses))), probe


def is_sure(probe: LayerProbe) -> bool:
    """Whether the layer lowers the loss by more than two standard errors."""
    return probe.base_loss - probe.losses[probe.layer] > 2 * probe.gain_standard_errors[probe.layer]
