"""Many sequences in one list, as towers hold the windows of pictures of any size: all of one length attended at once.

Without a varlen kernel, such towers (Qwen2-VL and its kin) call theirs for one window, or picture, after the other. A
high-res view has many times the windows of a low-res one, so a prompt would cost a GPU what it launches for these.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from operator import mul
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

__all__ = ["together", "watch_packed"]

_ENDS = "cu_seqlens"
"""By this argument attention modules are given where sequences begin and end."""
_SCORES = 1 << 22
"""Up to how many products of queries and keys a head makes at once: not all kernels are fused."""
_SHORTEST = 16
"""To a kernel no sequence is shorter; nor does it take any number of them."""
_SPARED = 3
"""By how many calls fewer it has to take: to bring sequences together and back is work, too."""


@dataclass(frozen=True)
class _Sequences:
    """How sequences that lie one behind the other are brought together."""

    batches: list[tuple[int, int]]
    """How many, and how long, for every call of the kernel."""
    places: tuple[Tensor, Tensor] | None
    """The positions in the order of these, and where they are found there; None if they lie so."""

    @classmethod
    def between(cls, ends: Tensor) -> "_Sequences | None":
        """Those between some ends ``(sequences + 1,)``, integer, which the host waits for; None if it does not pay."""
        bounds = np.asarray(ends.tolist())
        lengths = np.diff(bounds)
        order = np.argsort(lengths, kind="stable")
        batches: list[tuple[int, int]] = []
        for length, same in itertools.groupby(lengths[order].tolist()):
            count, most = len(list(same)), max(1, _SCORES // max(length, _SHORTEST) ** 2)
            batches += [(min(most, count - begin), length) for begin in range(0, count, most)]
        if len(lengths) < len(batches) + _SPARED:
            return None
        places = None
        if not np.array_equal(lengths, lengths[order]):
            moved = np.concatenate([np.arange(bounds[index], bounds[index + 1]) for index in order])
            there, back = (torch.from_numpy(each).to(ends.device) for each in (moved, np.argsort(moved)))
            places = there, back
        return cls(batches, places)

    @property
    def sizes(self) -> list[int]:
        """Positions of each batch."""
        return list(itertools.starmap(mul, self.batches))

    def attend(
        self, kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """Attention within each of them; queries, keys and values are ``(1, heads, positions, head_dim)``."""
        if self.places is not None:
            query, key, value = (states.index_select(2, self.places[0]) for states in (query, key, value))
        each = zip(*(torch.split(states[0], self.sizes, dim=1) for states in (query, key, value)), strict=True)
        found = []
        for batch, parts in zip(self.batches, each, strict=True):
            output = kernel(*(part.unflatten(1, batch).transpose(0, 1) for part in parts), **options)
            found.append(output.transpose(0, 1).flatten(1, 2))
        joined = (found[0] if len(found) == 1 else torch.cat(found, dim=1))[None]
        return joined if self.places is None else joined.index_select(2, self.places[1])


class _Together(TorchFunctionMode):
    """While entered, an attention that was handed one sequence in the place of many is of these."""

    waiting: _Sequences | None = None
    """Those of the module that runs, until its attention is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._known: list[tuple[Tensor, _Sequences | None]] = []

    def between(self, ends: Tensor) -> _Sequences | None:
        """The sequences between some ends, which all layers share; None if each is better left alone."""
        for other, known in self._known:
            if other is ends:
                return known
        self._known.append((ends, _Sequences.between(ends)))
        return self._known[-1][1]

    def check(self) -> None:
        """Raise RuntimeError if a module has attended otherwise."""
        if self.waiting is not None:
            count = sum(count for count, _ in self.waiting.batches)
            raise RuntimeError(
                f"an attention module was handed {count} sequences as one, and did not ask "
                "scaled_dot_product_attention for them."
            )

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and self.waiting is not None:
            sequences, self.waiting = self.waiting, None
            return sequences.attend(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_CURRENT: ContextVar[_Together | None] = ContextVar("together", default=None)


@contextmanager
def together() -> Iterator[None]:
    """Let watched modules attend to all sequences of one length at once, in this thread, while the block runs."""
    if torch.compiler.is_compiling():
        yield
        return
    with _Together() as mode:
        token = _CURRENT.set(mode)
        try:
            yield
        finally:
            _CURRENT.reset(token)
    mode.check()


def watch_packed(model: nn.Module) -> Iterator[RemovableHandle]:
    """Hooks on the attention modules of a model that take many sequences in one list."""
    taking = [module for module in model.modules() if _takes_many(type(module).forward) and hasattr(module, "config")]
    for module in taking:
        if not any(part in taking for part in module.modules() if part is not module):
            yield module.register_forward_pre_hook(_as_one, with_kwargs=True)


@cache
def _takes_many(forward: Callable[..., Any]) -> bool:
    return _ENDS in inspect.signature(forward).parameters


def _as_one(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Hand a module all of its sequences as one, and note which they are."""
    if torch.compiler.is_compiling() or (mode := _CURRENT.get()) is None:
        return None
    mode.check()
    ends = kwargs.get(_ENDS)
    if not isinstance(ends, Tensor) or module.config._attn_implementation != "sdpa":
        return None
    mode.waiting = mode.between(ends)
    if mode.waiting is None:
        return None
    return args, {**kwargs, _ENDS: torch.tensor([0, sum(mode.waiting.sizes)])}  # of the host, which the module asks
