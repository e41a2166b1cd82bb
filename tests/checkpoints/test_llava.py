import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModel

from flexkit.checkpoints import load_llava_flexattn
from flexkit.checkpoints.llava_config import read_settings
from flexkit.errors import CheckpointError
from flexkit.patching import added_parameters, get_patch, is_patched
from flexkit.selection import Threshold

VISION = "model.vision_tower.vision_tower.vision_model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tower_config() -> CLIPVisionConfig:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPVisionConfig(**shape, image_size=126, patch_size=14)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_model_is_patched_as_published(published: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_llava_flexattn(published)
    assert is_patched(model)
    assert not model.training
    assert model.dtype == torch.float32
    config = get_patch(model).config
    assert (config.start_layer, config.zoom, config.select_from) == (9, (3, 3), "previous")
    assert config.policy == Threshold(48 / 255).pooled(9)
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in added_parameters(model)}
    assert layers == {9, 10, 11}


def test_every_weight_comes_from_the_file(published: Path) -> None:
    model, tensors = load_llava_flexattn(published), load_file(published / "model.safetensors")
    state = model.state_dict()
    unused = {f"model.layers.{layer}.self_attn.{kind}_proj_hd.weight" for layer in range(9) for kind in "kv"}
    assert len(state) == len(tensors) - len(unused)
    for name, tensor in tensors.items():
        if name in unused:
            continue
        ours = (
            name.replace(VISION, "model.vision_tower.")
            .replace("model.mm_projector.0", "model.multi_modal_projector.linear_1")
            .replace("model.mm_projector.2", "model.multi_modal_projector.linear_2")
        )
        if not ours.startswith(("model.vision_tower", "model.multi_modal", "lm_head")):
            ours = ours.replace("model.", "model.language_model.", 1)
        assert torch.equal(state[ours][: len(tensor)], tensor), name


def test_placeholder_is_a_row_of_its_own_and_never_generated(published: Path) -> None:
    model, tensors = load_llava_flexattn(published), load_file(published / "model.safetensors")
    token = model.config.image_token_id
    assert token == 128
    torch.testing.assert_close(model.get_input_embeddings().weight[token], tensors[EMBEDDING].mean(0))
    # Only suppression keeps the placeholder from being generated once every other logit is negative.
    with torch.no_grad():
        model.lm_head.weight[:token] = -torch.eye(32).repeat(4, 1) * 1e-3
        model.get_decoder().norm.weight.fill_(1.0)
        model.get_decoder().norm.register_forward_hook(lambda module, inputs, output: output.abs())
    ids = torch.tensor([[1, 5, 7]])
    for sampling in ({"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 2}):
        tokens = model.generate(input_ids=ids, max_new_tokens=5, eos_token_id=None, **sampling)
        assert (tokens[:, 3:] != token).all()


def test_sharded_checkpoint_loads_the_same(published: Path) -> None:
    whole = load_llava_flexattn(published)
    tensors = load_file(published / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"model-{1 + index % 2:05}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == shard}, published / shard)
    (published / "model.safetensors").unlink()
    (published / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert same_weights(load_llava_flexattn(published), whole)


@pytest.mark.parametrize("form", ["config", "clip", "dict", "clip dict", "folder", "path"])
def test_vision_config_in_every_form(
    published: Path, tmp_path: Path, form: str, edit_json: Callable[..., None]
) -> None:
    expected = load_llava_flexattn(published)
    edit_json(published / "config.json", mm_vision_tower="./nowhere")
    config = tower_config()
    folder = tmp_path / "clip"
    config.save_pretrained(folder)
    forms: dict[str, Any] = {
        "config": config,
        "clip": CLIPConfig(vision_config=config.to_dict()),
        "dict": config.to_dict(),
        "clip dict": {"model_type": "clip", "vision_config": config.to_dict()},
        "folder": str(folder),
        "path": folder,
    }
    assert same_weights(load_llava_flexattn(published, forms[form]), expected)


@pytest.mark.parametrize("where", ["inside", "outside", "vision_config"])
def test_vision_weights_may_come_from_the_tower(
    published: Path,
    tmp_path: Path,
    where: str,
    edit_json: Callable[..., None],
    edit_tensors: Callable[[Path, Callable[[dict[str, Tensor]], None]], None],
) -> None:
    def drop_vision(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(VISION)]:
            del tensors[name]

    edit_tensors(published / "model.safetensors", drop_vision)
    tower = CLIPVisionModel(tower_config())
    folder = published / "vision_tower" if where == "inside" else tmp_path / "clip"
    tower.save_pretrained(folder)
    if where == "outside":
        edit_json(published / "config.json", mm_vision_tower=str(folder))
    model = load_llava_flexattn(published, folder if where == "vision_config" else None)
    assert same_weights(model.model.vision_tower, tower)


@pytest.mark.parametrize("given", [None, torch.bfloat16])
def test_dtype(published: Path, edit_json: Callable[..., None], given: torch.dtype | None) -> None:
    edit_json(published / "config.json", torch_dtype="float16")
    model = load_llava_flexattn(published, dtype=given)
    assert {weight.dtype for weight in model.parameters()} == {given or torch.float16}
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(model.get_decoder().rotary_emb.inv_freq, frequencies)


def test_language_settings_are_kept(published: Path) -> None:
    content = json.loads((published / "config.json").read_text())
    content |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "rms_norm_eps": 1e-3}
    (published / "config.json").write_text(json.dumps(content))
    model = load_llava_flexattn(published)
    frequencies = 500.0 ** -(torch.arange(0, 8, 2) / 8) / 2
    torch.testing.assert_close(model.get_decoder().rotary_emb.inv_freq, frequencies)
    assert model.get_decoder().norm.variance_epsilon == 1e-3


def test_generation_settings_are_kept(published: Path) -> None:
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "max_new_tokens": 3}))
    generation = load_llava_flexattn(published).generation_config
    assert (generation.eos_token_id, generation.bos_token_id, generation.max_new_tokens) == (7, 1, 3)
    assert generation.suppress_tokens == [128]


def test_tied_embeddings(
    published: Path,
    edit_json: Callable[..., None],
    edit_tensors: Callable[[Path, Callable[[dict[str, Tensor]], None]], None],
) -> None:
    edit_json(published / "config.json", tie_word_embeddings=True)
    edit_tensors(published / "model.safetensors", lambda tensors: tensors.pop(HEAD))
    model = load_llava_flexattn(published)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    tensors = load_file(published / "model.safetensors")
    assert torch.equal(model.lm_head.weight[:128], tensors[EMBEDDING])


def test_grouped_key_heads(
    published: Path,
    edit_json: Callable[..., None],
    edit_tensors: Callable[[Path, Callable[[dict[str, Tensor]], None]], None],
) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.startswith("model.layers.") and ("k_proj" in name or "v_proj" in name):
                tensors[name] = tensors[name][:16]

    edit_json(published / "config.json", num_key_value_heads=2)
    edit_tensors(published / "model.safetensors", halve)
    added = added_parameters(load_llava_flexattn(published))
    assert {tuple(weight.shape) for weight in added.values()} == {(16, 32)}


def test_buffers_that_older_versions_saved_are_passed_over(
    published: Path, edit_tensors: Callable[[Path, Callable[[dict[str, Tensor]], None]], None]
) -> None:
    expected = load_llava_flexattn(published)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors[f"{VISION}embeddings.position_ids"] = torch.arange(82)[None]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    edit_tensors(published / "model.safetensors", add)
    assert same_weights(load_llava_flexattn(published), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, r"model_type 'llava'; a published .* 'llava_llama'"),
        ({"extra": "3"}, r'no "extra" object'),
        ({"extra": {"zoom_ratio": None}}, r"lacks zoom_ratio"),
        ({"extra": {"zoom_ratio": "three"}}, r"zoom_ratio has to be a whole number, got 'three'"),
        ({"extra": {"zoom_ratio": "2"}}, r"highres_size 378 is not lowres_size 126 times zoom_ratio 2"),
        ({"extra": {"zoom_ratio": "0", "highres_size": "0"}}, r"times zoom_ratio 0"),
        ({"extra": {"threshold": "255"}}, r"threshold is 255"),
        ({"extra": {"lowres_size": "112", "highres_size": "336"}}, r"lowres_size is 112 .* images of 126"),
        ({"mm_hidden_size": 64}, r"mm_hidden_size is 64, but .* 32 wide"),
        ({"mm_projector_type": "linear"}, r"mm_projector_type is 'linear', only 'mlp2x_gelu'"),
        ({"mm_vision_select_feature": "cls_patch"}, r"mm_vision_select_feature is 'cls_patch'"),
        ({"mm_vision_select_layer": None}, r"lacks mm_vision_select_layer"),
        ({"mm_vision_tower": None}, r"lacks mm_vision_tower"),
        ({"mm_vision_tower": "./nowhere"}, r"tower '\./nowhere' cannot be read .*vision_config="),
        ({"mm_vision_tower": "../outside"}, r"'\.\./outside' .* lies outside of that folder"),
        ({"hidden_size": None, "vocab_size": None}, r"lacks vocab_size, hidden_size"),
        ({"hidden_size": 30}, r"does not describe a language model"),
        ({"hidden_size": "wide"}, r"does not describe a language model"),
        ({"num_attention_heads": 0}, r"does not describe a language model"),
        ({"num_hidden_layers": 9}, r"num_hidden_layers is 9, but .* layer 9 on"),
        ({"torch_dtype": "int8"}, r"torch_dtype 'int8' is not a floating dtype"),
        ({"torch_dtype": "half a float"}, r"torch_dtype 'half a float'"),
        ({"vocab_size": 120}, r"128, 32\) instead of \(120, 32\)"),
        ({"num_hidden_layers": 13}, r"11 missing: .*model\.layers\.12\."),
        ({"num_hidden_layers": 11}, r"11 not expected: model\.layers\.11\."),
        ({"attention_bias": True}, r"k_proj\.bias"),
    ],
)
def test_refuses_settings(
    published: Path, edit_json: Callable[..., None], changes: dict[str, Any], message: str
) -> None:
    (published.parent / "outside").mkdir()
    edit_json(published / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_llava_flexattn(published)


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("model.layers.9.self_attn.k_proj_hd.weight", None, r"1 missing: model\.layers\.9\.self_attn\.k_proj_hd"),
        ("model.layers.11.self_attn.v_proj_hd.weight", (32, 16), r"v_proj_hd\.weight \(32, 16\) instead of"),
        ("model.mm_projector.2.bias", None, r"1 missing: model\.mm_projector\.2\.bias"),
        (f"{VISION}post_layernorm.bias", None, r"1 missing: model\.vision_tower\.vision_tower"),
        (EMBEDDING, None, r"1 missing: model\.embed_tokens\.weight"),
        (HEAD, (129, 32), r"lm_head\.weight \(129, 32\) instead of \(128, 32\)"),
        ("model.image_newline", (32,), r"1 not expected: model\.image_newline"),
        ("model.layers.3.self_attn.q_proj_hd.weight", (32, 32), r"1 not expected: .*q_proj_hd"),
        ("model.layers.12.self_attn.k_proj_hd.weight", (32, 32), r"1 not expected: .*12\.self_attn\.k_proj_hd"),
    ],
)
def test_refuses_tensors(
    published: Path,
    edit_tensors: Callable[[Path, Callable[[dict[str, Tensor]], None]], None],
    name: str,
    replacement: tuple[int, ...] | None,
    message: str,
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(name, None)
        if replacement is not None:
            tensors[name] = torch.zeros(replacement)

    edit_tensors(published / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        load_llava_flexattn(published)


@pytest.mark.parametrize(
    ("given", "message"),
    [(3, "has to be a CLIPVisionConfig, a dict or a folder, got int"), ({"hidden_size": "wide"}, "cannot be read")],
)
def test_refuses_other_vision_configs(published: Path, given: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_llava_flexattn(published, given)


def test_refuses_a_tower_without_or_with_few_weights(
    published: Path, tmp_path: Path, edit_tensors: Callable[[Path, Callable[[dict[str, Tensor]], None]], None]
) -> None:
    def keep_language(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(VISION)]:
            del tensors[name]

    edit_tensors(published / "model.safetensors", keep_language)
    with pytest.raises(CheckpointError, match=r"no vision weights and .* cannot be loaded"):
        load_llava_flexattn(published)

    tower = CLIPVisionModel(tower_config())
    tower.save_pretrained(tmp_path / "clip")
    edit_tensors(tmp_path / "clip" / "model.safetensors", lambda tensors: tensors.popitem())
    with pytest.raises(CheckpointError, match=r"lacks weights: "):
        load_llava_flexattn(published, tmp_path / "clip")

    torch.save(tower.state_dict(), tmp_path / "clip" / "pytorch_model.bin")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be loaded"):
        load_llava_flexattn(published, tmp_path / "clip")


def test_refuses_a_folder_without_config(published: Path) -> None:
    (published / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_llava_flexattn(published)
    with pytest.raises(CheckpointError, match=r"is no folder here, and config\.json cannot be had"):
        load_llava_flexattn("liuhaotian/llava-v1.5-7b")


def test_tower_on_the_hub_is_named_not_looked_for(published: Path, edit_json: Callable[..., None]) -> None:
    edit_json(published / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    assert read_settings(published).vision_tower == "openai/clip-vit-large-patch14-336"
