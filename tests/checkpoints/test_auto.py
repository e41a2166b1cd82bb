"""A folder that flexkit saved, with those who do not know it: Auto classes, pipelines, processes without flexkit."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ProcessorMixin,
    pipeline,
)

import flexkit
from flexkit.checkpoints.flex import WEIGHTS
from flexkit.errors import CheckpointError
from flexkit.patching import get_patch
from flexkit.visual_search import draw_scene, load_model
from tests.patching.ways import families, inputs_of, logits_of

from .test_hub import cached
from .test_pretrained import hub, same_state, trained

__all__ = ["hub"]

AUTO_CLASSES = [AutoModelForImageTextToText, AutoModelForMultimodalLM]
QUESTION = "Which digit is on the object that is pink?"
ANSWER = "2"
"""In the picture of :func:`asked`; only the high-res view shows it."""


def asked(processor: Any) -> Any:
    turn = {
        "role": "user",
        "content": [{"type": "image", "image": draw_scene(3).image}, {"type": "text", "text": QUESTION}],
    }
    return processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def said(model: Any, processor: Any) -> str:
    inputs = asked(processor)
    answer = model.generate(**inputs, max_new_tokens=1)[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(answer)).strip()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, which reads, and its processor."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = load_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def no_warning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", flexkit.BaseModelWarning)
        yield


@families
@pytest.mark.usefixtures("no_warning")
def test_auto_classes_load_the_patched_model(name: str, tmp_path: Path) -> None:
    model = trained(name)
    model.save_pretrained(tmp_path)
    for auto_class in AUTO_CLASSES:
        loaded = auto_class.from_pretrained(tmp_path, trust_remote_code=True)
        assert type(loaded) is type(model) and same_state(loaded, model)
        assert get_patch(loaded).config.to_dict() == get_patch(model).config.to_dict()
    torch.testing.assert_close(logits_of(loaded, inputs_of(name)), logits_of(model, inputs_of(name)))


@pytest.mark.usefixtures("no_warning")
def test_auto_classes_hand_their_arguments_on(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path,
        trust_remote_code=True,
        dtype=torch.float32,
        attn_implementation="eager",
        policy=flexkit.TopK(1),
        output_loading_info=True,
    )
    assert loaded.dtype == torch.float32 and loaded.config._attn_implementation == "eager"
    assert get_patch(loaded).config.policy == flexkit.TopK(1) and not any(report.values())


@pytest.mark.usefixtures("no_warning")
def test_auto_classes_load_from_the_hub(saved: Path, tmp_path: Path) -> None:
    cached(tmp_path, saved)
    options = {"trust_remote_code": True, "cache_dir": tmp_path, "local_files_only": True}
    model = AutoModelForImageTextToText.from_pretrained("me/mine", **options)
    processor = AutoProcessor.from_pretrained("me/mine", **options)
    assert said(model, processor) == ANSWER


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("no_warning")
def test_both_views_are_read(dtype: torch.dtype, saved: Path) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(saved, dtype=dtype, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(saved, trust_remote_code=True)
    assert isinstance(processor, flexkit.FlexProcessor)
    assert said(model, processor) == ANSWER
    with flexkit.disabled(model):
        assert said(model, processor) != ANSWER


@pytest.mark.usefixtures("no_warning")
def test_a_pipeline(saved: Path) -> None:
    pipe = pipeline("image-text-to-text", model=str(saved), trust_remote_code=True)
    (answer,) = pipe(images=draw_scene(3).image, text=f"<image> {QUESTION}", max_new_tokens=1, return_full_text=False)
    assert flexkit.is_patched(pipe.model) and isinstance(pipe.processor, flexkit.FlexProcessor)
    assert answer["generated_text"].strip() == said(*load_model())


def test_without_remote_code_it_is_the_base_model(saved: Path) -> None:
    for load in (AutoModelForImageTextToText.from_pretrained, LlavaForConditionalGeneration.from_pretrained):
        with pytest.warns(flexkit.BaseModelWarning, match="its base model, which ignores what was added"):
            base = load(saved)
        assert not flexkit.is_patched(base)
    assert type(AutoProcessor.from_pretrained(saved)) is LlavaProcessor


def test_what_is_saved_again_says_what_it_is(saved: Path, tmp_path: Path) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(saved, trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    with pytest.warns(flexkit.BaseModelWarning):
        base = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    for number, plain in enumerate((base, flexkit.unpatch_model(loaded))):
        plain.save_pretrained(tmp_path / str(number))
        assert "auto_map" not in json.loads((tmp_path / str(number) / "config.json").read_text())
    processor = AutoProcessor.from_pretrained(saved)
    processor.save_pretrained(tmp_path / "plain")
    assert type(AutoProcessor.from_pretrained(tmp_path / "plain", trust_remote_code=True)) is LlavaProcessor
    with pytest.raises(CheckpointError, match="says None of a high_res view"):
        flexkit.FlexProcessor.from_pretrained(tmp_path / "plain")


def test_other_code_in_a_config_stays(tmp_path: Path) -> None:
    model = trained()
    theirs = {"AutoTokenizer": "their.Tokenizer", "AutoModelForImageTextToText": "their.Model"}
    model.config.auto_map = dict(theirs)
    model.save_pretrained(tmp_path / "first")
    loaded = flexkit.from_pretrained(tmp_path / "first")
    assert loaded.config.auto_map == model.config.auto_map == theirs


@pytest.mark.parametrize("trusts", [False, True])
def test_where_flexkit_is_not_installed(trusts: bool, saved: Path) -> None:
    code = (
        "import sys; sys.modules['flexkit'] = None\n"
        "from transformers import AutoModelForImageTextToText as Auto, AutoProcessor\n"
        "for each in (Auto, AutoProcessor):\n"
        f"    print(type(each.from_pretrained(sys.argv[1], trust_remote_code={trusts})))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, env=dict(os.environ))
    if trusts:
        assert "this folder was saved by flexkit, which cannot be imported: pip install flexkit-vlm" in ran.stderr
    else:
        assert ran.returncode == 0 and "LlavaForConditionalGeneration" in ran.stdout and "LlavaProcessor" in ran.stdout


def test_folders_of_before_load_and_are_saved_anew(saved: Path, tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "flexkit.safetensors")
    for name in ("modeling_flexkit.py", "README.md"):
        (tmp_path / name).unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    cached(tmp_path / "cache", tmp_path)
    for name in (tmp_path, "me/mine"):
        assert same_state(flexkit.from_pretrained(name, cache_dir=tmp_path / "cache"), model)
    with pytest.warns(flexkit.BaseModelWarning):
        base = AutoModelForImageTextToText.from_pretrained(tmp_path)
    flexkit.load_flex(base, tmp_path).save_pretrained(tmp_path)
    assert not (tmp_path / "flexkit.safetensors").exists() and (tmp_path / WEIGHTS).exists()
    assert same_state(flexkit.from_pretrained(tmp_path), model)


def test_a_card_of_ones_own_is_kept(hub: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    model = trained()
    model.config._name_or_path = "them/theirs"
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    model.push_to_hub("me/mine")
    assert "this is the base model" in hub["me/mine"]["README.md"].decode()
    model.save_pretrained(tmp_path / "new")
    assert "base_model: them/theirs" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_processor_is_pushed_with_its_zoom(
    way: str, hub: dict[str, dict[str, bytes]], saved: Path, tmp_path: Path
) -> None:
    processor = flexkit.FlexProcessor.from_pretrained(saved)
    assert isinstance(processor, ProcessorMixin) and isinstance(processor, LlavaProcessor)
    if way == "push_to_hub":
        processor.push_to_hub("me/mine")
    else:
        processor.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="me/mine")
    files = hub["me/mine"]
    for name in ("processor_config.json", "processing_flexkit.py", "tokenizer.json"):
        assert files[name] == (saved / name).read_bytes()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.zooms == processor.zooms
