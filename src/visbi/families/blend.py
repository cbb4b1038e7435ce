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
        with torch.no_grad():
            parts = [self._of_body(b, count) for b, count in enumerate(self._counts(n)) if count]
            if not parts:
                return self.shares.new_empty(0, self.dim), self.shares.new_empty(0)
            z, log_q = (torch.cat(each) for each in zip(*parts, strict=True))
            order = torch.randperm(n)
        return z[order], log_q[order]

    def log_prob(self, z: Tensor) -> Tensor:
        return self._joint([self._log_prob_of(b, z) for b in range(len(self.bodies))])

    def _of_body(self, b: int, n: int) -> tuple[Tensor, Tensor]:
        """Draws of one body with the density of them all.

        Its own part is the density of the noise that a draw was made of: by the inverse of a float32 flow a
        draw far out may have a density of e^-1000 of that, and outweigh all others.
        """
        z, own = self.bodies[b].rsample_and_log_prob(n)  # type: ignore[operator]
        z = z.double()
        return z, self._joint(
            [own.double() if i == b else self._log_prob_of(i, z) for i in range(len(self.bodies))]
        )

    def _log_prob_of(self, b: int, z: Tensor) -> Tensor:
        body = self.bodies[b]
        return body.log_prob(z.to(body.dtype)).double()  # type: ignore[operator,arg-type]

    def _joint(self, each: Sequence[Tensor]) -> Tensor:
        return torch.logsumexp(torch.stack(list(each)) + self.shares.log()[:, None], 0)

    def _counts(self, n: int) -> list[int]:
        """How many of n draws each body gives."""
        if self.shares.is_meta:  # no numbers there to count
            return [n, *(0 for _ in self.bodies[1:])]
        which = torch.bucketize(torch.rand(n).to(self.shares), self.shares.cumsum(0)[:-1])
        return which.bincount(minlength=len(self.shares)).tolist()
