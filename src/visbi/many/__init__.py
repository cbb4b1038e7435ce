"""One q for each of many observations: fitted in chunks, over workers, kept on disk."""

from visbi.many.fit import fit_many
from visbi.many.posteriors import Posteriors

__all__ = ["Posteriors", "fit_many"]
