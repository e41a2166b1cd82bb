"""What plots, animations and pages show is what the trace holds."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import flexkit
from flexkit import ConfigError
from flexkit.visual_search import draw_scene, load_model
from tests.zoo import VIDEOS, Row, prompt

pytest.importorskip("matplotlib")
QUESTION = "<image> Which digit is on the object that is pink?"


@pytest.fixture(scope="module")
def traced() -> tuple[flexkit.Trace, Image.Image, list[str]]:
    model, processor = load_model()
    image = draw_scene(3, 400).image.crop((0, 0, 400, 300))
    inputs = processor(images=image, text=QUESTION, return_tensors="pt")
    with flexkit.trace(model) as trace, torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    words = [processor.decode(token) for token in output[0, inputs["input_ids"].shape[1] :]]
    return trace, processor.shown(image), words


def test_one_panel_for_each_word_and_layer(traced: Any) -> None:
    trace, image, words = traced
    figure = flexkit.plot_selection(trace, image, words=words)
    panels = [axes for axes in figure.axes if axes.images and len(axes.images) == 3]
    assert len(panels) == len(trace) * len(trace.layers)
    assert [axes.get_title() for axes in panels[: len(trace.layers)]] == [f"map of layer {k}" for k in trace.layers]
    assert [panels[place].get_ylabel() for place in (0, len(trace.layers))] == [word.strip() for word in words]


def test_a_strip_over_layers(traced: Any) -> None:
    trace, image, words = traced
    figure = flexkit.plot_selection(trace, image, words=words, steps=[-1], layers=[1, 3])
    panels = [axes for axes in figure.axes if len(axes.images) == 3]
    assert [axes.get_title() for axes in panels] == ["map of layer 1", "map of layer 3"]
    for axes, layer in zip(panels, (1, 3), strict=True):
        shown = np.asarray(axes.images[2].get_array())
        mask = trace.mask(-1, layer)[0].numpy()
        assert shown.shape[:2] == image.size[::-1]
        rows, columns = (
            (np.arange(length) + 0.5) / length * side for length, side in zip(image.size[::-1], mask.shape, strict=True)
        )
        at = mask[rows.astype(int)][:, columns.astype(int)]
        assert np.array_equal(shown[..., 3] == 255, at) and set(np.unique(shown[..., 3])) == {0, 255}
        inside = shown[..., 3] == 255
        assert np.array_equal(shown[inside][:, :3], np.asarray(image)[inside])
        scores = np.asarray(axes.images[1].get_array())
        expected = trace.scores(-1, layer)[0]
        assert np.allclose(scores, expected / expected.max())


@pytest.fixture(scope="module")
def filmed() -> tuple[flexkit.Trace, list[Image.Image]]:
    """A video of two low-res frames, for each of which there are two of 4 x 6 cells, and the frames."""
    family = VIDEOS["qwen2_vl-video"]
    model, inputs = family.model(), prompt(family, [Row()], zoom=(2, 2, 2))
    policy = flexkit.TopK(2).over_frames()
    flexkit.patch_model(model, flexkit.FlexConfig(zoom=(2, 2, 2), policy=policy), trained=True)
    with flexkit.trace(model) as trace:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return trace, [Image.new("RGB", (60, 40), (40 * index, 90, 200)) for index in range(2)]


def test_a_video_has_a_panel_for_each_frame(filmed: Any) -> None:
    trace, frames = filmed
    figure = flexkit.plot_selection(trace, frames, layers=[2])
    panels = [axes for axes in figure.axes if len(axes.images) == 3]
    assert [axes.get_title() for axes in panels] == ["layer 2, frame 0", "layer 2, frame 1"] + [""] * 2
    for step in range(2):
        mask = trace.mask(step, 2)[0].unflatten(0, (2, 2)).any(1)
        for frame in range(2):
            shown = np.asarray(panels[2 * step + frame].images[2].get_array())
            assert np.array_equal(shown[5::10, 5::10, 3] == 255, mask[frame].numpy())
            assert tuple(shown[0, 0, :3]) == frames[frame].getpixel((0, 0))
    last = flexkit.plot_selection(trace, frames)
    assert last.axes[0].get_title() == f"layer {trace.layers[-1]}, frame 0"


def test_a_video_goes_on_from_frame_to_frame(filmed: Any, tmp_path: Path) -> None:
    trace, frames = filmed
    flexkit.animate_selection(trace, frames, tmp_path / "looks.gif", steps=[0], dpi=40)
    with Image.open(tmp_path / "looks.gif") as animation:
        assert animation.n_frames == 2


@pytest.mark.parametrize(("seconds", "dpi"), [(0.8, 40), (0.25, 41)])  # of even and odd sides
def test_mp4_shows_what_a_gif_does(filmed: Any, tmp_path: Path, seconds: float, dpi: int) -> None:
    pytest.importorskip("av")
    trace, frames = filmed
    for name in ("looks.gif", "looks.mp4"):
        flexkit.animate_selection(trace, frames, tmp_path / name, dpi=dpi, seconds=seconds)
    film = flexkit.open_video(tmp_path / "looks.mp4")
    with Image.open(tmp_path / "looks.gif") as animation:
        width, height = animation.size
        assert len(film) == animation.n_frames == 4 and film.seconds == pytest.approx(4 * seconds, rel=0.01)
        assert film.size == (height + height % 2, width + width % 2)
        for index, shown in enumerate(film.read(range(4))):
            animation.seek(index)
            expected = np.asarray(animation.convert("RGB")).astype(int)
            found = shown[:height, :width].astype(int)
            assert np.abs(found - expected).mean() < 4 < np.abs(found - 255).mean()


def test_animations_that_cannot_be_written(filmed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, frames = filmed
    for name in ("looks.webm", "looks"):
        with pytest.raises(ConfigError, match=rf"ends in '{Path(name).suffix}'; .* \.gif or \.mp4"):
            flexkit.animate_selection(trace, frames, tmp_path / name)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"video files need PyAV: pip install 'flexkit-vlm\[video\]'"):
        flexkit.animate_selection(trace, frames, tmp_path / "looks.mp4", steps=[0], dpi=40)
    assert not [*tmp_path.iterdir()]


def test_a_page_of_a_video_has_its_frames(filmed: Any, tmp_path: Path) -> None:
    trace, frames = filmed
    flexkit.selection_page(trace, frames, tmp_path / "page.html")
    data = json.loads(_Markup((tmp_path / "page.html").read_text(encoding="utf-8")).data)
    assert len(data["pictures"]) == 2 and len(data["looks"]) == 2 * len(trace.layers) * 2
    mask = trace.mask(1, trace.layers[0])[0].unflatten(0, (2, 2)).any(1)
    look = data["looks"]["1 0 1"]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(look["mask"]), np.uint8))[: mask[1].numel()]
    assert np.array_equal(bits.reshape(look["maskGrid"]).astype(bool), mask[1].numpy())


def test_pictures_that_do_not_fit(filmed: Any, traced: Any, tmp_path: Path) -> None:
    trace, frames = filmed
    with pytest.raises(ConfigError, match="1 pictures were given for a video of 2 low-res frames"):
        flexkit.plot_selection(trace, frames[0])
    with pytest.raises(ConfigError, match="1 pictures were given for a video of 2 low-res frames"):
        flexkit.selection_page(trace, frames[0], tmp_path / "page.html")
    with pytest.raises(ConfigError, match="2 pictures were given for one picture"):
        flexkit.plot_selection(traced[0], [traced[1]] * 2)


def test_animations_have_a_frame_for_each_word(traced: Any, tmp_path: Path) -> None:
    trace, image, words = traced
    flexkit.animate_selection(trace, image, tmp_path / "looks.gif", words=words, layers=[1], dpi=40)
    with Image.open(tmp_path / "looks.gif") as animation:
        assert animation.n_frames == len(trace) and animation.is_animated


def test_pages_hold_what_they_show(traced: Any, tmp_path: Path) -> None:
    trace, image, words = traced
    path = tmp_path / "looks.html"
    flexkit.selection_page(trace, image, path, words=["</script>", words[1]], question="Is 1 < 2?")
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page), "nothing is fetched"
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert data["words"][0] == "</script>" and data["layers"] == trace.layers and data["question"] == "Is 1 < 2?"
    for step in range(len(trace)):
        for place, layer in enumerate(trace.layers):
            look = data["looks"][f"{step} {place} 0"]
            bits = np.unpackbits(np.frombuffer(base64.b64decode(look["mask"]), dtype=np.uint8))
            mask = trace.mask(step, layer)[0].numpy()
            assert np.array_equal(bits[: mask.size].reshape(look["maskGrid"]).astype(bool), mask)
            assert look["fraction"] == pytest.approx(float(mask.mean()))


class _Markup(HTMLParser):
    """The tags and comments of a page, and what stands between them in its data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.data = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[Any]) -> None:
        self.found.append((tag, attributes))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(tag)

    def handle_comment(self, data: str) -> None:
        self.found.append(data)

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1] == ("script", [("id", "data"), ("type", "application/json")]):
            self.data += data


MARKUP = (
    "<!--",
    "<script>",
    "</script>",
    "@DATA@",
    "@QUESTION@",
    "<img src=x onerror=alert(1)>",
    "\u2028",
    "\ud800",
    "&lt;",
)
any_text = st.lists(st.one_of(st.text(st.characters()), st.sampled_from(MARKUP)), max_size=4).map("".join)


@given(question=any_text, word=any_text.filter(str.strip))
@example(question="@DATA@", word="<img src=x onerror=alert(1)>")
@example(question="<!--", word="<script>")
@example(question="\udc00\ud800", word="\ud83d")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_is_markup(traced: Any, tmp_path: Path, question: str, word: str) -> None:
    trace, image, words = traced
    image, path = image.resize((8, 8)), tmp_path / "looks.html"
    flexkit.selection_page(trace, image, path, words=words, question="")
    plain = _Markup(path.read_text(encoding="utf-8"))
    flexkit.selection_page(trace, image, path, words=[word, words[1]], question=question)
    page = _Markup(path.read_text(encoding="utf-8"))
    assert page.found == plain.found
    data = json.loads(page.data)
    assert (data["question"], data["words"][0]) == (question, word.strip())


def test_what_is_shown_is_padded_as_the_model_sees_it(traced: Any) -> None:
    _, image, _ = traced
    assert image.size == (400, 400)
    border, inside = np.asarray(image)[:48], np.asarray(image)[60:340]
    assert (border == border[0, 0]).all() and inside.std() > 1


def test_what_is_cropped_is_not_shown() -> None:
    from tests.tiny_processors import tiny_llava_processor, tiny_qwen_processor

    image = draw_scene(0, 300).image.crop((0, 0, 300, 200))
    cropped = flexkit.FlexProcessor(tiny_llava_processor(), 2).shown(image)
    assert cropped.size == (200, 200) or abs(cropped.width - 200) < 10
    assert flexkit.FlexProcessor(tiny_qwen_processor(), 2).shown(image).size == image.size


def test_wrong_uses_are_told(traced: Any) -> None:
    trace, image, _ = traced
    with pytest.raises(ConfigError, match="the trace is empty"):
        flexkit.plot_selection(flexkit.Trace(), image)
    with pytest.raises(ConfigError, match="1 words were given for 2 steps"):
        flexkit.plot_selection(trace, image, words=["one"])
    with pytest.raises(ConfigError, match="no batch row 4"):
        flexkit.plot_selection(trace, image, row=4)
    with pytest.raises(ConfigError, match="there is no step"):
        flexkit.plot_selection(trace, image, layers=[17])


def test_a_shut_gate_is_told(tmp_path: Path) -> None:
    model, processor = load_model("base")
    processor = flexkit.FlexProcessor(processor, flexkit.patch_model(model, flexkit.FlexConfig.training_free(gate=1e9)))
    image = draw_scene(3, 200).image
    with flexkit.trace(model) as trace, torch.no_grad():
        model(**processor(images=image, text=QUESTION, return_tensors="pt"))
    figure = flexkit.plot_selection(trace, image)
    labels = {axes.get_xlabel() for axes in figure.axes if len(axes.images) == 3}
    assert labels == {"nothing read: gate shut"}
    flexkit.selection_page(trace, image, tmp_path / "looks.html")
    data = json.loads(_Markup((tmp_path / "looks.html").read_text(encoding="utf-8")).data)
    assert {look["shut"] for look in data["looks"].values()} == {True}
