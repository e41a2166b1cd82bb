"""What is read of a file of conversations, and that exactly the answers carry labels."""

import json
import pickle
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from flexkit import ConfigError, DataError, FlexProcessor
from flexkit.training import Conversation, ConversationCollator, ConversationDataset
from flexkit.visual_search import load_model
from tests.tiny_processors import IMAGE_PROMPT, tiny_gemma3_processor, tiny_llava_processor, tiny_qwen_processor

BUILD = {"llava": tiny_llava_processor, "gemma3": tiny_gemma3_processor, "qwen": tiny_qwen_processor}
CHATML = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% endif %}{% endfor %}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content[0].text }}<|im_end|>{% endgeneration %}
{%- else -%}
{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}<|im_end|>
{%- endif %}
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""As many models have it: something stands behind the token that ends a turn."""
BARE = """
{%- for message in messages %}{{ message.role }}: {% for part in message.content -%}
{% if part.type == 'image' %}IMAGE {% elif message.role == 'assistant' -%}
{% generation %}{{ part.text + ' ' }}{% endgeneration %}
{%- else %}{{ part.text + ' ' }}{% endif %}{% endfor %}{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""
"""As LLaVA has it: nothing ends a turn."""
OUTSIDE = BARE.replace("{{ part.text + ' ' }}{% endgeneration %}", "{{ part.text }}{% endgeneration %}</s> ")
"""What ends a turn is not marked."""
TEMPLATES = {"chatml": CHATML, "bare": BARE, "outside": OUTSIDE}


def without_marks(template: str) -> str:
    return re.sub(r"\{% (end)?generation %\}", "", template)


@cache
def processor_of(name: str) -> Any:
    """One of words, or LLaVA with byte-pairs, which join letters to what stands beside them."""
    if name != "bytes":
        return BUILD[name]()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        ["user assistant w5 w6 w50 w51 7. 42, ab.\n a\n\nb"] * 9,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    processor = tiny_llava_processor()
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "ends": "<|im_end|>", "starts": "<|im_start|>"},
    )
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    return processor


def conversation_of(turns: list[tuple[int, str, str]], sizes: list[tuple[int, int]]) -> Conversation:
    """Each turn has so many images, a question and an answer."""
    messages: list[dict[str, Any]] = []
    for images, question, answer in turns:
        shown: list[dict[str, str]] = [{"type": "image"}] * images
        messages += [
            {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    count = sum(images for images, _, _ in turns)
    pictures = [Image.new("RGB", sizes[index % len(sizes)], (index, 90, 0)) for index in range(count)]
    return Conversation(messages, pictures)


sizes = st.lists(st.tuples(st.integers(40, 130), st.integers(40, 130)), min_size=3, max_size=3)


def conversations(answers: st.SearchStrategy[str], questions: st.SearchStrategy[str]) -> Any:
    turn = st.tuples(st.integers(0, 2), questions, answers)
    return st.builds(conversation_of, st.lists(turn, min_size=1, max_size=4), sizes)


def words(first: int, last: int) -> st.SearchStrategy[str]:
    return st.lists(st.integers(first, last).map("w{}".format), min_size=1, max_size=3).map(" ".join)


def labelled(processor: Any, template: str, batch: list[Conversation]) -> dict[str, Any]:
    return ConversationCollator(FlexProcessor(processor, 2), chat_template=template)(batch)


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("name", BUILD)
@given(data=st.data())
def test_answers_alone_carry_labels(name: str, kind: str, data: st.DataObject) -> None:
    """Words of answers occur nowhere else, so the labels can be told without knowing where the answers stand."""
    processor = processor_of(name)
    template = TEMPLATES[kind].replace("IMAGE", IMAGE_PROMPT[name])
    # A tokenizer of words needs spaces around what is special, and knows none of the ends of turns but its own.
    template = template.replace("<|im_end|>", " </s>").replace("<|im_start|>", "").replace("</s>", " </s>")
    batch = data.draw(st.lists(conversations(words(200, 250), words(10, 60)), min_size=1, max_size=3))
    marked = labelled(processor, template, batch)
    plain = labelled(processor, without_marks(template), batch)
    assert torch.equal(marked["labels"], plain["labels"]) and torch.equal(marked["input_ids"], plain["input_ids"])
    ids, labels = marked["input_ids"], marked["labels"]
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    for row, conversation in enumerate(batch):
        answers = [message["content"][0]["text"] for message in conversation.messages if message["role"] == "assistant"]
        expected = [token for answer in answers for token in (*answer.split(), "</s>")]
        ours = labels[row]
        assert processor.tokenizer.convert_ids_to_tokens(ours[ours != -100].tolist()) == expected
        spoken = (ids[row] >= 200) & (ids[row] <= 250)
        assert torch.equal(spoken & (ours == -100), torch.zeros_like(spoken))
    images = sum(len(conversation.images) for conversation in batch)
    assert ("hd_pixel_values" in marked) == (images > 0)


@pytest.mark.parametrize("kind", TEMPLATES)
@given(data=st.data())
def test_byte_pairs_that_reach_over_the_edges(kind: str, data: st.DataObject) -> None:
    """What is labelled spells the answers; a token may begin with the white space in front of one."""
    processor = processor_of("bytes")
    text = st.text("ab7.,\n w", min_size=1, max_size=6).map(str.strip).filter(bool)
    template = TEMPLATES[kind].replace("IMAGE", "<image>")
    batch = [data.draw(conversations(text, text)) for _ in range(2)]
    end = "<|im_end|>" if kind == "chatml" else "</s>"
    both = [labelled(processor, each, batch) for each in (template, without_marks(template))]
    for inputs in both:
        for row, conversation in enumerate(batch):
            labels = inputs["labels"][row]
            edges = torch.nn.functional.pad((labels != -100).int(), (1, 1)).diff()
            starts, stops = ((edges == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
            spelled = [
                processor.tokenizer.decode(labels[start:stop].tolist())
                for start, stop in zip(starts, stops, strict=True)
            ]
            answers = [
                message["content"][0]["text"] + end
                for message in conversation.messages
                if message["role"] == "assistant"
            ]
            assert [each.lstrip() for each in spelled] == answers
    assert torch.equal(both[0]["labels"], both[1]["labels"])


def test_the_small_model_marks_its_answers() -> None:
    for stage in ("base", "tuned", "conjunction", "in_sequence"):
        _, processor = load_model(stage)
        conversation = conversation_of([(1, "which digit is red?", "7"), (0, "and blue?", "8 9")], [(60, 60)])
        collator = ConversationCollator(processor)
        assert collator.template.marked
        labels = collator([conversation])["labels"]
        assert processor.decode(labels[labels != -100]) == "7 </s> 8 9 </s>"


def test_without_a_patch_there_is_one_view() -> None:
    _, processor = load_model("base")
    inputs = ConversationCollator(processor)([conversation_of([(1, "what?", "7")], [(60, 60)])])
    assert "pixel_values" in inputs and not any(name.startswith("hd_") for name in inputs)


@given(conversation=conversations(words(200, 250), words(10, 60)), max_length=st.integers(10, 120))
def test_a_long_conversation_loses_its_last_turns(conversation: Conversation, max_length: int) -> None:
    collator = ConversationCollator(processor_of("llava"), chat_template=BARE.replace("IMAGE", "<image>"))

    def length(turns: int) -> int:
        messages = conversation.messages[: 2 * turns]
        part = Conversation(messages, conversation.images[: conversation.shown(2 * turns)])
        return int(collator([part])["input_ids"].shape[1])

    lengths = [length(turns) for turns in range(1, len(conversation.messages) // 2 + 1)]
    if lengths[0] > max_length:
        with pytest.raises(DataError, match=f"{lengths[0]} tokens, more than {max_length}"):
            collator.shorten(conversation, max_length)
        return
    kept = collator.shorten(conversation, max_length)
    turns = sum(each <= max_length for each in lengths)
    assert kept.messages == conversation.messages[: 2 * turns]
    assert kept.images == conversation.images[: conversation.shown(2 * turns)]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ loop.length }}{{ m.content[0].text }}{% endfor %}", "give a chat_template"),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}{% generation %}x{% endgeneration %}", "marks 1"),
    ],
)
def test_templates_that_hide_answers(template: str, told: str) -> None:
    conversation = conversation_of([(0, "w5", "w6"), (0, "w7", "w8")], [])
    with pytest.raises(ConfigError, match=told):
        ConversationCollator(processor_of("llava"), chat_template=template)([conversation])


def test_no_template_at_all() -> None:
    processor = tiny_llava_processor()
    processor.chat_template = None
    with pytest.raises(ConfigError, match="LlavaProcessor has no chat template"):
        ConversationCollator(FlexProcessor(processor, 2))


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " A cat. "}]


def test_llava_and_messages_are_one() -> None:
    messages = [{"role": "user", "content": "<image> What?"}, {"role": "assistant", "content": "A cat."}]
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    records: list[dict[str, Any]] = [
        {"image": "a.png", "conversations": TURNS},
        {"images": ["a.png"], "messages": messages},
        {"image": ["a.png"], "messages": [messages[0] | {"content": parts}, messages[1]]},
        {"image": "a.png", "messages": [messages[0] | {"content": "What?"}, messages[1]]},
    ]
    read = [Conversation.from_record(record) for record in records]
    assert all(each == read[0] for each in read) and read[0].messages[0]["content"] == parts


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (["no object"], "is a JSON list"),
        ({"image": "a.png"}, "conversations must be a list of turns (it has ['image'])"),
        ({"conversations": []}, "conversations must be a list of turns (got [])"),
        ({"conversations": ["hello"]}, "conversations[0] must be an object"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from must be one of"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "conversations[0].from must be one of"),
        ({"conversations": [{"from": "human", "value": 3}]}, "conversations[0].value must be text, got 3"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content must be text, or"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}], "image": "a"}, "conversations[1].value is empty"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "<image>"}]}, "conversations[1].value shows an image"),
        ({"conversations": TURNS[:1], "image": "a"}, "roles are ['user']"),
        ({"conversations": TURNS[1:]}, "roles are ['assistant']"),
        ({"conversations": TURNS}, "0 images are named, and its texts have 1 <image>"),
        ({"conversations": TURNS, "image": "a", "images": ["b"]}, "both image and images"),
        ({"conversations": TURNS, "image": 7}, "image must be a path or a list of paths, got 7"),
        ({"conversations": TURNS, "images": [""]}, "images must be a path"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "roles are ['system']"),
    ],
)
def test_what_is_no_conversation(record: Any, told: str) -> None:
    with pytest.raises(DataError, match=re.escape(told)) as error:
        Conversation.from_record(record, "data.json, record 3")
    assert str(error.value).startswith("data.json, record 3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of six samples each; in ``bad`` the second's image is missing, and the third's torn."""
    Image.effect_noise((30, 20), 50).save(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    for name, images in {"good": ["a"] * 6, "bad": ["a", "none", "torn", "a", "a", "a"]}.items():
        turns = [[TURNS[0], {"from": "gpt", "value": f"{name} {index}"}] for index in range(6)]
        records = [{"image": f"{image}.png", "conversations": turn} for image, turn in zip(images, turns, strict=True)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n{")
    return tmp_path


def answers(dataset: ConversationDataset) -> list[str]:
    return [dataset[index].messages[1]["content"][0]["text"] for index in range(len(dataset))]


def test_files_are_repeated_and_drawn_from(folder: Path) -> None:
    files = [folder / "good.json", folder / "good.json"]
    dataset = ConversationDataset(files, repeats=[2, 0.5])
    seen = answers(dataset)
    assert seen[:12] == [f"good {index}" for index in range(6)] * 2
    assert len(seen[12:]) == len(set(seen[12:])) == 3
    assert answers(ConversationDataset(files, repeats=[2, 0.5])) == seen
    drawn = {tuple(answers(ConversationDataset(files[:1], repeats=[0.5], seed=seed))) for seed in range(9)}
    assert len(drawn) > 1
    for repeats in ([1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ConfigError, match="for each of 2 files"):
            ConversationDataset(files, repeats=repeats)


def test_raising_names_what_is_wrong(folder: Path) -> None:
    with pytest.raises(DataError, match=r"bad\.json, record 1: there is no image .*none\.png"):
        ConversationDataset(folder / "bad.json")
    with pytest.raises(DataError, match=r"good\.jsonl, line 8 is no JSON"):
        ConversationDataset(folder / "good.jsonl")
    (folder / "none.png").write_bytes(b"")
    dataset = ConversationDataset(folder / "bad.json")
    for index in (1, 2):
        with pytest.raises(DataError, match=rf"record {index}: image .* cannot be read"):
            dataset[index]
    with pytest.raises(IndexError):
        dataset[6]
    with pytest.raises(DataError, match="JSON dict"):
        (folder / "object.json").write_text("{}")
        ConversationDataset(folder / "object.json")


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_counts_across_workers(folder: Path, workers: int) -> None:
    with pytest.warns(UserWarning, match=r"bad\.jsonl, line 2: there is no image .*bad\.jsonl, line 8"):
        dataset = ConversationDataset(folder / "bad.jsonl", on_error="skip")
    assert len(dataset) == 5 and len(dataset.skipped) == 2
    loader = DataLoader(dataset.map(lambda conversation: conversation), num_workers=workers, collate_fn=list)
    if workers:
        batches = list(loader)  # the warnings are the workers'
    else:
        with pytest.warns(UserWarning, match=r"line 3: image .*torn\.png cannot be read"):
            batches = list(loader)
    seen = [conversation.messages[1]["content"][0]["text"] for [conversation] in batches]
    assert seen == ["bad 0", "bad 3", "bad 3", "bad 4", "bad 5"]
    assert [name.rpartition("line ")[2] for name in dataset.skipped[2:]] == ["3"]


def test_nothing_is_left(folder: Path) -> None:
    (folder / "a.png").unlink()
    (folder / "torn.png").unlink()
    with pytest.warns(UserWarning, match="left out"), pytest.raises(DataError, match="no sample is left"):
        ConversationDataset(folder / "bad.json", on_error="skip")


def test_none_can_be_used(folder: Path) -> None:
    def refuse(conversation: Conversation) -> Conversation:
        raise DataError(f"{conversation.source} is refused")

    dataset = ConversationDataset(folder / "good.json", on_error="skip").map(refuse)
    with pytest.warns(UserWarning, match="is refused"), pytest.raises(DataError, match="none of 6 samples"):
        dataset[0]
    assert len(dataset.skipped) == 6


def test_turned_and_grey_pictures(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("L", (30, 20)).save(folder / "a.png", exif=exif)
    [image] = ConversationDataset(folder / "good.json")[0].images
    assert image.mode == "RGB" and image.size == (20, 30)


def test_workers_that_are_spawned(folder: Path) -> None:
    collator = ConversationCollator(FlexProcessor(processor_of("llava"), 2))
    dataset = ConversationDataset(folder / "good.json").map(partial(collator.shorten, max_length=99))
    ours, theirs = (each([dataset[0]]) for each in (collator, pickle.loads(pickle.dumps(collator))))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert answers(pickle.loads(pickle.dumps(dataset))) == answers(dataset)
