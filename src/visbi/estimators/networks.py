r"""Networks of the estimators: a conditional flow for densities and a classifier for ratios.

The flow gives q(x | c) by the change of variables x -> u ~ N(0, I) in two stages. First a regression,

    u_0 = (x - mu(h)) exp(-log_sigma(h)),    h = (c, features of c by a residual network),

takes out location and scale; then autoregressive layers, each at the identity before training, shape what
is left (Papamakarios, Pavlakou, Murray 2017; Durkan, Bekasov, Murray, Papamakarios 2019). The regression is
there because a masked network must split its hidden units over the dimensions of x: with 50 units and 42
dimensions one or two units would be all that the first dimension has to see c with. h is computed once and
shared by all layers, so c with leading axes (N, 1) against x (T, n) costs N evaluations of it.

Activations are smooth (SiLU), because variational fits follow gradients with respect to c.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from visbi.core.checks import one_of, violation
from visbi.core.spline import spline_flow
from visbi.core.types import Shape
from visbi.core.zuko_import import zuko

__all__ = ["FLOWS", "ConditionalFlow", "RatioClassifier", "ResidualNetwork", "embedded_features"]

FLOWS = ("maf", "nsf")
"""Names of conditional flows."""

_LOG_2PI = math.log(2 * math.pi)
_LOG_SCALE_BOUND = 7.0  # exp(7) = 1097: the noise may be a thousand times smaller than x's spread


class ResidualNetwork(nn.Module):
    """A linear map in, residual blocks x + W2 act(W1 act(x)), a linear map out.

    Args:
        inputs, outputs: numbers of features.
        width: of the hidden layers.
        blocks: how many residual blocks.
    """

    def __init__(self, inputs: int, outputs: int, width: int, blocks: int = 2) -> None:
        super().__init__()
        self.entry = nn.Linear(inputs, width)
        self.blocks = _blocks(width, blocks)
        self.exit = nn.Sequential(nn.SiLU(), nn.Linear(width, outputs))

    def forward(self, y: Tensor) -> Tensor:
        y = self.entry(y)
        for block in self.blocks:
            y = y + block(y)
        return self.exit(y)


class ConditionalFlow(nn.Module):
    """q(x | c) for vectors x of `features` entries and conditions c of `condition_features`.

    Args:
        features: entries of x.
        condition_features: entries of c.
        flow: "maf", affine layers, or "nsf", rational-quadratic splines on [-5, 5]. A single feature leaves
            affine layers nothing to depend on but c, and the density Gaussian; there "maf" has splines too.
        num_transforms: autoregressive layers.
        hidden_features: width of every network.

    >>> flow = ConditionalFlow(3, 2, flow="maf", num_transforms=2, hidden_features=8)
    >>> flow.log_prob(torch.zeros(5, 3), torch.zeros(5, 2)).shape, flow.sample(torch.zeros(4, 2)).shape
    (torch.Size([5]), torch.Size([4, 3]))
    """

    def __init__(
        self, features: int, condition_features: int, *, flow: str, num_transforms: int, hidden_features: int
    ) -> None:
        super().__init__()
        one_of("flow", flow, FLOWS)
        self.features = features
        context = condition_features + hidden_features
        self.encoder = ResidualNetwork(condition_features, hidden_features, hidden_features)
        self.regression = nn.Linear(context, 2 * features)
        splines = flow == "nsf" or features == 1
        build: Any = spline_flow if splines else zuko.flows.MAF
        zuko_flow = build(
            features,
            context,
            transforms=num_transforms,
            hidden_features=(hidden_features, hidden_features),
            activation=nn.SiLU,
        )
        self.layers = nn.ModuleList(zuko_flow.transform.transforms)
        for module in self.layers.modules():
            if isinstance(module, zuko.nn.MaskedLinear):
                module.mask = module.mask.to(module.weight.dtype)  # type: ignore[union-attr] # saves a cast a step
        for output in (self.regression, *(layer.hyper[-1] for layer in zuko_flow.transform.transforms)):
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)

    def context(self, condition: Tensor) -> Tensor:
        """h for c (..., condition_features): what all layers see of the condition."""
        return torch.cat([condition, self.encoder(condition)], -1)

    def log_prob(self, x: Tensor, condition: Tensor) -> Tensor:
        """log q(x | c), (...), for x (..., features) and c (..., condition_features) that broadcast."""
        return self.log_prob_in_context(x, self.context(condition))

    def log_prob_in_context(self, x: Tensor, context: Tensor) -> Tensor:
        """log q(x | c) from `context(c)`, for callers that use one context many times."""
        location, log_scale = self._location_and_log_scale(context)
        u = (x - location) * torch.exp(-log_scale)
        log_det = -log_scale.sum(-1)
        for layer in self.layers:
            u, ladj = layer(context).call_and_ladj(u)
            log_det = log_det + ladj
        return -0.5 * u.square().sum(-1) - 0.5 * self.features * _LOG_2PI + log_det

    def sample(self, condition: Tensor) -> Tensor:
        """One draw of x for each row of c: (..., features), with torch's global generator."""
        context = self.context(condition)
        location, log_scale = self._location_and_log_scale(context)
        u = torch.randn_like(location)
        for layer in reversed(self.layers):
            u = layer(context).inv(u)
        return u * torch.exp(log_scale) + location

    def _location_and_log_scale(self, context: Tensor) -> tuple[Tensor, Tensor]:
        location, log_scale = self.regression(context).chunk(2, -1)
        return location, log_scale / (1 + (log_scale / _LOG_SCALE_BOUND).abs())


class RatioClassifier(nn.Module):
    """f(theta, e): one number for each pair of theta and features e of x; a residual network.

    theta and e enter through two linear maps that are added, so that all pairs of N thetas and T features,
    as (N, 1, D) and (T, F), cost the first layer N + T rows, not N T.
    """

    def __init__(
        self, theta_features: int, x_features: int, *, hidden_features: int, num_blocks: int
    ) -> None:
        super().__init__()
        self.theta_entry = nn.Linear(theta_features, hidden_features)
        self.x_entry = nn.Linear(x_features, hidden_features, bias=False)
        self.blocks = _blocks(hidden_features, num_blocks)
        self.exit = nn.Sequential(nn.SiLU(), nn.Linear(hidden_features, 1))

    def forward(self, theta: Tensor, x_features: Tensor) -> Tensor:
        y = self.theta_entry(theta) + self.x_entry(x_features)
        for block in self.blocks:
            y = y + block(y)
        return self.exit(y).squeeze(-1)


def embedded_features(embedding: Any, event_shape: Shape, name: str) -> int:
    """How many features `embedding` makes of one event; found by trying.

    Args:
        embedding: (M, *event_shape) -> (M, features); further axes of what it gives count as features.
        event_shape: of what is embedded.
        name: of the argument that errors speak of.

    Raises:
        TypeError: it is no module.
        ValueError: it does not take such events, or gives something else.
    """
    if not isinstance(embedding, nn.Module):
        raise TypeError(violation(name, "an nn.Module or None", type(embedding).__name__))
    shape = tuple(event_shape)
    parameter = next(embedding.parameters(), torch.empty(0))
    training = embedding.training
    try:
        with torch.no_grad():
            made = embedding.eval()(torch.zeros(2, *shape, device=parameter.device))
    except Exception as error:
        expected = f"one that takes {_rows_of(shape)}"
        raise ValueError(violation(name, expected, f"{type(error).__name__}: {error}")) from error
    finally:
        embedding.train(training)
    if not isinstance(made, Tensor) or made.ndim < 2 or len(made) != 2:
        got = f"shape {tuple(made.shape)} for M = 2" if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(violation(name, f"one that makes (M, features) of {_rows_of(shape)}", got))
    return made.flatten(1).shape[1]


def _rows_of(shape: tuple[int, ...]) -> str:
    return f"({', '.join(['M', *map(str, shape)])})"


def _blocks(width: int, n: int) -> nn.ModuleList:
    def block() -> nn.Sequential:
        return nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    return nn.ModuleList(block() for _ in range(n))
