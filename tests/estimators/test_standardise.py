import pytest
import torch

from visbi.core.random import seeded
from visbi.estimators.standardise import Standardise


def rows(n=500):
    with seeded(0):
        mixing = torch.tensor([[2.0, 0.0, 0.0], [1.5, 0.5, 0.0], [0.0, -3.0, 0.1]])
        return torch.randn(n, 3) @ mixing.T + torch.tensor([5.0, -100.0, 0.0])


def test_independent_has_mean_zero_and_scale_one():
    z = Standardise((3,), "independent").fit(rows())(rows())
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(3), atol=1e-4, rtol=0)


def test_structured_whitens_vectors():
    z = Standardise((3,), "structured").fit(rows())(rows())
    torch.testing.assert_close(z.T.cov(), torch.eye(3), atol=1e-3, rtol=0)


def test_structured_gives_images_one_mean_and_one_scale():
    with seeded(0):
        images = 3 * torch.randn(50, 1, 4, 5) + torch.arange(5.0)
    standardise = Standardise((1, 4, 5), "structured").fit(images)
    assert standardise.scale.unique().numel() == 1 and standardise.loc.unique().numel() == 1
    assert abs(float(standardise(images).mean())) < 1e-5
    assert abs(float(standardise(images).std()) - 1) < 1e-4


def test_none_changes_nothing():
    assert torch.equal(Standardise((3,), "none").fit(rows())(rows()), rows())


@pytest.mark.parametrize("kind", ["none", "independent", "structured"])
def test_inverse_and_jacobian(kind):
    standardise = Standardise((3,), kind).fit(rows())
    torch.testing.assert_close(standardise.inverse(standardise(rows())), rows(), rtol=1e-4, atol=1e-4)
    jacobian = torch.func.jacrev(standardise)(rows()[0])
    torch.testing.assert_close(
        standardise.log_abs_det, torch.linalg.slogdet(jacobian)[1], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["independent", "structured"])
def test_constant_columns_are_only_shifted(kind):
    data = rows()
    data[:, 1] = 0.1  # in float32 not exactly its own mean
    z = Standardise((3,), kind).fit(data)(data)
    assert torch.isfinite(z).all()
    assert z[:, 1].abs().max() < 1e-4


def test_far_from_zero_keeps_the_digits_of_float64():
    with seeded(0):
        noise = torch.randn(200, 1, dtype=torch.float64)
    data = 1e8 + noise
    z = Standardise((1,), "independent").fit(data)(data)
    assert z.dtype == torch.float32
    expected = ((noise - noise.mean()) / noise.std()).float()
    # the map's shift is float32, but it is the same for all rows
    torch.testing.assert_close(z - z.mean(), expected, atol=1e-5, rtol=1e-5)


def test_whitening_needs_more_rows_than_entries():
    with pytest.raises(ValueError, match=r"`z_score`: expected more than 3 rows"):
        Standardise((3,), "structured").fit(rows(3))


def test_unknown_kind():
    with pytest.raises(ValueError, match="'independent'"):
        Standardise((3,), "zscore")  # type: ignore[arg-type]
