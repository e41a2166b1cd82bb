import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexkit.attention import RaggedIndex

SEEDS = st.integers(0, 2**31).map(torch.manual_seed)
MASKS = st.tuples(st.integers(1, 3), st.integers(1, 6)).flatmap(
    lambda shape: st.lists(
        st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
)


@given(MASKS, st.sampled_from([(), (2,), (2, 3)]), SEEDS)
def test_gather_takes_the_querying_positions_in_order(
    mask: list[list[bool]], rest: tuple[int, ...], seed: object
) -> None:
    rows = RaggedIndex(torch.tensor(mask))
    states = torch.randn(len(mask), len(mask[0]), *rest)
    gathered = rows.gather(states)
    assert rows.count == max(map(sum, mask)) == gathered.shape[1] == rows.index.shape[1]
    for b, row in enumerate(mask):
        positions = [i for i, queries in enumerate(row) if queries]
        assert rows.index[b, : len(positions)].tolist() == positions
        assert rows.valid[b].tolist() == [i < len(positions) for i in range(rows.count)]
        assert torch.equal(gathered[b, : len(positions)], states[b, positions])


@given(MASKS, st.sampled_from([(), (2,), (2, 3)]), SEEDS)
def test_scatter_puts_rows_back_and_leaves_the_rest(
    mask: list[list[bool]], rest: tuple[int, ...], seed: object
) -> None:
    rows = RaggedIndex(torch.tensor(mask))
    states = torch.randn(len(mask), len(mask[0]), *rest)
    new = torch.randn(len(mask), rows.count, *rest)
    scattered = rows.scatter(new, states)
    for b, row in enumerate(mask):
        left = iter(new[b])
        for i, queries in enumerate(row):
            assert torch.equal(scattered[b, i], next(left) if queries else states[b, i])


def test_padded_rows_get_no_gradient() -> None:
    rows = RaggedIndex(torch.tensor([[True, False, True], [False, True, False]]))
    new, states = torch.ones(2, 2, 4, requires_grad=True), torch.ones(2, 3, 4, requires_grad=True)
    rows.scatter(new, states).sum().backward()
    assert new.grad is not None and states.grad is not None
    assert new.grad[..., 0].tolist() == [[1, 1], [1, 0]]
    assert states.grad[..., 0].tolist() == [[0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_scatter_keeps_the_dtype_of_the_sequence(dtype: torch.dtype) -> None:
    rows = RaggedIndex(torch.tensor([[True, False]]))
    assert rows.scatter(torch.ones(1, 1, 2), torch.zeros(1, 2, 2, dtype=dtype)).dtype == dtype
