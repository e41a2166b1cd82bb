"""What videos have that images have not: frames that are chosen, time between them, and images beside them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flexkit
from flexkit import Everything, FlexConfig, Frames, HighResInputError, TopK
from flexkit.grids import fractional_positions
from flexkit.patching import get_patch
from flexkit.patching.memory import cached_memory
from tests.families.test_laws import differences, empty_cache, generation, tensors
from tests.patching.laws import patched
from tests.zoo import VIDEOS, ZOO, Family, Row, low_res, prompt

every_video = pytest.mark.parametrize("family", VIDEOS.values(), ids=list(VIDEOS))
ACROSS = ("minimax_m3_vl-video", "dots3_note-video")
"""Kinds whose tower attends from frame to frame."""
CLIP = (3, 2, 1)
MIXED = ("qwen2_vl", "qwen3_vl", "glm5_next", "video_llama_3", "gemma4", "llava_onevision", "video_llava")
"""Kinds that take both in one prompt: with ids of their own, frame by frame, by marks, by merge sizes; or in tiles."""
mixed = pytest.mark.parametrize("name", [name for name in MIXED if f"{name}-video" in VIDEOS])


def rows_of(family: Family) -> list[Row]:
    """A batch with images and videos in one row, in another order, and none of either."""
    if not family.any_grid:
        return [Row((None, family.video_grid), 3), Row((family.video_grid, None, family.video_grid), 5), Row((), 4)]
    return [Row(((2, 2), CLIP), 3), Row((CLIP, (1, 3), (2, 1, 2)), 5), Row((), 4)]


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def first_frame(scores: Tensor) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[..., 0, :, :] = True
    return mask


@pytest.mark.parametrize(
    "family", [each for name, each in VIDEOS.items() if name not in ACROSS], ids=lambda each: each.name
)
def test_frames_that_are_not_selected_have_no_influence(family: Family) -> None:
    """Where towers see every frame by itself."""
    model, inputs = family.model(), prompt(family, [Row()])
    pixels = inputs["hd_pixel_values_videos"]
    shape, pixels = pixels.shape, pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    each = len(pixels) // family.grid[0]
    with patched(model, zoom=2, policy=first_frame, select_from="same", start_layer=0):
        expected = logits(model, inputs)
        for frame in range(family.grid[0]):
            changed = pixels.clone()
            own = slice(frame * each, (frame + 1) * each)
            changed[own] = changed[own].flip(-1)
            found = logits(model, inputs | {"hd_pixel_values_videos": changed.reshape(shape)})
            assert torch.equal(found, expected) == (frame > 0)


@pytest.mark.parametrize("name", ["qwen2_5_vl-video", "qwen3_vl-video", "glm4v-video", "lfm3_vl-video"])
def test_frames_that_nobody_looks_at_are_not_encoded(name: str) -> None:
    """Of videos of several sizes in a batch; what is read is what all frames at once were encoded to."""
    if name not in VIDEOS:
        pytest.skip("this transformers does not have it")
    family = VIDEOS[name]
    rows = [Row(((2, 2, 2), CLIP), 3), Row(((3, 2, 2),), 5)]
    model, inputs = family.model(), prompt(family, rows, zoom=(2, 2, 2))
    settings = {"zoom": (2, 2, 2), "policy": Frames(1), "select_from": "same", "start_layer": 0}
    with patched(model, **settings, tiles="all"):
        expected = logits(model, inputs)
    with patched(model, **settings), flexkit.trace(model) as trace:
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-6, atol=1e-6)
    (step,) = trace.steps
    looked_at = [
        torch.stack([trace.mask(0, layer, image=image) for layer in trace.layers]).any(0).flatten(2).any(-1).sum(-1)
        for image in range(2)
    ]
    assert step.tiles == int(sum(looked_at).sum()) and 6 <= step.tiles < 2 * (2 + 3 + 3)


@every_video
def test_a_video_without_a_high_res_view_is_the_base_model(family: Family) -> None:
    model, inputs = family.model(), low_res(prompt(family, [Row()]))
    expected = tensors(generation(model, inputs))
    with patched(model, zoom=2, policy=Everything()), flexkit.trace(model) as trace:
        assert all(map(torch.equal, tensors(generation(model, inputs)), expected))
    assert not trace.steps


@mixed
@pytest.mark.parametrize("padding", ["left", "right"])
def test_images_and_videos_in_one_prompt(name: str, padding: str) -> None:
    """Nothing selected is the base model, a batch equals its rows, and a trace has them as they stand in the prompt."""
    family = ZOO[name]
    rows = rows_of(family)
    model, inputs = family.model(), prompt(family, rows, padding=padding)
    base = logits(model, low_res(inputs))
    with patched(model, zoom=2, policy=TopK(1).over_frames()):
        with flexkit.disabled(model):
            own = differences(family, model, rows, inputs, padding)
        found = differences(family, model, rows, inputs, padding)
        assert all(ours <= max(1e-5, 10 * theirs) for ours, theirs in zip(found, own, strict=True))
        with flexkit.trace(model) as trace:
            logits(model, inputs)
        layer = trace.layers[0]
        for image in range(3):
            mask = trace.mask(0, layer, image=image)
            counts = [4 if image < len(row.images) else 0 for row in rows]  # one cell of 2 x 2 tokens, of all frames
            assert mask.flatten(1).sum(-1).tolist() == counts
        grids = [rows[0].images[0] or family.grid, rows[1].images[0]]
        largest = [max(sides) for sides in zip((1, *grids[0]), grids[1], strict=True)]
        assert trace.scores(0, layer, image=0).shape == (3, *largest)  # a picture beside a video is a frame
    with patched(model, zoom=2, policy=flexkit.Nothing()):
        assert torch.equal(logits(model, inputs), base)


@mixed
def test_one_kind_alone_may_have_a_high_res_view(name: str) -> None:
    family = ZOO[name]
    model, inputs = family.model(), prompt(family, rows_of(family)[:1])
    videos = {key for key in inputs if key.startswith("hd_") and "video" in key}
    images = {key for key in inputs if key.startswith("hd_")} - videos
    with patched(model, zoom=2, policy=Everything(), select_from="same", start_layer=0):
        found = []
        for left_out in (videos, images, set()):
            with flexkit.trace(model) as trace:
                found.append(logits(model, {key: inputs[key] for key in inputs if key not in left_out}))
            kinds = trace.steps[0].layers[trace.layers[0]].groups
            assert [len(group.grid) for group in kinds] == [[2], [3], [2, 3]][len(found) - 1]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["video_llama_3", "exaone4_5", "lfm3_vl"])
@pytest.mark.parametrize("grids", [((2, 2), CLIP), (CLIP, (2, 2)), ((2, 2), (3, 2), CLIP)])
def test_a_video_in_a_later_turn(name: str, grids: tuple[tuple[int, ...], ...]) -> None:
    """A chat whose later turn brings a video, or a picture, equals the whole of it at once."""
    if f"{name}-video" not in VIDEOS:
        pytest.skip("this transformers does not have it")
    family = ZOO[name]
    model = family.model()
    turns = [prompt(family, [Row((grid,), 3)], seed=seed) for seed, grid in enumerate(grids)]
    both = prompt(family, [Row(grids)])
    for key in both:
        parts = [turn[key] for turn in turns if key in turn]
        both[key] = torch.cat(parts, dim=1 if key in ("input_ids", "attention_mask") else 0)
    settings = {"zoom": 2, "policy": TopK(2).over_frames(), "queries": "all", "share_selection": False}
    with patched(model, **settings), torch.no_grad():
        whole, cache = logits(model, both), empty_cache(model)
        for turn in turns:
            length = cache.get_seq_length() + turn["input_ids"].shape[1]
            seen = {"attention_mask": both["attention_mask"][:, :length]}
            later = model(**turn | seen, past_key_values=cache).logits
    torch.testing.assert_close(later, whole[:, -later.shape[1] :], rtol=1e-6, atol=1e-6)


@every_video
@pytest.mark.parametrize("zoom", [(2, 1, 1), (2, 1, 2)])
def test_frames_between_frames(family: Family, zoom: tuple[int, ...]) -> None:
    """Zoomed in time, as many frames more are read, at times between those of the sequence."""
    rows = [Row(words=2), Row((), 5)]
    model, inputs = family.model(), prompt(family, rows, zoom=zoom)
    base = logits(model, low_res(inputs))
    with patched(model, zoom=zoom, policy=Frames(1) & TopK(2), positions="fractional"):
        alone = logits(model, prompt(family, rows, zoom=zoom, only=0))
        with flexkit.trace(model) as trace:
            found = logits(model, inputs)
        mask = trace.mask(0, trace.layers[-1])[0]
        assert mask.shape == tuple(cells * factor for cells, factor in zip(family.grid, zoom, strict=True))
        assert mask.flatten(1).any(-1).sum() == zoom[0]  # of the frames of one frame
        assert int(mask.sum()) == min(2, math.prod(family.grid[1:])) * math.prod(zoom)
        torch.testing.assert_close(found[0, -alone.shape[1] :], alone[0], rtol=1e-5, atol=1e-5)
    assert ((found - base).abs().amax((1, 2)) > 1e-9).tolist() == [True, False]
    with patched(model, zoom=zoom, policy=flexkit.Nothing()):
        assert torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("name", ["qwen2_vl-video", "qwen2_5_vl-video", "qwen3_vl-video"])
def test_times_lie_between_times(name: str) -> None:
    """High-res tokens of a frame between two have a time between theirs, and their rows and columns."""
    family = VIDEOS[name]
    model, inputs = family.model(), prompt(family, [Row()], zoom=(2, 1, 1))
    with patched(model, zoom=(2, 1, 1), policy=Everything(), select_from="same", start_layer=0):
        cache = empty_cache(model)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
    memory = cached_memory(cache)
    assert memory is not None
    (span,) = memory.images
    assert span.positions is not None
    times, rows, columns = span.positions.reshape(3, *family.grid).double()
    found = fractional_positions(span.positions, span.grid, span.zoom).reshape(3, 4, 2, 3).double()
    quarter = (times[1] - times[0]) / 4
    for frame, steps in enumerate((-1, 1, 3, 5)):
        torch.testing.assert_close(found[0, frame], times[0] + steps * quarter)
    if torch.equal(rows[0], rows[1]):
        torch.testing.assert_close(found[1:], torch.stack([rows, columns]).repeat_interleave(2, dim=1))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"hd_video_grid_thw": torch.tensor([[3, 8, 12]])}, "does not add up to the patches"),
        ({"hd_video_grid_thw": torch.tensor([[4, 8, 6]])}, "a video of 4 x 8 x 6; expected .*columns divisible by 4"),
        (
            {"hd_video_grid_thw": torch.tensor([[1, 16, 12]])},
            r"low-res grids \[\(2, 2, 3\)\]; .* zoom of \[\(1, 4, 3\)\]",
        ),
        ({"hd_video_grid_thw": torch.tensor([[0, 8, 12]])}, "positive integers"),
        ({"hd_video_grid_thw": None}, "lack"),
        ({"hd_pixel_values_videos": torch.zeros(0, 1176)}, "0 high-res views"),
        ({"hd_pixel_values_videos": torch.full((192, 1176), torch.nan)}, "NaN"),
        ({"hd_image_sizes": torch.tensor([[4, 4]])}, "lack"),
    ],
)
def test_views_that_are_none(broken: dict[str, Any], message: str) -> None:
    family = VIDEOS["qwen2_vl-video"]
    model, inputs = family.model(), prompt(family, [Row()])
    base = logits(model, low_res(inputs))
    with patched(model, zoom=2):
        with pytest.raises(HighResInputError, match=message):
            model(**inputs | broken)
        assert torch.equal(logits(model, low_res(inputs)), base)


def test_tokens_that_were_left_out() -> None:
    family = VIDEOS["video_llama_3-video"]
    model, inputs = family.model(), prompt(family, [Row()])
    kept = torch.ones(12, dtype=torch.bool)
    with patched(model, zoom=2):
        logits(model, inputs | {"video_compression_mask": kept})
        kept[-1] = False
        with pytest.raises(HighResInputError, match=r"leaves out 1 of .* use_token_compression=False"):
            logits(model, inputs | {"video_compression_mask": kept})


def test_one_frame() -> None:
    """A video of one frame is read as any other."""
    family = VIDEOS["qwen2_vl-video"]
    model, inputs = family.model(), prompt(family, [Row(((1, 2, 2),))], zoom=(3, 1, 1))
    with patched(model, zoom=(3, 1, 1), policy=Everything(), positions="fractional"), flexkit.trace(model) as trace:
        logits(model, inputs)
    assert trace.mask(0, trace.layers[0]).shape == (1, 3, 2, 2)


def test_a_budget_is_of_the_whole_video() -> None:
    family = VIDEOS["qwen2_vl-video"]
    model, inputs = family.model(), prompt(family, [Row()])
    for settings, most in (({"policy": TopK(1)}, 2 * 4), ({"policy": TopK(1).over_frames()}, 4), ({"budget": 3}, 3)):
        with patched(model, **{"zoom": 2, "policy": Everything()} | settings), flexkit.trace(model) as trace:
            logits(model, inputs)
            assert get_patch(model).config.selector.most((2, 2, 3), (1, 2, 2)) == most
        assert int(trace.mask(0, trace.layers[0]).sum()) == most


def test_settings_are_kept() -> None:
    policy = Frames(0.5) & TopK(3).over_frames()
    config = FlexConfig(zoom=(4, 1, 2), policy=policy)
    assert config.zoom_pair == (1, 2) and config.video_zoom == (4, 1, 2)
    again = FlexConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict() and again.policy == policy and again.zoom == (4, 1, 2)
    assert FlexConfig(zoom=2).video_zoom == (1, 2, 2)
