"""Finding the layer in which a frozen model localises, by what it can read there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexkit.errors import ConfigError, HighResInputError, PatchError
from flexkit.patching import FlexConfig, is_patched, patch_model, unpatch_model
from flexkit.patching.state import get_patch
from flexkit.patching.views import PREFIX
from flexkit.selection import Nothing, Schedule

__all__ = ["LayerProbe", "patched", "probe_start_layer", "without_high_res"]


@dataclass(frozen=True)
class LayerProbe:
    """How well a frozen model reads, with nothing trained, in each layer alone.

    Attributes
    ----------
    losses : dict of int to float
        From the index of a layer to the mean loss, in nats a label, when that layer alone reads high-res tokens.
    base_loss : float
        The same without high-res tokens.
    """

    losses: dict[int, float]
    base_loss: float

    @property
    def layer(self) -> int:
        """The first layer that lowers the loss by at least half of what the best one does.

        Its own map finds what is asked about. Of layers that read about as well the first is the one to start from:
        starting too early does little harm, starting too late leaves the details unread (:doc:`/evidence`).
        """
        best = min(self.losses, key=self.losses.__getitem__)
        enough = (layer for layer, loss in sorted(self.losses.items()) if self.base_loss - loss >= self.gain / 2)
        return next(enough, best)

    @property
    def gain(self) -> float:
        """By how many nats a label the best layer lowers the loss; 0 where none does."""
        return max(0.0, self.base_loss - min(self.losses.values()))


@torch.no_grad()
def probe_start_layer(
    model: nn.Module, samples: Iterable[Mapping[str, Any]], config: FlexConfig | None = None
) -> LayerProbe:
    """Find the layer to start from: let every layer read alone, with untrained copies, and compare the losses.

    A frozen model reads in the layer whose own map localises. So ``start_layer=probe.layer`` is the layer to start from
    without training. Trained projections read in the layers behind a map that localises: there,
    ``start_layer=probe.layer + 1``.

    Parameters
    ----------
    model : torch.nn.Module
        Not patched; it is the same afterwards.
    samples : iterable of dict
        Inputs of both views with ``labels``, such as a collator makes; a few dozen questions about details that the
        low-res view loses.
    config : FlexConfig, optional
        How the layers read; by default ``FlexConfig.training_free(gate=None)``. Its ``start_layer`` is not used.

    Returns
    -------
    LayerProbe
        The losses of all layers.

    Raises
    ------
    PatchError
        If the model is patched.
    ConfigError
        If the config reads what an earlier layer selected.
    HighResInputError
        If there are no samples, or one lacks labels or the high-res view.
    UnsupportedModelError
        If the model cannot be patched.
    """
    if is_patched(model):
        raise PatchError("the model is patched; probe before flexkit.patch_model, or after flexkit.unpatch_model.")
    config = config or FlexConfig.training_free(gate=None)
    if config.select_from != "same":
        raise ConfigError('layers are probed with select_from="same": untrained, only the layer that localises reads.')
    batches = list(samples)
    _check(batches)
    training = model.training
    model.eval()
    try:
        with patched(model, config.replace(start_layer=0)):
            patch = get_patch(model)
            layers, policy = list(patch.layers), patch.config.selector.policy
        losses = {}
        for layer in layers:
            own = policy.at(layer) if isinstance(policy, Schedule) else policy
            alone = Schedule({layer: own, layer + 1: Nothing()})
            with patched(model, config.replace(start_layer=layer, policy=alone)):
                losses[layer] = _mean_loss(model, batches)
        return LayerProbe(losses, _mean_loss(model, [without_high_res(batch) for batch in batches]))
    finally:
        model.train(training)


@contextmanager
def patched(model: nn.Module, config: FlexConfig) -> Iterator[None]:
    """The model patched, for as long as the block lasts; untrained projections are meant."""
    patch_model(model, config, trained=True)
    try:
        yield
    finally:
        unpatch_model(model)


def _mean_loss(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> float:
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    losses = [float(model(**batch).loss) for batch in batches]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def without_high_res(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of the base model among those of both views."""
    return {name: value for name, value in batch.items() if not name.startswith(PREFIX)}


def _check(batches: Sequence[Mapping[str, Any]]) -> None:
    if not batches:
        raise HighResInputError("there are no samples; give some batches of inputs with labels and both views.")
    for batch in batches:
        if "labels" not in batch or len(without_high_res(batch)) == len(batch):
            raise HighResInputError(
                f"a sample has {sorted(batch)}; it needs labels, and the high-res view that flexkit.FlexProcessor adds."
            )
