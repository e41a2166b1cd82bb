"""Peaks of memory are those of tensors, beyond what there was."""

import torch

from flexkit.measuring import peak_bytes


def test_peaks_are_of_what_lives_together() -> None:
    large = torch.zeros(1000, 250)

    def run() -> None:
        once = large + 1
        twice = once + 1
        del once
        twice + 1

    assert 2e6 <= peak_bytes(run) < 2.1e6


def test_what_is_freed_again_counts_once() -> None:
    def run() -> None:
        for _ in range(10):
            torch.ones(1000, 250)

    assert 1e6 <= peak_bytes(run) < 1.1e6
