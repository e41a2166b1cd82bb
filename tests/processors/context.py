"""Processors for models whose attention reads the image from a context beside the decoder's sequence."""

from typing import Any

from tokenizers import AddedToken
from transformers import UdopTokenizer

from tests.processors.kind import TinyProcessor
from tests.zoo import END, START, VOCABULARY, Family
from tests.zoo.resamplers import aria

__all__ = ["CONTEXT"]

_SQUARE: dict[str, Any] = {"size": {"height": 42, "width": 42}}
_CROPPED: dict[str, Any] = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
_QUERIES = {"num_query_tokens": 4}
_NUMBERED: dict[str, Any] = {"patch_size": {"height": 2, "width": 2}}
_FEW = {"max_patches": 48}
_LARGE_ARIA = Family("aria", lambda: aria(490, 70), lambda *_: {})


def _of_blip(processor: Any) -> None:
    processor.image_token = AddedToken(processor.image_token, normalized=False, special=True)


def _of_kosmos(processor: Any) -> None:
    processor.tokenizer.padding_side = "right"


def _words(texts: list[str]) -> dict[str, Any]:
    """The words of a page, one under the other."""
    pages = [text.split() for text in texts]
    return {"text": pages, "boxes": [[[0.1, 0.1 * n, 0.4, 0.1 * n + 0.1] for n in range(len(page))] for page in pages]}


def _udop_tokenizer() -> UdopTokenizer:
    words = [(f"▁w{index}", -1.0) for index in range(4, VOCABULARY)]
    return UdopTokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *words])


CONTEXT = (
    TinyProcessor(
        "aria",
        {"max_image_size": 490},
        {"size_conversion": {490: 4}},
        call={"max_image_size": 490},
        overview={"split_image": False},
        family=_LARGE_ARIA,
    ),
    TinyProcessor("blip", _SQUARE, prompt=""),
    TinyProcessor("blip-2", _SQUARE, _QUERIES, prompt="", finish=_of_blip),
    TinyProcessor("instructblip", _SQUARE, _QUERIES, prompt="", finish=_of_blip),
    TinyProcessor("instructblipvideo", settings=_QUERIES, backends=(), refused="it takes videos"),
    TinyProcessor(
        "deepseek_ocr2",
        {"size": {"height": 48, "width": 48}, "tile_size": 48},
        {"patch_size": 1},  # the least number of learned queries is that of a picture of 48 x 48 cells
        overview={"crop_to_patches": False},
    ),
    TinyProcessor(
        "florence2",
        {"size": {"height": 48, "width": 48}, "do_center_crop": False, "image_seq_length": 10},
        prompt="",
    ),
    TinyProcessor("git", _CROPPED, prompt=""),
    TinyProcessor("idefics", {"image_size": 42}, tokens={80: "<fake_token_around_image>"}, prompt=""),
    TinyProcessor(
        "idefics2",
        {"size": {"shortest_edge": 42, "longest_edge": 42}},
        {"image_seq_len": 4},
        overview={"do_image_splitting": False},
    ),
    TinyProcessor(
        "kosmos-2",
        _CROPPED,
        {"num_patch_index_tokens": 0},
        {START: "<image_start>", END: "</image>"},
        processor="Kosmos2Processor",
        prompt="",
        call={"num_image_tokens": 4},
    ),
    TinyProcessor(
        "kosmos-2.5",
        _NUMBERED,
        {"num_image_tokens": 4},
        processor="Kosmos2_5Processor",
        prompt="",
        finish=_of_kosmos,
        call={**_FEW, "add_special_tokens": False},
    ),
    TinyProcessor("mllama", _SQUARE, overview={"max_image_tiles": 1}),
    TinyProcessor("pix2struct", _NUMBERED, prompt="", call=_FEW),
    TinyProcessor(
        "pp_formulanet",
        {"size": {"height": 48, "width": 48}},
        prompt="",
        given=lambda texts: {},
        backends=("torchvision",),
    ),
    TinyProcessor(
        "t5gemma2",
        {"size": {"height": 56, "width": 56}},
        {"image_seq_length": 4},
        {START: "<start_of_image>"},
        "<start_of_image>",
    ),
    TinyProcessor("udop", {**_SQUARE, "apply_ocr": False}, prompt="", given=_words, tokenizer=_udop_tokenizer),
    TinyProcessor(
        "vision-encoder-decoder",
        _SQUARE,
        prompt="",
        processor="TrOCRProcessor",
        image_processor="ViTImageProcessor",
    ),
    TinyProcessor(
        "vision-encoder-decoder-donut",
        {"size": {"height": 32, "width": 48}},
        prompt="",
        processor="DonutProcessor",
        image_processor="DonutImageProcessor",
    ),
)
