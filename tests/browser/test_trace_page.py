"""The page that ``flexkit trace`` writes, opened from disk: sliders, words and the switch change what is shown."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import flexkit
from flexkit.__main__ import main
from flexkit.visual_search import draw_scene, load_model
from tests.browser.conftest import WIDTHS, Open
from tests.zoo import VIDEOS, Row, prompt


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    draw_scene(3, 400).image.save(folder / "scene.png")
    arguments = ["trace", str(folder / "scene.png"), "Which digit is on the object that is pink?"]
    assert not main([*arguments, "--new-tokens", "3", "--output", str(folder / "trace.html")])
    return folder / "trace.html"


def shown(page: Any) -> str:
    """The pixels of the overlay."""
    pixels: str = page.evaluate("document.querySelector('canvas').toDataURL()")
    return pixels


def slide(page: Any, name: str, value: int) -> None:
    """Move a slider by its keys, as a hand does."""
    slider = page.locator(f"#{name}")
    slider.press("Home")
    for _ in range(value):
        slider.press("ArrowRight")


def test_sliders_change_the_overlay(page_file: Path, visit: Open) -> None:
    page = visit(page_file.as_uri())
    page.wait_for_selector("body[data-ready]")
    assert "pink" in page.locator("h1").inner_text()
    layers = int(page.locator("#layer").get_attribute("max")) + 1
    words = int(page.locator("#word").get_attribute("max")) + 1
    assert layers >= 3 and words >= 2
    seen = {}
    for word in range(words):
        for layer in range(layers):
            slide(page, "word", word)
            slide(page, "layer", layer)
            pressed = page.locator(".words button").nth(word).get_attribute("aria-pressed")
            assert pressed == "true"
            seen[word, layer] = shown(page)
    assert len(set(seen.values())) == words * layers
    page.locator("#heat").click()
    assert shown(page) not in seen.values()
    page.locator(".words button").first.click()
    page.locator("#heat").click()
    assert shown(page) == seen[0, layers - 1]


def test_a_video_has_a_slider_over_time(page_file: Path, visit: Open, tmp_path: Path) -> None:
    family = VIDEOS["qwen2_vl-video"]
    model, inputs = family.model(), prompt(family, [Row()])
    flexkit.patch_model(model, flexkit.FlexConfig(zoom=2, policy=flexkit.TopK(1)), trained=True)
    with flexkit.trace(model) as trace, torch.no_grad():
        model(**inputs)
    frames = [Image.new("RGB", (60, 40), (90, 200 * index, 40)) for index in range(2)]
    flexkit.selection_page(trace, frames, tmp_path / "page.html", words=["word"], question="When?")
    page = visit((tmp_path / "page.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    seen = set()
    for frame in range(2):
        slide(page, "frame", frame)
        assert page.locator("#frame-name").inner_text() == str(frame)
        seen.add(shown(page))
    assert len(seen) == 2
    picture = visit(page_file.as_uri())
    picture.wait_for_selector("body[data-ready]")
    assert not picture.locator("#frame").is_visible()


HOSTILE = (
    ("@DATA@", "<img src=x onerror=document.title='taken'>"),
    ("<!--", "<script>"),
    ("<script>document.title='taken'</script>", "</script><script>document.title='taken'</script>"),
    ("\ud800 lone", "\udc00"),
    ("\u2028&lt;\u2029", "&amp;"),
)


@pytest.mark.parametrize(("question", "word"), HOSTILE)
def test_text_is_shown_and_not_run(question: str, word: str, visit: Open, tmp_path: Path) -> None:
    model, processor = load_model()
    image = draw_scene(3, 200).image
    inputs = processor(images=image, text="<image> Which digit is on the object that is pink?", return_tensors="pt")
    with flexkit.trace(model) as trace, torch.no_grad():
        model(**inputs)
    flexkit.selection_page(trace, image, tmp_path / "page.html", words=[word], question=question)
    page = visit((tmp_path / "page.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    shown = [page.locator("h1").text_content(), page.locator(".words button").text_content()]
    assert shown == [question, word]
    assert page.title() == "Where the model looked"
    assert page.locator("script").count() == 2 and page.locator("img").count() == 0


@pytest.mark.parametrize("window", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_its_window(page_file: Path, visit: Open, window: str, scheme: str, screenshots: Path) -> None:
    page = visit(page_file.as_uri(), window, color_scheme=scheme)
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    canvas = page.locator("canvas").bounding_box()
    assert canvas["width"] > 0.6 * min(WIDTHS[window][0], 500)
    page.screenshot(path=screenshots / f"trace-{window}-{scheme}.png", full_page=True)
