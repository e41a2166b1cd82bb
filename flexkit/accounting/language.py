"""What the language model computes and keeps, on the meta device."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from flexkit.measuring import count_flops, count_flops_of
from flexkit.patching.seam.decoder import DecoderLayer, rotary_embedding
from flexkit.patching.state import Patch

__all__ = ["HighResReading", "TextCost", "own_states_cost", "text_cost"]


@dataclass(frozen=True)
class TextCost:
    """Operations, and the keys and values that are kept."""

    flops: int
    kv_bytes: int


def text_cost(model: PreTrainedModel, decoder: Any, length: int, new_tokens: int) -> TextCost:
    """Of a prompt of ``length`` tokens, and every new one behind it; of layers that are alike, one is run."""
    cache = DynamicCache(config=decoder.config)

    def run(tokens: int) -> None:
        states = decoder(inputs_embeds=_states(model, tokens), past_key_values=cache, use_cache=True)
        model.get_output_embeddings()(states.last_hidden_state[:, -1:])

    with _alike_once(decoder) as times:

        def cost_of(tokens: int) -> TextCost:
            flops = _count(partial(run, tokens), decoder, times)
            return TextCost(flops, sum(times[index] * _bytes(cache.layers[index]) for index in times))

        prompt = cost_of(length)
        if not new_tokens:
            return prompt
        first, then = cost_of(1), cost_of(1)
    # Each step sees one key more than the one before.
    steps = new_tokens * first.flops + (then.flops - first.flops) * new_tokens * (new_tokens - 1) // 2
    return TextCost(prompt.flops + steps, prompt.kv_bytes + (then.kv_bytes - prompt.kv_bytes) * new_tokens // 2)


def own_states_cost(
    model: PreTrainedModel, decoder: Any, image: int, length: int, new_tokens: int, tokens: int
) -> TextCost:
    """What one selection of own states adds to a prompt of ``length`` tokens, and every new one behind it.

    The layers run so many tokens behind those of the image, and the last one of the prompt once more. That one makes a
    map in all layers, and it and the new ones attend to the tokens, too.
    """
    if not tokens:
        return TextCost(0, 0)
    heads: int = decoder.config.num_attention_heads

    def run(before: int, count: int) -> int:
        cache = DynamicCache(config=decoder.config)
        settings = {"past_key_values": cache, "use_cache": True}
        if before:
            decoder(inputs_embeds=_states(model, before), **settings)
        return _count(lambda: decoder(inputs_embeds=_states(model, count), **settings), decoder, times)

    with _alike_once(decoder) as times:
        flops = run(image, tokens) + run(length - 1, 1)
        cache = DynamicCache(config=decoder.config)
        decoder(inputs_embeds=_states(model, 1), past_key_values=cache, use_cache=True)
        held = [(count, cache.layers[index]) for index, count in times.items() if _bytes(cache.layers[index])]
        kept = tokens * sum(count * _bytes(layer) for count, layer in held)
        key, value = (
            sum(count * getattr(layer, name).shape[-1] for count, layer in held) for name in ("keys", "values")
        )
    return TextCost(flops + 2 * heads * (length * key + (new_tokens + 1) * tokens * (key + value)), kept)


def _count(run: Callable[[], object], decoder: Any, times: Mapping[int, int]) -> int:
    """Operations of a run, in which each of these layers stands for so many."""
    total, own = count_flops_of(run, {index: decoder.layers[index] for index in times})
    return total + sum((times[index] - 1) * count for index, count in own.items())


@contextmanager
def _alike_once(decoder: Any) -> Iterator[dict[int, int]]:
    """Let only the first of the layers that are alike run, and say how many each stands for, by its index."""
    kinds = getattr(decoder.config, "layer_types", None)
    alike = [_likeness(layer, kinds[index] if kinds else None) for index, layer in enumerate(decoder.layers)]
    layers, counts = list(decoder.layers), Counter(alike)
    firsts = {likeness: alike.index(likeness) for likeness in counts}
    echoes = {likeness: _Echo() for likeness in counts}
    hooks = [layers[first].register_forward_hook(echoes[likeness].listen) for likeness, first in firsts.items()]
    for index, likeness in enumerate(alike):
        if index != firsts[likeness]:
            decoder.layers[index] = echoes[likeness]
    try:
        yield {first: counts[likeness] for likeness, first in firsts.items()}
    finally:
        for hook in hooks:
            hook.remove()
        for index, layer in enumerate(layers):
            decoder.layers[index] = layer


def _likeness(layer: nn.Module, kind: str | None) -> tuple[object, ...]:
    """What layers that compute the same have in common."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    windows = tuple(getattr(part, "sliding_window", None) for part in layer.children())
    return type(layer), kind, shapes, windows


class _Echo(nn.Module):
    """Gives again what a layer that it listens to gave."""

    given: Any = None

    def listen(self, layer: nn.Module, args: object, output: object) -> None:
        self.given = output

    def forward(self, *args: object, **kwargs: object) -> Any:
        return self.given


def _bytes(layer: Any) -> int:
    """Of the keys and values of a cache's layer; 0 in layers that keep something else."""
    kept = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(int(part.nbytes) for part in kept if part is not None)


@dataclass(frozen=True)
class HighResReading:
    """What reading high-res tokens adds."""

    patch: Patch

    def projection(self, tokens: int) -> TextCost:
        """K' and V' of so many tokens in every layer."""
        if not tokens:
            return TextCost(0, 0)
        made: list[Tensor] = []

        def run() -> None:
            for layer in self.patch.reading.values():
                made.extend(self._project(layer, tokens))

        flops = count_flops(run)
        return TextCost(flops, sum(part.nbytes for part in made))

    def attention_flops(self, keys: int, steps: int, tokens: int) -> int:
        """Operations of positions that query one after another: maps over the base keys, and reading.

        Parameters
        ----------
        keys : int
            Base keys that the first one sees; each later one sees one more.
        steps : int
            How many positions.
        tokens : int
            High-res tokens that each reads among.
        """
        key, value = (part.shape[-1] for part in self._project(next(iter(self.patch.reading.values())), 1))
        replaces = self.patch.config.low_res_keys == "replace"
        products = 0
        for index, layer in self.patch.layers.items():
            seen = _seen(keys, steps, getattr(layer.attention, "sliding_window", None) or keys + steps)
            products += seen * key
            if index in self.patch.reading:
                products += steps * tokens * (key + value) + replaces * seen * value
        decoder: Any = self.patch.decoder
        return int(2 * decoder.config.num_attention_heads * products)

    def _project(self, layer: DecoderLayer, tokens: int) -> tuple[Tensor, Tensor]:
        """K' and V', each ``(1, key_heads, tokens, head_dim)``."""
        features = _states(self.patch.decoder, tokens)
        positions = torch.zeros(1, 1, tokens, device="meta")
        return layer.project(features, rotary_embedding(self.patch.decoder, layer, features, positions))


def _seen(keys: int, steps: int, window: int) -> int:
    """Keys that positions see one after another, the first ``keys``, each one more, and no more than the window."""
    growing = min(max(window - keys, 0), steps)
    return growing * keys + growing * (growing - 1) // 2 + (steps - growing) * window


def _states(model: Any, tokens: int) -> Tensor:
    width = model.get_input_embeddings().embedding_dim
    return torch.empty(1, tokens, width, dtype=model.dtype, device="meta")
