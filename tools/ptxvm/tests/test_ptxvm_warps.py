"""What lanes do together: shuffles, votes, reductions, matrices, barriers; and reconvergence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tools.ptxvm import Out, Violation, launch

LANES = np.arange(32)


def run_warp(
    body: str, *inputs: np.ndarray, threads: int = 32, schedule: Any = "forward", out: type = np.uint32
) -> np.ndarray:
    """Runs `body`, which turns %v (32 bits a thread, of the first input) into %d."""
    result = np.zeros(threads, out)
    values = np.asarray(inputs[0] if inputs else np.arange(threads), np.uint32)
    ptx = f"""
.version 8.6
.target sm_100a
.address_size 64
.visible .entry warp(.param .u64 out, .param .u64 in)
{{
    .reg .b64 %o, %i; .reg .b32 %v, %d, %e, %t; .reg .pred %p, %q;
    .shared .align 16 .b8 tile[1024];
    ld.param.u64 %o, [out];
    ld.param.u64 %i, [in];
    mov.u32 %t, %tid.x;
    mad.wide.u32 %o, %t, 4, %o;
    mad.wide.u32 %i, %t, 4, %i;
    ld.global.u32 %v, [%i];
    {body}
    st.global.u32 [%o], %d;
    ret;
}}"""
    launch(ptx, "warp", 1, threads, [Out(result), values], schedule=schedule)
    return result


def shuffle_reference(mode: str, b: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    """The algorithm of the ISA."""
    source, inside = np.zeros(32, int), np.zeros(32, bool)
    clamp, segment = c & 31, c >> 8 & 31
    for lane in range(32):
        last, first = lane & segment | clamp & ~segment, lane & segment
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segment}[mode]
        inside[lane] = j >= last if mode == "up" else j <= last
        source[lane] = j if inside[lane] else lane
    return source, inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(mode: str, width: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**32, 32, np.uint64).astype(np.uint32)
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    for b in (0, 1, 3, 7, 16, 31):
        source, inside = shuffle_reference(mode, b, c)
        assert (run_warp(f"shfl.sync.{mode}.b32 %d|%p, %v, {b}, {c}, -1;", values) == values[source]).all()
        assert (
            run_warp(f"shfl.sync.{mode}.b32 %d|%p, %v, {b}, {c}, 0xffffffff; selp.u32 %d, 1, 0, %p;", values) == inside
        ).all()


def test_shuffles_take_five_bits_of_the_distance() -> None:
    assert run_warp("shfl.sync.idx.b32 %d, %v, 35, 31, -1;").tolist() == [3] * 32
    assert run_warp("shfl.sync.down.b32 %d, %v, 33, 31, -1;").tolist() == [*range(1, 32), 31]


def test_a_shuffle_within_half_a_warp() -> None:
    body = """setp.ge.u32 %p, %t, 16; mov.u32 %d, 99;
    @%p bra HIGH;
    shfl.sync.down.b32 %d, %v, 1, 31, 0x0000ffff;
    bra END;
    HIGH: shfl.sync.idx.b32 %d, %v, 31, 31, 0xffff0000;
    END:"""
    with pytest.raises(Violation, match="reads lane 16, which does not take part"):
        run_warp(body)
    fixed = run_warp(body.replace("1, 31, 0x0000ffff", "1, 0x100f, 0x0000ffff"))
    assert fixed.tolist() == [*range(1, 16), 15, *[31] * 16]


def test_groups_of_one_instruction_keep_to_themselves() -> None:
    # Each half of the warp names its own members, as tiles of cooperative groups do, in one converged instruction.
    halves = "setp.lt.u32 %p, %t, 16; selp.b32 %e, 0x0000ffff, 0xffff0000, %p; "
    assert run_warp(halves + "redux.sync.max.u32 %d, %v, %e;").tolist() == [15] * 16 + [31] * 16
    assert run_warp(halves + "vote.sync.ballot.b32 %d, %p, %e;").tolist() == [0xFFFF] * 16 + [0] * 16
    assert run_warp(halves + "elect.sync %d|%q, %e;").tolist() == [0] * 16 + [16] * 16
    assert run_warp(halves + "shfl.sync.bfly.b32 %d, %v, 8, 31, %e;").tolist() == [k ^ 8 for k in range(32)]
    with pytest.raises(Violation, match="reads lane 16, which does not take part"):
        run_warp(halves + "shfl.sync.bfly.b32 %d, %v, 16, 31, %e;")


def test_votes() -> None:
    odd = "and.b32 %e, %v, 1; setp.ne.u32 %p, %e, 0; "
    assert set(run_warp(odd + "vote.sync.ballot.b32 %d, %p, -1;")) == {0xAAAAAAAA}
    assert set(run_warp(odd + "vote.sync.any.pred %q, %p, -1; selp.u32 %d, 1, 0, %q;")) == {1}
    assert set(run_warp(odd + "vote.sync.all.pred %q, %p, -1; selp.u32 %d, 1, 0, %q;")) == {0}
    assert set(run_warp(odd + "vote.sync.uni.pred %q, !%p, -1; selp.u32 %d, 1, 0, %q;")) == {0}
    for limit in (0, 99):  # all of the lanes, none of them
        uniform = f"setp.ge.u32 %p, %t, {limit}; vote.sync.uni.pred %q, %p, -1; selp.u32 %d, 1, 0, %q;"
        assert set(run_warp(uniform)) == {1}
    assert (
        run_warp(odd + "@%p bra A; activemask.b32 %d; bra B; A: activemask.b32 %d; B:").tolist()
        == [0x55555555, 0xAAAAAAAA] * 16
    )
    assert run_warp("elect.sync %d|%p, -1; selp.u32 %d, 7, 8, %p;").tolist() == [7] + [8] * 31


@pytest.mark.parametrize(
    ("operation", "reduce"),
    [
        ("add.u32", lambda v: v.sum() & 0xFFFFFFFF),
        ("min.u32", np.min),
        ("max.s32", lambda v: v.astype(np.int32).max()),
        ("add.s32", lambda v: v.sum() & 0xFFFFFFFF),
        ("and.b32", np.bitwise_and.reduce),
        ("or.b32", np.bitwise_or.reduce),
        ("xor.b32", np.bitwise_xor.reduce),
    ],
)
def test_integer_reductions(operation: str, reduce: Any) -> None:
    values = np.random.default_rng(1).integers(0, 2**32, 32, np.uint64).astype(np.uint32)
    assert set(run_warp(f"redux.sync.{operation} %d, %v, -1;", values).tolist()) == {
        int(reduce(values.astype(np.int64) if "s32" not in operation else values)) & 0xFFFFFFFF
    }


def test_float_reductions() -> None:
    values = np.random.default_rng(2).normal(size=32).astype(np.float32)
    values[3] = np.nan
    run = lambda op: run_warp(f"redux.sync.{op}.f32 %d, %v, -1;", values.view(np.uint32)).view(np.float32)[0]  # noqa: E731
    assert run("max") == np.nanmax(values) and run("min") == np.nanmin(values)
    assert run("max.abs") == np.nanmax(np.abs(values)) and run("min.abs") == np.nanmin(np.abs(values))
    assert np.isnan(run("max.NaN")) and np.isnan(run("min.NaN"))
    alone = "mov.u32 %d, 0; setp.eq.u32 %p, %t, 0; @%p redux.sync.max.abs.f32 %d, %v, 1;"
    assert run_warp(alone, np.full(32, 0xBF800000)).tolist() == [0x3F800000] + [0] * 31  # -1 alone


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_go_to_shared_memory_and_back(trans: str) -> None:
    # Each lane stores a register of matrix 0 and 1; then every lane reads its own 16 bits of the tile by the ISA's figure.
    body = f"""mov.u32 %e, tile; mad.lo.u32 %e, %t, 16, %e;
    stmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 [%e], {{%v, %t}};
    bar.warp.sync -1;
    mov.u32 %e, tile; mad.lo.u32 %e, %t, 4, %e; ld.shared.u32 %d, [%e];"""
    values = np.random.default_rng(3).integers(0, 2**32, 32, np.uint64).astype(np.uint32)
    tile = run_warp(body, values).view(np.uint16).reshape(8, 8)
    fragments = values.view(np.uint16).reshape(8, 8)  # lane t: row t/4, columns 2*(t%4), +1
    assert (tile == (fragments.T if trans else fragments)).all()
    back = body.replace("ld.shared.u32 %d, [%e];", "").replace(
        "mad.lo.u32 %e, %t, 4, %e;", "mad.lo.u32 %e, %t, 16, %e;"
    )
    assert (
        run_warp(back + f"ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%d, %e}}, [%e];", values) == values
    ).all()


def test_barrier_reductions() -> None:
    odd = "and.b32 %e, %v, 1; setp.ne.u32 %p, %e, 0; "
    for schedule in ("forward", "reversed", 5):
        assert set(run_warp(odd + "bar.red.popc.u32 %d, 0, %p;", threads=96, schedule=schedule)) == {48}
        assert set(
            run_warp(odd + "bar.red.or.pred %q, 0, %p; selp.u32 %d, 1, 0, %q;", threads=96, schedule=schedule)
        ) == {1}
        assert set(
            run_warp(odd + "barrier.red.and.pred %q, 0, !%p; selp.u32 %d, 1, 0, %q;", threads=96, schedule=schedule)
        ) == {0}


PRODUCER = """setp.lt.u32 %p, %t, 32; mov.u32 %e, tile; shl.b32 %d, %t, 2; add.u32 %e, %e, %d;
    @%p bra PRODUCER;
    bar.sync 1, 64;
    ld.shared.u32 %d, [%e+-128];
    bra END;
    PRODUCER: mul.lo.u32 %d, %v, 3; st.shared.u32 [%e], %d;
    bar.arrive 1, 64;
    END:"""


def test_a_named_barrier_orders_producer_and_consumer() -> None:
    for schedule in ("forward", "reversed", 5):
        assert run_warp(PRODUCER, threads=64, schedule=schedule).tolist() == [3 * k for k in range(32)] * 2
        with pytest.raises(Violation, match=r"(?s)race: .*(ld|st)\.shared|unwritten read"):
            run_warp(PRODUCER.replace("bar.sync 1", "bar.arrive 1"), threads=64, schedule=schedule)


def test_warps_that_disagree_about_a_barrier() -> None:
    body = "mov.u32 %d, 0; mov.u32 %e, 64; setp.ge.u32 %p, %t, 32; @%p mov.u32 %e, 96; bar.sync 1, %e;"
    with pytest.raises(Violation, match=r"barrier: expects (64|96) threads; others came expecting (64|96)"):
        run_warp(body, threads=64)
    with pytest.raises(Violation, match="barrier: more threads come than the 48 expected"):
        run_warp("mov.u32 %d, 0; bar.sync 1, 48;", threads=64)


def test_branches_reconverge() -> None:
    # The shuffle needs all lanes: they must have met again after a branch with a loop on one side.
    body = """and.b32 %e, %v, 1; setp.ne.u32 %p, %e, 0; mov.u32 %d, 0;
    @%p bra ODD;
    LOOP: add.u32 %d, %d, 1; setp.lt.u32 %q, %d, %v; @%q bra LOOP;
    bra MEET;
    ODD: mov.u32 %d, 100;
    MEET: shfl.sync.bfly.b32 %d, %d, 1, 31, -1;"""
    assert run_warp(body).tolist() == [x for k in range(0, 32, 2) for x in (100, max(1, k))]


def test_a_shuffle_waits_for_lanes_that_come_by_another_way() -> None:
    # The odd lanes' code lies behind the shuffle, and jumps back to it.
    body = """and.b32 %e, %v, 1; setp.ne.u32 %p, %e, 0; mov.u32 %d, 1;
    @%p bra ODD;
    MEET: shfl.sync.bfly.b32 %d, %d, 1, 31, -1;
    bra END;
    ODD: mov.u32 %d, 2; bra MEET;
    END:"""
    assert run_warp(body).tolist() == [2, 1] * 16


def test_lanes_of_a_warp_can_wait_for_each_other() -> None:
    # Lane 0 spins, at the lower address, until lane 1 has set a flag.
    body = """mov.u32 %e, tile; setp.eq.u32 %p, %t, 0; mov.u32 %d, 0; @%p st.shared.u32 [%e], %d; bar.warp.sync -1;
    @!%p bra OTHER;
    SPIN: ld.volatile.shared.u32 %d, [%e]; setp.eq.u32 %q, %d, 0; @%q bra SPIN;
    bra END;
    OTHER: setp.ne.u32 %q, %t, 1; @%q bra END; mov.u32 %d, 5; st.volatile.shared.u32 [%e], %d;
    END:"""
    assert run_warp(body).tolist() == [5, 5] + [0] * 30


@pytest.mark.parametrize(("body", "kind", "message"), [
    ("setp.lt.u32 %p, %t, 8; @%p exit; shfl.sync.idx.b32 %d, %v, 3, 31, -1;", "shuffle", "reads lane 3, which does not take part"),
    ("shfl.sync.idx.b32 %d, %v, 0, 31, 0x7fffffff;", "member mask", "not in the member mask"),
    ("bar.warp.sync 0xfffffffe;", "member mask", "not in the member mask"),
    ("shfl.sync.idx.b32 %d, %v, 0, 31, %t;", "member mask", "not in the member mask"),
    ("setp.lt.u32 %p, %t, 8; @%p bar.warp.sync -1;", "deadlock", "lanes that must take part never come here"),
    ("barrier.cluster.arrive.aligned; barrier.cluster.arrive.aligned;", "barrier", "arrives a second time without a wait"),
    ("barrier.cluster.wait.aligned;", "barrier", "waits without having arrived"),
    ("and.b32 %e, %t, 1; bar.sync %e;", "barrier", "lanes of a warp name different barriers"),
    ("bar.sync 16;", "barrier", "there are 16 barriers"),
    ("bar.sync 0, 64;", "deadlock", "threads that must take part never come here"),
    ("setp.lt.u32 %p, %t, 8; @%p exit; barrier.sync 0;", "deadlock", "8 of 32 threads have exited"),
    ("L: bra L;", "deadlock", "no progress"),
    ("trap;", "trap", "the kernel gave up"),
    ("mov.u32 %e, tile; ld.shared.u32 %d, [%e];", "unwritten read", "byte 0 of shared memory, which nobody has written"),
    ("mov.u32 %e, tile; st.shared.u32 [%e+1024], %v;", "out of bounds", "4-byte access at byte 1024 of shared memory, which has 1024"),
    ("mov.u32 %e, tile; setp.eq.u32 %p, %t, 0; @%p red.shared.add.u32 [%e], 1;", "unwritten read", "which nobody has written"),
    ("mov.u32 %e, tile; st.shared.v2.u32 [%e+4], {%v, %v};", "misaligned", "8-byte access at byte 4 of shared memory"),
    ("mov.u32 %e, tile; st.shared.u32 [%e+2], %v;", "misaligned", "4-byte access at byte 2 of shared memory"),
    ("mov.u32 %e, tile; st.shared.u32 [%e], %v;", "race", "was written by thread 0 of block 0"),
    ("ld.global.u32 %d, [%i+128];", "out of bounds", "0 bytes past the end of argument 1 (uint32[32])"),
    ("mov.b64 %i, 0; ld.global.u32 %d, [%i];", "out of bounds", "no allocation is near 0x0"),
])  # fmt: skip
def test_violations_of_one_warp(body: str, kind: str, message: str) -> None:
    for schedule in ("forward", 4):
        with pytest.raises(Violation) as caught:
            run_warp("mov.u32 %d, 0; " + body, schedule=schedule)
        assert caught.value.kind == kind, str(caught.value)
        assert message.replace("thread 0", "thread") in str(caught.value).replace("thread 0", "thread").replace(
            "thread 31", "thread"
        )


def test_partial_warps_run_with_a_full_member_mask() -> None:
    assert (
        run_warp("shfl.sync.idx.b32 %d, %v, 2, 31, -1; bar.warp.sync -1;", threads=40).tolist() == [2] * 32 + [34] * 8
    )


def test_lanes_that_part_cannot_meet_at_two_aligned_barriers() -> None:
    apart = "mov.u32 %d, 1; setp.lt.u32 %p, %t, 16; @%p bra A; barrier.sync 0; bra B; A: barrier.sync 0; B:"
    assert run_warp(apart).tolist() == [1] * 32
    with pytest.raises(Violation, match="deadlock: lanes that must take part never come here"):
        run_warp(apart.replace("barrier.sync", "bar.sync"))
