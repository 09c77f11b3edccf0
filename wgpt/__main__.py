"""`python -m wgpt` = `wgpt`."""

import sys

from wgpt.cli import main

sys.exit(main())
