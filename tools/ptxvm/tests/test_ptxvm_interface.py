"""Reading PTX, launching with good and bad arguments, reports, and clear errors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from tools.ptxvm import Out, PTXError, Struct, Violation, launch, parse
from tools.ptxvm.ptx import Location, literal

HEADER = ".version 8.6\n.target sm_90\n.address_size 64\n"
COPY = (
    HEADER
    + """
.visible .entry copy(.param .u64 .ptr .global .align 4 x, .param .u64 y, .param .u32 n, .param .u32 step)
.maxntid 128
{
    .reg .b64 %rd<5>; .reg .b32 %r<8>; .reg .pred %p;
    ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [y]; ld.param.u32 %r1, [n]; ld.param.u32 %r2, [step];
    mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ntid.x; mov.u32 %r5, %tid.x;
    mad.lo.u32 %r5, %r3, %r4, %r5;
    setp.ge.u32 %p, %r5, %r1;
    @%p ret;
    mul.lo.u32 %r6, %r5, %r2;
    mad.wide.s32 %rd3, %r6, 4, %rd1;
    mad.wide.s32 %rd4, %r6, 4, %rd2;
    ld.global.u32 %r7, [%rd3];
    st.global.u32 [%rd4], %r7;
    ret;
}"""
)


def kernel(body: str, params: str = "") -> str:
    return (
        HEADER
        + f".visible .entry f({params}) {{\n .reg .b64 %a; .reg .b32 %r; .reg .f32 %f; .reg .pred %p;\n{body}\n ret;\n}}"
    )


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ("add.s32 %r, %r, 1;\nfoo.b32 %r, %r;", 7, "unknown instruction 'foo'"),
        ("add.rn.s32 %r, %r, 1;", 6, "'add' is known, but not with these modifiers"),
        ("add.f32.bogus %f, %f, %f;", 6, "'add' is known, but not with these modifiers"),
        ("ld.global.L1::bogus.u32 %r, [%a];", 6, "not with these modifiers"),
        ("add.s32 %r, %r;", 6, "takes 3 operands, not 2"),
        ("ld.global.v4.u32 {%r, %r}, [%a];", 6, "takes 5 operands, not 3"),
        ("add.s32 %r, %q, 1;", 6, "unknown special register %q"),
        ("mov.u32 %r, nowhere;", 6, "unknown symbol 'nowhere'"),
        ("bra NOWHERE;", 6, "unknown label 'NOWHERE'"),
        ("@q trap;", 6, "register q is not declared"),
        ("call.uni printf;", 6, "unknown instruction 'call'"),
        (".bogus 1;", 6, "unknown directive '.bogus'"),
        ("mov.u32 %r, %r", 6, "cannot read the operand"),
    ],
)
def test_errors_name_the_line(body: str, line: int, message: str) -> None:
    with pytest.raises(PTXError, match=message.replace("(", r"\(")) as caught:
        launch(kernel(body), "f", 1, 1, [])
    assert caught.value.line == line


def test_a_kernel_is_read_where_it_is_asked_for() -> None:
    """Lines count from the start of the text, and one kernel's mistake is no other's."""
    module = parse(HEADER + ".entry f() {\n{ ret; }\n}\n.entry g() {\n .bogus 1;\n}\n.entry h()\n{\n\nret;\n}")
    for _ in range(2):
        with pytest.raises(PTXError, match=r"PTX line 8: unknown directive '\.bogus'"):
            module.kernel("g")
    assert [(k.line, *(i.line for i in k.instructions)) for k in map(module.kernel, "fh")] == [(4, 5), (10, 13)]
    assert module.kernel("h") is module.kernel("h")


def test_text_that_ends_too_early() -> None:
    with pytest.raises(PTXError, match="PTX line 7: the text ends too early"):
        parse(kernel("").rsplit("ret", 1)[0])
    with pytest.raises(PTXError, match="unknown directive 'hello'"):
        parse("hello world")


def test_literals() -> None:
    values = {
        "12": 12,
        "-7": -7,
        "0x1F": 31,
        "0b101": 5,
        "017": 15,
        "5U": 5,
        "0f3F800000": 0x3F800000,
        "0d3FF0000000000000": 0x3FF0000000000000,
        "1.5": 0x3FF8000000000000,
        "%r1": None,
        "x": None,
    }
    assert {text: literal(text) for text in values} == values


def test_variables_labels_and_locations() -> None:
    module = parse(
        HEADER
        + """
.file 1 "/some where//a.cu"
.file 2 "/some/where/b.h"
.global .align 4 .b8 bytes[4] = {1, 2, 255, 4};
.global .f32 number = 0f3F800000;
.extern .shared .align 16 .b8 dynamic[];
.extern .func (.param .b32 r) vprintf(.param .b64 a, .param .b64 b);
.entry f(.param .align 8 .b8 s[24]) .reqntid 32, 1, 1 {
    .reg .b32 %r<3>;
    .loc 2 10 3, function_name $info, inlined_at 1 5 1
L: { .reg .b32 %r1; mov.u32 %r1, 5; }  // comment; with a semicolon
    /* a comment
       of two lines */ mov.u32 %r1, 6;
}
.section .debug_info { .b8 1 .b8 2 }"""
    )
    kernel = module.kernel("f")
    assert [(v.name, v.size, v.data) for v in module.variables][:2] == [
        ("bytes", 4, bytes([1, 2, 255, 4])),
        ("number", 4, b"\0\0\x80?"),
    ]
    assert module.variables[2].size == 0 and module.variables[2].align == 16
    assert kernel.params[0].size == 24 and kernel.attributes["reqntid"] == (32, 1, 1) and kernel.labels == {"L": 0}
    assert kernel.registers == {"%r1", "%r1#1"}, "the inner register hides the outer one"
    inner, outer = kernel.instructions
    assert inner.location == Location(2, 10, (1, 5)) and module.describe(inner.location) == "b.h:10 (inlined at a.cu:5)"
    assert (inner.line, outer.line) == (14, 16)


X = np.arange(300, dtype=np.uint32)


@pytest.mark.parametrize("schedule", ["forward", "reversed", 5])
def test_views_share_their_array(schedule: Any) -> None:
    whole = np.arange(600, dtype=np.uint32)
    launch(COPY, "copy", 3, 128, [whole[::2], Out(whole[1::2]), 300, 2], schedule=schedule)
    assert (whole[1::2] == whole[::2]).all()
    backwards = np.zeros(300, np.uint32)[::-1]
    launch(COPY, "copy", 3, 128, [X[::-1], Out(backwards), 300, -1], schedule=schedule)
    assert (backwards == X[::-1]).all()


def test_gaps_of_a_view_are_out_of_bounds() -> None:
    with pytest.raises(Violation, match=r"out of bounds: 4 bytes at byte 4 of argument 0 .*, outside of its elements"):
        launch(COPY, "copy", 3, 128, [np.zeros(600, np.uint32)[::2], Out(np.zeros(300, np.uint32)), 300, 1])


def test_a_vector_that_reaches_past_the_end() -> None:
    ptx = kernel("ld.param.u64 %a, [x]; ld.global.v2.u32 {%r, %r}, [%a+8];", ".param .u64 x")
    launch(ptx, "f", 1, 1, [np.zeros(4, np.uint32)])
    with pytest.raises(Violation, match=r"8-byte access at byte 8 of argument 0 \(uint32\[3\]\), which has 12"):
        launch(ptx, "f", 1, 1, [np.zeros(3, np.uint32)])


def test_alignment_is_that_within_the_array() -> None:
    x = np.zeros(1200, np.uint8)[2:]
    with pytest.raises(Violation, match="misaligned"):
        launch(COPY, "copy", 1, 128, [x[:400], Out(np.zeros(100, np.uint32)), 100, 1])


def test_outputs_start_unwritten_and_inputs_may_be_read_only() -> None:
    with pytest.raises(Violation, match="unwritten read: 4 bytes at byte 0 of argument 0"):
        launch(COPY, "copy", 3, 128, [Out(X.copy()), Out(X.copy()), 300, 1])
    frozen = X.copy()
    frozen.setflags(write=False)
    launch(COPY, "copy", 3, 128, [frozen, Out(X.copy()), 300, 1])
    with pytest.raises(Violation, match="read-only: write to argument 1"):
        launch(COPY, "copy", 3, 128, [X, frozen, 300, 1])
    add = COPY.replace("st.global.u32 [%rd4]", "red.global.add.u32 [%rd4]")
    with pytest.raises(Violation, match="read-only: write to argument 1"):
        launch(add, "copy", 3, 128, [X, frozen, 300, 1])
    with pytest.raises(ValueError, match="argument 1 is an output, but the array is read-only"):
        launch(COPY, "copy", 3, 128, [X, Out(frozen), 300, 1])


@pytest.mark.parametrize(
    ("grid", "block", "args", "options", "error", "message"),
    [
        (1, 32, [X], {}, TypeError, "takes 4 arguments, not 1"),
        (1, 32, [X, X, 1 << 40, 1], {}, ValueError, "argument 2 = 1099511627776 does not fit"),
        (1, 32, [X, X, "n", 1], {}, TypeError, "argument 2 is a str"),
        (1, 32, [X, X, b"ab", 1], {}, ValueError, "has 2 bytes; parameter n has 4"),
        (0, 32, [X, X, 1, 1], {}, ValueError, "grid .* is not within"),
        ((1, 70000), 32, [X, X, 1, 1], {}, ValueError, "grid .* is not within"),
        (1, (64, 32), [X, X, 1, 1], {}, ValueError, "at most 1024 threads"),
        (1, 256, [X, X, 1, 1], {}, ValueError, "at most 128 threads a block"),
        (3, 32, [X, X, 1, 1], {"cluster": 2}, ValueError, "not a multiple of cluster"),
        (1, 32, [X, X, 1, 1], {"schedule": "sideways"}, ValueError, "schedule is"),
        (1, 32, [torch.zeros(4, device="meta"), X, 1, 1], {}, TypeError, "on meta"),
    ],
)
def test_bad_launches(
    grid: Any, block: Any, args: list[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        launch(COPY, "copy", grid, block, args, **options)


def test_an_unknown_kernel_and_a_wrong_block() -> None:
    with pytest.raises(KeyError, match="no kernels match 'other'; the text has copy"):
        launch(COPY, "other", 1, 1, [])
    with pytest.raises(ValueError, match=r"compiled for blocks of \(64, 1, 1\)"):
        launch(COPY.replace(".maxntid 128", ".reqntid 64"), "copy", 1, 32, [X, X, 1, 1])


def test_structs_and_null() -> None:
    ptx = kernel(
        "ld.param.u64 %a, [s+8]; ld.param.u32 %r, [s]; st.global.u32 [%a], %r; ld.param.u64 %a, [p]; setp.ne.u64 %p, %a, 0; @%p trap;",
        ".param .align 8 .b8 s[16], .param .u64 p",
    )
    y = np.zeros(1, np.uint32)
    launch(ptx, "f", 1, 1, [Struct("iP", 77, Out(y)), None])
    assert y[0] == 77


def test_numbers_take_the_type_of_the_parameter() -> None:
    ptx = kernel(
        "ld.param.u64 %a, [y]; ld.param.f32 %f, [v]; st.global.f32 [%a], %f; ld.param.s8 %r, [k]; cvt.rn.f32.s32 %f, %r; st.global.f32 [%a+4], %f;",
        ".param .u64 y, .param .f32 v, .param .s8 k",
    )
    y = np.zeros(2, np.float32)
    launch(ptx, "f", 1, 1, [Out(y), 3, -5])
    assert y.tolist() == [3, -5]


def test_threads_and_blocks_have_three_dimensions() -> None:
    ptx = kernel(
        """ld.param.u64 %a, [y]; { .reg .b32 %i<20>;
    mov.u32 %i0, %tid.x; mov.u32 %i1, %tid.y; mov.u32 %i2, %tid.z; mov.u32 %i3, %ntid.x; mov.u32 %i4, %ntid.y; mov.u32 %i5, %ntid.z;
    mov.u32 %i6, %ctaid.x; mov.u32 %i7, %ctaid.y; mov.u32 %i8, %ctaid.z; mov.u32 %i9, %nctaid.x; mov.u32 %i10, %nctaid.y;
    mad.lo.u32 %i11, %i8, %i10, %i7; mad.lo.u32 %i11, %i11, %i9, %i6; mad.lo.u32 %i11, %i11, %i5, %i2;
    mad.lo.u32 %i11, %i11, %i4, %i1; mad.lo.u32 %i11, %i11, %i3, %i0; mad.wide.u32 %a, %i11, 4, %a; st.global.u32 [%a], %i11; }""",
        ".param .u64 y",
    )
    for schedule in ("forward", "reversed", 9):
        y = np.zeros(2 * 3 * 2 * 5 * 3 * 4, np.uint32)
        launch(ptx, "f", (2, 3, 2), (5, 3, 4), [Out(y)], schedule=schedule)
        assert (y == np.arange(len(y))).all()


def test_reports_count_what_happened() -> None:
    report = launch(COPY, "copy", 3, 128, [X, Out(np.zeros(300, np.uint32)), 300, 1])
    assert (report.global_read.requests, report.global_read.bytes, report.global_read.sectors) == (10, 1200, 38)
    strided = launch(COPY, "copy", 2, 128, [np.zeros(2048, np.uint32), Out(np.zeros(2048, np.uint32)[::8]), 256, 8])
    assert strided.global_written.sectors / strided.global_written.requests == 32
    (load,) = [r for r in report.rows if r.opcode == "ld.global.u32"]
    assert (load.line, load.warps, load.requests, load.threads) == (17, 10, 10, 300)
    # Neighbouring lanes go to different sectors, the lanes of a warp to four of them.
    dealt = "{ .reg .b32 %q; and.b32 %q, %r5, 3; shr.u32 %r5, %r5, 2; mad.lo.u32 %r5, %q, 8, %r5; } mul.lo.u32 %r6"
    shuffled = launch(COPY.replace("mul.lo.u32 %r6", dealt), "copy", 1, 32, [X[:32], Out(X[:32].copy()), 32, 1])
    assert shuffled.global_read.sectors == shuffled.global_written.sectors == 4
    assert report.divergent_branches == 0 and report.instructions["memory"] == 4 * 12 + 2 * 10
    data = json.loads(report.to_json())
    assert data["global_read"] == {"requests": 10, "bytes": 1200, "sectors": 38, "conflicts": 0} and len(
        data["instructions"]
    ) == len(report.rows)
    assert "global read           10        1200        38             3.80" in str(report)
    assert "ld.global.u32 %r7, [%rd3];" in report.table()


@pytest.mark.parametrize(
    ("stride", "bytes_each", "conflicts"),
    [(4, 4, 0), (8, 4, 1), (128, 4, 31), (132, 4, 0), (16, 16, 0), (32, 16, 4), (2, 2, 0), (0, 4, 0)],
)
def test_bank_conflicts(stride: int, bytes_each: int, conflicts: int) -> None:
    registers = "{%r, %r, %r, %r}" if bytes_each == 16 else "%r"
    kind = ".v4.u32" if bytes_each == 16 else f".u{8 * bytes_each}"
    report = launch(
        kernel(f""".shared .align 16 .b8 s[4608]; {{ .reg .b32 %o; mov.u32 %o, %tid.x; mov.u32 %r, 0;
    mad.lo.u32 %o, %o, {stride}, s; st.shared{kind} [%o], {registers}; }}"""),
        "f",
        1,
        32,
        [],
    )
    assert report.conflicts == conflicts


def test_divergent_branches_are_counted() -> None:
    body = "mov.u32 %r, %tid.x; setp.lt.u32 %p, %r, {}; @%p bra L; add.u32 %r, %r, 1; L:"
    assert [launch(kernel(body.format(n)), "f", 1, 64, []).divergent_branches for n in (0, 5, 32, 40)] == [0, 1, 0, 1]
