"""The entry of Gaussianization flows: one-to-one far out, its inverse and both derivatives right."""

import pytest
import torch
from scipy.stats import norm
from torch import nn

from visbi.families.flows import GaussianizationBody
from visbi.families.gaussianize import Gaussianize


def entry(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shift = 2 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    scale = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return shift.requires_grad_(), scale.requires_grad_()


def test_formula():
    shift, scale = entry()
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None].expand(7, 3)
    t = (x[..., None] * scale.exp() + shift).detach().numpy()
    torch.testing.assert_close(
        Gaussianize(shift, scale)(x).detach(), torch.as_tensor(norm.ppf(norm.cdf(t).mean(-1)))
    )


def test_far_out():
    f = Gaussianize(*entry())
    x = torch.tensor([-1e4, -300.0, -9.0, 0.0, 9.0, 300.0, 1e4], dtype=torch.float64)[:, None].expand(7, 3)
    x = x.clone().requires_grad_()
    y, ladj = f.call_and_ladj(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and (y[1:] > y[:-1]).all()
    torch.testing.assert_close(slope.log(), ladj)
    torch.testing.assert_close(f.inv(y), x)


def test_derivatives():
    shift, scale = entry()
    point = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda b, a, v: Gaussianize(b, a)(v),
        lambda b, a, v: Gaussianize(b, a).call_and_ladj(v)[1],
        lambda b, a, v: Gaussianize(b, a).inv(v),
    ):
        assert torch.autograd.gradcheck(function, (shift, scale, point))


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_the_inverse_finds_its_way_between_components_of_all_widths_and_distances(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shift = 5 * torch.randn(500, 8, generator=generator, dtype=torch.float64)
    scale = spread * torch.randn(500, 8, generator=generator, dtype=torch.float64)
    y = 2 * torch.randn(100, 500, generator=generator, dtype=torch.float64)
    f = Gaussianize(shift, scale)
    torch.testing.assert_close(f(f.inv(y)), y, rtol=1e-9, atol=1e-9)


def test_what_is_saved_does_not_depend_on_the_unit_of_training() -> None:
    torch.manual_seed(0)
    body, again = (GaussianizationBody(2, num_transforms=2) for _ in range(2))
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    state = {name: value.clone() for name, value in body.state_dict().items()}
    layers = [layer for layer in body.flow.transform.transforms if hasattr(layer, "phi")]
    shift, scale = (state[f"flow.transform.transforms.0.phi.{i}"] for i in range(2))
    z = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(layers[0](None)(z), Gaussianize(shift, scale)(z))
    again.load_state_dict(state)
    assert torch.equal(again.log_prob(z), body.log_prob(z))
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    outer = nn.ModuleDict({"a": again})
    outer.load_state_dict({f"a.{name}": value for name, value in state.items()})
    assert torch.equal(outer["a"].log_prob(z), body.log_prob(z))
