"""The hybrid model, its blocks, embeddings and key/value cache."""

from wgpt.model.cache import Cache
from wgpt.model.hybrid import HybridModel

__all__ = ["Cache", "HybridModel"]
