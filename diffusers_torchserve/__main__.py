"""Runs the command line as ``python -m diffusers_torchserve``."""

import sys

from diffusers_torchserve import main

if __name__ == "__main__":
    sys.exit(main())
