"""The page of floors: what its rows count, and how they are written."""

import torch

from floors import Bench, Row, page


def test_a_stage_is_counted_once_and_timed():
    bench = Bench("gaussian_d50", seed=0, repeats=1)
    row = bench.row("values", lambda: bench.ell.value(torch.zeros(1, 64, 50).double()), 64)
    assert (row.values, row.gradients, row.batch, row.dim) == (64, 0, 64, 50)
    row = bench.row("slopes", lambda: bench.ell.value_and_gradient(torch.zeros(1, 32, 50).double()), 32)
    assert (row.values, row.gradients) == (0, 32)
    assert row.floor > 0 and row.measured > 0


def test_the_page():
    text = page([Row("slcp", 5, "match", 1200, 34, 128, 2.0, 5.0)])
    assert text.splitlines()[-1] == "| slcp | 5 | match | 1,200 | 34 | 128 | 2.0 | 5.0 | 2.5 | 3.0 |"
