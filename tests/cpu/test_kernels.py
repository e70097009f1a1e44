"""Every kernel of the package, compiled for Hopper here and now: nothing is spilled, wgmma is as it should be."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import pytest

from etap_rt import compiler, kv_memory, states, workspace
from etap_rt.compiler import Compiled, build_report, compile_spec, compile_specs
from etap_rt.decode import CHUNK_DIMS, THREADS, Params
from etap_rt.errors import CompileError
from etap_rt.kernels import DIMS, ELEMENT_TYPES, KernelSpec, all_specs, decode_spec
from etap_rt.schedule import OWN_TILES_ROWS, ROW_TILES

REGISTERS_OF_AN_SM = 65536
DECODE_SPECS = [spec for spec in all_specs() if spec.entry == "mla_decode"]

# Instructions of the tensor cores. Those whose result is the register RZ compute nothing: ptxas waits with them.
HGMMA = re.compile(r"HGMMA\.(\d+x\d+x\d+)\.(\S+) R\d")
LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b.*")
# What threads write to shared memory, for wgmma or each other, and read there, what makes it visible to wgmma and the
# copy engine, what tells others of it.
EVENTS = {
    "weights": r"STSM\.",
    "zeros": r"STS\.128 .*, RZ",
    "left": r"STS\.128 .*, R\d",
    "taken": r"LDS\.128",
    "copied": r"DEPBAR\.LE SB0",
    "fence": r"FENCE\.VIEW\.ASYNC",
    "arrive": r"SYNCS\.ARRIVE",
    "both": r"BAR\.SYNC.* 0x3, 0x100",
    "barrier": r"BAR\.SYNC",
    "vote": r"BAR\.RED",
    "values": r"HGMMA.*\.tnspA",
    "scores": HGMMA.pattern,
    "end": r"WARPGROUP\.DEPBAR",
}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d\s+)?(.*?);")
# What reads or writes global memory. Prefetches do neither.
GLOBAL_ACCESS = re.compile(r"LDG|STG|ATOMG|REDG|UTMALDG|UTMASTG|UBLKCP")
# The wait for a phase of a barrier. Without TRYWAIT it is only asked whether that has ended.
WAIT = re.compile(r"SYNCS\.PHASECHK\S*\.TRYWAIT")
EVENT = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in EVENTS.items()))
PARAMETER_BYTES = re.compile(r"EIATTR_KPARAM_INFO\n.*\n.*Size *: (0x[0-9a-f]+)")
PARAMETERS: dict[str, type[ctypes.Structure]] = {
    "mla_decode": Params,
    "kv_write": kv_memory._WriteParams,
    "page_copy": kv_memory._CopyParams,
    "batch_update": kv_memory._UpdateParams,
    "merge_states": states._Params,
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[KernelSpec], Compiled]]:
    """Gives the machine code of a spec, from a disk cache that was empty before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiler.CACHE_VARIABLE, str(tmp_path_factory.mktemp("kernels")))
        patch.setattr(compiler, "_compiled", {})
        with contextlib.suppress(CompileError):  # to be raised again, in the test of the spec
            compile_specs(all_specs())
        yield compile_spec


@pytest.fixture(scope="module")
def dump(compiled: Callable[[KernelSpec], Compiled]) -> Iterator[Callable[[KernelSpec, str], str]]:
    """What cuobjdump says of a spec's machine code: "-sass" is the instructions, "-elf" the sections."""
    files = metadata.files("nvidia-cuda-cuobjdump") or []
    cuobjdump = next(str(file.locate()) for file in files if file.name == "cuobjdump")

    def run(spec: KernelSpec, what: str) -> str:
        command = [cuobjdump, what, str(compiled(spec).path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wanted = [*itertools.product(all_specs(), ["-elf"]), *itertools.product(DECODE_SPECS, ["-sass"])]
        dumps = {of: pool.submit(run, *of) for of in wanted}
        yield lambda spec, what: dumps[spec, what].result()


@pytest.fixture(scope="module")
def disassemble(dump: Callable[[KernelSpec, str], str]) -> Callable[[KernelSpec], str]:
    """Gives the SASS of a spec."""
    return lambda spec: dump(spec, "-sass")


def constants(spec: KernelSpec) -> dict[str, int]:
    return dict(spec.defines)


def test_there_is_a_decode_kernel_for_every_dtype_dims_and_row_tile() -> None:
    wanted = {
        decode_spec(dtype, *dims, rows, own_tiles=own_tiles, general=general)
        for dtype in ELEMENT_TYPES
        for dims in DIMS
        for rows in ROW_TILES
        for own_tiles in ((False, True) if rows <= OWN_TILES_ROWS else (False,))
        for general in (False, True)
    }
    assert len(DECODE_SPECS) == len(wanted) == 72
    assert set(DECODE_SPECS) == wanted


@pytest.mark.parametrize(
    ("arguments", "own_tiles", "message"),
    [
        (("float32", 512, 64, 16), False, "no decode kernel for float32"),
        (("bfloat16", 512, 32, 16), False, "dims 512 \\+ 32"),
        (("bfloat16", 512, 64, 12), False, "12 rows a tile"),
        (("bfloat16", 512, 64, 64), True, "with 64 rows a tile the warpgroups share the key tiles"),
    ],
)
def test_kernels_that_there_are_not_are_refused(arguments: Any, own_tiles: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_spec(*arguments, own_tiles=own_tiles)


@pytest.mark.parametrize("spec", all_specs(), ids=str)
def test_nothing_is_spilled(spec: KernelSpec, compiled: Callable[[KernelSpec], Compiled]) -> None:
    report = build_report(compiled(spec))
    assert (report.spill_stores, report.spill_loads, report.stack) == (0, 0, 0)


@pytest.mark.parametrize("spec", all_specs(), ids=str)
def test_the_parameter_is_as_large_as_the_hosts(spec: KernelSpec, dump: Callable[[KernelSpec, str], str]) -> None:
    """The driver copies as many bytes as the kernel's struct has, from the address of the host's."""
    _, _, about = dump(spec, "-elf").partition(f"\n.nv.info.{spec.entry}\n")
    size = PARAMETER_BYTES.search(about)
    assert size and int(size[1], 16) == ctypes.sizeof(PARAMETERS[spec.entry])


@pytest.mark.parametrize("spec", DECODE_SPECS, ids=str)
def test_nothing_is_read_or_written_before_the_kernel_before_has_ended(
    spec: KernelSpec, disassemble: Callable[[KernelSpec], str]
) -> None:
    """Both who computes and who loads wait for it: the one behind the beginning, the other where that branches to."""
    code = [(int(address, 16), what) for address, what in INSTRUCTION.findall(disassemble(spec))]
    waits = [address for address, what in code if what.startswith("ACQBULK")]
    assert len(waits) == 2
    first, second = waits
    jumps = [int(what.split()[-1], 16) for address, what in code if address < first and what.startswith("BRA 0x")]
    other = max(target for target in jumps if target <= second)
    assert other > first, "the beginning of the second role"
    ahead = [what for address, what in code if address < first or other <= address < second]
    assert not [what for what in ahead if GLOBAL_ACCESS.match(what)]


def test_the_workspace_is_as_large_as_the_kernel_counts_on() -> None:
    """Of each lane so many counters, each a word, and slots for partial results."""
    source = (compiler.source_directory() / "mla_decode.cu").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", source)}
    assert "constexpr int COUNTER_WORDS = LINE_WORDS;" in source
    assert numbers["LINE_WORDS"] * 4 == workspace.COUNTER_BYTES
    assert numbers["LANE_SLOTS"] == workspace.SEGMENTS
    assert "constexpr int CONSUMERS = 2 * WARPGROUP;" in source
    assert 2 * numbers["WARPGROUP"] // 32 == workspace.WARPS


@pytest.mark.parametrize("spec", DECODE_SPECS, ids=str)
def test_wgmma_stays_asynchronous_and_a_cta_fits_an_sm(
    spec: KernelSpec, compiled: Callable[[KernelSpec], Compiled]
) -> None:
    report = build_report(compiled(spec))
    assert not report.serialized_wgmma
    assert report.shared == 0, "shared memory is all dynamic"
    assert report.registers * THREADS <= REGISTERS_OF_AN_SM


@pytest.mark.parametrize("spec", DECODE_SPECS, ids=str)
def test_the_tensor_cores_work_on_whole_row_tiles(
    spec: KernelSpec, compiled: Callable[[KernelSpec], Compiled], disassemble: Callable[[KernelSpec], str]
) -> None:
    rows, bf16 = constants(spec)["ROWS"], constants(spec)["IS_BF16"]
    found = HGMMA.findall(disassemble(spec))
    assert set(found) == {(f"64x{rows}x16", "F32.BF16" if bf16 else "F32")}
    assert compiled(spec).wgmma == ((f"m64n{rows}k16", len(found)),), "as many as in the PTX"


@pytest.mark.parametrize("spec", DECODE_SPECS, ids=str)
def test_local_memory_is_never_touched(spec: KernelSpec, disassemble: Callable[[KernelSpec], str]) -> None:
    sass = disassemble(spec)
    assert f"Function : {spec.entry}" in sass
    assert LOCAL_MEMORY.findall(sass) == []


@pytest.mark.parametrize("spec", DECODE_SPECS, ids=str)
def test_where_operands_lie_is_computed_in_uniform_registers(
    spec: KernelSpec, disassemble: Callable[[KernelSpec], str]
) -> None:
    """As long as ptxas sees that all threads of a warp do the same. Else each product waits for four moves: R2UR."""
    lines = disassemble(spec).splitlines()
    products = [i for i, line in enumerate(lines) if HGMMA.search(line)]
    moves = [line for i in products for line in lines[max(0, i - 8) : i] if "R2UR" in line]
    assert moves == []


@pytest.mark.parametrize("spec", DECODE_SPECS, ids=str)
def test_what_threads_write_is_fenced_before_wgmma_reads_it(
    spec: KernelSpec, disassemble: Callable[[KernelSpec], str]
) -> None:
    """Then handed over. No tool sees this race: compute-sanitizer does not follow wgmma, results are seldom wrong."""
    lines = disassemble(spec).splitlines()
    events = [str(found.lastgroup) for line in lines if (found := EVENT.search(line))]
    in_order = " ".join(events)
    for written, then in (
        (r"weights(?: weights)*", ("fence barrier", "fence vote")),
        (r"zeros(?: zeros)*", ("fence barrier",)),
        (r"copied(?: copied)*(?= fence| both)", ("fence both",)),  # queries
    ):
        after = [in_order[found.end() + 1 :] for found in re.finditer(written, in_order)]
        assert after and all(events_after.startswith(then) for events_after in after), written
    if constants(spec)["GENERAL"]:  # keys may have been copied by threads
        before = [a for a, b in itertools.pairwise(events) if b == "scores" and a != "scores"]
        assert before and set(before) == {"fence"}


@pytest.mark.parametrize(
    "spec", [s for s in DECODE_SPECS if constants(s)["ROWS"] > 16 and not constants(s)["OWN_TILES"]], ids=str
)
def test_the_only_buffer_for_weights_is_written_when_both_warpgroups_are_done_with_it(
    spec: KernelSpec, disassemble: Callable[[KernelSpec], str]
) -> None:
    """Between a tile's scores and its weights is a wait; what is waited for comes behind the last products."""
    lines = disassemble(spec).splitlines()
    found = [(i, str(event.lastgroup)) for i, line in enumerate(lines) if (event := EVENT.search(line))]
    written = next(i for i, name in found if name == "weights")
    scores = max(i for i, name in found if name == "scores" and i < written)
    assert any(WAIT.search(line) for line in lines[scores:written])
    products = max(i for i, name in found if name == "values")
    ends = [i for i, name in found if name == "end" and i > products]
    last = ends[constants(spec)["LATENT_DIM"] // 2 // CHUNK_DIMS - 1]
    given_back = itertools.takewhile(lambda line: "SHFL" not in line, lines[last:])  # till the sums of the segment
    assert sum("SYNCS.ARRIVE" in line for line in given_back) == 2, "the last chunk and the buffer"


@pytest.mark.parametrize("spec", [spec for spec in DECODE_SPECS if constants(spec)["OWN_TILES"]], ids=str)
def test_what_warpgroups_leave_in_the_ring_is_taken_before_its_chunks_go_back(
    spec: KernelSpec, disassemble: Callable[[KernelSpec], str]
) -> None:
    """It is left when all warps are done with the chunks, and the copy engine gets them when all has been read.

    What warps leave there when they divide a merge comes behind a barrier of all.
    """
    events = [str(found.lastgroup) for line in disassemble(spec).splitlines() if (found := EVENT.search(line))]
    in_order = " ".join(events)
    exchange = re.findall(r"(?: barrier)+((?: left)+) arrive((?: taken)+) fence arrive", in_order)
    columns = constants(spec)["ROWS"] // 8 * 2 + 1  # whose sums a thread reads for a whole result, two fours each
    # The arrival in between, if it stands there, is that of a partial result.
    assert re.search(rf" arrive(?: taken){{{columns * 2}}}(?: arrive)? both vote both left", in_order)
    assert len(exchange) == 1
    of_thread = constants(spec)["LATENT_DIM"] // 2 // CHUNK_DIMS * constants(spec)["ROWS"] // 8  # fours of floats
    assert [items.count(" ") for items in exchange[0]] == [of_thread, of_thread]


@pytest.mark.parametrize("spec", DECODE_SPECS, ids=str)
def test_slots_that_are_passed_over_have_been_filled_before_one_is_given_back(
    spec: KernelSpec, disassemble: Callable[[KernelSpec], str]
) -> None:
    """The consumers' code starts with that wait: a parity would not tell whether a slot holds its first chunk."""
    consumers = disassemble(spec).split("USETMAXREG.TRY_ALLOC")[1]
    assert WAIT.search(consumers[: consumers.index("SYNCS.ARRIVE")])


@pytest.mark.parametrize("spec", [spec for spec in DECODE_SPECS if constants(spec)["OWN_TILES"]], ids=str)
def test_a_warpgroup_is_never_two_tiles_ahead_of_the_other(
    spec: KernelSpec, disassemble: Callable[[KernelSpec], str]
) -> None:
    """It asks beside the products of the first chunk whether the other one is done, and waits beside those half way."""
    sass = disassemble(spec)
    products = [found.end() for found in re.finditer(EVENTS["values"], sass)][-1]
    blocks = constants(spec)["LATENT_DIM"] // CHUNK_DIMS
    # What comes between the end of a chunk's products and the chunk's release, for each chunk of the last tile.
    ended = [step.split("SYNCS.ARRIVE")[0] for step in re.split(EVENTS["end"], sass[products:])[1 : blocks + 1]]
    assert [n for n, step in enumerate(ended) if WAIT.search(step)] == [blocks // 2]
    assert [n for n, step in enumerate(ended) if "SYNCS.PHASECHK" in step] == [0, blocks // 2]


@pytest.mark.parametrize("spec", DECODE_SPECS, ids=str)
def test_others_are_told_of_a_partial_result_when_all_warps_have_left_their_part(
    spec: KernelSpec, disassemble: Callable[[KernelSpec], str]
) -> None:
    """The count of arrivals is raised behind a fence, that behind a wait for what warps tell after their stores."""
    sass = disassemble(spec)
    raised = sass[: sass.index("REDG.")]
    waited = raised[raised.rindex("SYNCS.ARRIVE") :]  # since the queries' place was given back
    assert waited.count("SYNCS.PHASECHK") == 1
    assert "MEMBAR.ALL.GPU" in waited[waited.index("SYNCS.PHASECHK") :]
    store = "STG.E.64" if constants(spec)["IS_BF16"] else "STG.E.128"  # of four elements, in fp16 or fp32
    parts = constants(spec)["LATENT_DIM"] // 2 // CHUNK_DIMS * constants(spec)["ROWS"] // 8
    steps = sass.split("SYNCS.")  # each begins with what was done at a barrier
    assert any(step.count(store) == parts and then.startswith("ARRIVE") for step, then in itertools.pairwise(steps))


@pytest.mark.parametrize("spec", DECODE_SPECS, ids=str)
def test_warpgroups_wait_for_each_other_before_the_ring_serves_something_else(
    spec: KernelSpec, disassemble: Callable[[KernelSpec], str]
) -> None:
    """Before one takes what the other has left there; if they leave nothing, before a merge: one may multiply yet."""
    sass = disassemble(spec)
    end = sass[: sass.rindex("BAR.RED")]  # the vote on taking over parts of a merge, for which arrivals are waited for
    if constants(spec)["OWN_TILES"]:
        after = [found.end() for found in re.finditer(EVENTS["left"], end)][-1]
        taken = re.compile(EVENTS["taken"]).search(end, after)
        assert taken and "SYNCS.PHASECHK" in end[after : taken.start()]
    else:
        assert end[end.rindex("EXIT") :].count("SYNCS.PHASECHK") == 2


@pytest.mark.parametrize(
    "spec",
    [
        s
        for s in DECODE_SPECS
        if constants(s)["ROWS"] <= 16 and not (constants(s)["GENERAL"] or constants(s)["OWN_TILES"])
    ],
    ids=str,
)
def test_short_calls_find_all_their_code_in_the_first_64_kb(
    spec: KernelSpec, disassemble: Callable[[KernelSpec], str]
) -> None:
    """What lies behind is slow the first time: a merge there takes 1 us longer (tools/results/what_bounds_it.md)."""
    exits = re.findall(r"/\*([0-9a-f]{4,})\*/ +EXIT", disassemble(spec))
    assert exits and int(exits[-1], 16) < 64 << 10
