"""The studies run, in little, on the weights that ship, and give what the docs show."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import PIL.Image
import pytest
import torch

import flexkit
from flexkit.measuring import time_in_turns
from flexkit.visual_search import draw_clip, draw_scene, evaluation, load_model
from flexkit.visual_search.clip import SAMPLED
from flexkit.visual_search.evaluation import Batch
from flexkit.visual_search.model import ZOOM
from flexkit.visual_search.weights import WEIGHTS
from studies import report, selection, settings, without_training
from studies.baselines import Looker, insert_selected, zoom_in
from studies.motion import model as motion_model
from studies.motion import picture as motion_picture
from studies.motion import study as motion_study
from studies.motion import training as motion_training
from studies.native import model as native_model
from studies.native import study as native_study
from studies.native import training as native_training


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    _, processor = load_model("base")
    return dict(Batch.draw("attribute", 3, range(4)).inputs(flexkit.FlexProcessor(processor, ZOOM)))


@torch.no_grad()
def test_nothing_inserted_is_the_base_model(inputs: dict[str, torch.Tensor]) -> None:
    model, _ = load_model("base")
    low_res = {name: value for name, value in inputs.items() if not name.startswith("hd_")}
    expected = model(**low_res, logits_to_keep=1).logits[:, -1]
    found = insert_selected(Looker(model, 0, flexkit.Nothing()), inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not flexkit.is_patched(model)


@torch.no_grad()
def test_inserted_tokens_stand_in_for_those_of_their_cells(inputs: dict[str, torch.Tensor]) -> None:
    """Alone in a batch, where none is padded, and in a sequence that is written out."""
    model, _ = load_model("base")
    one = {name: value[:1] for name, value in inputs.items()}
    look = Looker(model, 0, flexkit.TopK(2))
    found = insert_selected(look, inputs)[:1]
    torch.testing.assert_close(insert_selected(look, one), found, atol=1e-4, rtol=1e-4)
    other = {**one, "hd_pixel_values": one["hd_pixel_values"].clone()}
    row, column = look(one)[1][0].nonzero()[0].tolist()
    other["hd_pixel_values"][..., row * 24 : row * 24 + 24, column * 24 : column * 24 + 24] = 0
    assert (insert_selected(look, other) - found).abs().max() > 1e-3


@torch.no_grad()
def test_the_best_tile_takes_the_place_of_the_image(inputs: dict[str, torch.Tensor]) -> None:
    model, _ = load_model("base")
    look = Looker(model, 0, flexkit.TopK(1))
    found = zoom_in(look, inputs)
    for index, scores in enumerate(look(inputs)[0]):
        row, column = divmod(int(scores.argmax()), 8)
        y, x = 64 * (row * 3 // 8), 64 * (column * 3 // 8)
        one = {name: value[index : index + 1] for name, value in inputs.items() if not name.startswith("hd_")}
        one["pixel_values"] = inputs["hd_pixel_values"][index : index + 1, :, y : y + 64, x : x + 64]
        expected = model(**one, logits_to_keep=1).logits[:, -1]
        torch.testing.assert_close(found[index : index + 1], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_model_that_reads_any_size_sees_what_the_small_one_does() -> None:
    """Its tower is the one that ships, on patches in the order of their tokens."""
    base, plain = load_model("base")
    model, scene = native_model.build_model(), draw_scene(1).image
    tall = scene.resize((64, 96))
    inputs = native_model.build_processor(96).image_processor([scene, tall, scene], return_tensors="pt")
    tokens = model.model.visual.seen(inputs["pixel_values"], inputs["image_grid_thw"])
    shown = scene.resize((96, 96), PIL.Image.Resampling.BICUBIC), tall
    as_they_are = partial(plain.image_processor, do_resize=False, do_pad=False, return_tensors="pt")
    pixels = [as_they_are(each)["pixel_values"] for each in shown]
    first, second = (base.model.vision_tower(each, output_hidden_states=True).hidden_states[-1][0] for each in pixels)
    torch.testing.assert_close(tokens, torch.cat([first, second, first]), atol=1e-4, rtol=1e-4)


def test_a_model_that_reads_any_size_is_trained_and_studied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: replace(stage, steps=2, batch=1) for name, stage in native_training.STAGES.items()}
    monkeypatch.setattr(native_training, "STAGES", few)
    monkeypatch.setattr(native_study, "SIDES", (64, 192))
    monkeypatch.setattr(native_study, "ZOOMS", {64: 3})
    monkeypatch.setattr(native_study, "SHARES", (0.1,))
    native_training.main(["--output", str(tmp_path / "model")])
    native_study.main([str(tmp_path / "model"), "--questions", "4", "--output", str(tmp_path / "native.json")])
    report.main([str(tmp_path)])
    lines = [line.split(",") for line in (tmp_path / "native.csv").read_text().splitlines()]
    assert lines[0] == ["", "digits", "rows", "columns", "shapes", "LM FLOP"]
    costs = {line[0]: float(line[-1]) for line in lines[1:] if len(line) == 6}
    assert costs["192 px"] == 1 and costs["64 px"] < 0.1


@torch.no_grad()
def test_the_model_of_clips_sees_of_each_frame_what_the_small_one_does() -> None:
    """Its parts are those that ship; of a frame's tiles, read when they are wanted, as well as of what is sampled."""
    base, plain = load_model()
    clip, model = draw_clip(3), motion_model.build_model()
    assert set(model.state_dict()) - set(base.state_dict()) == {"model.image_newline"}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.state_dict().items())
    inputs = motion_model.ClipProcessor()([clip], ["which shape"])
    frames = [PIL.Image.fromarray(frame) for frame in clip.read(SAMPLED)]
    low_res = plain.processor.image_processor(frames, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values_videos"][0], low_res)
    found = model.get_video_features(low_res[None]).pooler_output
    torch.testing.assert_close(found.view(4, 64, -1), torch.stack(base.get_image_features(low_res).pooler_output))
    (view,) = inputs["hd_frames"]
    assert view.frames == 16 and view.zooms == ((3, 3),)
    frame = PIL.Image.fromarray(next(clip.read([5])))  # the third of the high-res view: 1, 3, 5, ...
    whole = plain(images=frame, text="<image>", return_tensors="pt")["hd_pixel_values"][0]
    (tile,) = view.read(0, [2 * 9 + 5])
    assert torch.equal(tile[0], whole[:, 64:128, 128:192])


def test_a_model_of_clips_is_trained_and_studied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motion_training, "STAGE", replace(motion_training.STAGE, steps=2, batch=1))
    motion_training.main(["--output", str(tmp_path / "model")])
    assert json.loads((tmp_path / "model" / "motion" / "log.json").read_text())["steps"] == 2
    policies = dict(list(motion_study.POLICIES.items())[-2:])
    monkeypatch.setattr(motion_study, "POLICIES", policies)
    few = ["--questions", "1", "--in-sequence", "1", "--output", str(tmp_path / "motion.json")]
    motion_study.main([str(tmp_path / "model"), *few])
    motion_picture.main([str(tmp_path / "model"), "--output", str(tmp_path / "motion.webp")])
    assert PIL.Image.open(tmp_path / "motion.webp").size == (1000, 860)
    report.main([str(tmp_path)])
    lines = [line.rsplit(",", 5) for line in (tmp_path / "motion.csv").read_text().splitlines()]
    assert [*lines[0][1:]] == ["digits", "places and shapes", "read", "LM GFLOP", "LM FLOP"]
    read = {name.strip('"'): float(share) for name, *_, share, _, _ in lines[1:]}
    assert read["low-res frames only"] == 0 and read[motion_study.ALL] == read["every high-res token"] == 1
    assert all(share == pytest.approx(2 / 64, abs=1e-3) for name, share in read.items() if "cells" in name)
    costs = {name: float(cost) for name, *_, cost in lines[1:]}
    assert costs["low-res frames only"] < costs["flexkit in space and time"] < 0.1 < costs[motion_study.ALL] == 1


def test_studies_and_their_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["--questions", "4"]
    without_training.main([str(WEIGHTS), *few, "--output", str(tmp_path / "without_training.json")])
    own = ["--way", "low-res only", "--way", "training_free"]
    without_training.main([str(WEIGHTS), *few, *own, "--output", str(tmp_path / "own_states.json")])
    monkeypatch.setattr(selection, "CELLS", (1, 64))
    monkeypatch.setattr(selection, "THRESHOLDS", (48,))
    selection.main([str(WEIGHTS), str(WEIGHTS), *few, "--output", str(tmp_path / "selection.json")])
    found = json.loads((tmp_path / "selection.json").read_text())["trainings"]
    assert found[0] == found[1] and set(found[0]) == set(report.STYLES)
    assert found[0]["oracle"]["64"]["fraction"] == 1 and found[0]["random"]["1"]["fraction"] == pytest.approx(1 / 64)
    few_steps = replace(settings.STAGES["added"], steps=2, batch=1)
    monkeypatch.setattr(settings, "STAGES", {"added": few_steps})
    monkeypatch.setattr(settings, "SETTINGS", {"as shipped": {}, "zoom=2": {"zoom": 2}})
    settings.main([str(WEIGHTS), *few, "--output", str(tmp_path / "settings.json")])
    monkeypatch.setattr(evaluation, "time_in_turns", partial(time_in_turns, repeats=1))
    scores = evaluation.evaluate(1, 1, tracks=["attribute"], quiet=True)
    assert scores is not None
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "scores_again.json").write_text(json.dumps({"seed 1": scores, "seed 2": scores}))
    report.main([str(tmp_path)])
    table = (tmp_path / "without_training_4.csv").read_text().splitlines()
    assert table[0] == ",attribute,conjunction,row,column,shape" and len(table) == 23
    rows = (tmp_path / "own_states_4.csv").read_text().splitlines()
    assert rows == [row for row in table if row.startswith((",", "low-res only,", "training_free,"))]
    probe = (tmp_path / "probe.csv").read_text().splitlines()
    assert probe[1].startswith("weights,4,") and probe[1].split(",")[3] == "0"
    trained = (tmp_path / "settings.csv").read_text().splitlines()
    assert trained[0] == ",attribute,low-res,read"
    assert trained[2].startswith("zoom=2,") and trained[2].endswith(",0.094")
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 1 + len(scores["attribute"])
    again = (tmp_path / "scores_again.csv").read_text().splitlines()
    assert again[0] == ',"attribute, seed 1","attribute, seed 2"'
    assert len(again) == 1 + len(scores["attribute"]) and all(row.count(" (+0.0)") == 2 for row in again[1:])
    assert "told where the digit is" in (tmp_path / "selection.svg").read_text()
