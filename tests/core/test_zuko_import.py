"""zuko comes in without switching off the validation of torch's distributions."""

import subprocess
import sys

import pytest

SHOW = "from torch.distributions import Distribution; print(Distribution._validate_args)"


def shown(*lines: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("setting", ["True", "False"])
def test_validation_stays_as_the_user_set_it(setting):
    set_it = (
        f"from torch.distributions import Distribution; Distribution.set_default_validate_args({setting})"
    )
    assert shown(set_it, "from visbi.core.zuko_import import zuko", SHOW) == setting
