from types import ModuleType

import pytest
import torch

from tests.scripts import load_example


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("build_your_own")


def test_it_learns_and_reports_both_accuracies(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    losses = example.main(steps=30, batch=32)
    assert len(losses) == 30 and sum(losses[-5:]) / 5 < 0.6 * losses[0]
    *_, low_res, closer = capsys.readouterr().out.strip().splitlines()
    assert low_res.startswith("low-res only") and closer.startswith("looking closer")
    assert float(low_res.split()[-1]) < 0.35, "the low-res view does not show the pattern"


def test_the_low_res_view_does_not_show_the_patterns(example: ModuleType) -> None:
    images, low_res, questions, answers = example.draw_scenes(64)
    cells = low_res.unfold(2, example.PATCH, example.PATCH).unfold(3, example.PATCH, example.PATCH)
    assert torch.equal(cells, cells[..., :1, :1].expand_as(cells)), "each cell is of one colour"
    assert images.shape[-1] == example.ZOOM * low_res.shape[-1]
    tinted = cells[..., 0, 0].flatten(2).sum(-1).argmax(-1)
    assert torch.equal(tinted[questions == 0], answers[questions == 0])


def test_only_the_question_reads_the_high_res_view(example: ModuleType) -> None:
    model = example.TinyVisionLanguageModel()
    images, low_res, questions, _ = example.draw_scenes(4)
    other = torch.randn_like(images)
    same = [model(view, low_res, questions, look_closer=False) for view in (images, other)]
    assert torch.equal(*same)
    closer = [model(view, low_res, questions) for view in (images, other)]
    assert not torch.allclose(*closer)
