"""Posteriors as files: tensors and JSON, never a pickle."""

from visbi.saving.posterior import Parts, load_parts, save_parts

__all__ = ["Parts", "load_parts", "save_parts"]
