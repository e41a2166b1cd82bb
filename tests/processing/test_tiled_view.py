"""Tiles that are read from a source are those that the whole high-res view would be cut into."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

import flexkit
from flexkit import ArraySource, FlexProcessor, HighResInputError, PictureSource, UnsupportedModelError
from flexkit.encoding import split_tiles
from flexkit.processing.views import choose_tiled_view, choose_view
from flexkit.processing.views.fixed import fixed_view
from tests.processing.pictures import PROCESSORS, image_prompt, noise, picture
from tests.processors import PROCESSORS as TINY
from tests.processors import TinyProcessor

FIXED = ("gemma3", "llava", "llava padded", "llava siglip")
SIZES = [(200, 200), (300, 170), (150, 330)]


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture without details: filters agree about it wherever a tile is cut."""
    return Image.fromarray(noise(5, 5, seed)).resize((width, height), Image.Resampling.BICUBIC)


def inputs_of(processor: Any, name: str, images: Any, zoom: Any = 2, **settings: Any) -> Any:
    count = len(images) if isinstance(images, list) else 1
    text = " ".join([image_prompt(name)] * count)
    return FlexProcessor(processor, zoom, **settings)(images=images, text=text, return_tensors="pt")


def tiles_of(view: flexkit.TileView, level: int = 0) -> Tensor:
    rows, columns = view.zooms[level]
    return view.read(level, range(rows * columns))[0]


def far(tiles: Tensor, expected: Tensor) -> float:
    """How far tiles are from what is expected, as a share of all the values there are."""
    return float((tiles - expected).abs().mean() / (expected.max() - expected.min()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("zoom", [(2, 2), (3, 3), (2, 1)])
@pytest.mark.parametrize("name", FIXED)
def test_tiles_are_cut_from_the_whole(name: str, zoom: tuple[int, int], size: tuple[int, int]) -> None:
    processor, image = PROCESSORS[name](), smooth(*size)
    whole = inputs_of(processor, name, image, zoom)
    tiled = inputs_of(processor, name, PictureSource(image), zoom)
    assert torch.equal(tiled["pixel_values"], whole["pixel_values"])
    assert "hd_pixel_values" not in tiled
    assert ("hd_image_sizes" in tiled) == ("hd_image_sizes" in whole)
    if "hd_image_sizes" in whole:
        assert torch.equal(tiled["hd_image_sizes"], whole["hd_image_sizes"])
    (view,) = tiled["hd_tiles"]
    assert far(tiles_of(view), split_tiles(whole["hd_pixel_values"], zoom)[0]) < 0.02


@pytest.mark.parametrize("name", FIXED)
def test_levels_show_the_same_in_finer_tiles(name: str) -> None:
    (view,) = inputs_of(PROCESSORS[name](), name, smooth(300, 200), levels=3)["hd_tiles"]
    assert view.zooms == ((2, 2), (4, 4), (8, 8))
    for level in (1, 2):
        (finer,) = inputs_of(PROCESSORS[name](), name, PictureSource(smooth(300, 200)), 2 ** (level + 1))["hd_tiles"]
        assert torch.equal(tiles_of(view, level), tiles_of(finer))


THIN = st.integers(1, 3)
SIDE = st.one_of(THIN, st.integers(1, 120), st.integers(1, 2000))


@given(height=SIDE, width=SIDE, zoom=st.sampled_from([(1, 1), (2, 2), (3, 3), (5, 5)]), name=st.sampled_from(FIXED))
def test_tiles_of_noise_are_to_the_bit_those_of_the_whole(
    height: int, width: int, zoom: tuple[int, int], name: str
) -> None:
    assume(height * width <= 400_000 and max(height, width) <= 400 * min(height, width))  # the whole view is as long
    image = picture(height, width)
    whole = inputs_of(PROCESSORS[name](), name, image, zoom)
    for source in (PictureSource(image), ArraySource(np.asarray(image))):
        tiled = inputs_of(PROCESSORS[name](), name, source, zoom)
        assert torch.equal(tiled["pixel_values"], whole["pixel_values"])
        (view,) = tiled["hd_tiles"]
        assert torch.equal(tiles_of(view), split_tiles(whole["hd_pixel_values"], zoom)[0])


@pytest.mark.parametrize(("height", "width"), [(300, 500), (1000, 700), (1000, 10), (1, 100), (3000, 20)])
@pytest.mark.parametrize("name", FIXED)
def test_pictures_that_are_padded_or_thin(height: int, width: int, name: str) -> None:
    image = picture(height, width)
    whole = inputs_of(PROCESSORS[name](), name, image)
    (view,) = inputs_of(PROCESSORS[name](), name, ArraySource(np.asarray(image)))["hd_tiles"]
    assert torch.equal(tiles_of(view), split_tiles(whole["hd_pixel_values"], 2)[0])


@given(
    zoom=st.sampled_from([(2, 1), (2, 3), (4, 3)]), height=SIDE, width=st.integers(1, 120), name=st.sampled_from(FIXED)
)
def test_a_zoom_for_each_axis_differs_by_rounding_alone(
    zoom: tuple[int, int], height: int, width: int, name: str
) -> None:
    assume(max(height, width) <= 400 * min(height, width))
    image = picture(height, width)
    whole = inputs_of(PROCESSORS[name](), name, image, zoom)
    (view,) = inputs_of(PROCESSORS[name](), name, ArraySource(np.asarray(image)), zoom)["hd_tiles"]
    expected = split_tiles(whole["hd_pixel_values"], zoom)[0]
    # The view is shrunk in float32, which places of pixels are rounded to, and colours change from one to the next.
    side, span = max(zoom) * max(expected.shape[-2:]), float(expected.max() - expected.min())
    bound = torch.finfo(torch.float32).eps * side * max(span, 1.0)
    torch.testing.assert_close(tiles_of(view), expected, rtol=0, atol=bound)


def test_large_pictures_are_shown_from_an_overview() -> None:
    """Of more than 2048 pixels, they are resized twice, which noise shows the most of."""
    image = smooth(2304, 3000)
    whole = inputs_of(PROCESSORS["llava padded"](), "llava", image)
    tiled = inputs_of(PROCESSORS["llava padded"](), "llava", ArraySource(np.asarray(image)))
    assert far(tiled["pixel_values"], whole["pixel_values"]) < 1 / 255
    assert torch.equal(tiles_of(tiled["hd_tiles"][0]), split_tiles(whole["hd_pixel_values"], 2)[0])


OF_ONE_SIZE = {
    name: tiny
    for name, tiny in TINY.items()
    if "pil" in tiny.runs_here() and not tiny.refused and choose_view(tiny.build("pil").image_processor) is fixed_view
}


@pytest.mark.parametrize("name", OF_ONE_SIZE)
def test_every_family_reads_tiles_as_it_cuts_them(name: str) -> None:
    tiny: TinyProcessor = OF_ONE_SIZE[name]
    call = {**tiny.call, **tiny.given([tiny.prompt])}
    processor = FlexProcessor(tiny.build("pil"), 2)

    def views(image: Any) -> Any:
        return processor(images=[[image]] if tiny.nested else [image], **call, return_tensors="pt")

    # Of pictures so thin some make nothing, and one mistakes their height for a number of channels.
    thin = () if any(part in name for part in ("ocr2", "donut", "video_llava")) else ((1, 200), (250, 1))
    for size in ((160, 192), (97, 31), (20, 190), *thin):
        image = picture(*size)
        whole, tiled = views(image), views(PictureSource(image))
        (view,) = tiled["hd_tiles"]
        names = [key for key in ("hd_pixel_values", "hd_high_res_pixel_values") if key in whole]
        for key, tiles in zip(names, view.read(0, range(4)), strict=True):
            pixels = torch.as_tensor(np.asarray(whole[key]))
            expected = split_tiles(pixels.reshape(-1, *pixels.shape[-3:])[:1], 2)[0]
            assert torch.equal(tiles, expected)


@settings(max_examples=10)
@given(height=st.integers(30, 400), width=st.integers(30, 400), name=st.sampled_from(FIXED))
def test_sources_that_are_no_pictures_are_read_alike(height: int, width: int, name: str) -> None:
    image = smooth(height, width)
    (picture,) = inputs_of(PROCESSORS[name](), name, PictureSource(image))["hd_tiles"]
    array = inputs_of(PROCESSORS[name](), name, ArraySource(np.asarray(image)))
    assert torch.equal(tiles_of(picture), tiles_of(array["hd_tiles"][0]))
    assert torch.equal(array["pixel_values"], inputs_of(PROCESSORS[name](), name, image)["pixel_values"])


def test_sources_and_pictures_of_one_call() -> None:
    images = [smooth(90, 60, seed) for seed in range(3)]
    mixed = [images[0], PictureSource(images[1]), ArraySource(np.asarray(images[2]))]
    inputs = inputs_of(PROCESSORS["llava padded"](), "llava", mixed)
    for view, image in zip(inputs["hd_tiles"], images, strict=True):
        (alone,) = inputs_of(PROCESSORS["llava padded"](), "llava", PictureSource(image))["hd_tiles"]
        assert torch.equal(tiles_of(view), tiles_of(alone))
    assert inputs["hd_image_sizes"].tolist() == [[90, 60]] * 3
    moved = inputs.to(torch.float64)
    assert moved["hd_tiles"] == inputs["hd_tiles"]


def test_sources_in_a_chat() -> None:
    processor = PROCESSORS["llava"]()
    processor.chat_template = "{% for message in messages %}<image>{% endfor %}"
    chat = [{"role": "user", "content": [{"type": "image", "image": PictureSource(smooth(90, 60))}]}]
    inputs = FlexProcessor(processor, 2).apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    (alone,) = inputs_of(processor, "llava", PictureSource(smooth(90, 60)))["hd_tiles"]
    assert torch.equal(tiles_of(inputs["hd_tiles"][0]), tiles_of(alone))


def test_only_what_is_asked_for_is_read() -> None:
    class Counting(ArraySource):
        seen = 0

        def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
            self.seen += (bottom - top) * (right - left)
            return super().region(top, left, bottom, right)

    source = Counting(np.asarray(smooth(1200, 1200)))
    (view,) = inputs_of(PROCESSORS["llava"](), "llava", source, levels=4)["hd_tiles"]
    source.seen = 0
    view.read(3, [17])
    assert source.seen < 1200 * 1200 / 16**2 * 2


def test_image_processors_that_do_something_else_are_refused() -> None:
    class Turning(CLIPImageProcessorPil):
        def center_crop(self, image: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
            return super().center_crop(np.ascontiguousarray(image[:, ::-1]), *args, **kwargs)

    processor = PROCESSORS["llava"]()
    processor.image_processor = Turning(**processor.image_processor.to_dict())
    with pytest.raises(UnsupportedModelError, match="Turning does something else with pictures"):
        inputs_of(processor, "llava", PictureSource(smooth(90, 60)))
    with pytest.raises(UnsupportedModelError, match="Turning does something else with pictures"):
        FlexProcessor(processor, 2).shown(smooth(90, 60))


def test_transparent_pictures_are_read_as_without_tiles() -> None:
    image = picture(60, 90).convert("RGBA")
    image.putalpha(Image.fromarray(noise(60, 90, 1, channels=1)[..., 0]))
    for each in (image, image.convert("P"), image.convert("L")):
        whole = inputs_of(PROCESSORS["llava"](), "llava", each)
        (view,) = inputs_of(PROCESSORS["llava"](), "llava", PictureSource(each))["hd_tiles"]
        assert torch.equal(tiles_of(view), split_tiles(whole["hd_pixel_values"], 2)[0])


@pytest.mark.parametrize(
    ("name", "size", "shown", "box"),
    [
        ("llava", (100, 60), (61, 60), (0, -19)),
        ("llava", (1, 100), (1, 1), (-50, 0)),
        ("llava padded", (100, 60), (100, 100), (20, 0)),
        ("llava padded", (100, 1), (100, 100), (49, 0)),
        ("llava padded", (10, 1000), (1000, 1000), (0, 495)),
        ("llava siglip", (100, 60), (100, 60), (0, 0)),
        ("qwen", (100, 60), (100, 60), (0, 0)),
    ],
)
def test_what_is_shown_of_a_picture(
    name: str, size: tuple[int, int], shown: tuple[int, int], box: tuple[int, int]
) -> None:
    """In its own pixels, and padding of the colour that the image processor pads with."""
    image = picture(*size)
    processor = PROCESSORS[name]()
    mean = getattr(processor.image_processor, "image_mean", (0, 0, 0))
    expected = Image.new("RGB", shown[::-1], tuple(int(255 * share) for share in mean))
    expected.paste(image, box)
    for given_as in (image, PictureSource(image), ArraySource(np.asarray(image))):
        assert np.array_equal(np.asarray(FlexProcessor(processor, 2).shown(given_as)), np.asarray(expected))


def test_towers_of_any_size_read_no_tiles() -> None:
    with pytest.raises(UnsupportedModelError, match="no tiles to read one by one"):
        inputs_of(PROCESSORS["qwen"](), "qwen", PictureSource(smooth(90, 60)))


@pytest.mark.parametrize(
    ("mark", "problem"), [("overlap_margins", "without smoothing"), ("crop_margin", "looks at a picture")]
)
def test_pictures_of_which_tiles_would_look_different_are_refused(mark: str, problem: str) -> None:
    processor = PROCESSORS["llava"]()
    setattr(processor.image_processor, mark, None)
    with pytest.raises(UnsupportedModelError, match=problem):
        choose_tiled_view(processor.image_processor)(
            processor.image_processor, [PictureSource(smooth(90, 60))], {"pixel_values": torch.zeros(1)}, {}, ((2, 2),)
        )


def test_tiles_of_floats_are_refused() -> None:
    floats = np.random.default_rng(0).random((60, 60, 3), dtype=np.float32)
    with pytest.raises(HighResInputError, match="uint8 in RGB"):
        inputs_of(PROCESSORS["llava"](), "llava", floats, levels=2)
