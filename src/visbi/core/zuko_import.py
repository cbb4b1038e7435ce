"""zuko, imported without its side effect.

Importing zuko switches off argument validation for every torch distribution in the process. That is
the user's setting, not ours, so this module is the one place that imports zuko and it puts the
setting back.
"""

from torch.distributions import Distribution

__all__ = ["zuko"]

_validate_args = Distribution._validate_args
import zuko  # noqa: E402

Distribution._validate_args = _validate_args
