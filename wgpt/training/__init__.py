"""Training: plan and start a run, the loop, the optimizer, processes, initial weights."""

from wgpt.training.launch import train

__all__ = ["train"]
