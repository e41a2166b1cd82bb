"""What the language model computes and keeps, on the meta device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from flexkit.measuring import count_flops, kept_bytes
from flexkit.patching.decoder import DecoderLayer, rotary_embedding
from flexkit.patching.state import Patch

__all__ = ["HighResReading", "TextCost", "text_cost"]


@dataclass(frozen=True)
class TextCost:
    """Operations, and the keys and values that are kept."""

    flops: int
    kv_bytes: int


def text_cost(model: PreTrainedModel, decoder: nn.Module, length: int, new_tokens: int) -> TextCost:
    """Of a prompt of ``length`` tokens, and every new one behind it."""
    cache = DynamicCache(config=decoder.config)

    def run(tokens: int) -> None:
        states = decoder(inputs_embeds=_states(model, tokens), past_key_values=cache, use_cache=True)
        model.get_output_embeddings()(states.last_hidden_state[:, -1:])

    flops = count_flops(lambda: run(length))
    kept = kept_bytes(cache)
    if new_tokens:
        first, then = count_flops(lambda: run(1)), count_flops(lambda: run(1))
        # Each step sees one key more than the one before.
        flops += new_tokens * first + (then - first) * new_tokens * (new_tokens - 1) // 2
        kept += (kept_bytes(cache) - kept) * new_tokens // 2
    return TextCost(flops, kept)


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
