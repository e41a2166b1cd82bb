"""Whatever is done to a patched model, in whatever order: it answers as its settings say, and it can be undone."""

import copy
import pickle
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule
from torch import Tensor

import flexkit
from flexkit.tracing import Trace
from tests.patching.test_all_or_nothing import STEPS, BrokenError, breaking
from tests.patching.ways import inputs_of, logits_of, plain, through_a_file
from tests.zoo import Row, low_res

NAME = "qwen2_5_vl"  # others cannot be pickled once they have run, patched or not
CONFIGS = (
    flexkit.FlexConfig(zoom=2, start_layer=1, policy=flexkit.TopK(3)),
    flexkit.FlexConfig(zoom=2, policy=flexkit.Everything(), queries="all", projection="full"),
    flexkit.FlexConfig.training_free(high_res_states="features", zoom=2, gate=None),
)
SCALES = (1.0, 0.5)
"""What added weights are multiplied by, so that a weight that was lost or mixed up shows."""
configs, scales = st.integers(0, len(CONFIGS) - 1), st.sampled_from(SCALES)


@cache
def inputs() -> dict[str, Tensor]:
    return inputs_of(NAME, (Row(),))


@cache
def expected(config: int | None, scale: float) -> Tensor:
    """The answer of a model that nothing has happened to."""
    model = plain(NAME)
    if config is None:
        return logits_of(model, low_res(inputs()))
    return logits_of(scaled(flexkit.patch_model(model, CONFIGS[config], trained=True), scale), inputs())


def scaled(model: Any, scale: float) -> Any:
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(model):
            parameter.mul_(scale)
    return model


@dataclass
class Life:
    """A model, and what has been done to it."""

    model: Any = field(default_factory=lambda: plain(NAME))
    config: int | None = None
    scale: float = 1.0
    disabled: list[ExitStack] = field(default_factory=list)
    traces: list[tuple[ExitStack, Trace]] = field(default_factory=list)

    def answers(self) -> None:
        """The model answers as it should, and only what is open records it."""
        counts = [len(trace) for _, trace in self.traces]
        reads = self.config is not None and not self.disabled
        given = inputs() if self.config is not None else low_res(inputs())
        answer = logits_of(self.model, given)
        assert torch.equal(answer, expected(self.config if reads else None, self.scale if reads else 1.0))
        assert [len(trace) for _, trace in self.traces] == [count + reads for count in counts]


class Lives(RuleBasedStateMachine):
    """Models that are patched and unpatched, copied and saved, disabled and traced, in any order."""

    lives = Bundle("lives")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Life] = []

    def born(self, **state: Any) -> Any:
        if len(self.all) == 4:
            return multiple()
        self.all.append(Life(**state))
        return self.all[-1]

    @initialize(target=lives, config=configs, scale=scales)
    def first(self, config: int, scale: float) -> Any:
        life = self.born()
        self.patch(life, config, scale)
        return life

    @rule(target=lives)
    def new(self) -> Any:
        return self.born()

    @rule(life=lives, config=configs, scale=scales)
    def patch(self, life: Life, config: int, scale: float) -> None:
        if life.config is not None:
            with pytest.raises(flexkit.PatchError, match="patched already"):
                flexkit.patch_model(life.model, CONFIGS[config])
            return
        scaled(flexkit.patch_model(life.model, CONFIGS[config], trained=True), scale)
        life.config, life.scale = config, scale

    @rule(life=lives, step=st.sampled_from(sorted(STEPS)), after=st.integers(0, 5))
    def fail_to_patch(self, life: Life, step: str, after: int) -> None:
        if life.config is not None:
            return
        try:
            with breaking(*STEPS[step], after):
                flexkit.patch_model(life.model, CONFIGS[0], trained=True)
        except BrokenError:
            return
        life.config, life.scale = 0, 1.0

    @rule(life=lives)
    def unpatch(self, life: Life) -> None:
        if life.config is None:
            with pytest.raises(flexkit.PatchError, match="not patched"):
                flexkit.unpatch_model(life.model)
            return
        flexkit.unpatch_model(life.model)
        life.config, life.disabled, life.traces = None, [], []

    @rule(life=lives, opened=st.booleans())
    def disable(self, life: Life, opened: bool) -> None:
        if life.disabled and not opened:
            life.disabled.pop().close()
        elif life.config is not None:
            life.disabled.append(ExitStack())
            life.disabled[-1].enter_context(flexkit.disabled(life.model))

    @rule(life=lives, opened=st.booleans())
    def trace(self, life: Life, opened: bool) -> None:
        if life.traces and not opened:
            life.traces.pop()[0].close()
        elif life.config is not None:
            stack = ExitStack()
            life.traces.append((stack, stack.enter_context(flexkit.trace(life.model))))

    @rule(life=lives)
    def answer(self, life: Life) -> None:
        life.answers()

    @rule(target=lives, life=lives, way=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copy(self, life: Life, way: str) -> Any:
        if way == "deepcopy":
            twin = copy.deepcopy(life.model)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(life.model))
        else:
            twin = through_a_file(life.model, weights_only=False)
        return self.born(model=twin, config=life.config, scale=life.scale)

    @rule(life=lives)
    def copy_shallowly(self, life: Life) -> None:
        if life.config is not None:
            with pytest.raises(flexkit.PatchError, match="shallow copy"):
                copy.copy(life.model)(**inputs())

    @rule(target=lives, life=lives, whole=st.booleans())
    def save_and_load(self, life: Life, whole: bool) -> Any:
        if life.config is None:
            return multiple()
        with tempfile.TemporaryDirectory() as folder:
            if whole:
                life.model.save_pretrained(folder)
                twin = flexkit.from_pretrained(folder)
            else:
                flexkit.save_flex(life.model, folder)
                twin = flexkit.load_flex(plain(NAME), folder)
        return self.born(model=twin, config=life.config, scale=life.scale)

    @rule(life=lives, source=lives)
    def fail_to_load(self, life: Life, source: Life) -> None:
        if source.config is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            flexkit.save_flex(source.model, folder)
            weights = Path(folder, "flexkit.weights")
            weights.write_bytes(weights.read_bytes()[:-8])
            with pytest.raises(flexkit.CheckpointError):
                flexkit.load_flex(life.model, folder)

    @rule(life=consumes(lives))
    def end(self, life: Life) -> None:
        self.undo(life)
        self.all.remove(life)

    def undo(self, life: Life) -> None:
        life.answers()
        if life.config is not None:
            flexkit.unpatch_model(life.model)
        base = plain(NAME)
        assert torch.equal(logits_of(life.model, low_res(inputs())), expected(None, 1.0))
        ours, theirs = life.model.state_dict(), base.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert not flexkit.is_patched(life.model)

    def teardown(self) -> None:
        for life in self.all:
            self.undo(life)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=15, stateful_step_count=25)
