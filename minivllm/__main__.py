"""python -m minivllm: the command line."""

import sys

from minivllm.cli import main

sys.exit(main())
