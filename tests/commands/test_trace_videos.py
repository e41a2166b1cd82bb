"""``flexkit trace`` of videos: a page with a slider over time."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf
from PIL import Image

from flexkit.__main__ import main
from flexkit.demo import looking
from flexkit.errors import ConfigError
from tests.commands.test_trace import page_of
from tests.encoding.test_clips import CLOSE, frames_of, written
from tests.processing.test_videos import qwen
from tests.processors import TORCHVISION
from tests.tiny_processors import tiny_llava_processor, tiny_onevision_processor
from tests.zoo import IMAGE, VIDEO, VOCABULARY, ZOO

QUESTION = "w5 w6 w7"
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vocab_size": VOCABULARY}
needs_torchvision = pytest.mark.skipif(not TORCHVISION, reason="video processors need torchvision")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the command load a tiny model, of any name, and a processor that is not saved."""

    def loaded(kind: str = "llava_onevision", processor: Any = None, **config: Any) -> None:
        model = ZOO[kind].model().float()
        for name, value in config.items():
            setattr(model.config.get_text_config(), name, value)
        own = processor or tiny_onevision_processor(**TOKENS)
        monkeypatch.setattr(looking, "load_as_saved", lambda name: (model, own))

    return loaded


def pictures_of(page: Path) -> list[Image.Image]:
    shown: Any = page_of(page)["pictures"]
    return [Image.open(io.BytesIO(base64.b64decode(each.split(",")[1]))) for each in shown]


def levels_of(page: Path) -> list[int]:
    return [round(float(np.asarray(picture).mean())) for picture in pictures_of(page)]


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()  # what went on before
    assert main(["trace", *arguments]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line and not line.startswith("Loading weights")]
    assert printed.out == "" and len(lines) == 1
    return lines[0]


@pytest.mark.filterwarnings("ignore::flexkit.SmallImageWarning")
@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ([], [0, 28, 60, 88, 120, 148, 180, 208]),
        (["--num-frames", "3"], [0, 80, 160]),
        (["--fps", "0.5"], [0, 80, 160]),
        (["--num-frames", "100"], [*range(0, 240, 4)]),
    ],
)
def test_a_page_has_the_frames_of_the_sequence(
    options: list[str], levels: list[int], tmp_path: Path, load: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each frame of the file has a brightness of its own."""
    load()
    clip, page = written(tmp_path / "clip.mp4"), tmp_path / "page.html"
    given = [str(clip), QUESTION, "--model", "any", "--new-tokens", "2", "--output", str(page)]
    assert main(["trace", *given, *options]) == 0
    answer, *_, where = capsys.readouterr().out.strip().splitlines()
    assert answer.split() and where == f"Where it looked: {page}"
    found = levels_of(page)
    assert len(found) == len(levels) and np.abs(np.array(found) - levels).max() <= CLOSE
    data: Any = page_of(page)
    assert data["question"] == QUESTION and len(data["words"]) == 2
    assert {int(key.split()[2]) for key in data["looks"]} == {*range(len(levels))}
    assert all(look["scoreGrid"] == [2, 2] for look in data["looks"].values())


@pytest.mark.filterwarnings("ignore::flexkit.SmallImageWarning")
def test_a_folder_of_frames(tmp_path: Path, load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    load()
    folder, page = tmp_path / "frames", tmp_path / "page.html"
    folder.mkdir()
    for index, frame in enumerate(frames_of([10, 70, 130, 190])):
        Image.fromarray(frame).save(folder / f"{index}.png")
    given = [str(folder), QUESTION, "--model", "any", "--new-tokens", "1", "--output", str(page)]
    assert main(["trace", *given, "--frame-rate", "2", "--num-frames", "2"]) == 0
    assert levels_of(page) == [10, 130]
    assert "do not say how fast they follow; give --frame-rate" in told(given, capsys)


@pytest.mark.filterwarnings("ignore::flexkit.SmallImageWarning")
def test_a_file_that_breaks_off(tmp_path: Path, load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as it goes; the last frame stands for those behind."""
    load()
    clip, page = written(tmp_path / "clip.mkv"), tmp_path / "page.html"
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) * 2 // 3])
    given = [str(clip), QUESTION, "--model", "any", "--new-tokens", "1", "--output", str(page)]
    assert main(["trace", *given, "--num-frames", "4"]) == 0
    found = levels_of(page)
    assert len(found) == 4 and found == sorted(found) and found[-1] < 200


def test_what_cannot_be_traced(
    tmp_path: Path, load: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    clip = written(tmp_path / "clip.mp4")
    whole, broken, empty = clip.read_bytes(), tmp_path / "broken.mp4", tmp_path / "empty.mp4"
    broken.write_bytes(whole[:40] + bytes(len(whole) - 40))
    empty.touch()
    model = ["--model", "any"]
    for path in (broken, empty):
        assert re.search(
            r"cannot be read as a picture.* if it is a video: .*cannot be read as a video",
            told([str(path), QUESTION, *model], capsys),
        )
        assert "cannot be read as a video" in told([str(path), QUESTION, *model, "--fps", "1"], capsys)
    assert "there is no file" in told([str(tmp_path / "none.mp4"), QUESTION, *model], capsys)
    assert "reads pictures alone; say which model by --model" in told([str(clip), QUESTION], capsys)
    assert "the question names <video>" in told([str(clip), "what <video> ?", *model], capsys)
    (tmp_path / "folder").mkdir()
    assert "holds no pictures" in told([str(tmp_path / "folder"), QUESTION, *model, "--frame-rate", "1"], capsys)
    load(max_position_embeddings=20)
    assert "has positions for 20; ask in fewer words, or about fewer frames" in told(
        [str(clip), QUESTION, *model], capsys
    )
    load("llava", tiny_llava_processor(image_token_id=IMAGE, vocab_size=VOCABULARY))
    assert "LlavaForConditionalGeneration reads no videos" in told([str(clip), QUESTION, *model], capsys)
    load("llava_onevision", tiny_llava_processor(image_token_id=IMAGE, vocab_size=VOCABULARY))
    assert "has no video processor; those of transformers need torchvision" in told(
        [str(clip), QUESTION, *model], capsys
    )

    def missing() -> None:
        raise ConfigError("video files need PyAV: pip install 'flexkit-vlm[video]'.")

    monkeypatch.setattr("flexkit.encoding.clips.pyav", missing)
    assert "pip install 'flexkit-vlm[video]'" in told([str(clip), QUESTION, *model], capsys)


@pytest.mark.skipif(TORCHVISION, reason="torchvision is installed")
def test_a_folder_that_needs_torchvision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is missing, the processor of a model that takes videos cannot be loaded."""
    ZOO["llava_onevision"].model().float().save_pretrained(tmp_path)
    tiny_onevision_processor(**TOKENS).tokenizer.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(
        '{"processor_class": "LlavaOnevisionProcessor", "video_processor": {"video_processor_type": '
        '"LlavaOnevisionVideoProcessor"}, "image_processor": {"image_processor_type": "LlavaOnevisionImageProcessor"}}'
    )
    clip = written(tmp_path / "clip.mp4")
    assert "requires the Torchvision library but it was not found in your environment" in told(
        [str(clip), QUESTION, "--model", str(tmp_path)], capsys
    )


@needs_torchvision
@pytest.mark.filterwarnings("ignore::flexkit.SmallImageWarning")
@pytest.mark.parametrize("kind", ["llava_onevision", "qwen2_5_vl"])
def test_a_folder_of_a_model(kind: str, tmp_path: Path) -> None:
    """Loaded as anybody's: towers that merge two frames show one for both, short videos are taken whole."""
    square = {"size": {"height": 42, "width": 42}}
    processor = qwen()
    if kind == "llava_onevision":
        processor = tiny_onevision_processor(tf.LlavaOnevisionVideoProcessor(**square), **TOKENS)
    ZOO[kind].model().float().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    clip, page = written(tmp_path / "clip.mp4"), tmp_path / "page.html"
    given = [QUESTION, "--model", str(tmp_path), "--new-tokens", "1", "--output", str(page)]
    assert main(["trace", str(clip), *given, "--num-frames", "6"]) == 0
    expected = [0, 40, 80, 120, 160, 200] if kind == "llava_onevision" else [0, 80, 160]
    assert np.abs(np.array(levels_of(page)) - expected).max() <= CLOSE
    one = written(tmp_path / "one.mp4", [90])
    assert main(["trace", str(one), *given]) == 0
    assert len(pictures_of(page)) == 1
