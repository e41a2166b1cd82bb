"""Every mistake is named, and leaves the model as it was."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import flexkit
from flexkit.errors import ConfigError, HighResInputError, PatchError, PolicyError, UnsupportedModelError
from flexkit.patching.call.call import FlexCall
from tests.patching.ways import (
    families,
    generate,
    inputs_of,
    logits_of,
    patched,
    plain,
    unharmed,
)
from tests.zoo import TEXT, Row, low_res

fixed = pytest.mark.parametrize("name", ["llava", "gemma3"])


def refused(name: str, match: str, changes: dict[str, Any], inputs: dict[str, Any] | None = None) -> None:
    """A patched model refuses these inputs, in forward and in generate, and works as before."""
    model, good = patched(name), inputs_of(name)
    bad = (good if inputs is None else inputs) | changes
    with unharmed(model, good):
        with pytest.raises(HighResInputError, match=match):
            logits_of(model, bad)
        with pytest.raises(HighResInputError, match=match):
            generate(model, bad, 2)


# Models


def test_not_a_transformers_model() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"Linear is no transformers model.*HierarchicalSelfAttention"):
        flexkit.patch_model(module)
    assert not flexkit.is_patched(module)


def test_a_text_model() -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*'llama'.*supported_models\(\)"):
        flexkit.patch_model(model)
    assert not any("hd" in name for name in model.state_dict())


def test_image_tokens_that_are_no_square() -> None:
    model = plain("gemma3")
    model.config.mm_tokens_per_image = 6
    with pytest.raises(UnsupportedModelError, match="6 tokens an image, which is no square"):
        flexkit.patch_model(model)
    assert not flexkit.is_patched(model)


def test_no_attention_that_can_be_patched() -> None:
    model = plain("llava")
    for layer in model.model.language_model.layers:
        del layer.self_attn.k_proj
    with pytest.raises(UnsupportedModelError, match=r"no layer of LlamaModel has attention .*AttentionInterface"):
        flexkit.patch_model(model)


def test_a_norm_that_cannot_be_found() -> None:
    model = plain("llava")
    del model.model.language_model.layers[2].input_layernorm
    with pytest.raises(ConfigError, match="key_norm needs the norm"):
        flexkit.patch_model(model, flexkit.FlexConfig.training_free(high_res_states="features"))
    assert not flexkit.is_patched(model)


def test_no_decoder_to_be_found() -> None:
    model = plain("llava")
    model.model.language_model.layers = None
    with pytest.raises(UnsupportedModelError, match=r"decoder layers of LlavaForConditionalGeneration: .*get_decoder"):
        flexkit.patch_model(model)


@families
def test_patched_twice(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    with unharmed(model, inputs), pytest.raises(PatchError, match=r"patched already; call flexkit.unpatch_model"):
        flexkit.patch_model(model)


@families
def test_never_patched(name: str) -> None:
    model, inputs = plain(name), low_res(inputs_of(name))
    with unharmed(model, inputs):
        with pytest.raises(PatchError, match="not patched"):
            flexkit.unpatch_model(model)
        with pytest.raises(PatchError, match="not patched"), flexkit.disabled(model):
            pass
        with pytest.raises(PatchError, match="not patched"), flexkit.trace(model):
            pass


@families
def test_unpatched_twice(name: str) -> None:
    model = flexkit.unpatch_model(patched(name))
    with pytest.raises(PatchError, match="not patched"):
        flexkit.unpatch_model(model)


@families
def test_forward_replaced_after_patching(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    ours = model.forward
    with unharmed(model, inputs):
        model.forward = lambda **kwargs: ours(**kwargs)
        with pytest.raises(PatchError, match="forward of this model was replaced"):
            flexkit.unpatch_model(model)
    model.forward = ours
    flexkit.unpatch_model(model)


@families
def test_layers_before_the_start_are_not_touched(name: str) -> None:
    model, patched_model = plain(name), patched(name, start_layer=3)
    layers, others = (entry.model.language_model.layers for entry in (patched_model, model))
    for index in (0, 1):
        assert layers[index].state_dict().keys() == others[index].state_dict().keys()
        assert type(layers[index].self_attn.config) is type(others[index].self_attn.config)
    assert hasattr(layers[3].self_attn, "k_proj_hd") and not hasattr(layers[2].self_attn, "k_proj_hd")


@families
def test_generate_of_an_unpatched_model_knows_no_high_res_inputs(name: str) -> None:
    with pytest.raises(ValueError, match="hd_pixel_values"):
        generate(plain(name), inputs_of(name), 2)


# Inputs


@families
def test_an_unknown_high_res_input(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    with unharmed(model, inputs):
        with pytest.raises(HighResInputError, match=r"takes no \['hd_pixels'\].*hd_pixel_values"):
            logits_of(model, inputs, hd_pixels=torch.zeros(1))
        with pytest.raises(ValueError, match="hd_pixels"):
            generate(model, inputs, 2, hd_pixels=torch.zeros(1))


@families
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_no_numbers(name: str, value: float) -> None:
    pixels = inputs_of(name)["hd_pixel_values"].clone()
    pixels.view(-1)[-1] = value
    refused(name, "NaN or infinite", {"hd_pixel_values": pixels})


@families
@pytest.mark.parametrize("key", ["hd_pixel_values", "hd_image_sizes"])
def test_high_res_inputs_that_are_no_tensors(name: str, key: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    with unharmed(model, inputs), pytest.raises(HighResInputError, match=rf"tensors, not {key} \(list\)"):
        logits_of(model, inputs | {key: [[1, 2]] * 3})


@fixed
@pytest.mark.parametrize("view", ["low-res", "wider", "channels", "one image", "flat"])
def test_a_view_of_another_size(name: str, view: str) -> None:
    inputs = inputs_of(name)
    pixels = inputs["hd_pixel_values"]
    changed = {
        "low-res": inputs["pixel_values"],
        "wider": torch.cat([pixels, pixels], dim=-1),
        "channels": pixels[:, :2],
        "one image": pixels[0],
        "flat": pixels.flatten(1),
    }
    refused(name, r"hd_pixel_values has shape .*expected \(images, 3, ", {"hd_pixel_values": changed[view]})


@fixed
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_another_number_of_views(name: str, count: int) -> None:
    pixels = inputs_of(name)["hd_pixel_values"]
    views = torch.cat([pixels, pixels])[:count]
    refused(name, rf"{count} high-res views", {"hd_pixel_values": views})


@families
def test_views_without_an_image_in_the_prompt(name: str) -> None:
    views = {key: value for key, value in inputs_of(name).items() if key.startswith("hd_")}
    refused(name, "3 high-res views were given for 0 images", views, inputs_of(name, (Row(()), Row((), 2))))


@families
def test_sizes_or_queries_without_a_view(name: str) -> None:
    prompt = low_res(inputs_of(name))
    refused(name, r"lack \['hd_pixel_values'", {"hd_image_sizes": torch.ones(3, 2, dtype=torch.long)}, prompt)
    queries = torch.ones(3, 4, dtype=torch.bool)
    refused(name, "hd_queries were given without a high-res view", {"hd_queries": queries}, prompt)


SIZES = {
    "too few": torch.full((2, 2), 30),
    "too many": torch.full((4, 2), 30),
    "one number": torch.tensor(30),
    "three columns": torch.full((3, 3), 30),
}


@families
@pytest.mark.parametrize("sizes", SIZES)
def test_image_sizes_of_another_shape(name: str, sizes: str) -> None:
    refused(name, r"hd_image_sizes has shape .*expected \(3, 2\)", {"hd_image_sizes": SIZES[sizes]})


@families
@pytest.mark.parametrize("size", [[0, 30], [30, -4], [30.5, 3.0]], ids=str)
def test_image_sizes_that_no_image_has(name: str, size: list[float]) -> None:
    refused(name, "image sizes", {"hd_image_sizes": torch.tensor([[30, 30], [30, 30], size])})


QUERIES = {
    "no tensor": ([[True]], "must be a bool tensor"),
    "no axes": (torch.tensor(True), r"must be a bool tensor \(batch, positions\)"),
    "floats": (torch.ones(3, 4), "queries are torch.float32"),
    "too long": (torch.ones(3, 400, dtype=torch.bool), r"shape \(3, 400\); expected .* or shorter"),
    "other batch": (torch.ones(2, 4, dtype=torch.bool), r"shape \(2, 4\); expected torch.bool of shape \(3, "),
}


@families
@pytest.mark.parametrize("kind", QUERIES)
def test_queries_that_name_no_positions(name: str, kind: str) -> None:
    queries, match = QUERIES[kind]
    model, inputs = patched(name), inputs_of(name)
    with unharmed(model, inputs), pytest.raises(HighResInputError, match=match):
        logits_of(model, inputs, hd_queries=queries)
    if isinstance(queries, Tensor):
        with pytest.raises(HighResInputError, match=match):
            logits_of(patched(name, queries=queries), inputs)


# The flattened patches of towers that take any size


@pytest.mark.parametrize("missing", ["hd_pixel_values", "hd_image_grid_thw"])
def test_one_of_the_pair_is_missing(missing: str) -> None:
    refused("qwen2_5_vl", rf"lack \['{missing}'\]", {missing: None})


GRIDS = {
    "too few": (torch.tensor([[1, 12, 12]] * 2), "does not add up"),
    "too many": (torch.tensor([[1, 12, 12]] * 4), "does not add up"),
    "frames": (torch.tensor([[2, 6, 12]] * 3), "expected one frame"),
    "no multiple": (torch.tensor([[1, 6, 24]] * 3), "rows .* 4"),
    "negative": (torch.tensor([[1, -12, -12]] * 3), "positive integers"),
    "zero": (torch.tensor([[1, 12, 12]] * 3 + [[1, 0, 8]]), "positive integers"),
    "floats": (torch.tensor([[1.0, 12.0, 12.0]] * 3), "positive integers"),
    "flat": (torch.tensor([1, 12, 12]), "expected positive integers"),
    "columns": (torch.tensor([[12, 12]] * 3), "expected positive integers"),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_grids_that_do_not_fit_the_patches(kind: str) -> None:
    grids, match = GRIDS[kind]
    refused("qwen2_5_vl", match, {"hd_image_grid_thw": grids})


def test_patches_too_few() -> None:
    patches = inputs_of("qwen2_5_vl")["hd_pixel_values"]
    refused("qwen2_5_vl", "does not add up", {"hd_pixel_values": patches[:-1]})


@pytest.mark.parametrize("grids", [[(2, 2), (3, 4)], [(2, 3), (3, 2)]], ids=str)
def test_views_in_another_order(grids: list[tuple[int, int]]) -> None:
    inputs = inputs_of("qwen2_5_vl", tuple(Row((grid,)) for grid in grids))
    swapped = {"hd_image_grid_thw": inputs["hd_image_grid_thw"].flip(0)}
    refused("qwen2_5_vl", "grid|views fit images", swapped, inputs)


def test_a_view_of_another_zoom() -> None:
    inputs = inputs_of("qwen2_5_vl", (Row(((2, 2),)),), zoom=(3, 3))
    refused("qwen2_5_vl", "low-res grids|views fit images", {}, inputs)


# Policies and heads, which only meet a map in a call

POLICIES = {
    "shape": lambda scores: scores[..., :1] > 0,
    "dtype": lambda scores: scores,
    "nothing": lambda scores: None,
    "numbers": lambda scores: 1.0,
}


@families
@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_that_returns_no_mask(name: str, kind: str) -> None:
    model, inputs = patched(name, policy=POLICIES[kind]), inputs_of(name)
    with unharmed(model, low_res(inputs)), pytest.raises(PolicyError, match=r"expected a torch.bool tensor of shape"):
        logits_of(model, inputs)


def test_an_error_of_a_policy_itself() -> None:
    def broken(scores: Tensor) -> Tensor:
        raise RuntimeError("broken policy")

    model, inputs = patched("llava", policy=broken), inputs_of("llava")
    named = r"broken\) failed on scores of shape \(.*RuntimeError: broken policy"
    with unharmed(model, low_res(inputs)), pytest.raises(PolicyError, match=named) as raised:
        logits_of(model, inputs)
    assert isinstance(raised.value.__cause__, RuntimeError)


@families
def test_a_head_that_the_model_has_not(name: str) -> None:
    model, inputs = patched(name, heads=(0, 4)), inputs_of(name)
    with unharmed(model, low_res(inputs)), pytest.raises(ConfigError, match="the attention has 4"):
        logits_of(model, inputs)


def test_a_model_that_drops_the_call() -> None:
    model, inputs = patched("llava", start_layer=1), inputs_of("llava")
    layer = model.model.language_model.layers[2]
    forward = layer.forward
    layer.forward = lambda *args, flexkit_call=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(PatchError, match=r"layers \[2\] did not run through flexkit"):
        logits_of(model, inputs)


def test_flex_attention_blocks_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class BlockMask:
        pass

    attend = FlexCall.attend

    def with_blocks(
        call: FlexCall, layer: int, query: Any, key: Any, value: Any, mask: Any, *rest: Any, **own: Any
    ) -> Any:
        return attend(call, layer, query, key, value, BlockMask(), *rest, **own)  # type: ignore[arg-type]

    model = patched("llava")
    monkeypatch.setattr(FlexCall, "attend", with_blocks)
    with pytest.raises(UnsupportedModelError, match=r"BlockMask.*attn_implementation='sdpa'"):
        logits_of(model, inputs_of("llava"))


@families
def test_every_error_is_a_value_error(name: str) -> None:
    assert issubclass(flexkit.FlexkitError, ValueError)
    with pytest.raises(flexkit.FlexkitError):
        logits_of(patched(name), inputs_of(name) | {"hd_pixel_values": torch.zeros(1)})
