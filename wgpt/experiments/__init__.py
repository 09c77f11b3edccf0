"""Many runs in one command: the paper's comparison with its controls, and the demo."""
