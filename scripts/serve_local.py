#!/usr/bin/env python3
"""Serves the packaged tiny model, or the one you name, at http://127.0.0.1:8000: ``jaxpaged serve`` without installing the command."""

import sys

from jaxpaged.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
