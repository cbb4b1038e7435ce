"""Stacked coupling flows: every number against the single flow's, every gradient against autograd's."""

import pytest
import torch

from visbi.families.coupling import CouplingBody
from visbi.families.coupling_stack import CouplingStack

KINDS = pytest.mark.parametrize("spline", [False, True], ids=["affine", "spline"])
DIM = pytest.mark.parametrize("dim", [1, 2, 3, 6])
FLOWS = 3


def bodies(dim, spline, dtype=torch.float64):
    made = [CouplingBody(dim, 4, 8, spline).to(dtype) for _ in range(FLOWS)]
    with torch.no_grad():
        for body in made:
            for p in body.layers.parameters():
                p.add_(0.3 * torch.randn_like(p))
            for p in body.place.parameters():
                p.add_(0.03 * torch.randn_like(p))
    return made


def flat(body, gradients):
    """Gradients of a body's parameters as the stack lays them out."""
    holder = CouplingBody(body.dim, 4, 8, body.layers.spline).double()
    with torch.no_grad():
        for p, by in zip(holder.parameters(), gradients, strict=True):
            p.copy_(torch.zeros_like(p) if by is None else by)
    stack = CouplingStack([holder])
    return stack.layers[0], stack.place[0]


@KINDS
@DIM
def test_densities_are_those_of_each_flow(dim, spline):
    each = bodies(dim, spline)
    stack = CouplingStack(each)
    z, log_q, _ = stack.draw(20)
    assert z.shape == (FLOWS, 20, dim) and log_q.shape == (FLOWS, 20) and len(stack) == FLOWS
    torch.testing.assert_close(stack.log_prob(z), log_q)
    for body, own_z, own_q in zip(each, z, log_q, strict=True):
        torch.testing.assert_close(body.log_prob(own_z).detach(), own_q)
    u = torch.randn(FLOWS, 7, dim, dtype=torch.float64)
    out, log_det = stack.push(u)
    back, again = stack.pull(out)
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(again, log_det)
    for body, own_u, own_z, own_det in zip(each, u, out, log_det, strict=True):
        want, det = body.push(own_u)
        torch.testing.assert_close(own_z, want.detach())
        torch.testing.assert_close(own_det, det.detach())


@KINDS
@DIM
def test_gradient_along_the_path(dim, spline):
    each = bodies(dim, spline)
    stack = CouplingStack(each)
    torch.manual_seed(5)
    _, _, tape = stack.draw(6)
    by_z = torch.randn(FLOWS, 6, dim, dtype=torch.float64)
    usable = torch.ones(FLOWS, 6, dtype=torch.bool)
    usable[0, 2] = False
    found = stack.path_gradient(tape, by_z, usable)
    torch.manual_seed(5)
    noise = torch.randn(FLOWS, dim, 6, dtype=torch.float64)
    for f, body in enumerate(each):
        z = body.outward(body.layers(noise[f].mT)[0])
        loss = ((body.score_at_draws(z) - by_z[f]) * z).sum(-1)
        loss = torch.where(usable[f], loss, 0.0).mean()
        wanted = flat(body, torch.autograd.grad(loss, list(body.parameters()), allow_unused=True))
        # float32 networks: some processors add up a row of products in another order for more rows
        torch.testing.assert_close(found.layers[f], wanted[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.place[f], wanted[1])


@KINDS
@DIM
def test_gradient_of_the_likelihood_and_the_score(dim, spline):
    each = bodies(dim, spline)
    stack = CouplingStack(each)
    z = torch.randn(FLOWS, 6, dim, dtype=torch.float64)
    log_q, found = stack.likelihood_gradient(z)
    norms = found.norm()
    u, _, tape = stack.pull_and_tape(z)
    score = stack.carry(tape, -u)
    for f, body in enumerate(each):
        own = body.log_prob(z[f])
        torch.testing.assert_close(log_q[f], own.detach())
        torch.testing.assert_close(score[f], body.score_at_draws(z[f]))
        wanted = flat(body, torch.autograd.grad(-own.mean(), list(body.parameters()), allow_unused=True))
        torch.testing.assert_close(found.layers[f], wanted[0])
        torch.testing.assert_close(found.place[f], wanted[1])
        torch.testing.assert_close(norms[f], torch.cat(wanted).norm())


def test_gradients_mix():
    stack = CouplingStack(bodies(2, False))
    a = stack.likelihood_gradient(torch.randn(FLOWS, 5, 2).double())[1]
    b = stack.likelihood_gradient(torch.randn(FLOWS, 5, 2).double())[1]
    both = a.mixed(b, torch.tensor([0.0, 1.0, 0.25]).double())
    for mixed, one, other in ((both.layers, a.layers, b.layers), (both.place, a.place, b.place)):
        torch.testing.assert_close(mixed, torch.stack([one[0], other[1], 0.75 * one[2] + 0.25 * other[2]]))


@KINDS
@DIM
def test_flows_come_out_as_they_went_in(dim, spline):
    each = bodies(dim, spline, torch.float32)
    stack = CouplingStack(each)
    z = torch.randn(4, dim, dtype=torch.float64)
    for i, body in enumerate(each):
        torch.testing.assert_close(stack.one(i).log_prob(z), body.log_prob(z), rtol=0, atol=0)
    some = stack.only([2, 0])
    torch.testing.assert_close(some.one(0).log_prob(z), each[2].log_prob(z), rtol=0, atol=0)
    assert len(stack.only(torch.tensor([True, False, False]))) == 1
    some.layers += 1.0  # a copy
    torch.testing.assert_close(stack.one(2).log_prob(z), each[2].log_prob(z), rtol=0, atol=0)
    stack.write(1, each[0])
    torch.testing.assert_close(each[0].log_prob(z), each[1].log_prob(z), rtol=0, atol=0)


def test_a_place_for_each():
    stack = CouplingStack([CouplingBody(2, 2, 8) for _ in range(FLOWS)])
    loc = torch.randn(FLOWS, 2, dtype=torch.float64)
    tril = (
        torch.tensor([[2.0, 0.0], [0.7, 0.3]]).double()
        * torch.tensor([1.0, 2.0, 3.0]).double()[:, None, None]
    )
    z = torch.randn(FLOWS, 5, 2, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(loc[:, None], scale_tril=tril[:, None])
    torch.testing.assert_close(stack.placed(loc, tril).log_prob(z), exact.log_prob(z), rtol=1e-5, atol=1e-5)


def test_far_out_it_is_not_nan():
    stack = CouplingStack(bodies(2, False, torch.float32))
    log_q = stack.log_prob(torch.tensor([[1e6, -1e6], [1e200, 1e200]]).double().expand(FLOWS, 2, 2))
    assert bool((log_q < -1e6).all()) and not bool(log_q.isnan().any())


def test_many_points_are_cut_into_pieces():
    stack = CouplingStack(bodies(3, False))
    z = torch.randn(FLOWS, 2500, 3, dtype=torch.float64)
    torch.testing.assert_close(stack.log_prob(z)[:, 2490:], stack.log_prob(z[:, 2490:]))


@pytest.mark.parametrize("others", [[], [CouplingBody(3)], [CouplingBody(2, spline=True)]])
def test_unlike_flows(others):
    with pytest.raises(ValueError, match="`bodies`: expected at least one flow, all of one make"):
        CouplingStack([*([CouplingBody(2)] if others else []), *others])
