#!/usr/bin/env python3
"""Offline generation: ``jaxpaged generate`` without installing the command."""

import sys

from jaxpaged.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
