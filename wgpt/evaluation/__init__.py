"""Scores, baselines, the codec's ceiling, drift, distances to real sound, tables."""

from wgpt.evaluation.summary import evaluate

__all__ = ["evaluate"]
