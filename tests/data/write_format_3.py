"""How the files in `format_3` were written: `python tests/data/write_format_3.py`, with the visbi they name.

Format 3 added fits with q="auto". Once a visbi of a higher format is out they are never written again.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from auto_cases import auto, found, trained, two_modes
from posterior_cases import X
from visbi import VIPosterior

FOLDER = Path(__file__).parent / "format_3"


def facts(posterior: VIPosterior) -> dict[str, Any]:
    """What must hold of the posterior after loading."""
    theta, log_w = posterior.weighted_sample(25)
    return {
        "theta": theta.tolist(),
        "log_w": log_w.tolist(),
        "log_q": posterior.log_prob(theta).tolist(),
        "modes": [mode.weight for mode in posterior.report.modes],
        "described": repr(posterior),
    }


def main() -> None:
    """Write the files, and beside them what they must say."""
    torch.manual_seed(0)
    made = {
        # the budget ends it before it has drawn many
        "mixture": trained(auto(two_modes), X, max_potential_evals=65_000),
        "patched_flow": found("patched flow", auto(two_modes), allow_failed=True),
    }
    FOLDER.mkdir(exist_ok=True)
    written = {}
    for name, posterior in made.items():
        written[name] = facts(posterior)
        posterior.save(FOLDER / f"{name}.visbi")
    (FOLDER / "facts.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
