r"""Several bodies as one: q(z) = sum_b a_b q_b(z).

A flow that is right where it has been trained, and a wide mixture that bounds its weights beyond. The shares
are fixed; draws have no gradient, so a blend is drawn from and evaluated, not trained by reparameterisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visbi.core.checks import same_length, violation
from visbi.families.base import Body

__all__ = ["BlendBody"]


class BlendBody(Body):
    """A mixture of bodies over the same R^d.

    Args:
        bodies: at least one.
        shares: (B,), positive; normalised.

    Raises:
        ValueError: no bodies, or of unlike dimensions; another number of shares, or shares that are not
            positive.

    >>> from visbi.families.gaussian import GaussianBody
    >>> body = BlendBody([GaussianBody(2), GaussianBody(2)], torch.tensor([0.9, 0.1]))
    >>> z, log_q = body.rsample_and_log_prob(3)
    >>> bool(torch.allclose(body.log_prob(z), log_q))
    True
    """

    shares: Tensor

    def __init__(self, bodies: Sequence[Body], shares: Tensor) -> None:
        if not bodies:
            raise ValueError(violation("bodies", "at least one", "none"))
        super().__init__(bodies[0].dim)
        dims = sorted({body.dim for body in bodies})
        if len(dims) > 1:
            raise ValueError(violation("bodies", "bodies of one dimension", " and ".join(map(str, dims))))
        same_length("bodies", torch.empty(len(bodies)), "shares", shares)
        if not bool((shares > 0).all()):
            raise ValueError(violation("shares", "positive numbers", shares.tolist()))
        self.bodies = nn.ModuleList(bodies)
        self.register_buffer("shares", shares.detach().double() / shares.sum())

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        counts = self._counts(n)
        with torch.no_grad():
            parts = [
                body.rsample_and_log_prob(count)[0].double()  # type: ignore[operator]
                for body, count in zip(self.bodies, counts, strict=True)
                if count
            ]
            z = torch.cat(parts)[torch.randperm(n)] if n else self.shares.new_empty(0, self.dim)
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        each = [
            body.log_prob(z.to(body.dtype)).double()  # type: ignore[operator,arg-type]
            for body in self.bodies
        ]
        return torch.logsumexp(torch.stack(each) + self.shares.log()[:, None], 0)

    def _counts(self, n: int) -> list[int]:
        """How many of n draws each body gives."""
        if self.shares.is_meta:  # no numbers there to count
            return [n, *(0 for _ in self.bodies[1:])]
        which = torch.bucketize(torch.rand(n).to(self.shares), self.shares.cumsum(0)[:-1])
        return which.bincount(minlength=len(self.shares)).tolist()
