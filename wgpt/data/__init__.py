"""Prepared data: `prepare` writes it, `dataset` opens it, `batches` draws from it."""

from wgpt.data.dataset import Dataset, Split
from wgpt.data.pipeline import merge, prepare

__all__ = ["Dataset", "Split", "merge", "prepare"]
