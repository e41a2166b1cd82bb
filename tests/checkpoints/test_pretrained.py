import copy
import filecmp
import json
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, PreTrainedModel

import flexkit
from flexkit.checkpoints import BaseModelWarning, from_pretrained, load_flex, save_flex
from flexkit.errors import CheckpointError
from flexkit.patching import added_parameters
from tests.patching.ways import every_family, families, inputs_of, logits_of, patched, plain
from tests.zoo import FAMILIES, MAIN, ZOO

OURS = ["flexkit.json", "flexkit.weights"]
LOADING = ["README.md", "modeling_flexkit.py"]
AUTO_MAP = dict.fromkeys(("AutoModelForImageTextToText", "AutoModelForMultimodalLM"), "modeling_flexkit.PatchedModel")


def trained(name: str = "llava", **settings: Any) -> PreTrainedModel:
    """A patched model whose added weights are nobody's copies."""
    model = patched(name, **settings)
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(model):
            parameter.normal_(0, 0.3)
    return model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_state(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def assert_base_is_untouched(patched_folder: Path, plain_folder: Path) -> None:
    assert names(patched_folder) == sorted(names(plain_folder) + OURS + LOADING)
    _, *different = filecmp.cmpfiles(patched_folder, plain_folder, names(plain_folder), shallow=False)
    assert different == [["config.json"], []]
    config, base = (json.loads((folder / "config.json").read_text()) for folder in (patched_folder, plain_folder))
    assert config == base | {"auto_map": AUTO_MAP}


@every_family
@pytest.mark.parametrize("size", ["50GB", "50KB"])
def test_base_files_are_those_of_the_base_model(name: str, size: str, tmp_path: Path) -> None:
    model, base = trained(name), plain(name)
    before = {key: id(value) for key, value in vars(model).items()}
    model.save_pretrained(tmp_path / "patched", max_shard_size=size)
    base.save_pretrained(tmp_path / "plain", max_shard_size=size)
    assert_base_is_untouched(tmp_path / "patched", tmp_path / "plain")
    assert (len(names(tmp_path / "plain")) > 3) == (size == "50KB")
    save_flex(model, tmp_path / "added")
    assert filecmp.cmpfiles(tmp_path / "patched", tmp_path / "added", OURS, shallow=False)[0] == OURS
    assert {key: id(value) for key, value in vars(model).items()} == before


@families
def test_transformers_alone_loads_the_base_model(name: str, tmp_path: Path) -> None:
    trained(name).save_pretrained(tmp_path)
    with pytest.warns(BaseModelWarning, match="holds a model that flexkit patched"):
        base, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert same_state(base, plain(name))
    for path in tmp_path.glob("*.safetensors"):
        assert not any("_hd" in key for key in load_file(path))


@families
def test_from_pretrained_is_the_saved_model(name: str, tmp_path: Path) -> None:
    model, inputs = trained(name), inputs_of(name)
    model.save_pretrained(tmp_path / "first", max_shard_size="50KB")
    loaded = from_pretrained(tmp_path / "first")
    assert same_state(loaded, model) and not loaded.training
    # Not to the bit: weights lie elsewhere in memory, and rotary frequencies are made anew.
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(model, inputs), rtol=1e-5, atol=1e-5)
    assert (logits_of(loaded, inputs) - logits_of(patched(name), inputs)).abs().max() > 0.01
    loaded.save_pretrained(tmp_path / "second", max_shard_size="50KB")
    flexkit.unpatch_model(loaded).save_pretrained(tmp_path / "unpatched", max_shard_size="50KB")
    assert_base_is_untouched(tmp_path / "second", tmp_path / "unpatched")
    assert filecmp.cmpfiles(tmp_path / "first", tmp_path / "second", OURS, shallow=False)[0] == OURS


@pytest.mark.parametrize("name", ["kimi_k25", "fuyu", "qwen3_5_moe"])
def test_added_names_follow_the_model(name: str, tmp_path: Path) -> None:
    model = flexkit.patch_model(ZOO[name].model(), flexkit.FlexConfig.training_free(high_res_states="features"))
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(model):
            parameter.normal_()
    model.save_pretrained(tmp_path / "patched")
    ZOO[name].model().save_pretrained(tmp_path / "plain")
    assert_base_is_untouched(tmp_path / "patched", tmp_path / "plain")
    assert same_state(from_pretrained(tmp_path / "patched"), model)


def test_weights_that_are_tied(tmp_path: Path) -> None:
    config = FAMILIES["llava"].config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    bases = [LlavaForConditionalGeneration(copy.deepcopy(config)) for _ in range(2)]
    bases[1].load_state_dict(bases[0].state_dict())
    model = flexkit.patch_model(bases[0], flexkit.FlexConfig.training_free(high_res_states="features"))
    model.save_pretrained(tmp_path / "patched")
    bases[1].save_pretrained(tmp_path / "plain")
    assert_base_is_untouched(tmp_path / "patched", tmp_path / "plain")
    assert not any("lm_head" in key for key in load_file(tmp_path / "patched" / "model.safetensors"))
    loaded = from_pretrained(tmp_path / "patched")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert same_state(loaded, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_keeps_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained().to(dtype)
    model.save_pretrained(tmp_path)
    assert {weight.dtype for weight in load_file(tmp_path / "flexkit.weights").values()} == {dtype}
    assert same_state(from_pretrained(tmp_path), model)
    assert same_state(from_pretrained(tmp_path, dtype=torch.float64), model.double())


def test_added_weights_may_be_finer_than_the_base_model(tmp_path: Path) -> None:
    model = trained().to(torch.bfloat16)
    for parameter in flexkit.flex_parameters(model):
        parameter.data = torch.randn_like(parameter, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "flexkit.weights")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    for name, weight in added_parameters(from_pretrained(tmp_path)).items():
        assert torch.equal(weight, saved[name].bfloat16())


def test_from_pretrained_hands_its_arguments_on(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "sub")
    with pytest.raises(CheckpointError, match=r"has no flexkit\.json"):
        from_pretrained(tmp_path)
    loaded = from_pretrained(
        tmp_path, subfolder="sub", policy=flexkit.TopK(1), dtype=torch.float32, attn_implementation="eager"
    )
    assert loaded.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert flexkit.patching.get_patch(loaded).config.policy == flexkit.TopK(1)


def test_from_pretrained_needs_a_patched_model(tmp_path: Path) -> None:
    plain("llava").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no flexkit\.json: nothing there was patched .*patch_model"):
        from_pretrained(tmp_path)


def test_a_given_state_is_what_is_saved(tmp_path: Path) -> None:
    model = trained()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(state))
    loaded = from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)


def test_a_state_without_what_was_added_is_the_base_model(tmp_path: Path) -> None:
    model = trained()
    added = added_parameters(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in added}
    model.save_pretrained(tmp_path / "patched", state_dict=state)
    plain("llava").save_pretrained(tmp_path / "plain")
    assert filecmp.cmpfiles(tmp_path / "patched", tmp_path / "plain", names(tmp_path / "patched"), shallow=False)[
        0
    ] == names(tmp_path / "plain")
    state[next(iter(added))] = model.state_dict()[next(iter(added))]
    with pytest.raises(CheckpointError, match=r"has 1 of the 6 tensors that flexkit added"):
        model.save_pretrained(tmp_path / "part", state_dict=state)
    assert not (tmp_path / "part").exists()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path, is_main_process=False)
    save_flex(model, tmp_path, is_main_process=False)
    assert names(tmp_path) == []


def test_a_path_that_is_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    trained().save_pretrained(tmp_path / "file")  # as transformers does: logged, nothing saved
    assert (tmp_path / "file").read_text() == "mine"


def test_copies_save_their_own_weights(tmp_path: Path) -> None:
    model = trained()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    clone.save_pretrained(tmp_path)
    assert not any(parameter.any() for parameter in from_pretrained(tmp_path).parameters())


def test_modules_that_layers_share_are_saved_for_each(tmp_path: Path) -> None:
    model = trained()
    layers = model.model.language_model.layers
    layers[3].self_attn.k_proj_hd = layers[2].self_attn.k_proj_hd
    model.save_pretrained(tmp_path)
    assert same_state(from_pretrained(tmp_path), model)


def test_unpatching_gives_the_methods_back(tmp_path: Path) -> None:
    model = plain("llava")
    calls: list[Any] = []
    vars(model)["save_pretrained"] = MethodType(lambda self, folder: calls.append(folder), model)
    own = vars(model)["save_pretrained"]
    flexkit.patch_model(model, flexkit.FlexConfig.training_free(high_res_states="features"))
    model.save_pretrained(tmp_path)
    assert calls == [] and set(OURS) < set(names(tmp_path))
    flexkit.unpatch_model(model)
    assert vars(model)["save_pretrained"] is own and "load_state_dict" not in vars(model)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """What was pushed, as name of the repository to its files and their content."""
    pushed: dict[str, dict[str, bytes]] = {}

    def create_repo(self: HfApi, repo_id: str, **_: Any) -> Any:
        pushed.setdefault(repo_id, {})
        return type("Repository", (), {"repo_id": repo_id})

    def create_commit(self: HfApi, repo_id: str, operations: list[Any], **_: Any) -> str:
        for operation in operations:
            pushed[repo_id][operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()
        return repo_id

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", classmethod(lambda cls, *_, **__: cls("---\ntags: []\n---\n")))
    return pushed


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_pushing_uploads_both(hub: dict[str, dict[str, bytes]], way: str, tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "local")
    for _ in range(2):  # the second time into a folder that has all files already
        if way == "push_to_hub":
            model.push_to_hub("me/mine")
        else:
            model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine")
        files = hub["me/mine"]
        assert sorted(files) == names(tmp_path / "local")
        for name in set(files) - {"README.md"}:
            assert files[name] == (tmp_path / "local" / name).read_bytes()
        with torch.no_grad():
            for parameter in flexkit.flex_parameters(model):
                parameter.add_(1)
        model.save_pretrained(tmp_path / "local")


def resumed(model: PreTrainedModel, folder: Path, best: bool = False) -> None:
    """What Trainer does with a checkpoint before it goes on."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to=[]))
    if best:
        trainer.state.best_model_checkpoint = str(folder)
        trainer._load_best_model()
    else:
        trainer._load_from_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("name", "size", "best"),
    [(name, "50GB", False) for name in MAIN] + [("llava", "300KB", False), ("llava", "300KB", True)],
)
def test_a_trainer_restores_every_weight(
    name: str, size: str, best: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path, max_shard_size=size)
    other = patched(name)
    parameters = list(other.parameters())
    resumed(other, tmp_path, best)
    assert same_state(other, model)
    assert all(one is two for one, two in zip(parameters, other.parameters(), strict=True))
    # Of shards it complains about the names in their index.
    assert "keys in the checkpoint" not in caplog.text or size == "300KB"


def test_a_trainer_cannot_resume_with_other_layers(tmp_path: Path) -> None:
    trained(start_layer=2).save_pretrained(tmp_path)
    model = trained(start_layer=1)
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match="2 missing"):
        resumed(model, tmp_path)
    assert same_state(model, before)


def test_a_trainer_can_start_from_a_plain_checkpoint(tmp_path: Path) -> None:
    base, model = plain("qwen2_5_vl"), trained("qwen2_5_vl")
    base.save_pretrained(tmp_path, save_original_format=False)
    added = {name: weight.clone() for name, weight in added_parameters(model).items()}
    resumed(model, tmp_path)
    assert all(torch.equal(weight, added[name]) for name, weight in added_parameters(model).items())


def test_other_states_are_loaded_as_ever() -> None:
    model, other = trained(), patched("llava")
    report = other.load_state_dict(model.state_dict(), strict=True)
    assert report.missing_keys == report.unexpected_keys == []
    assert same_state(other, model)
    with pytest.raises(RuntimeError, match="k_proj_hd"):
        other.load_state_dict(plain("llava").state_dict())


def test_a_model_without_weights_yet(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(model.config).double()
    load_flex(empty, tmp_path)
    state = added_parameters(empty)
    assert all(weight.requires_grad and torch.equal(weight, model.state_dict()[name]) for name, weight in state.items())
    assert all(weight.is_meta for name, weight in empty.named_parameters() if name not in state)
    base = {name: tensor for name, tensor in model.state_dict().items() if name not in state}
    empty.load_state_dict(base, strict=False, assign=True)
    assert same_state(empty, model)


PLACES = {
    "whole": "cpu",
    "parts": {"": "cpu"},
    "disk": {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "lm_head": "cpu",
        "model.language_model": "disk",
    },
}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("place", PLACES)
def test_models_that_accelerate_places(place: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, inputs = trained(), inputs_of("llava")
    model.save_pretrained(tmp_path / "first")
    loaded = from_pretrained(tmp_path / "first", device_map=PLACES[place], offload_folder=tmp_path / "offloaded")
    assert any(parameter.is_meta for parameter in loaded.parameters()) == (place == "disk")
    for _ in range(2):
        torch.testing.assert_close(logits_of(loaded, inputs), logits_of(model, inputs))
    assert not any(parameter.is_meta for parameter in flexkit.flex_parameters(loaded))
    loaded.save_pretrained(tmp_path / "second")
    files = [*OURS, "model.safetensors"]
    assert filecmp.cmpfiles(tmp_path / "first", tmp_path / "second", files, shallow=False)[0] == files


def test_sharded_weights_are_saved_whole_and_loaded_in_shards(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = trained()
    expected: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in added_parameters(model).items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))
        assert all(isinstance(weight, DTensor) for weight in flexkit.flex_parameters(model))
        save_flex(model, tmp_path)
        for weight in flexkit.flex_parameters(model):
            nn.init.zeros_(weight)
        again: dict[str, Any] = added_parameters(load_flex(model, tmp_path))
        assert all(torch.equal(weight.full_tensor(), expected[name]) for name, weight in again.items())
    finally:
        dist.destroy_process_group()
    loaded = load_flex(plain("llava"), tmp_path)
    assert all(torch.equal(weight, expected[name]) for name, weight in added_parameters(loaded).items())
