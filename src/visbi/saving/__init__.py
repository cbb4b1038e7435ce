"""Posteriors as files: tensors and JSON, never a pickle."""

from visbi.saving.posterior import VOCABULARY, Parts, load_parts, save_parts

__all__ = ["VOCABULARY", "Parts", "load_parts", "save_parts"]
