"""The rows that were collected are compiled once, by processes of their own; a test waits for its row."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from compile_targets.session import Session
from compile_targets.targets import TARGETS


@pytest.fixture(scope="session")
def compiled(request):
    """Returns a function from a row to what compiling it gave; the rows of all tests that will run are begun at once, in order."""
    rows = [item.callspec.params["row"] for item in request.session.items if "row" in getattr(item, "callspec", _NO_ROW).params]
    with Session(row for row in rows if TARGETS[row.target].missing() is None) as session:
        yield lambda row: session.futures[row].result()


class _NO_ROW:
    params = ()
