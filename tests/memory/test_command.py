"""``jaxpaged memory`` from the outside: text, JSON, the page, and complaints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from jaxpaged.cli import main
from jaxpaged.memory.charts import Line, line_chart, nice_ticks

SMALL = ["memory", "--num-requests", "40", "--num-pages", "129", "--max-model-len", "256"]


def test_text_compares_four_systems(capsys):
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    assert re.search(r"^paged, 16 tokens a page +\d", out, re.MULTILINE)
    for name in ("longest context", "next power of two", "true length"):
        assert re.search(rf"^contiguous, {name} +\d.* x ", out, re.MULTILINE)


def test_json_has_the_documented_names(capsys):
    assert main([*SMALL, "--json", "-", "--page-size", "16,64"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema_version"] == 1
    assert set(report) == {
        "schema_version",
        "model",
        "workload",
        "kv_cache_dtype",
        "token_bytes",
        "memory_bytes",
        "num_cells",
        "num_pages",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "contiguous",
        "seed",
        "beam_entropy",
        "beam_likeness",
        "prefix_caching",
        "swap_space",
        "comparison",
        "page_sizes",
        "sharing",
    }
    assert [row["system"] for row in report["comparison"]] == ["paged", "max", "pow2", "oracle"]
    assert [row["page_size"] for row in report["page_sizes"]] == [16, 64]
    for row in report["comparison"]:
        figures = row["figures"]
        whole = figures["tokens"] + figures["to_come"] + figures["never"] + figures["external"]
        assert whole == pytest.approx(1)
        assert figures["used"] + figures["internal_waste"] == pytest.approx(1)
        assert 0 < figures["mean_requests"] <= figures["peak_requests"]
        assert figures["peak_cells"] <= report["num_cells"]
    used = {row["system"]: row["figures"]["used"] for row in report["comparison"]}
    assert used["paged"] > used["oracle"] > used["pow2"] > used["max"]


def test_json_goes_to_a_file_beside_the_text(tmp_path, capsys):
    assert main([*SMALL, "--json", str(tmp_path / "r.json")]) == 0
    assert "paged, 16 tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["num_pages"] == 129


def test_the_page_is_well_formed_and_asks_nobody(tmp_path, capsys):
    path = tmp_path / "r.html"
    assert main([*SMALL, "--page-size", "16,1,64", "--html", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    svg = "{http://www.w3.org/2000/svg}"
    plots = list(root.iter(f"{svg}svg"))
    assert [plot.get("aria-label") for plot in plots] == [
        "Division of the memory while requests wait for some",
        "Requests at once over the steps",
        "Share of the memory that holds tokens",
        "Waste by page size",
        "Requests at once by page size",
        "Lengths",
    ]
    assert all(list(plot.iter(f"{svg}text")) for plot in plots)
    links = re.findall(
        r"(?:https?:)?//[\w.]+|url\(|@import|<script|<link|<img|\bsrc=", text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    )
    assert links == []
    assert "jaxpaged memory --num-requests 40" in text


def test_the_page_escapes_names(tmp_path, capsys):
    workload = tmp_path / "w.json"
    workload.write_text(json.dumps({"name": "<b>&", "requests": [{"prompt_token_ids": [1, 2], "max_tokens": 3}]}))
    assert main(["memory", "--workload", str(workload), "--html", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<b>&," not in text
    assert "&lt;b&gt;&amp;" in text
    ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def test_a_system_that_takes_far_longer_is_cut_from_the_plots_and_named(tmp_path, capsys):
    arguments = ["memory", "--num-requests", "60", "--workload", "alpaca", "--memory", "0.003", "--max-num-seqs", "64"]
    assert main([*arguments, "--html", str(tmp_path / "r.html"), "--json", "-"]) == 0
    steps = {row["system"]: row["figures"]["steps"] for row in json.loads(capsys.readouterr().out)["comparison"]}
    assert steps["max"] > 2 * steps["pow2"]
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"Contiguous, longest context goes on until step {steps['max']:,}." in text
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    plot = next(svg for svg in root.iter("{http://www.w3.org/2000/svg}svg") if svg.get("aria-label") == "Requests at once over the steps")
    points = [point for line in plot.iter("{http://www.w3.org/2000/svg}polyline") for point in line.get("points").split()]
    widths = [float(point.split(",")[0]) for point in points]
    assert max(widths) <= 880, "nothing is drawn outside of the plot"


def test_nothing_is_divided_where_nobody_waits(capsys):
    assert main(["memory", "--num-requests", "3", "--num-pages", "2000", "--json", "-"]) == 0
    for row in json.loads(capsys.readouterr().out)["comparison"]:
        assert row["figures"]["waiting_steps"] == 0
        assert row["figures"]["external"] is None
    assert main(["memory", "--num-requests", "3", "--num-pages", "2000"]) == 0
    assert " x" not in capsys.readouterr().out


def test_plots_escape_what_they_say():
    plot = line_chart([Line("a<b", "ours", [(0, 1), (1, 2)])], title="<t>", x_label="<x>", y_label="&", show_y=str)
    assert ElementTree.fromstring(plot).get("aria-label") == "<t>"


@pytest.mark.parametrize(
    ("most", "ticks"),
    [(0, [0, 1]), (1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.23, [0, 0.05, 0.1, 0.15, 0.2, 0.25]), (89, [0, 20, 40, 60, 80, 100])],
)
def test_ticks_are_round_and_reach_the_top(most, ticks):
    assert nice_ticks(most) == pytest.approx(ticks)


def test_a_system_that_cannot_hold_a_request_says_so(tmp_path, capsys):
    """Pages are shared out evenly, but a buddy allocator has no runs that long."""
    arguments = ["--num-pages", "40", "--n", "4", "--workload", "alpaca", "--contiguous", "buddy", "--html", str(tmp_path / "r.html")]
    assert main([*SMALL, *arguments]) == 0
    assert "4 x 144 tokens do not fit" in capsys.readouterr().out
    assert "4 x 144 tokens do not fit" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_worked_examples_are_printed(capsys):
    assert main(["memory", "--reserved", "2048", "--used", "600"]) == 0
    assert main(["memory", "--reserved", "4096", "--used", "900", "--page-size", "32"]) == 0
    assert capsys.readouterr().out == (
        "contiguous: 2,048 tokens reserved, 600 used: 70.7 % wasted\n"
        "paged:      38 pages of 16 = 608 tokens, 600 used: 1.3 % wasted\n"
        "contiguous: 4,096 tokens reserved, 900 used: 78.0 % wasted\n"
        "paged:      29 pages of 32 = 928 tokens, 900 used: 3.0 % wasted\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--page-size", "0"], "page_size must be integers from 1 to 1024; got 0"),
        (["--page-size", "16,x"], "page_size must be a list of int values; got '16,x'"),
        (["--n", "300"], "n must be integers from 1 to 256; got 300"),
        (["--beam-width", "11"], "beam_width must be integers from 1 to 10; got 11"),
        (["--n", "2", "--beam-width", "2"], "n and beam_width exclude each other"),
        (["--memory", "1", "--num-pages", "9"], "memory and num_pages exclude each other"),
        (["--memory", "0.000002"], "holds 0 pages of 16 tokens"),
        (["--max-model-len", "9999"], "max_model_len must be at most the model's 1024; got 9999"),
        (["--max-num-seqs", "20", "--max-num-batched-tokens", "10"], r"max_num_batched_tokens \(10\) must be at least max_num_seqs \(20\)"),
        (["--reserved", "20"], "reserved and used belong together"),
        (["--reserved", "20", "--used", "21"], r"used must be at most reserved \(20\); got 21"),
        (["--contiguous", "best"], "contiguous must be one of first-fit, buddy; got 'best'"),
        (["nowhere"], "model: 'nowhere' is no directory"),
        (["--workload", "nowhere"], "workload: 'nowhere' is no file"),
        (["--html", "/nowhere/x.html", "--num-requests", "1"], "--html /nowhere/x.html: No such file"),
        (["--pagesize", "16"], "unknown flag --pagesize; did you mean 'page-size'"),
    ],
)
def test_complaints_name_the_option(arguments, message, capsys):
    assert main(["memory", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_no_jax_is_loaded():
    code = "import sys; from jaxpaged.cli import main; main(['memory', '--num-requests', '3']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
