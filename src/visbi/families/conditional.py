r"""Conditional families: q(theta | x), one q for every observation.

A family is stacked from standardised x to theta,

    c = embedding(standardise(x)),   h = (c, features of c by a residual network),
    y = flow(u; h),  u ~ N(0, I),    z = m(h) + L(h) y,    theta = link(z),

with L lower triangular (diagonal for `gaussian_diag`). The conditional Gaussian outside takes out location,
scale and correlation, which are linear in h; the flow inside shapes what is left (Radev, Mertens, Voss,
Ardizzone, Köthe: BayesFlow, 2020, for conditional flows in amortised inference). The two Gaussian names have
y = u. m and log L start at zero and flows near the identity: q starts as the prior in its coordinates.

Autoregressive layers are built in the direction that samples in one pass, because the ELBO samples from q at
every step; h is computed once for each x and shared by all of its draws.
"""

from typing import Any

import torch
from torch import Tensor, nn

from visbi.core.checks import violation
from visbi.core.types import Shape
from visbi.estimators.networks import ResidualNetwork, embedded_features
from visbi.estimators.standardise import Standardise
from visbi.families.base import Draws, Family, kept_inside, path_part
from visbi.families.conditional_config import ConditionalConfig
from visbi.families.conditional_flows import ConditionalBody, conditional_body
from visbi.priors.transforms import Coordinates

__all__ = ["ConditionalFamily", "ObservedFamily"]

_LOG_SCALE_BOUND = 20.0  # scales within e^+-20 of the prior's: nothing overflows far from the training data


class ConditionalFamily(nn.Module):
    """q(theta | x) on the prior's support.

    Args:
        coords: the map between theta and z.
        x_shape: shape of one x.
        config: what it is built from; `z_score_theta` is for the caller, who makes `coords`.
        embedding_net: applied to standardised x (M, *x_shape), gives (M, features); None flattens x.

    >>> from visbi.families.conditional_config import ConditionalConfig
    >>> from visbi.priors import BoxUniform, coordinates
    >>> config = ConditionalConfig(
    ...     flow_type="maf", num_transforms=2, hidden_features=8, z_score_theta="none", z_score_x="none"
    ... )
    >>> q = ConditionalFamily(coordinates(BoxUniform(torch.zeros(2), torch.ones(2))), (3,), config)
    >>> theta, log_q = q.draw(torch.randn(5, 3), 4)
    >>> theta.shape, log_q.shape, q.log_prob(theta[0], torch.zeros(1, 3)).shape
    (torch.Size([4, 5, 2]), torch.Size([4, 5]), torch.Size([5]))
    """

    def __init__(
        self,
        coords: Coordinates,
        x_shape: Shape,
        config: ConditionalConfig,
        embedding_net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.coords, self.x_shape, self.config = coords, torch.Size(x_shape), config
        self.standardise_x = Standardise(x_shape, config.z_score_x)
        self.embedding = nn.Flatten() if embedding_net is None else embedding_net
        dim, width = coords.dim_z, config.hidden_features
        features = embedded_features(self.embedding, self.x_shape, "embedding_net")
        self.encoder = ResidualNetwork(features, width, width)
        below = 0 if config.flow_type == "gaussian_diag" else dim * (dim - 1) // 2
        self.regression = nn.Linear(features + width, 2 * dim + below)
        nn.init.zeros_(self.regression.weight)
        nn.init.zeros_(self.regression.bias)
        self.body: ConditionalBody = conditional_body(
            config.flow_type,
            dim,
            features + width,
            num_transforms=config.num_transforms,
            hidden_features=width,
        )

    def fit_standardisation(self, x: Tensor) -> "ConditionalFamily":
        """Set mean and scale of x from observations (N, *x_shape); returns self."""
        self.standardise_x.fit(x)
        return self

    def observations(self, x: Tensor, name: str = "x") -> Tensor:
        """x as rows (M, *x_shape); a single x gets a leading axis.

        Raises:
            ValueError: a shape that fits neither.
        """
        if x.shape == self.x_shape or (x.ndim == 0 and self.x_shape.numel() == 1):
            return x.reshape(1, *self.x_shape)
        if x.shape[1:] != self.x_shape or not len(x):
            one, many = tuple(self.x_shape), ", ".join(["M", *map(str, self.x_shape)])
            raise ValueError(violation(name, f"shape {one} or ({many})", tuple(x.shape)))
        return x

    def draw(self, x: Tensor, n: int, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """`n` reparameterised draws for each x.

        Args:
            x: (M, *x_shape).
            n: how many.
            path: whether log q shall have the gradient of the path alone: its parameters held fixed.

        Returns:
            theta (n, M, D) and log q(theta | x) (n, M) in float64.
        """
        h = self._context(x)
        u = torch.randn(n * len(h), self.coords.dim_z, dtype=self.body.dtype, device=h.device)
        y, log_q, score = self.body.draw(u, h.to(self.body.dtype), path=path and torch.is_grad_enabled())
        y, log_q = y.double().unflatten(0, (n, len(h))), log_q.double().unflatten(0, (n, len(h)))
        loc, log_diag, unit = self._place(h)
        scale_tril = log_diag.exp()[..., None] * unit
        z = loc + torch.einsum("mij,nmj->nmi", scale_tril, y)
        log_q = log_q - log_diag.sum(-1)
        if score is not None:
            back = score.double().unflatten(0, (n, len(h)))[..., None]
            score = torch.linalg.solve_triangular(scale_tril.detach().mT, back, upper=True)[..., 0]
            log_q = path_part(log_q, z, score)
        theta, ladj = self.coords.to_theta(z)
        return theta, log_q - ladj

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        """log q(theta_n | x_n), (N,) float64, for theta (N, D) and x (N, *x_shape); -inf outside the support.

        A single row of one of them is paired with every row of the other.

        Raises:
            ValueError: numbers of rows that do not fit, or theta of another length.
        """
        n = len(theta) if len(x) == 1 else len(x)
        if len(theta) not in (1, n) or len(x) not in (1, n):
            expected = "equally many rows, or one row in either"
            raise ValueError(violation("theta` and `x", expected, f"{len(theta)} and {len(x)}"))
        contained, safe = kept_inside(self.coords, theta)
        z, ladj = self.coords.to_z(safe)
        h = self._context(x)
        loc, log_diag, unit = self._place(h)
        centred = ((z - loc) * torch.exp(-log_diag))[..., None]
        y = torch.linalg.solve_triangular(unit.expand(n, -1, -1), centred, upper=False)[..., 0]
        dtype = self.body.dtype
        log_q = self.body.log_prob(y.to(dtype), h.expand(n, -1).to(dtype)).double()
        return torch.where(contained, log_q - log_diag.sum(-1) - ladj, -torch.inf)

    def at(self, x: Tensor) -> "ObservedFamily":
        """The family at observations (M, *x_shape), as one without a condition."""
        return ObservedFamily(self, x)

    def _context(self, x: Tensor) -> Tensor:
        features = self.embedding(self.standardise_x(x)).flatten(1)
        return torch.cat([features, self.encoder(features)], -1)

    def _place(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """m (M, d), log of L's diagonal (M, d), and L with its rows divided by it (M, d, d)."""
        dim = self.coords.dim_z
        loc, log_diag, below = self.regression(h).double().tensor_split([dim, 2 * dim], -1)
        unit = torch.eye(dim, dtype=loc.dtype, device=loc.device).expand(len(h), dim, dim)
        if below.shape[-1]:
            i, j = torch.tril_indices(dim, dim, -1, device=loc.device)
            unit = unit.clone().index_put((torch.arange(len(h), device=loc.device)[:, None], i, j), below)
        return loc, log_diag / (1 + (log_diag / _LOG_SCALE_BOUND).abs()), unit


class ObservedFamily(Family):
    """A conditional family at given observations, as a `Family`; it has no weights of its own.

    With M observations `draw(n)` gives n draws for each, (n M, D), the M draws of one round together.

    Args:
        conditional: q(theta | x).
        x: (M, *x_shape).
    """

    def __init__(self, conditional: ConditionalFamily, x: Tensor) -> None:
        super().__init__()
        self.conditional, self.x = conditional, x
        self.event_shape = torch.Size([conditional.coords.dim_theta])

    @property
    def support(self) -> Any:
        """The prior's support."""
        return self.conditional.coords.support

    def draw(self, n: int, *, path: bool = True) -> Draws:
        if not (path and torch.is_grad_enabled()):
            theta, log_q = self.conditional.draw(self.x, n)
            return Draws(theta.flatten(0, 1), log_q.flatten())
        theta, log_q = self.conditional.draw(self.x, n, path=True)
        # the score's mean is zero and no objective of amortised fits asks for it
        return Draws(theta.flatten(0, 1), log_q.detach().flatten(), log_q.flatten())

    def log_prob(self, theta: Tensor) -> Tensor:
        flat = theta.reshape(-1, theta.shape[-1])
        return self.conditional.log_prob(flat, self.x).reshape(theta.shape[:-1])

    def fresh(self) -> "Family":
        raise ValueError(violation("q", "a family that can be rebuilt by itself", "one that is conditional"))
