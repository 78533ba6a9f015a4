"""Runs the command line as ``python -m na_lora_lightning``."""

import sys

from na_lora_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
