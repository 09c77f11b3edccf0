"""Prepared data: `prepare` writes it, `dataset` opens it, `batches` draws from it."""

from wgpt.data.dataset import Dataset, Split
from wgpt.data.pipeline import prepare

__all__ = ["Dataset", "Split", "prepare"]
