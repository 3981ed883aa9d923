"""docs/memory.md: every block is what its command prints, and the table at its top says nothing that no block says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import memory_docs  # noqa: E402

SHOWN = memory_docs.shown(memory_docs.PAGE.read_text(encoding="utf-8"))
LONG = ("--beam-width", "--n ", "sharegpt --memory 12 --page-size", "--num-requests 600")


def is_long(command: str) -> bool:
    return any(mark in command for mark in LONG)


def test_the_blocks_are_found():
    assert len(SHOWN) >= 16
    assert sum(not is_long(command) for command, _ in SHOWN) >= 7
    assert all(printed for _, printed in SHOWN)


@pytest.mark.parametrize(
    ("command", "printed"),
    [pytest.param(*each, marks=[pytest.mark.slow] if is_long(each[0]) else [], id=each[0]) for each in SHOWN],
)
def test_a_block_is_what_its_command_prints(command, printed):
    assert memory_docs.printed_by(command) == printed


def test_the_table_repeats_figures_of_the_blocks():
    text = memory_docs.PAGE.read_text(encoding="utf-8")
    figures = set(re.findall(r"[\d.]+(?= [%x])", "".join(printed for _, printed in SHOWN)))
    table = text.partition("## In short")[2].partition("##")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 10
    for _, claim, measured, _, _ in rows:
        found = re.findall(r"\d+\.\d+", measured)
        assert found, claim
        assert set(found) <= figures, claim
