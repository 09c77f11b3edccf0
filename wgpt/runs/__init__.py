"""Run folders: what was asked, checkpoints, metrics, pretrained models, plots."""
