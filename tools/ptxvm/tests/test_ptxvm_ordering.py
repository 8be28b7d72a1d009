"""The memory model: what orders two threads, in a block, a cluster and a grid, and what does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tools.ptxvm import Out, Report, Violation, launch

SCHEDULES: list[Any] = ["forward", "reversed", 1, 2]


def run(
    body: str, *, blocks: int = 2, threads: int = 32, schedule: Any = "forward", **options: Any
) -> tuple[np.ndarray, Report]:
    """Runs `body` with %m a zeroed memory of 64 words, %b the block, %t the thread, %z "thread 0", %y "block 1"."""
    memory = np.zeros(64, np.uint32)
    ptx = f"""
.version 8.6
.target sm_100a
.address_size 64
.visible .entry f(.param .u64 memory)
{{
    .reg .b64 %m, %g; .reg .b32 %b, %t, %d, %e; .reg .pred %z, %y, %p;
    .shared .align 4 .b8 tile[256];
    ld.param.u64 %m, [memory];
    mov.u32 %b, %ctaid.x;
    mov.u32 %t, %tid.x;
    setp.eq.u32 %z, %t, 0;
    setp.eq.u32 %y, %b, 1;
    {body}
    ret;
}}"""
    options.setdefault("cooperative", True)
    report = launch(ptx, "f", blocks, threads, [memory], schedule=schedule, **options)
    return memory, report


MESSAGE = """@!%z exit;
    @%y bra READER;
    st.global.u32 [%m], 42;
    {release}
    exit;
    READER: {acquire} setp.eq.u32 %p, %d, 0; @%p bra READER;
    {after}
    ld.global.u32 %d, [%m];
    st.global.u32 [%m+8], %d;"""
SOUND = {
    "release and acquire": ("st.release.gpu.global.u32 [%m+4], 1;", "ld.acquire.gpu.global.u32 %d, [%m+4];", ""),
    "system scope": ("st.release.sys.global.u32 [%m+4], 1;", "ld.acquire.gpu.global.u32 %d, [%m+4];", ""),
    "fences": (
        "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%m+4], 1;",
        "ld.relaxed.gpu.global.u32 %d, [%m+4];",
        "fence.acq_rel.gpu;",
    ),
    "a narrow fence and a wide one": (
        "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%m+4], 1;",
        "ld.relaxed.gpu.global.u32 %d, [%m+4];",
        "fence.acq_rel.cta; fence.acq_rel.gpu;",
    ),
    "old fences": ("membar.gl; st.volatile.global.u32 [%m+4], 1;", "ld.volatile.global.u32 %d, [%m+4];", "membar.sys;"),
    "atomics": ("atom.acq_rel.gpu.global.add.u32 %d, [%m+4], 1;", "atom.acq_rel.gpu.global.or.b32 %d, [%m+4], 0;", ""),
    "a reduction": ("red.release.gpu.global.max.u32 [%m+4], 1;", "ld.acquire.gpu.global.u32 %d, [%m+4];", ""),
    "a release sequence": (
        "st.release.gpu.global.u32 [%m+4], 0; red.relaxed.gpu.global.add.u32 [%m+4], 1;",
        "ld.acquire.gpu.global.u32 %d, [%m+4];",
        "",
    ),
}
UNSOUND = {
    "no release": ("st.relaxed.gpu.global.u32 [%m+4], 1;", "ld.acquire.gpu.global.u32 %d, [%m+4];", ""),
    "no acquire": ("st.release.gpu.global.u32 [%m+4], 1;", "ld.relaxed.gpu.global.u32 %d, [%m+4];", ""),
    "no fence before": ("st.volatile.global.u32 [%m+4], 1;", "ld.volatile.global.u32 %d, [%m+4];", "membar.gl;"),
    "no fence after": ("membar.gl; st.volatile.global.u32 [%m+4], 1;", "ld.volatile.global.u32 %d, [%m+4];", ""),
    "a fence after the flag": ("st.volatile.global.u32 [%m+4], 1; membar.gl;", "ld.volatile.global.u32 %d, [%m+4];", "membar.gl;"),
    "a fence of the block": ("membar.cta; st.volatile.global.u32 [%m+4], 1;", "ld.volatile.global.u32 %d, [%m+4];", "membar.gl;"),
    "a fence of the block at the reader": ("fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%m+4], 1;", "ld.relaxed.gpu.global.u32 %d, [%m+4];", "fence.acq_rel.cta;"),
    "a fence of the block and an acquire": ("fence.acq_rel.cta; st.relaxed.gpu.global.u32 [%m+4], 1;", "ld.acquire.gpu.global.u32 %d, [%m+4];", ""),
    "a release to the block": ("st.release.cta.global.u32 [%m+4], 1;", "ld.acquire.gpu.global.u32 %d, [%m+4];", ""),
    "an acquire from the block": ("st.release.gpu.global.u32 [%m+4], 1;", "ld.acquire.cta.global.u32 %d, [%m+4];", ""),
    "a plain flag": ("st.global.u32 [%m+4], 1;", "ld.acquire.gpu.global.u32 %d, [%m+4];", ""),
    "a plain look at the flag": ("st.release.gpu.global.u32 [%m+4], 1;", "ld.global.u32 %d, [%m+4];", ""),
    "a flag that is stored again": ("st.release.gpu.global.u32 [%m+4], 0; st.relaxed.gpu.global.u32 [%m+4], 1;", "ld.acquire.gpu.global.u32 %d, [%m+4];", ""),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("way", SOUND)
def test_a_message_between_blocks(way: str, schedule: Any) -> None:
    release, acquire, after = SOUND[way]
    memory, _ = run(MESSAGE.format(release=release, acquire=acquire, after=after), schedule=schedule)
    assert memory[2] == 42


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("way", UNSOUND)
def test_a_message_that_nothing_orders(way: str, schedule: Any) -> None:
    release, acquire, after = UNSOUND[way]
    with pytest.raises(Violation, match=r"race: .* with nothing that orders the two"):
        run(MESSAGE.format(release=release, acquire=acquire, after=after), schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_message_within_a_cluster(schedule: Any) -> None:
    text = MESSAGE.format(
        release="st.release.cluster.global.u32 [%m+4], 1;",
        acquire="ld.acquire.cluster.global.u32 %d, [%m+4];",
        after="",
    )
    memory, _ = run(text, schedule=schedule, cluster=2)
    assert memory[2] == 42
    with pytest.raises(Violation, match="race"):
        run(text, schedule=schedule)
    with pytest.raises(Violation, match="race"):
        run(
            text.replace("setp", "fence.acq_rel.cluster; setp").replace("acquire.cluster", "relaxed.gpu"),
            schedule=schedule,
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_block_passes_on_what_it_knows(schedule: Any) -> None:
    # Every thread writes; a barrier; thread 0 releases. Over there thread 0 acquires; a barrier; every thread reads.
    body = """mul.wide.u32 %g, %t, 4; add.s64 %g, %m, %g;
    @%y bra READER;
    st.global.u32 [%g+8], %t;
    bar.sync 0;
    @%z red.release.gpu.global.add.u32 [%m], 1;
    exit;
    READER: @!%z bra ALL;
    SPIN: ld.acquire.gpu.global.u32 %d, [%m]; setp.eq.u32 %p, %d, 0; @%p bra SPIN;
    ALL: bar.sync 0;
    ld.global.u32 %d, [%g+8];"""
    run(body, threads=48, schedule=schedule)
    for barrier in ("bar.sync 0;\n    @%z red", "ALL: bar.sync 0;"):
        with pytest.raises(Violation, match=r"race: byte .* of argument 0"):
            run(body.replace(barrier, barrier.replace("bar.sync 0;", "")), threads=48, schedule=schedule)


CASES = {
    "lanes of a warp are not ordered by lock step": "mov.u32 %e, tile; mad.lo.u32 %e, %t, 4, %e; st.shared.u32 [%e], %t; xor.b32 %d, %t, 1; mov.u32 %e, tile; "
    "mad.lo.u32 %e, %d, 4, %e; BETWEEN ld.shared.u32 %d, [%e];",
    "a read before a write": "mov.u32 %e, tile; @%z st.shared.u32 [%e], 1; bar.sync 0; ld.shared.u32 %d, [%e]; BETWEEN @%z st.shared.u32 [%e], 2;",
    "two writes": "mov.u32 %e, tile; @%z st.shared.u32 [%e], 1; BETWEEN setp.eq.u32 %p, %t, 1; @%p st.shared.u32 [%e], 2;",
    "an atomic and a plain read": "mov.u32 %e, tile; @%z st.shared.u32 [%e], 1; bar.sync 0; red.shared.add.u32 [%e], 1; BETWEEN @%z ld.shared.u32 %d, [%e];",
    "bytes of one word": "mov.u32 %e, tile; add.u32 %e, %e, %t; st.shared.u8 [%e], %t; BETWEEN mov.u32 %e, tile; @%z ld.shared.u32 %d, [%e];",
}


@pytest.mark.parametrize("case", CASES)
def test_a_warp_barrier_orders_its_lanes(case: str) -> None:
    for barrier in ("bar.warp.sync -1;", "bar.sync 0;"):
        run(CASES[case].replace("BETWEEN", barrier), blocks=1)
    with pytest.raises(Violation, match=r"race: byte .* of shared memory"):
        run(CASES[case].replace("BETWEEN", ""), blocks=1)


def test_a_warp_barrier_does_not_order_other_warps() -> None:
    body = CASES["a read before a write"].replace("BETWEEN", "bar.warp.sync -1;")
    with pytest.raises(Violation, match=r"race: byte 0 of shared memory was (read|written) by thread"):
        run(body, blocks=1, threads=64, schedule="reversed")
    run(body.replace("bar.warp.sync -1;", "bar.sync 0;"), blocks=1, threads=64)


def test_a_write_must_be_ordered_after_every_read() -> None:
    # Threads 0 and 32 read; a flag makes sure that thread 0 writes last, but only fences order it.
    body = """mov.u32 %e, tile; @%z st.shared.u32 [%e], 1; @%z st.shared.u32 [%e+4], 0; bar.sync 0;
    setp.eq.u32 %p, %t, 32; @%p ld.shared.u32 %d, [%e]; @%z ld.shared.u32 %d, [%e];
    FENCE @%p st.volatile.shared.u32 [%e+4], 1;
    @!%z exit;
    SPIN: ld.volatile.shared.u32 %d, [%e+4]; setp.eq.u32 %p, %d, 0; @%p bra SPIN;
    FENCE st.shared.u32 [%e], 2;"""
    for schedule in SCHEDULES:
        run(body.replace("FENCE", "membar.cta;"), blocks=1, threads=64, schedule=schedule)
        with pytest.raises(Violation, match="race: byte 0 of shared memory was read by thread 32 of block 0"):
            run(body.replace("FENCE", ""), blocks=1, threads=64, schedule=schedule)


def test_a_write_must_be_ordered_after_the_first_of_many_reads() -> None:
    body = """setp.lt.u32 %p, %t, 32; @%p bra WRITER;
    ld.global.u32 %d, [%m];
    setp.ge.u32 %p, %t, 64; @%p bar.arrive 1, 96;
    exit;
    WRITER: bar.sync 1, 96;
    @%z st.global.u32 [%m], 1;"""
    for schedule in SCHEDULES:
        with pytest.raises(Violation, match="race: byte 0 of argument 0"):
            run(body, blocks=1, threads=128, schedule=schedule)
        run(body.replace("ge.u32 %p, %t, 64", "ge.u32 %p, %t, 32").replace("96", "128"), blocks=1, threads=128)


def test_weak_and_strong_reads_of_a_warp_are_kept_apart() -> None:
    body = """@%y bra WRITER;
    @%z ld.relaxed.gpu.global.u32 %d, [%m];
    setp.eq.u32 %p, %t, 1; @%p ld.global.u32 %d, [%m];
    exit;
    WRITER: @%z st.relaxed.gpu.global.u32 [%m], 1;"""
    for schedule in SCHEDULES:
        run(body.replace("@%p ld.global", "@%p ld.relaxed.gpu.global"), schedule=schedule)
        with pytest.raises(Violation, match="race: byte 0 of argument 0"):
            run(body, schedule=schedule)


def test_a_barrier_lets_only_its_own_threads_go() -> None:
    # Warps 0 and 3 meet at barrier 1, warps 1 and 2 at barrier 2.
    body = """mov.u32 %e, tile; mov.u32 %d, 0;
    setp.ge.u32 %p, %t, 96; @%p bra LAST;
    setp.ge.u32 %p, %t, 32; @%p bra MIDDLE;
    bar.sync 1, 64;
    @%z ld.shared.u32 %d, [%e]; @%z st.global.u32 [%m], %d;
    exit;
    MIDDLE: bar.sync 2, 64;
    exit;
    LAST: setp.eq.u32 %p, %t, 96; @%p st.shared.u32 [%e], 7; bar.sync 1, 64;"""
    for schedule in SCHEDULES:
        memory, _ = run(body, blocks=1, threads=128, schedule=schedule)
        assert memory[0] == 7


def test_a_kernel_that_writes_makes_progress() -> None:
    body = "mov.u32 %d, 0; L: @%z st.global.u32 [%m], %d; add.u32 %d, %d, 1; setp.lt.u32 %p, %d, 2000; @%p bra L;"
    memory, _ = run(body, blocks=1, patience=4000)
    assert memory[0] == 1999
    with pytest.raises(Violation, match="deadlock: no progress"):
        run(body.replace("@%z st.global.u32 [%m], %d;", "").replace("2000", "20000"), blocks=1, patience=4000)


def test_neighbouring_bytes_are_no_race() -> None:
    run("cvt.u64.u32 %g, %t; add.s64 %g, %m, %g; st.global.u8 [%g], %t;", blocks=1, threads=64)


def test_equal_values_in_shared_memory_are_no_race_but_in_global_memory_are() -> None:
    run("mov.u32 %e, tile; st.shared.u32 [%e], 7;", blocks=1, threads=64)
    with pytest.raises(Violation, match="race: byte 0 of argument 0"):
        run("st.global.u32 [%m], 7;", blocks=1)


@pytest.mark.parametrize("threads", [32, 96])
def test_stores_that_collide_are_counted_where_that_is_allowed(threads: int) -> None:
    body = "mov.u32 %e, tile; st.shared.u32 [%e], %t; bar.sync 0; ld.shared.u32 %d, [%e]; @%z st.global.u32 [%m], %d;"
    with pytest.raises(Violation, match="race"):
        run(body, blocks=1, threads=threads)
    winners = {}
    for schedule in ("forward", "reversed"):
        memory, report = run(body, blocks=1, threads=threads, schedule=schedule, stores_may_collide=True)
        winners[schedule] = int(memory[0])
        assert report.collisions == threads - 1 and f"{threads - 1} collisions of copies" in str(report)
    assert winners == {"forward": threads - 1, "reversed": 0}


OTHER_RACES = {
    "stores of two instructions": "mov.u32 %e, tile; setp.lt.u32 %p, %t, 32; @%p st.shared.u32 [%e], %t; @!%p st.shared.u32 [%e], %t;",
    "one instruction and then another": "mov.u32 %e, tile; st.shared.u32 [%e], 5; st.shared.u32 [%e], %t;",
    "a read before a store": "mov.u32 %e, tile; st.shared.u32 [%e], 5; bar.sync 0; ld.shared.u32 %d, [%e]; st.shared.u32 [%e], 5;",
    "a read after a store": "mov.u32 %e, tile; @%z st.shared.u32 [%e], 5; bar.sync 0; st.shared.u32 [%e], 5; ld.shared.u32 %d, [%e];",
    "global memory": "st.global.u32 [%m], %t;",
}


@pytest.mark.parametrize("case", OTHER_RACES)
def test_other_races_are_refused_where_stores_may_collide(case: str) -> None:
    for schedule in SCHEDULES:
        with pytest.raises(Violation, match="race: byte 0 of"):
            run(OTHER_RACES[case], blocks=1, threads=64, schedule=schedule, stores_may_collide=True)


def test_blocks_of_a_grid_are_not_ordered_by_running_one_after_the_other() -> None:
    for schedule in SCHEDULES:
        with pytest.raises(Violation, match="race"):
            run(
                "@%z @%y bra LAST; @%z st.global.u32 [%m], 1; exit; LAST: ld.global.u32 %d, [%m];".replace(
                    "@%z @%y", "@%y"
                ),
                cooperative=False,
                schedule=schedule,
            )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_that_wait_for_one_another_must_all_be_resident(schedule: Any) -> None:
    """A device runs as many blocks at a time as it has room for: the others begin when these have ended."""
    body = """@!%z exit; red.release.gpu.global.add.u32 [%m], 1;
    SPIN: ld.acquire.gpu.global.u32 %d, [%m]; setp.lt.u32 %p, %d, 4; @%p bra SPIN;"""
    options: dict[str, Any] = {"blocks": 8, "schedule": schedule, "patience": 10_000}
    for resident in (4, 8):
        memory, _ = run(body, cooperative=False, resident=resident, **options)
        assert memory[0] == 8
    with pytest.raises(Violation, match="deadlock"):
        run(body, cooperative=False, resident=3, **options)
    with pytest.raises(ValueError, match="cooperative launch of 8 blocks on a device that runs 5 at a time"):
        run(body, resident=5, **options)


def test_atomics_of_blocks_do_not_race_unless_their_scope_is_the_block() -> None:
    memory, _ = run("red.global.add.u32 [%m], 1;", blocks=4, cooperative=False)
    assert memory[0] == 128
    with pytest.raises(Violation, match="race"):
        run("red.relaxed.cta.global.add.u32 [%m], 1;", blocks=4, cooperative=False)


def test_constant_loads_of_memory_that_changes() -> None:
    body = "@%z ld.global.{}u32 %d, [%m]; @%z st.global.u32 [%m], 1; @%z ld.global.{}u32 %d, [%m];"
    run(body.format("", ""), blocks=1)
    with pytest.raises(Violation, match="race: byte 0 of argument 0"):
        run(body.format("", "nc."), blocks=1)


ATOMICS = {
    "add.u32": lambda m, v: (m + v) & 0xFFFFFFFF,
    "min.u32": min,
    "max.u32": max,
    "and.b32": lambda m, v: m & v,
    "or.b32": lambda m, v: m | v,
    "xor.b32": lambda m, v: m ^ v,
    "exch.b32": lambda m, v: v,
    "inc.u32": lambda m, v: 0 if m >= v else m + 1,
    "dec.u32": lambda m, v: v if m == 0 or m > v else m - 1,
}


@pytest.mark.parametrize("operation", ATOMICS)
def test_atomics_return_and_leave(operation: str) -> None:
    for start in (0, 5, 9, 0xFFFFFFFF):
        memory, _ = run(
            f"@!%z exit; st.global.u32 [%m], {start}; atom.global.{operation} %d, [%m], 9; st.global.u32 [%m+4], %d;",
            blocks=1,
        )
        assert memory[1] == start and memory[0] == ATOMICS[operation](start, 9)


def test_compare_and_swap_builds_a_lock() -> None:
    # Without a lock the plain additions would race.
    body = """mov.u32 %d, 0;
    AGAIN: atom.acquire.gpu.global.cas.b32 %e, [%m], 0, 1; setp.ne.u32 %p, %e, 0; @%p bra AGAIN;
    ld.global.u32 %d, [%m+4]; add.u32 %d, %d, 1; st.global.u32 [%m+4], %d;
    st.release.gpu.global.u32 [%m], 0;"""
    for schedule in SCHEDULES:
        memory, _ = run(body, blocks=3, threads=8, schedule=schedule)
        assert memory[1] == 24


def test_float_atomics() -> None:
    memory, _ = run("red.global.add.f32 [%m], 0f3F000000; @%z red.global.add.noftz.f16x2 [%m+4], 0x40003C00;", blocks=1)
    assert memory.view(np.float32)[0] == 16 and memory[1] == 0x40003C00


CLUSTER = """mov.u32 %e, tile; st.shared.u32 [%e], %b; FIRST
    add.u32 %d, %b, 1; rem.u32 %d, %d, 4;
    mapa.shared::cluster.u32 %e, %e, %d;
    ld.shared::cluster.u32 %d, [%e]; LAST
    mul.wide.u32 %g, %b, 4; add.s64 %g, %m, %g;
    @%z st.global.u32 [%g], %d;"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_clusters_exchange_through_shared_memory(schedule: Any) -> None:
    both = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    options: dict[str, Any] = {"blocks": 8, "threads": 64, "cluster": 4, "cooperative": False, "schedule": schedule}
    memory, _ = run(CLUSTER.replace("FIRST", both).replace("LAST", both), **options)
    assert memory[:8].tolist() == [1, 2, 3, 0, 5, 6, 7, 4]
    with pytest.raises(Violation, match="shared memory"):
        run(CLUSTER.replace("FIRST", "").replace("LAST", both), **options)
    with pytest.raises(Violation, match=r"shared memory of block ., which has exited|race"):
        run(CLUSTER.replace("FIRST", both).replace("LAST", ""), **options)
    with pytest.raises(Violation, match="race"):
        run(CLUSTER.replace("FIRST", both.replace(".release", ".relaxed")).replace("LAST", both), **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("first", ["", "barrier.cluster.arrive.aligned;"])
def test_a_cluster_does_not_wait_for_blocks_that_have_exited(first: str, schedule: Any) -> None:
    # Block 0 is gone, with or without having arrived; the others wait for each other, and none passes early.
    body = f"""mov.u32 %e, tile; setp.eq.u32 %p, %b, 0; @!%p bra REST;
    {first} exit;
    REST: st.shared.u32 [%e], %b;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    rem.u32 %d, %b, 3; add.u32 %d, %d, 1;
    mapa.shared::cluster.u32 %e, %e, %d;
    ld.shared::cluster.u32 %d, [%e];
    mul.wide.u32 %g, %b, 4; add.s64 %g, %m, %g; @%z st.global.u32 [%g], %d;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    memory, _ = run(body, blocks=4, cluster=4, cooperative=False, schedule=schedule)
    assert memory[:4].tolist() == [0, 2, 3, 1]


def test_blocks_of_a_cluster_have_banks_of_their_own() -> None:
    """Half of the lanes read another word than the others: of two blocks, or of the same bank of one."""
    both = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    body = f"""mov.u32 %e, tile; mad.lo.u32 %e, %t, 4, %e; st.shared.u32 [%e], %t; st.shared.u32 [%e+128], %t; {both}
    and.b32 %d, %t, 1; mov.u32 %e, tile; mad.lo.u32 %e, %d, APART, %e;
    mapa.shared::cluster.u32 %e, %e, RANK; ld.shared::cluster.u32 %d, [%e]; {both}"""
    for rank, apart, conflicts in (("%d", 0, 0), ("1", 128, 2)):
        text = body.replace("RANK", rank).replace("APART", str(apart))
        assert run(text, cluster=2, cooperative=False)[1].conflicts == conflicts


def test_registers_of_a_cluster() -> None:
    body = """mov.u32 %d, %cluster_ctarank; mov.u32 %e, %cluster_nctarank; mad.lo.u32 %d, %e, 10, %d;
    mul.wide.u32 %g, %b, 4; add.s64 %g, %m, %g; @%z st.global.u32 [%g], %d;
    mov.u32 %e, %clusterid.x; @%z st.global.u32 [%g+64], %e;"""
    memory, _ = run(body, blocks=6, cluster=2, cooperative=False)
    assert memory[:6].tolist() == [20, 21] * 3 and memory[16:22].tolist() == [0, 0, 1, 1, 2, 2]


def test_generic_addresses_reach_every_space() -> None:
    body = """mov.u32 %e, tile; cvt.u64.u32 %g, %e; cvta.shared.u64 %g, %g; mad.wide.u32 %g, %t, 4, %g;
    isspacep.shared %p, %g; @!%p trap; isspacep.global %p, %m; @!%p trap;
    st.u32 [%g], %t; ld.u32 %d, [%g]; mad.wide.u32 %g, %t, 4, %m; st.u32 [%g], %d;"""
    memory, report = run(body, blocks=1)
    assert memory[:32].tolist() == list(range(32))
    assert report.traffic("shared", True).bytes == report.global_written.bytes == 128


def test_vectors_of_32_bytes_and_cache_hints() -> None:
    body = """.reg .b32 a<8>; .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 0f3F800000;
    @!%z exit; st.global.v4.b32 [%m+32], {1, 2, 3, 4}; st.global.L1::no_allocate.v4.u32 [%m+48], {5, 6, 7, 8};
    ld.global.L1::evict_last.L2::cache_hint.v8.b32 {a0, a1, a2, a3, a4, a5, a6, a7}, [%m+32], policy;
    st.global.cs.v8.b32 [%m], {a7, a6, a5, a4, a3, a2, a1, a0};"""
    memory, _ = run(body, blocks=1)
    assert memory[:8].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]


def test_outputs_may_be_written_several_times_where_that_is_said() -> None:
    ptx = """.version 8.6
.target sm_90
.address_size 64
.entry f(.param .u64 y) { .reg .b64 %a; ld.param.u64 %a, [y]; st.global.u32 [%a], 1; st.global.u32 [%a], 2; ret; }"""
    launch(ptx, "f", 1, 1, [Out(np.zeros(1, np.uint32), writes=2)])
    launch(ptx, "f", 1, 1, [Out(np.zeros(1, np.uint32), writes=None)])
    often = ptx.replace("[%a], 2;", "[%a], 2;" + " st.global.u32 [%a], 1;" * 255)  # 257 times
    with pytest.raises(Violation, match="was written 255 times, not 1"):
        launch(often, "f", 1, 1, [Out(np.zeros(1, np.uint32))])
    with pytest.raises(
        Violation, match=r"element \[0\] of argument 0 \(uint32\[1\]\) was written 2 times, not 1; 1 of 1 elements"
    ):
        launch(ptx, "f", 1, 1, [Out(np.zeros(1, np.uint32))])


def test_the_reads_of_a_word_are_kept_for_each_of_its_halves() -> None:
    body = """and.b32 %d, %t, 31;
    shr.u32 %e, %t, 5;
    setp.eq.u32 %p, %e, 0; @%p bra SECOND_HALF;
    setp.eq.u32 %p, %e, 1; @%p bra UNORDERED;
    setp.eq.u32 %p, %e, 2; @%p bra ORDERED;
    bar.sync 2, 96;
    bar.sync 1, 64;
    setp.ne.u32 %p, %d, 0; @%p exit;
    st.global.u16 [%m+8], %d;
    exit;
    UNORDERED: ld.global.u32 %e, [%m+8]; bar.arrive 1, 64; exit;
    ORDERED: ld.global.u32 %e, [%m+8]; bar.arrive 2, 96; exit;
    SECOND_HALF: bar.sync 2, 96;
    setp.ne.u32 %p, %d, 0; @%p exit;
    st.global.u16 [%m+10], %d;"""
    with pytest.raises(Violation, match=r"race: byte 10 of .* was read by thread 32 of block 0"):
        run(body, blocks=1, threads=128)
