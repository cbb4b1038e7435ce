"""How the file in `format_2` was written: `python tests/data/write_format_2.py`, with the visbi it names.

Format 2 added amortised fits. Once a visbi of a higher format is out it is never written again.
"""

import json
from pathlib import Path

import torch
import torch.distributions as td
from torch import Tensor, nn

from visbi import VIPosterior
from visbi.priors import BoxUniform, MultipleIndependent

FOLDER = Path(__file__).parent / "format_2"


def log_p(theta: Tensor, x: Tensor) -> Tensor:
    """A user's potential."""
    return -2 * (theta - x).square().sum(-1)


def main() -> None:
    """Write the file, and beside it what it must say."""
    torch.manual_seed(0)
    prior = MultipleIndependent([td.HalfCauchy(torch.ones(1)), BoxUniform(-torch.ones(1), torch.ones(1))])
    theta = prior.sample(torch.Size([40]))
    x = theta.clamp(max=3) + 0.5 * torch.randn(40, 2)
    posterior = VIPosterior(log_p, prior, num_transforms=1, hidden_features=3)
    posterior.train_amortized(
        theta,
        x,
        flow_type="nsf",
        n_particles=4,
        max_num_iters=3,
        z_score_x="structured",
        embedding_net=nn.Linear(2, 3),
        show_progress_bar=False,
        seed=0,
    )
    posterior.set_default_x(x[0])
    posterior.map(num_init_samples=20, num_iter=3)
    posterior.report  # noqa: B018
    said = {
        "theta": theta[:5].tolist(),
        "x": x[:5].tolist(),
        "log_q": posterior.log_prob(theta[:5], x[:5]).tolist(),
        "described": repr(posterior),
    }
    FOLDER.mkdir(exist_ok=True)
    posterior.save(FOLDER / "amortised.visbi")
    (FOLDER / "facts.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
