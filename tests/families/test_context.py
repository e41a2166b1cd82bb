"""Law 2, features and keys where attention reads the image from a context beside the decoder's sequence."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexkit
from flexkit import FlexConfig
from flexkit.grids import fractional_positions
from flexkit.patching import get_patch
from flexkit.patching.memory import HighResMemory
from tests.zoo import CONTEXT, Family, Row, low_res, prompt

every_context = pytest.mark.parametrize("family", CONTEXT.values(), ids=list(CONTEXT))
_MASKS = ("merged_attention_mask", "attn_mask", "mask", "attention_mask")


@contextmanager
def patched(model: Any, **settings: Any) -> Iterator[Any]:
    defaults = {"zoom": 2, "policy": flexkit.Everything(), "start_layer": 0, "select_from": "same"}
    flexkit.patch_model(model, FlexConfig(**defaults | settings), trained=True)
    try:
        yield get_patch(model)
    finally:
        flexkit.unpatch_model(model)


def read(model: Any, inputs: dict[str, Tensor]) -> HighResMemory:
    """The high-res tokens of the inputs of a patched model."""
    patch, high = get_patch(model), {name: value for name, value in inputs.items() if name.startswith("hd_")}
    memory = patch.geometry.route.read(model, patch, high, low_res(inputs))  # type: ignore[attr-defined]
    assert isinstance(memory, HighResMemory)
    return memory


def bound(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a module's call, by name."""
    arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return {name: value for name, value in (arguments | arguments.pop("kwargs", {})).items() if name != "self"}


def shown_again(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The low-res pictures as high-res view of zoom 1."""
    (name,) = (name[3:] for name in inputs if name.startswith("hd_"))
    view = inputs[name]
    if view.ndim == 6:  # the first tile of every image
        view = view[:, :, 0]
    if view.ndim > inputs[f"hd_{name}"].ndim:
        view = view.flatten(0, 1)
        view = view[view.flatten(1).any(-1)]
    return inputs | {f"hd_{name}": view}


@every_context
def test_features_are_what_keys_are_made_of(family: Family) -> None:
    """At zoom 1, bit by bit, at the columns of the image's cells."""
    if family.name == "udop":
        pytest.skip("words take in the patches on which they lie, and a patch of a tile lies elsewhere among them")
    several = [Row(), Row((None, None), 2)]
    inputs = shown_again(prompt(family, [Row(), Row(words=2)] if family.one_image else several, padding="right"))
    model, given = family.model(), []
    with patched(model, zoom=1) as patch:
        memory, site = read(model, inputs), patch.layers[0]

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(bound(module, args, kwargs)[site.reads])

    hook = site.attention.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**low_res(inputs))
        hook.remove()
        features = memory.features.states
        features = features if site.source_norm is None else site.source_norm(features)
    source = given[0].reshape(memory.batch, -1, features.shape[-1])
    for image in memory.images:
        ours = features[image.row, image.start : image.start + image.tokens]
        assert torch.equal(ours, source[image.row, image.columns])


@every_context
def test_tiles_shown_together_are_what_they_are_one_by_one(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prompt(family, [Row(), Row(words=2)], padding="right")
    with patched(model := family.model()):
        at_once = read(model, inputs).features.states
        monkeypatch.setattr("flexkit.patching.context.pictures.TOGETHER", 1)
        torch.testing.assert_close(at_once, read(model, inputs).features.states, rtol=0, atol=1e-9)


def test_tiles_are_not_run_through_what_lies_in_front_of_the_attention() -> None:
    """Of Mllama, whose first layers see words alone."""
    family, ran = CONTEXT["mllama"], []
    model = family.model()
    with patched(model):
        model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
        memory = read(model, prompt(family, [Row()]))
    assert memory.tokens
    assert not ran


@contextmanager
def longer_context(
    sites: list[Any], features: Tensor, readers: Tensor | None, tables: list[Tensor] | None
) -> Iterator[None]:
    """Let attention modules of an unpatched model find high-res features in their context too.

    ``readers``, ``(batch, length)``, says which positions do; all by default. ``tables`` rotate the features.
    """

    def hook_of(site: Any) -> Any:
        more = features if site.source_norm is None else site.source_norm(features)

        def lengthen(module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = bound(module, args, kwargs)
            states = given[site.reads].reshape(len(more), -1, more.shape[-1])
            given[site.reads] = torch.cat([states, more], dim=1)
            name = next((name for name in _MASKS if given.get(name) is not None), None)
            if name:  # what is behind the context stays there
                at = states.shape[1] if "latents" in given else given[name].shape[-1]
                given[name] = wider(given[name], at)
            return (), given

        return lengthen

    def hook_of_sequence(site: Any) -> Any:
        """For GIT: keys and values are made of more than queries are."""

        def attend(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            given = bound(module, args, kwargs)
            states, mask = given["hidden_states"], given["attention_mask"]
            both = torch.cat([states, features], dim=1)
            query, key, value = (
                made.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
                for made in (module.query(states), module.key(both), module.value(both))
            )
            read = nn.functional.scaled_dot_product_attention(query, key, value, wider(mask, mask.shape[-1]))
            return (read.transpose(1, 2).flatten(2), *output[1:])

        return attend

    def hooks_of_rotated(site: Any) -> Any:
        """For DeepSeek-OCR 2: the features are a part of the sequence, which is cut off again."""

        def lengthen(module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = bound(module, args, kwargs)
            given["hidden_states"] = torch.cat([given["hidden_states"], site.source_norm(features)], dim=1)
            given["position_embeddings"] = tuple(
                torch.cat([own.expand(len(more), -1, -1), more], dim=1)
                for own, more in zip(given["position_embeddings"], tables or [], strict=True)
            )
            mask = wider(given["attention_mask"], given["attention_mask"].shape[-1])
            given["attention_mask"] = torch.cat([mask, mask[..., -features.shape[1] :, :]], dim=-2)
            return (), given

        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            return (output[0][:, : -features.shape[1]], *output[1:])

        return [
            site.attention.register_forward_pre_hook(lengthen, with_kwargs=True),
            site.attention.register_forward_hook(cut),
        ]

    def wider(mask: Tensor, at: int) -> Tensor:
        """A mask with the columns of the features from column ``at`` on."""
        shown = torch.ones(1, 1, dtype=torch.bool) if readers is None else readers
        seen = shown[:, None, :, None].expand(-1, *mask.shape[1:-1], features.shape[1]).expand(len(mask), -1, -1, -1)
        if mask.dtype != torch.bool:
            seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)
        return torch.cat([mask[..., :at], seen, mask[..., at:]], dim=-1)

    hooks: list[Any] = []
    for site in sites:
        if site.is_rotated:
            hooks += hooks_of_rotated(site)
        elif site.reads == "hidden_states":
            hooks.append(site.attention.register_forward_hook(hook_of_sequence(site), with_kwargs=True))
        else:
            hooks.append(site.attention.register_forward_pre_hook(hook_of(site), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@every_context
def test_everything_selected_is_a_longer_context(family: Family, fact: Any) -> None:
    """Law 2: what the unpatched model computes whose context is lengthened by the high-res features."""
    model = family.model()
    inputs = prompt(family, [Row(), Row(words=2)], padding="right")
    tables = None
    with patched(model, queries="all", positions="fractional") as patch, torch.no_grad():
        found = model(**inputs).logits
        memory, sites = read(model, inputs), list(patch.layers.values())
        features, image = memory.features.states, memory.images[0]
        if image.positions is not None:
            places = fractional_positions(image.positions, image.grid, image.zoom)
            tables = [table.expand(len(features), -1, -1) for table in patch.decoder.rotary_emb(features, places)]
    options = {} if family.learned_queries else {"use_cache": False}
    text = inputs[family.stream + "input_ids"]
    attended = inputs.get(family.stream + "attention_mask", torch.ones_like(text)).bool()
    front = found.shape[1] - text.shape[1]
    seen = next((inputs[name] for name in ("cross_attention_mask", "image_attention_mask") if name in inputs), None)
    readers = None if seen is None or family.learned_queries else seen.flatten(2).any(-1)
    if tables:
        readers = torch.arange(int(image.columns.max()) + 1 + 144)[None] > image.columns.max()
    elif front:
        readers = torch.arange(found.shape[1])[None] >= front
    with torch.no_grad():
        plain = model(**low_res(inputs), **options).logits
        with longer_context(sites, features, readers, tables):
            expected = model(**low_res(inputs), **options).logits
    assert float((expected - plain)[:, front:][attended].abs().max()) > 1e-3
    torch.testing.assert_close(found[:, front:][attended], expected[:, front:][attended], rtol=1e-5, atol=1e-5)
    if family.name == model.config.model_type:
        fact(family.name, {"equal to full attention": "yes"})


def keep_places_apart(model: Any) -> None:
    """Weaken what carries information from place to place in towers and encoders."""
    mixing = (
        "out_proj",
        "o_proj",
        "projection",
        "output",
        "proj",
        "fc2",
        "o",
        "wo",
        "v_proj",
        "value",
        "dense",
        "lin2",
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            *owner, last = name.split(".")[:-1] or [""]
            tower = any(part.endswith(("vision_model", "vision_tower", "encoder", "image_encoder")) for part in owner)
            if last in mixing and (tower or "vision" in name) and "patch" not in name and "multi_modal" not in name:
                weight.mul_(0.02)
            if weight.ndim == 4 and weight.shape[-1] > 1 and "patch" not in name:
                if any(
                    part in name for part in (".convs.", "projector", ".proj.conv")
                ):  # each sees what it makes one of, and nothing beside
                    stride, padding = {3: (2, 1), 5: (4, 2), 7: (4, 3)}[weight.shape[-1]]
                    kept = torch.zeros(weight.shape[-1]).double()
                    kept[padding : padding + stride] = 1
                    weight.mul_(kept[:, None] * kept)
                else:
                    weight.mul_(0.02)


@every_context
def test_features_lie_as_the_picture_does(family: Family) -> None:
    """What changes in a high-res cell of the view changes that cell's features most."""
    model, zoom = family.model(), (2, 1)
    keep_places_apart(model)
    inputs = prompt(family, [Row()], zoom=zoom)
    (name,) = (name for name in inputs if name.startswith("hd_"))
    rows, columns = family.grid[0] * zoom[0], family.grid[1] * zoom[1]
    wrong = []
    with patched(model, zoom=zoom):
        memory = read(model, inputs)
        tokens = memory.images[0].tokens
        for cell in range(rows * columns):
            view = inputs[name].clone()
            if view.ndim == 3:
                place: Any = (..., cell, slice(2, None))
            else:
                height, width = view.shape[-2] // rows, view.shape[-1] // columns
                row, column = divmod(cell, columns)
                place = (..., slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
            torch.manual_seed(cell)
            view[place] += 3 * torch.randn_like(view[place])
            changed = read(model, inputs | {name: view}).features.states - memory.features.states
            if int(changed[0, :tokens].norm(dim=-1).argmax()) != cell:
                wrong.append(cell)
    assert not wrong
