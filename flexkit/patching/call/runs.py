"""How often the text model runs in a call that reads own states of high-res tokens, and on what.

A token can only pass through the layers once all of them have run its image. So the text model runs, and notes which
tokens its rows selected that are not there; these are run, and the querying rows again, until nothing is missing.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, QuantizedLayer, StaticLayer

from flexkit.attention.layer import HighResKeys
from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.select import hidden_cells, select_once
from flexkit.attention.visible import VisibleImages, hidden_keys
from flexkit.errors import HighResInputError
from flexkit.grids import fractional_positions
from flexkit.patching.call.call import FlexCall
from flexkit.patching.call.one_selection import OneSelection
from flexkit.patching.call.own_states import LayerKeys, OwnStates, Passing
from flexkit.patching.memory.high_res import HighResMemory
from flexkit.patching.memory.resident import move_in
from flexkit.patching.memory.tokens import ImageSpan, Prefix, alike, by_rows, tokens_by_image
from flexkit.patching.seam.attention import Silent
from flexkit.patching.seam.config_view import CALL
from flexkit.patching.seam.decoder import DecoderLayer, embeddings_of

__all__ = ["Saying", "entropy_of", "read_own_states"]

_OWN = ("inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "vision_mask")
"""Arguments of the text model by position that tokens have of their own."""
_TOGETHER = 1024
"""How many tokens of a batch row are run at a time, which bounds the mask of what each of them sees."""


@dataclass
class Saying(Silent):
    """Stands in the place of a call while a model says what it makes of hidden states that a run left."""

    hidden: Tensor
    """``(batch, 1, dim)``."""
    own: ClassVar[None] = None

    def said(self, output: Any) -> Any:
        """The text model's output, with these states in the place of what it made."""
        if isinstance(output, tuple):
            return self.hidden, *output[1:]
        return type(output)(**output | {next(iter(output)): self.hidden})


def read_own_states(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the text model: run the tokens that are missing, and the querying rows again, until none is."""
    first = kwargs.get(CALL)
    if isinstance(first, Saying):
        return first.said(output)
    if not isinstance(first, FlexCall) or first.own is None or torch.compiler.is_compiling():
        return output
    inputs = kwargs
    if args:  # a signature takes as long to make as a layer's masks
        names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        inputs = dict(zip(names, args, strict=False)) | kwargs
    call, own, memory, written = first, first.own, first.memory, None
    layers, ends = call.patch.layers, [own.past + own.length] * memory.batch
    reading, base = torch.zeros(memory.batch, dtype=torch.bool, device=memory.device), output
    while (unread := _unread(call, own, inputs, output)) is not None:
        reading = reading | unread.flatten(1).any(1) if call.one is None else call.one.given.flatten(1).any(1)
        if not bool(reading.any()):
            output, written = base, None
            continue
        wanted, final = _wanted(own, unread, call)
        _note_prefixes(memory, own, layers, final, inputs)
        held = _run_tokens(decoder, call, own, wanted)
        call, own = _again(call, own, held)
        written = DynamicCache(config=decoder.config)
        rest = _from(inputs, own) | {"past_key_values": written, CALL: call}
        output = _joined(base, decoder.forward(**rest), reading)
    _note_prefixes(memory, own, layers, ends, inputs)
    if call.projection == "full":
        own.held = _run_tokens(decoder, call, own, memory.ends <= own.past + own.length)
    if call.keeps:
        limit = call.patch.config.limit_kept(memory.tokens)
        memory.projected = {
            index: held if own.read is None or held.key.shape[2] <= limit else held.only(own.read)
            for index, held in own.held.items()
        }
    if call.one is not None and call.rows.count:
        if call.one.shut is not None:
            blank = torch.zeros_like(call.rows.mask)
            call.shut = RaggedIndex(call.rows.scatter(call.one.shut, blank))
        call.selections = dict.fromkeys(layers, call.one.selection(call.levels[0]))
        memory.answer = call.one.answer(memory.answer)
    if call is not first:
        first.last = call
    cache = inputs.get("past_key_values") or _cache_of(output)
    shapes = {index: known.key.shape for index, known in own.keys.items()}
    for done in () if call.training else (first.own, own):  # layers may be computed again there, by checkpointing
        done.keys, done.behind, done.held = {}, {}, {}  # or the cache would be there several times
    if written is not None:
        _replace_end(cache, written, own, reading)
    if call.one is not None and (call.reads_by_kernel or not call.one.reads) and call.keeps:
        call.memory = move_in(cache, memory, shapes, _hidden(call, memory))
    return output


def _hidden(call: FlexCall, memory: HighResMemory) -> Tensor | None:
    """``(batch, positions)``, bool: low-res tokens in whose place the answers read others, if they read so."""
    if call.hides is None or memory.answer is None:
        return None
    images = [VisibleImages(group, group.columns) for group in call.levels[0]]
    return hidden_cells(memory.answer.tokens[:, None], images, memory.seen, dilation=call.hides)[:, 0]


def _unread(call: FlexCall, own: OwnStates, inputs: Mapping[str, Any], output: Any) -> Tensor | None:
    """``(batch, queries, tokens)``, bool: what rows selected and could not read; None if all is as it will be."""
    if own.missing is not None and bool(own.missing.any()):
        return own.missing
    one, config = call.one, call.patch.config
    if one is None:
        return None
    gate, surer = (None, None) if call.training else (config.gate, config.surer)
    if surer is not None and one.doubt is not None and one.fresh is not None:
        now = _doubt(call, own, one, inputs, output, one.selecting(one.fresh))
        unsure = one.fresh.any(-1) & (now > surer * one.doubt)
        one.doubt = None
        if bool(unsure.any()):
            one.shut_out(unsure)
            return torch.zeros_like(one.given)
    while not one.is_decided:
        merged = select_once(config.selector, [call.selections[layer] for layer in sorted(call.sources)])
        if gate is not None or surer is not None:
            one.doubt = _doubt(call, own, one, inputs, output, one.next)
        unread = one.decide(merged.tokens(call.memory.batch, call.memory.tokens), call.behind)
        one.scores = merged.scores
        if gate is not None and one.doubt is not None:
            one.shut_out(one.doubt < gate)
            unread = unread & one.given
        if bool(unread.any()):
            return unread
    return None


def _doubt(
    call: FlexCall, own: OwnStates, one: OneSelection, inputs: Mapping[str, Any], output: Any, slots: Tensor
) -> Tensor:
    """``(batch,)``: entropy, in nats, of what the model says at one querying row of every batch row."""
    model, rows = call.patch.model, torch.arange(call.memory.batch, device=slots.device)
    places = one.positions[rows, slots] - (own.past + own.length)  # from the end, which is there in any case
    hidden = output[0][rows, places.clamp_min(-output[0].shape[1])]
    word = int(getattr(model.config, "image_token_id", None) == 0)  # any that stands for no image
    said = {"input_ids": torch.full_like(rows, word)[:, None], "use_cache": False, CALL: Saying(hidden[:, None])}
    if inputs.get("position_ids") is not None:  # or a model may note positions of its own
        said["position_ids"] = inputs["position_ids"][..., -1:]
    logits: Tensor = call.patch.own_method(model, "forward")(**said).logits
    return entropy_of(logits[:, -1])


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy, in nats, of the distributions that logits ``(..., vocabulary)`` stand for."""
    log_probabilities = torch.log_softmax(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    entropy: Tensor = torch.special.entr(log_probabilities.exp()).sum(-1)
    return entropy


def _wanted(own: OwnStates, unread: Tensor, call: FlexCall) -> tuple[Tensor, list[int]]:
    """The tokens that can be run of those that are unread, and in front of where each batch row is final.

    What stands in front of the first row that has not read all it selected will not change. So the tokens of images
    that end there can be run; rows behind may want those of later images.
    """
    lack = unread.any(-1) & call.rows.valid
    places = torch.where(lack, call.rows.index + own.past + own.start, own.past + own.length)
    final = places.amin(-1).tolist()
    known = call.memory.ends <= torch.tensor(final, device=unread.device)[:, None]
    return known if call.projection == "full" else known & unread.any(1), final


def _again(call: FlexCall, own: OwnStates, held: Mapping[int, HighResKeys]) -> tuple[FlexCall, OwnStates]:
    """The call from its first querying position on, with these own states."""
    start = int(call.rows.mask.any(0).int().argmax())
    own = own.again(start, held)
    return call.querying(call.rows.mask[:, start:], past=call.past + start, own=own, one=call.one), own


def _note_prefixes(
    memory: HighResMemory,
    own: OwnStates,
    layers: Mapping[int, DecoderLayer],
    ends: Sequence[int],
    inputs: Mapping[str, Any],
) -> None:
    """Note what the last low-res tokens of images see that end in this call, and in front of ``ends``."""
    new = [span for span in memory.images if not span.prefix and own.past < span.end <= ends[span.row]]
    if not new:
        return
    last = np.zeros((memory.batch, own.length), dtype=bool)
    for span in new:
        last[span.row, span.end - own.past - 1] = True
    rows = RaggedIndex(torch.from_numpy(last).to(memory.device))
    seen: dict[tuple[object, ...], tuple[Tensor | None, list[list[int]]]] = {}

    def visible(span: ImageSpan, known: LayerKeys, *, asks: bool = False) -> tuple[Tensor, int]:
        """What its last low-res token sees, up to itself, and where that begins, if that is asked."""
        kind = *known.kind, asks
        if kind not in seen:
            mask = known.rows(rows, own.past)
            mask = None if mask is None else (~hidden_keys(mask)).any(1)
            seen[kind] = mask, mask.int().argmax(-1).tolist() if asks and mask is not None else []
        (of_rows, firsts), columns = seen[kind], span.end - known.offset
        if of_rows is None:
            return torch.ones(columns, dtype=torch.bool, device=memory.device), 0
        row, place = min(span.row, len(of_rows) - 1), int(last[span.row, : span.end - own.past - 1].sum())
        return of_rows[row, place, :columns], firsts[row][place] if asks else 0

    batch = memory.batch, own.length
    by_word = {
        name: value
        for name, value in inputs.items()
        if name not in _OWN and isinstance(value, Tensor) and value.shape[:2] == batch
    }
    noted = {}
    for span in new:
        prefix, shared = {}, dict[tuple[object, ...], Prefix]()
        for index, known in own.keys.items():
            if layers[index].is_windowed or known.sliding_window is not None:  # its cache forgets them
                mask, first = visible(span, known, asks=True)
                parts = (part[span.row, :, first : len(mask)].clone() for part in (known.key, known.value))
                prefix[index] = Prefix(mask[first:], *parts)
            else:
                if known.kind not in shared:
                    shared[known.kind] = Prefix(visible(span, known)[0])
                prefix[index] = shared[known.kind]
        typed = {name: value[span.row, span.end - own.past - 1] for name, value in by_word.items()}
        noted[span] = replace(span, prefix=prefix, typed=typed)
    memory.images = tuple(noted.get(span, span) for span in memory.images)


def _run_tokens(decoder: nn.Module, call: FlexCall, own: OwnStates, wanted: Tensor) -> dict[int, HighResKeys]:
    """The own states that are there, and those of the tokens ``(batch, tokens)`` that are wanted besides."""
    memory, held = call.memory, dict(own.held)
    first = next(iter(held.values()), None)
    wanted = wanted if first is None else wanted & ~first.tokens.mask
    order = wanted.cumsum(-1) - 1
    for begin in range(0, int(wanted.sum(-1).amax()), _TOGETHER):
        tokens = RaggedIndex(wanted & (order >= begin) & (order < begin + _TOGETHER))
        features = memory.features.of(tokens, memory.images, call.encode)
        places = [found for found in tokens_by_image(memory.images, tokens) if found[2] is None or len(found[2])]
        passing = Passing(call.patch.layers, own.keys, tokens, places)
        typed = {
            name: _laid_out(tokens, [(span.row, place, span.typed[name][None]) for span, place, _ in places])
            for name in places[0][0].typed
        }
        entering = embeddings_of(call.patch.model, decoder, features, tokens.valid)
        positions = _positions(memory, tokens)
        decoder.forward(position_ids=positions, use_cache=False, **entering, **typed, **{CALL: passing})
        for index in call.patch.reading:
            key, value = (states.nan_to_num() for states in passing.states[index])
            new = HighResKeys(key, value, tokens)
            held[index] = held[index].and_then(new) if index in held else new
    return held


def _laid_out(tokens: RaggedIndex, parts: Sequence[tuple[int, Any, Tensor]]) -> Tensor:
    """``(batch, tokens, ...)`` of parts ``(tokens or 1, ...)`` of batch rows; zero where rows are padded."""
    first = parts[0][2]
    whole = first.new_zeros(*tokens.index.shape, *first.shape[1:])
    for row, place, states in parts:
        whole[row, place] = states
    return whole


def _positions(memory: HighResMemory, tokens: RaggedIndex) -> Tensor:
    """``([axes,] batch, tokens)``: where tokens lie between the low-res ones."""
    images, found = [], []
    for spans, positions in alike(memory.images):
        if positions is None:
            raise RuntimeError("the rotary positions of an image are unknown: the text model ran without its hook.")
        images.append(spans)
        found.append(fractional_positions(positions, spans[0].grid, spans[0].zoom).movedim(0, -1))
    whole = tokens.gather(by_rows(images, found, memory.batch, memory.tokens)).movedim(-1, 0)
    return whole if len(whole) > 1 else whole[0]


def _from(inputs: Mapping[str, Any], own: OwnStates) -> dict[str, Any]:
    """The text model's arguments for a run from ``own.start`` on, which sees by what is behind it."""
    start, length = own.start, own.length
    embeds = inputs["inputs_embeds"]
    batch = len(embeds)
    cut: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name in ("position_ids", "cache_position"):
            cut[name] = value[..., start:]
        elif isinstance(value, Tensor) and value.shape[:2] == (batch, length):
            cut[name] = value[:, start:]
        elif name == "deepstack_visual_embeds" and value is not None:
            behind = inputs["visual_pos_masks"].nonzero()[:, 1] >= start
            cut[name] = [states[behind] for states in value]
        elif name == "deepstack_features" and value is not None:
            behind = inputs["vision_mask"][..., 0].nonzero()[:, 1] >= start
            cut[name] = {layer: states[behind] for layer, states in value.items()}
        else:
            cut[name] = value
    if cut.get("position_ids") is None:
        cut["position_ids"] = (own.past + torch.arange(start, length, device=embeds.device))[None]
    return cut | {"attention_mask": None, "use_cache": True}


def _joined(whole: Any, end: Any, reading: Tensor) -> Any:
    """An output of the call, and that of a run of its end in the place of its end, in the batch rows that read."""
    if isinstance(whole, Tensor):
        differ = [axis for axis, (a, b) in enumerate(zip(whole.shape, end.shape, strict=True)) if a != b]
        axis = differ[0] if differ else 1
        front, before = whole.tensor_split([whole.shape[axis] - end.shape[axis]], dim=axis)
        rest = torch.where(reading.view(-1, *[1] * (end.ndim - 1)), end, before)
        return torch.cat([front, rest], dim=axis) if front.numel() else rest
    if isinstance(whole, Cache) or end is None:
        return whole
    if isinstance(whole, Mapping):
        return type(whole)(**{name: _joined(value, end.get(name), reading) for name, value in whole.items()})
    return tuple(_joined(*both, reading) for both in zip(whole, end, strict=False))


def _cache_of(output: Any) -> Cache | None:
    values = output if isinstance(output, tuple) else output.values()
    return next((value for value in values if isinstance(value, Cache)), None)


def _replace_end(cache: Cache | None, written: DynamicCache, own: OwnStates, reading: Tensor) -> None:
    """Put what the last run wrote in the place of what the first one left in a cache, in the batch rows that read."""
    if cache is None:
        return
    mask, end = reading[:, None, None, None], own.past + own.length
    for slot, new in zip(cache.layers, written.layers, strict=False):
        if isinstance(slot, QuantizedLayer):
            raise HighResInputError(
                "own states of high-res tokens need a cache in which the last positions can be written again, and this "
                "one is quantised; use another cache_implementation."
            )
        if slot.keys is None or new.keys is None:  # shares those of another layer
            continue
        stop = min(end, slot.keys.shape[2]) if isinstance(slot, StaticLayer) else slot.keys.shape[2]
        count = min(new.keys.shape[2], stop)
        for name in ("keys", "values"):
            old, states = getattr(slot, name), getattr(new, name)[:, :, new.keys.shape[2] - count :]
            states = torch.where(mask, states, old[:, :, stop - count : stop].to(states.device)).to(old.device)
            if isinstance(slot, StaticLayer):
                old[:, :, stop - count : stop] = states
            else:
                setattr(slot, name, torch.cat([old[:, :, : stop - count], states], dim=2))
