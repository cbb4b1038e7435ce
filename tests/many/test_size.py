"""Chunks that fit into memory, and potentials that are tried before they are trusted with rows."""

import pytest
import torch
from torch import Tensor, nn

from many_cases import X, many
from posterior_cases import alone_and_seeded, log_p, real
from visbi.families import named_family
from visbi.many.rows import Probe, takes_rows
from visbi.many.size import draw_width, rows_per_chunk, width
from visbi.potentials import as_potential, pairs
from visbi.potentials.pairs import evaluate_each
from visbi.priors import BoxUniform, coordinates

__all__ = ["alone_and_seeded"]


def test_chunks_shrink_with_parameters_width_and_memory() -> None:
    base = rows_per_chunk(10_000, 10, 1e3, 2**29)
    assert 1 < base < 64
    assert rows_per_chunk(10_000, 20, 1e3, 2**29) < base
    assert rows_per_chunk(10_000, 10, 1e4, 2**29) < base
    assert rows_per_chunk(10_000, 10, 1e3, 2**28) < base < rows_per_chunk(10_000, 10, 1e3, 2**33) == 64
    assert rows_per_chunk(3, 10, 1e3, 2**33) == 3 and rows_per_chunk(10_000, 10, 1e9, 2**20) == 1


def test_memory_decides_where_no_size_is_given() -> None:
    wide = many(q="auto", chunk_size=None)
    narrow = many(q="auto", chunk_size=None, memory=2.0**10)
    alone = many(q="auto", chunk_size=1)
    assert narrow.reports == alone.reports and wide.reports != alone.reports


@pytest.mark.parametrize("units", [7, 70])
def test_width_is_what_autograd_keeps(units: int) -> None:
    """float32: theta for the first layer, the hidden units once for tanh and once for the last layer."""
    net = nn.Sequential(nn.Linear(2, units), nn.Tanh(), nn.Linear(units, 1))
    potential = as_potential(lambda theta, x: net(theta)[:, 0] - x[:, 0] * 0)
    measured = width(potential, torch.randn(32, 2), torch.randn(32, 2), in_rows=True)
    assert measured == pytest.approx(4 * (2 + 2 * units), rel=0.2)


def test_without_a_gradient_there_is_no_width() -> None:
    potential = as_potential(lambda theta, x: log_p(theta.detach(), x))
    assert width(potential, torch.randn(32, 2), torch.randn(32, 2), in_rows=True) == 0.0


def mixing(theta: Tensor, x: Tensor) -> Tensor:
    return log_p(theta, x.mean(0))


def raising(theta: Tensor, x: Tensor) -> Tensor:
    if len(x) > 1:
        raise RuntimeError("one at a time, please")
    return log_p(theta, x)


def never_finite(theta: Tensor, x: Tensor) -> Tensor:
    return log_p(theta, x) - torch.inf


@pytest.mark.parametrize(
    ("potential", "expected"), [(log_p, True), (mixing, False), (raising, False), (never_finite, False)]
)
def test_rows_are_tried(potential: object, expected: bool) -> None:
    assert takes_rows(Probe(as_potential(potential), real(), X)) == expected


def test_values_at_each_are_the_same_in_rows_and_alone() -> None:
    potential = as_potential(log_p)
    theta, x = [torch.randn(n, 2) for n in (3, 0, 20_000)], list(X[:3].split(1))
    together, alone = (evaluate_each(potential, theta, x, in_rows=rows) for rows in (True, False))
    for a, b, each, x_o in zip(together, alone, theta, x, strict=True):
        torch.testing.assert_close(a, log_p(each, x_o).double())
        torch.testing.assert_close(a, b)


def test_large_x_is_repeated_for_a_few_theta_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def seen(theta: Tensor, x: Tensor) -> Tensor:
        calls.append(x.nbytes)
        return log_p(theta, x[:, :2])

    monkeypatch.setattr(pairs, "_BYTES", 4096)
    theta, x = [torch.randn(n, 2) for n in (30, 50)], list(torch.randn(2, 100).split(1))
    values = evaluate_each(as_potential(seen), theta, x, in_rows=True)
    assert len(calls) == 8 and max(calls) <= 4096
    for each, theta_o, x_o in zip(values, theta, x, strict=True):
        torch.testing.assert_close(each, log_p(theta_o, x_o[:, :2].expand(len(theta_o), -1)).double())


def test_a_flow_counts_by_what_its_steps_keep() -> None:
    coords = coordinates(BoxUniform(-torch.ones(3), torch.ones(3)))
    narrow, wide = (draw_width(named_family("maf", coords, hidden_features=n)) for n in (10, 100))
    assert 1000 < narrow < wide < 1e6
    few, many = (rows_per_chunk(1000, 3, 100.0, 2.0**24, step=256 * each) for each in (wide, narrow))
    assert 1 <= few < many <= 64
