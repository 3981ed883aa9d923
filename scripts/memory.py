#!/usr/bin/env python3
"""What paging saves on a workload: ``jaxpaged memory`` without installing the command."""

import sys

from jaxpaged.cli import main

if __name__ == "__main__":
    sys.exit(main(["memory", *sys.argv[1:]]))
