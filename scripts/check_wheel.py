#!/usr/bin/env python3
"""Checks that a built wheel carries both packages, the presets and the tiny model.

Usage: check_wheel.py WHEEL
"""

import sys
import zipfile

NEEDED = (
    "jaxpaged/__init__.py",
    "jaxpaged/configs/",
    "jaxpaged/memory/page.css",
    "jaxpaged/assets/tiny/config.json",
    "jaxpaged/assets/tiny/model.safetensors",
    "jaxpaged/assets/tiny/tokenizer.json",
    "pallas_kernels/paged_attention/__init__.py",
)


def main() -> int:
    """Prints what is missing; returns the number of missing parts."""
    names = zipfile.ZipFile(sys.argv[1]).namelist()
    missing = [need for need in NEEDED if not any(name == need or (need.endswith("/") and name.startswith(need)) for name in names)]
    print(f"{sys.argv[1]}: {len(names)} files; missing: {', '.join(missing) or 'nothing'}")
    return len(missing)


if __name__ == "__main__":
    sys.exit(main())
