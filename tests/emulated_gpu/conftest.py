"""These tests run in a process of their own, which tests/simt/test_simt_gpu.py starts."""

import os

if os.environ.get("WGPT_EMULATED_GPU") != "1":
    collect_ignore_glob = ["test_*.py"]
