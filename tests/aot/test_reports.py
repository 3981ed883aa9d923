"""What is read from the compilers' reports."""

from __future__ import annotations

import compile_check
import pytest
from compile_targets.report import line, markdown
from compile_targets.reports import Kernel, Measured, find_copies, find_sliced_operands, read_ptxas
from compile_targets.session import Session
from compile_targets.table import Row

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'decode' for 'sm_90a'
ptxas info    : Function properties for decode
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 164 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compiling entry function 'prefill' for 'sm_90a'
ptxas info    : Function properties for prefill
    48 bytes stack frame, 40 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers
"""

HLO = """
HloModule jit_step, input_output_alias={ {0}: (0, {}, may-alias) }

%fused_scatter (param_0: bf16[100,64]) -> bf16[100,64] {
  %param_0 = bf16[100,64]{1,0} parameter(0)
  ROOT %scatter.1 = bf16[100,64]{1,0} scatter(%param_0, %i, %u), to_apply=%region
}

%fused_gather (param_0.2: bf16[100,64]) -> f32[10,64] {
  %param_0.2 = bf16[100,64]{1,0} parameter(0)
  %convert.1 = f32[100,64]{1,0} convert(%param_0.2)
  ROOT %gather.1 = f32[10,64]{1,0} gather(%convert.1, %i)
}

ENTRY %main (pages: bf16[100,64]) -> bf16[100,64] {
  %pages = bf16[100,64]{1,0:T(8,128)(2,1)} parameter(0)
  %small = bf16[10,64]{1,0:T(8,128)(2,1)} copy(%slice)
  %read = f32[10,64]{1,0} fusion(%pages), kind=kLoop, calls=%fused_gather
  ROOT %written = bf16[100,64]{1,0:T(8,128)(2,1)} fusion(%pages, %i, %u), kind=kCustom, calls=%fused_scatter
}
"""

FUSED_COPY = """
%fused_copy (param_0.1: bf16[100,64]) -> bf16[100,64] {
  %param_0.1 = bf16[100,64]{1,0} parameter(0)
  ROOT %copy.1 = bf16[100,64]{0,1} copy(%param_0.1)
}
"""


def test_ptxas():
    assert read_ptxas(PTXAS) == [Kernel("decode", 164, 0), Kernel("prefill", 168, 64)]
    assert read_ptxas("") == []


def test_writing_in_place_and_reading_through_a_fusion_are_no_copies():
    assert find_copies(HLO, 6400) == []
    assert "copy small" in find_copies(HLO, 640)[0]


def test_copies_are_found():
    before, end = HLO.rsplit("  ROOT", 1)
    for operation in (
        "%again = bf16[100,64]{0,1} copy(%pages)",
        "%again = bf16[200,32]{1,0:T(8,128)(2,1)} reshape(%pages)",
        "%again = (bf16[100,64]{1,0}, bf16[100,64]{1,0}, u32[]) copy-start(%pages)",
        "%again = bf16[100,64]{0,1} fusion(%pages), kind=kLoop, calls=%fused_copy",
    ):
        found = find_copies(f"{FUSED_COPY if 'fused_copy' in operation else ''}{before}  {operation}\n  ROOT{end}", 6400)
        assert len(found) == 1, operation
        assert "again" in found[0]


SLICED = """
%dynamic-slice-fusion (p0: s32[148], p1: bf16[256,128]) -> f32[32,32,128] {
  %p0 = s32[148]{0} parameter(0)
  %slice.1 = s32[128]{0} slice(%p0), slice={[20:148]}
  ROOT %call.1 = f32[32,32,128]{2,1,0} custom-call(%p1, %slice.1), custom_call_target="mosaic_gpu_v2"
}

ENTRY %main (ints: s32[148], q: bf16[256,128]) -> f32[32,32,128] {
  %whole = f32[32,32,128]{2,1,0} custom-call(%q, %ints), custom_call_target="mosaic_gpu_v2"
  ROOT %fused = f32[32,32,128]{2,1,0} fusion(%ints, %q), kind=kCustom, calls=%dynamic-slice-fusion
}
"""


def test_a_kernel_that_reads_a_slice_where_it_lies_is_found():
    assert find_sliced_operands(SLICED, "mosaic_gpu") == ["a kernel reads a slice where it lies: dynamic-slice-fusion"]
    assert find_sliced_operands(SLICED.replace("slice={[20:148]}", "slice={[64:192]}").replace("[148]", "[192]"), "mosaic_gpu") == []
    assert find_sliced_operands(SLICED.replace(" slice(%p0), slice={[20:148]}", " dynamic-slice(%p0, %i)"), "mosaic_gpu") != []
    assert find_sliced_operands(SLICED, "xla.gpu.triton") == []
    assert find_sliced_operands(SLICED.replace("calls=%dynamic-slice-fusion", "calls=%other"), "mosaic_gpu") == []


@pytest.mark.parametrize(
    ("bounds", "found"),
    [
        ("[0:1], [0:16], [0:128]", False),
        ("[0:1], [1:17], [0:128]", False),
        ("[0:1], [0:16], [64:128]", True),
        ("[1:2], [0:16], [0:128]", False),
    ],
)
def test_a_slice_of_several_dimensions_that_begins_at_a_multiple_of_256_bytes_is_as_good_as_an_array(bounds, found):
    text = f"""
%fused (p0: bf16[2,24,128]) -> f32[16,128] {{
  %p0.1 = bf16[2,24,128]{{2,1,0}} parameter(0)
  %slice.378 = bf16[1,16,128]{{2,1,0}} slice(%p0.1), slice={{{bounds}}}
  %bitcast.1 = bf16[16,128]{{1,0}} bitcast(%slice.378)
  ROOT %call.1 = f32[16,128]{{1,0}} custom-call(%bitcast.1), custom_call_target="mosaic_gpu_v2"
}}

ENTRY %main (p: bf16[2,24,128]) -> f32[16,128] {{
  ROOT %all = f32[16,128]{{1,0}} fusion(%p), kind=kCustom, calls=%fused
}}
"""
    assert bool(find_sliced_operands(text, "mosaic_gpu")) == found


def test_a_missing_target_or_a_dead_compiler_is_a_red_row(monkeypatch):
    row = Row("H200", "attention", "xla", "Llama-3-8B", "decode 32 x 4k")
    monkeypatch.setattr("compile_targets.targets.Target.missing", lambda target: "nothing is installed")
    with Session([row]) as session:
        assert session.futures[row].result(60).problems == ("nothing is installed",)
    monkeypatch.setattr("compile_targets.targets.Target.missing", lambda target: None)
    monkeypatch.setattr("sys.executable", "false")
    with Session([row]) as session:
        assert "ended with exit status 1" in session.futures[row].result(60).problems[0]


def test_the_table_puts_the_chips_side_by_side():
    rows = [Row(target, "attention", "mosaic_gpu", "Llama-3-8B", "decode 32 x 4k") for target in ("H100", "H200")]
    green = Measured(0.5, 2**20, kernels=(Kernel("decode", 164, 0),))
    red = Measured(0.7, 2**30, kernels=(Kernel("decode", 164, 0),), problems=("too large",))
    text = markdown({rows[0]: green, rows[1]: red})
    assert "| attention | mosaic_gpu | Llama-3-8B | decode 32 x 4k | bfloat16 | 164 | 0 | 0.5, 1.0 MiB | 0.7, 1.00 GiB | **red** |" in text
    assert line(rows[0], green).endswith("164r/0s            ok")
    assert line(rows[1], red).endswith("RED too large")


def test_the_tables_go_between_the_marks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{compile_check.BEGIN}\nold\n{compile_check.END}\nafter\n")
    compile_check.write_between_marks(page, "| new |")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"| new |\n{compile_check.END}\nafter\n")
    assert "old" not in text
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="marks"):
        compile_check.write_between_marks(page, "| new |")
