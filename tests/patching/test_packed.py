"""Towers whose sequences lie one behind the other in one list attend to those of a high-res view together."""

from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import flexkit
from flexkit.measuring import count_launches
from flexkit.patching.seam import packed
from flexkit.patching.seam.packed import together, watch_packed
from tests.patching.ways import assert_close, logits_of, plain
from tests.zoo import ZOO, Row, prompt

KINDS = (
    "qwen2_5_vl",
    "qwen2_vl",
    "glm4v",
    "kimi_k25",
    "video_llama_3",
    "minicpmv4_6",
    "nemotron_h_omni",
    "inkling2",
    "muse_spark",
    "qwen2_5_vl-video",
)
ROWS = [Row((None,) * 4), Row((None,) * 4, 2)]


class Tower(nn.Module):
    """Attends within each of many sequences, as towers do without a varlen kernel."""

    def __init__(self, kernel: Any = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.kernel, self.config = kernel, type("Config", (), {"_attn_implementation": "sdpa"})()

    def forward(self, states: Tensor, cu_seqlens: Tensor) -> Tensor:
        parts = states.split(cu_seqlens.diff().tolist(), dim=2)
        return torch.cat([self.kernel(part, part.sin(), part.cos(), scale=0.7) for part in parts], dim=2)


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=16).filter(sum),
    scores=st.sampled_from([1, 20, 1 << 22]),
    seed=st.integers(0, 9),
)
def test_sequences_of_one_length_give_together_what_each_gives(lengths: list[int], scores: int, seed: int) -> None:
    tower = Tower()
    assert len(list(watch_packed(tower))) == 1
    states = torch.randn(1, 2, sum(lengths), 4, generator=torch.Generator().manual_seed(seed)).double()
    ends = torch.tensor([0, *accumulate(lengths)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_SCORES", scores)
        with together():
            found = tower(states, cu_seqlens=ends)
            again = tower(states, cu_seqlens=ends)
    torch.testing.assert_close(found, tower(states, cu_seqlens=ends), rtol=0, atol=1e-12)
    assert torch.equal(found, again)


def test_one_kernel_serves_all_windows_of_one_length() -> None:
    tower, states = Tower(), torch.randn(1, 2, 60, 4)
    list(watch_packed(tower))
    ends = torch.arange(0, 61, 5)

    def run() -> Tensor:
        output: Tensor = tower(states, cu_seqlens=ends)
        return output

    def run_together() -> Tensor:
        with together():
            return run()

    alone, at_once = count_launches(run), count_launches(run_together)
    assert at_once.kernels <= alone.kernels - 11


def test_an_attention_by_another_kernel_is_no_silent_mistake() -> None:
    tower = Tower(lambda query, key, value, scale: (query @ key.mT * scale).softmax(-1) @ value)
    list(watch_packed(tower))
    with pytest.raises(RuntimeError, match="handed 6 sequences as one"), together():
        tower(torch.randn(1, 2, 18, 4), cu_seqlens=torch.arange(0, 19, 3))


def test_eager_towers_are_left_alone() -> None:
    tower = Tower(lambda query, key, value, scale: (query @ key.mT * scale).softmax(-1) @ value)
    tower.config._attn_implementation = "eager"
    list(watch_packed(tower))
    states, ends = torch.randn(1, 2, 18, 4), torch.arange(0, 19, 3)
    with together():
        found = tower(states, cu_seqlens=ends)
    assert torch.equal(found, tower(states, cu_seqlens=ends))


@pytest.mark.parametrize("name", KINDS)
def test_a_high_res_view_is_what_it_is_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in ZOO:
        pytest.skip("this version of transformers has no such model")
    family = ZOO[name]
    model = flexkit.patch_model(family.model(), flexkit.FlexConfig(zoom=2, policy=flexkit.TopK(3)), trained=True)
    inputs = prompt(family, ROWS)
    at_once = logits_of(model, inputs)
    kernels = count_launches(lambda: logits_of(model, inputs)).kernels
    monkeypatch.setattr("flexkit.patching.geometry.any_size.together", nullcontext)
    assert_close(at_once, logits_of(model, inputs))
    assert kernels < count_launches(lambda: logits_of(model, inputs)).kernels


def test_the_base_model_is_left_without_hooks() -> None:
    model = plain("qwen2_5_vl")
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    flexkit.unpatch_model(flexkit.patch_model(model, flexkit.FlexConfig.training_free()))
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
