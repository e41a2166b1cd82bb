"""A dataset of conversations, whose images are read when they are wanted."""

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from flexkit.errors import ConfigError, DataError
from flexkit.training.conversations import Conversation, read_records

__all__ = ["ConversationDataset"]

AnyPath = str | PathLike[str]
_NAMED = 10
"""How many samples a warning names."""


class ConversationDataset(Dataset[Conversation]):
    """Conversations of LLaVA's format, from one file or several, with their images.

    All records are checked at once, and that their images exist; a picture is opened when its sample is asked for. With
    ``on_error="skip"`` one that is broken is named by a warning, and the next sample that can be read stands in for it,
    so that batches keep their size and processes keep step. Workers of a data loader count together.

    Parameters
    ----------
    files : str or os.PathLike or sequence of str
        JSON arrays, or JSON lines (``.jsonl``).
    images : str or os.PathLike, optional
        The folder that paths of images start from; by default that of each file.
    repeats : sequence of float, optional
        For each file how often an epoch has its samples: 2 takes each twice, 0.5 one half, drawn once by ``seed``.
    on_error : {"raise", "skip"}
        Whether a sample that cannot be used is an error, or is left out, named and counted.
    seed : int
        Of that draw.

    Attributes
    ----------
    unusable : torch.Tensor
        uint8 (records): 1 for each that was found to be unusable so far, in memory that workers share.

    Raises
    ------
    DataError
        If a file cannot be read, a record is no conversation or an image is missing; with ``on_error="skip"`` if
        nothing is left. When a sample is asked for: if its image is broken.
    ConfigError
        If repeats do not fit the files.

    Examples
    --------
    .. code-block:: python

        dataset = ConversationDataset(["llava.json", "mine.jsonl"], "images", repeats=[1, 2])
        dataset[0].messages, dataset[0].images
    """

    def __init__(
        self,
        files: AnyPath | Sequence[AnyPath],
        images: AnyPath | None = None,
        *,
        repeats: Sequence[float] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        seed: int = 0,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ConfigError(f'on_error must be "raise" or "skip", got {on_error!r}.')
        paths = [Path(file) for file in ([files] if isinstance(files, str | PathLike) else files)]
        repeats = [1.0] * len(paths) if repeats is None else repeats
        if not paths or len(repeats) != len(paths) or not all(0 < times < math.inf for times in repeats):
            raise ConfigError(f"repeats= must be a number above 0 for each of {len(paths)} files, got {list(repeats)}.")
        self.on_error = on_error
        self._refused: list[str] = []
        self._maps: tuple[Callable[[Conversation], Conversation], ...] = ()
        # In one text, which forked workers share: a million objects would be copied as they are counted.
        texts: list[bytes] = []
        order: list[np.ndarray[Any, Any]] = []
        for number, (path, times) in enumerate(zip(paths, repeats, strict=True)):
            first = len(texts)
            texts += self._read(path, path.parent if images is None else Path(images))
            order.append(first + _repeated(len(texts) - first, times, [seed, number]))
        self._warn(self._refused)
        self._text, self._ends = b"".join(texts), np.cumsum([0, *map(len, texts)])
        self._order = np.concatenate(order)
        if not len(self._order):
            raise DataError(f"{', '.join(map(str, paths))}: no sample is left to train on.")
        self.unusable = torch.zeros(len(texts), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Conversation:
        """A conversation with its images, as RGB pictures.

        Raises
        ------
        DataError
            If it cannot be used, or none can.
        """
        index = range(len(self))[index]
        for following in range(len(self)):
            place = int(self._order[(index + following) % len(self)])
            if self.unusable[place]:
                continue
            try:
                return self._load(place)
            except DataError as error:
                if self.on_error == "raise":
                    raise
                self.unusable[place] = 1
                self._warn([str(error)])
        raise DataError(f"none of {len(self)} samples can be used.")

    def map(self, function: Callable[[Conversation], Conversation]) -> Self:
        """The same samples, to each of which a function is applied when it is asked for.

        Parameters
        ----------
        function : callable
            Takes a conversation with its images; if it raises DataError, the sample cannot be used.

        Returns
        -------
        ConversationDataset
            Another, which counts together with this one.
        """
        mapped = copy.copy(self)
        mapped._maps = (*self._maps, function)
        return mapped

    @property
    def skipped(self) -> list[str]:
        """What was refused at once, with the reason, and which samples any worker has found to be unusable so far."""
        found = [self._record(place).source for place in self.unusable.nonzero()[:, 0].tolist()]
        return [*self._refused, *found]

    def _read(self, path: Path, folder: Path) -> Iterator[bytes]:
        for name, read in read_records(path):
            try:
                conversation = Conversation.from_record(read(), name)
                places = [str(folder / image) for image in conversation.images]
                for place in places:
                    if not Path(place).is_file():
                        raise DataError(f"{conversation.source}: there is no image {place}.")
            except DataError as error:
                if self.on_error == "raise":
                    raise DataError(f"{error} Correct it, or have such samples skipped.") from error
                self._refused.append(str(error))
            else:
                yield json.dumps(asdict(replace(conversation, images=places))).encode()

    def _record(self, place: int) -> Conversation:
        return Conversation(**json.loads(self._text[self._ends[place] : self._ends[place + 1]]))

    def _load(self, place: int) -> Conversation:
        conversation = self._record(place)
        images = [_picture(path, conversation.source) for path in conversation.images]
        conversation = replace(conversation, images=images)
        for function in self._maps:
            conversation = function(conversation)
        return conversation

    def _warn(self, reasons: Sequence[str]) -> None:
        if reasons:
            more = f" and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
            warnings.warn(f"left out: {' '.join(reasons[:_NAMED])}{more}", stacklevel=3)


def _repeated(count: int, times: float, seed: Sequence[int]) -> np.ndarray[Any, Any]:
    """Indices of samples, each so many times."""
    whole, rest = divmod(round(times * count), count) if count else (0, 0)
    drawn = np.sort(np.random.default_rng(seed).permutation(count)[:rest])
    return np.concatenate([np.tile(np.arange(count), whole), drawn])


def _picture(path: str, source: str) -> Image.Image:
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{source}: image {path} cannot be read ({error}).") from error
