"""Densities of the named families integrate to one, each on its own support."""

import math

import pytest
import torch

from family_cases import PRIORS, rough_family, simplex_prior
from visbi.families import FAMILY_NAMES

# nodes and log of their weights from an equally spaced axis s, by a map that has nothing to do with the
# coordinates under test; the trapezoid rule converges fast where the integrand vanishes at the ends


def real_nodes(s, dim):
    return dim - 1 + 1.5 * s, torch.full_like(s, math.log(1.5))


def box_nodes(s, dim):
    low, width = -1.0, dim + 1.0
    u = torch.special.ndtr(s)
    return low + width * u, math.log(width) - 0.5 * s**2 - 0.5 * math.log(2 * math.pi)


def positive_nodes(s, dim):
    return torch.exp(1.3 * s), 1.3 * s + math.log(1.3)


NODES = {"real": real_nodes, "box": box_nodes, "positive": positive_nodes}


def mass(family, kind, dim, n):
    s = torch.linspace(-7.0, 7.0, n, dtype=torch.float64)
    axes = [NODES[kind](s, i + 1) for i in range(dim)]
    nodes = torch.cartesian_prod(*(theta for theta, _ in axes)).reshape(-1, dim)
    weights = torch.cartesian_prod(*(log_w for _, log_w in axes)).reshape(-1, dim).sum(-1)
    with torch.no_grad():
        log_q = family.log_prob(nodes)
    return float((log_q + weights).exp().sum()) * float(s[1] - s[0]) ** dim


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_density_integrates_to_one(name, kind):
    family = rough_family(name, PRIORS[kind](1))
    assert mass(family, kind, 1, 1001) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_density_integrates_to_one_in_the_plane(name, kind):
    nodes = {"unaf": 31, "naf": 71, "sospf": 71}.get(name, 101)  # what a test can afford to invert
    family = rough_family(name, PRIORS[kind](2), num_transforms=1 if nodes < 101 else 2)
    assert mass(family, kind, 2, nodes) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("name", ["maf", "nice", "gf", "gaussian"])
def test_density_integrates_to_one_on_the_simplex(name):
    family = rough_family(name, simplex_prior(3))
    s = torch.linspace(-9.0, 9.0, 181, dtype=torch.float64)
    a, b = torch.cartesian_prod(s, s).unbind(-1)
    first, second = torch.sigmoid(a), torch.sigmoid(b)  # theta = (p, (1 - p) r, (1 - p) (1 - r))
    theta = torch.stack([first, (1 - first) * second, (1 - first) * (1 - second)], -1)
    jacobian = first * (1 - first) ** 2 * second * (1 - second)
    with torch.no_grad():
        total = (family.log_prob(theta).exp() * jacobian).sum() * (s[1] - s[0]) ** 2
    assert float(total) == pytest.approx(1, abs=5e-3)
