"""Finding the layer in which a frozen model localises, by what it can read there."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flexkit.errors import ConfigError, HighResInputError, PatchError, UnsupportedModelError
from flexkit.patching import FlexConfig, is_patched, patch_model, unpatch_model
from flexkit.patching.geometry.base import PREFIX
from flexkit.patching.state import get_patch
from flexkit.selection import Nothing, Schedule

__all__ = ["LayerProbe", "patched", "probe_start_layer", "without_high_res"]


@dataclass(frozen=True, repr=False)
class LayerProbe:
    """How well a frozen model reads, with nothing trained, in each layer alone.

    Attributes
    ----------
    losses : dict of int to float
        From the index of a layer to the mean loss, in nats a label, when that layer alone reads high-res tokens.
    base_loss : float
        The same without high-res tokens.
    standard_errors : dict of int to float
        Of the losses, from sample to sample; NaN for a single sample.
    base_standard_error : float
        Of the base loss.
    gain_standard_errors : dict of int to float
        From the index of a layer to the standard error of how much lower its loss is than the base loss, sample by
        sample: what chance may make of the gain.
    """

    losses: dict[int, float]
    base_loss: float
    standard_errors: dict[int, float] = field(default_factory=dict)
    base_standard_error: float = math.nan
    gain_standard_errors: dict[int, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        error = self.gain_standard_errors.get(min(self.losses, key=self.losses.__getitem__), math.nan)
        return (
            f"LayerProbe(layer={self.layer}, gain={self.gain:.3g} ± {error:.2g}, base_loss={self.base_loss:.3g} ± "
            f"{self.base_standard_error:.2g}, {len(self.losses)} layers)"
        )

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
        low-res view loses. The standard errors are from sample to sample, so give one question in each. As no model is
        patched yet, the processor is told the zoom: ``flexkit.FlexProcessor(processor, 3)``. Labels are the prompt's
        ``input_ids`` with -100 wherever no answer stands.
    config : FlexConfig, optional
        How the layers read; by default ``FlexConfig.training_free(high_res_states="features", gate=None)``. Its
        ``start_layer`` is not used.

    Returns
    -------
    LayerProbe
        The losses of all layers, with standard errors.

    Raises
    ------
    PatchError
        If the model is patched.
    ConfigError
        If the config reads what an earlier layer selected.
    HighResInputError
        If there are no samples, one lacks the high-res view or labels, or its labels are all -100.
    UnsupportedModelError
        If the model cannot be patched, or gives no loss for labels.

    Examples
    --------
    >>> import flexkit
    >>> from flexkit.visual_search import draw_scene, load_model
    >>> model, processor = load_model("base")
    >>> both = flexkit.FlexProcessor(processor, 3)
    >>> answers = {0: "yellow? 9", 1: "red? 3", 2: "pink? 5"}
    >>> samples = []
    >>> for seed, answer in answers.items():
    ...     text = f"<image> Which digit is on the object that is {answer}"
    ...     sample = both(images=draw_scene(seed).image, text=text, return_tensors="pt")
    ...     sample["labels"] = sample["input_ids"].clone()
    ...     sample["labels"][:, :-1] = -100
    ...     samples.append(sample)
    >>> probe = flexkit.probe_start_layer(model, samples)
    >>> sorted(probe.losses), len(probe.standard_errors)
    ([0, 1, 2, 3], 4)
    """
    if is_patched(model):
        raise PatchError("the model is patched; probe before flexkit.patch_model, or after flexkit.unpatch_model.")
    config = config or FlexConfig.training_free(high_res_states="features", gate=None)
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
        weights = [_labels(model, number, batch) for number, batch in enumerate(batches)]
        base = [_loss(model, without_high_res(batch)) for batch in batches]
        read = {}
        for layer in layers:
            own = policy.at(layer) if isinstance(policy, Schedule) else policy
            alone = Schedule({layer: own, layer + 1: Nothing()})
            with patched(model, config.replace(start_layer=layer, policy=alone)):
                read[layer] = [_loss(model, batch) for batch in batches]
        base_loss, base_error = _mean(base, weights)
        means = {layer: _mean(losses, weights) for layer, losses in read.items()}
        gains = {layer: [before - loss for before, loss in zip(base, read[layer], strict=True)] for layer in layers}
        return LayerProbe(
            losses={layer: loss for layer, (loss, _) in means.items()},
            base_loss=base_loss,
            standard_errors={layer: error for layer, (_, error) in means.items()},
            base_standard_error=base_error,
            gain_standard_errors={layer: _mean(gain, weights)[1] for layer, gain in gains.items()},
        )
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


def _labels(model: Any, number: int, batch: Mapping[str, Any]) -> int:
    """How many labels the loss of a sample is the mean of."""
    # A decoder alone predicts from the position before; an encoder's decoder shifts what it is given by itself.
    labels = batch["labels"] if model.config.is_encoder_decoder else batch["labels"][:, 1:]
    count = int((labels != -100).sum())
    if not count:
        raise HighResInputError(f"sample {number} has no label but -100, so nothing to score; leave it out.")
    return count


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> float:
    output = model(**batch)
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise UnsupportedModelError(f"{type(model).__name__} gives no loss for labels, by which layers are compared.")
    return float(loss)


def _mean(losses: Sequence[float], weights: Sequence[int]) -> tuple[float, float]:
    """Mean loss a label, and its standard error, of samples with different numbers of labels (a ratio estimate)."""
    count, total = len(losses), sum(weights)
    mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / total
    if count < 2:
        return mean, math.nan
    squares = sum((weight * (loss - mean)) ** 2 for loss, weight in zip(losses, weights, strict=True))
    return mean, math.sqrt(count / (count - 1) * squares) / total


def without_high_res(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of the base model among those of both views."""
    return {name: value for name, value in batch.items() if not name.startswith(PREFIX)}


def _check(batches: Sequence[Mapping[str, Any]]) -> None:
    if not batches:
        raise HighResInputError("there are no samples; give some batches of inputs with labels and both views.")
    for batch in batches:
        if not isinstance(batch.get("labels"), Tensor) or len(without_high_res(batch)) == len(batch):
            raise HighResInputError(
                f"a sample has {sorted(batch)}; it needs labels, a tensor, and the high-res view that "
                "flexkit.FlexProcessor adds."
            )
