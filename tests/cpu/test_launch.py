"""What mla_decode hands to the kernel, seen through a driver that only takes notes.

CPU tensors pass for tensors on a GPU here; nothing is computed.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import etap_rt
from etap_rt import decode, driver, interop, workspace
from etap_rt.decode import Params, divider
from etap_rt.interop import Layout
from etap_rt.schedule import MOST_TILES
from tests.fake_gpu import STREAM, CudaTensor, Notes, pass_tensors_for_cuda

torch = pytest.importorskip("torch")

SMS = 132
SCALE = 192**-0.5


class DecodeNotes(Notes):
    """Also notes the arguments of the tensor maps that were encoded."""

    def __init__(self) -> None:
        super().__init__(Params)
        self.maps: list[tuple[Any, ...]] = []

    def encode(self, *arguments: Any) -> bytes:
        self.maps.append(arguments)
        return len(self.maps).to_bytes(1, "little") * driver.TENSOR_MAP_BYTES


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[DecodeNotes]:
    notes = DecodeNotes()
    pass_tensors_for_cuda(monkeypatch)
    monkeypatch.setattr(driver, "sm_count", lambda device: SMS)
    monkeypatch.setattr(driver, "stream_state", lambda device, stream: (stream, 0, SMS))
    monkeypatch.setattr(driver, "allocate_zeroed", lambda device, size: 1 << 30)
    monkeypatch.setattr(driver, "encode_tensor_map", notes.encode)
    monkeypatch.setattr(decode.compiler, "load", notes.load)
    monkeypatch.setattr(decode, "_launches", {})
    monkeypatch.setattr(decode, "_maps", {})
    monkeypatch.setattr(workspace, "_workspaces", {})
    monkeypatch.setattr(workspace, "_counters", {})
    yield notes


def arguments(batch: int = 2, s_q: int = 1, heads: int = 16, page_size: int = 64, offset: int = 0) -> dict[str, Any]:
    q = torch.zeros(batch * s_q * heads * 576 + offset, dtype=torch.bfloat16)[offset:].view(batch, s_q, heads, 576)
    return {
        "q": q,
        "kv_cache": torch.zeros(8, page_size, 576, dtype=torch.bfloat16),
        "block_table": torch.zeros(batch, 4, dtype=torch.int32),
        "cache_seqlens": torch.zeros(batch, dtype=torch.int32),
        "softmax_scale": SCALE,
    }


def on_gpu(call: dict[str, Any]) -> dict[str, Any]:
    return {name: CudaTensor(x) if isinstance(x, torch.Tensor) else x for name, x in call.items()}


def test_the_kernel_gets_the_addresses_of_this_call(notes: DecodeNotes) -> None:
    call = arguments()
    out, lse = etap_rt.mla_decode(**call, return_lse=True)
    (params,) = notes.params
    assert params.q_latent == call["q"].data_ptr()
    assert params.q_rope == call["q"].data_ptr() + 512 * 2
    assert (params.out, params.lse) == (out.data_ptr(), lse.data_ptr())
    assert (params.block_table, params.cache_seqlens) == (
        call["block_table"].data_ptr(),
        call["cache_seqlens"].data_ptr(),
    )
    assert notes.launches == [(SMS, decode.THREADS, decode.SHARED_BYTES, STREAM)]


def test_a_stream_on_a_part_of_the_sms_gets_a_grid_and_a_kernel_for_that_part(
    notes: DecodeNotes, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = arguments()
    for sms in (SMS, 32, SMS):
        monkeypatch.setattr(driver, "stream_state", lambda device, stream, sms=sms: (stream, 0, sms))
        etap_rt.mla_decode(**call)
    assert [grid for grid, *_ in notes.launches] == [SMS, 32, SMS]
    assert [params.lanes for params in notes.params] == [SMS, 32, SMS]
    assert [dict(spec.defines)["OWN_TILES"] for spec in notes.specs] == [0, 1], "each once"


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "compared"])
def test_a_call_that_was_seen_before_gets_what_it_would_get_otherwise(
    notes: DecodeNotes, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    if not guarded:
        monkeypatch.setattr(interop, "_tensor_guard", lambda: None)
    calls = [arguments(), arguments(offset=8), {**arguments(heads=8), "causal": False, "softmax_scale": 0.5}]
    for call in (*calls, *calls):
        again = on_gpu(call)
        out, lse = etap_rt.mla_decode(**again, return_lse=True)
        etap_rt.mla_decode(**call, out=out.tensor, lse=lse.tensor)
        recognised, described = (bytes(params)[Params.k_latent.offset :] for params in notes.params[-2:])
        assert recognised == described
        etap_rt.mla_decode(**again, out=out, lse=lse)
        assert bytes(notes.params[-1])[Params.k_latent.offset :] == described
        etap_rt.mla_decode(**again, out=out)
        assert (notes.params[-1].out, notes.params[-1].lse) == (out.data_ptr(), 0)
    assert len(notes.launches) == 24 and len(set(notes.launches)) == 1


def test_a_parameter_that_is_used_again_is_what_a_new_one_would_be(
    notes: DecodeNotes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch sets only what changed since its latest call."""
    call, other = on_gpu(arguments()), on_gpu(arguments(offset=1))
    call["out"], other["out"] = (on_gpu({"out": torch.zeros(2, 1, 16, 512, dtype=torch.bfloat16)})["out"] for _ in "12")
    calls = [call, call | {"causal": False}, call | {"q": other["q"]}, call | {"softmax_scale": 0.5}]
    calls += [call | {"out": other["out"]}, other, other | {"causal": False}]
    for first, second in itertools.permutations(calls, 2):
        etap_rt.mla_decode(**first)
        etap_rt.mla_decode(**second)
        monkeypatch.setattr(decode, "_launches", {})
        monkeypatch.setattr(decode, "_maps", {})
        etap_rt.mla_decode(**second)
        again, new = (bytes(params)[Params.k_latent.offset :] for params in notes.params[-2:])
        assert again == new


@pytest.mark.parametrize(("output", "other"), [("out", "kv_cache"), ("lse", "kv_cache"), ("lse", "out")])
def test_outputs_of_a_call_that_was_seen_must_lie_elsewhere(notes: DecodeNotes, output: str, other: str) -> None:
    call = arguments()
    call["out"], call["lse"] = (x.clone() for x in etap_rt.mla_decode(**call, return_lse=True))
    for _ in range(2):
        etap_rt.mla_decode(**on_gpu(call))
    taken = call[other].view(-1).view(call[output].dtype)
    call[output] = taken[: call[output].numel()].view(call[output].shape)
    launches = len(notes.launches)
    with pytest.raises(etap_rt.ArgumentError, match=f"^{output}: got memory of {other}"):
        etap_rt.mla_decode(**on_gpu(call))
    assert len(notes.launches) == launches


@pytest.mark.parametrize(
    ("name", "spoil", "text"),
    [
        ("q", lambda x: x[:1], r"batch 1"),
        ("kv_cache", lambda x: x.half(), "dtype float16"),
        ("kv_cache", lambda x: torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape), "address 0x"),
        ("block_table", lambda x: x.long(), "dtype int64"),
        ("cache_seqlens", lambda x: x[:1], r"shape \(1,\)"),
        ("out", lambda x: x.float(), "dtype float32"),
        ("out", lambda x: torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape), "address 0x"),
        ("lse", lambda x: x[:1], "shape"),
        ("lse", lambda x: torch.zeros(4 * x.numel() + 2, dtype=torch.uint8)[2:-2], "dtype uint8"),
    ],
)
def test_what_differs_from_a_call_that_was_seen_is_refused(
    notes: DecodeNotes, name: str, spoil: Any, text: str
) -> None:
    call = {**arguments(), "out": torch.zeros(2, 1, 16, 512, dtype=torch.bfloat16), "lse": torch.zeros(2, 16, 1)}
    seen = on_gpu(call)
    etap_rt.mla_decode(**seen)
    with pytest.raises(etap_rt.ArgumentError, match=text):
        etap_rt.mla_decode(**{**seen, name: CudaTensor(spoil(call[name]))})
    with pytest.raises(etap_rt.ArgumentError, match="device cpu:0"):
        etap_rt.mla_decode(**{**seen, "cache_seqlens": call["cache_seqlens"].numpy()})
    assert len(notes.launches) == 1


def test_nobody_wants_an_lse_that_was_not_asked_for(notes: DecodeNotes) -> None:
    etap_rt.mla_decode(**arguments())
    assert notes.params[0].lse == 0


def test_strides_and_sizes_arrive(notes: DecodeNotes) -> None:
    call = arguments(batch=3, s_q=2, heads=5)
    wide = torch.zeros(3, 2, 8, 1024, dtype=torch.bfloat16)
    etap_rt.mla_decode(**call, out=wide[:, :, :5, :512])
    (params,) = notes.params
    assert list(params.q_strides) == [2 * 5 * 576, 5 * 576, 576]
    assert list(params.out_strides) == [2 * 8 * 1024, 8 * 1024, 1024]
    assert (params.batch, params.s_q, params.heads, params.max_pages) == (3, 2, 5, 4)
    assert (params.table_stride, params.seqlens_stride) == (4, 1)
    assert (params.lanes, params.row_groups, params.passes, params.share) == (SMS, 1, 1, SMS // 3)


@pytest.mark.parametrize(
    ("page_size", "page_tiles", "tile_pages", "box"), [(1, 1, 64, 1), (16, 1, 4, 16), (64, 1, 1, 64), (192, 3, 1, 64)]
)
def test_pages_of_any_size_are_copied_in_boxes(
    notes: DecodeNotes, page_size: int, page_tiles: int, tile_pages: int, box: int
) -> None:
    call = arguments(page_size=page_size)
    etap_rt.mla_decode(**call)
    params = notes.params[0]
    assert (params.page_size, params.page_tiles, params.tile_pages) == (page_size, page_tiles, tile_pages)
    address = call["kv_cache"].data_ptr()
    strides = (576 * 2, page_size * 576 * 2)
    assert notes.maps == [
        ("bfloat16", address, (512, page_size, 8), strides, (64, box, 1)),
        ("bfloat16", address + 512 * 2, (64, page_size, 8), strides, (64, box, 1)),
    ]


def test_tensor_maps_are_made_once_for_each_cache(notes: DecodeNotes) -> None:
    call = arguments()
    other = {**call, "kv_cache": call["kv_cache"].clone()}
    for each in (call, call, other, call):
        etap_rt.mla_decode(**each)
    assert len(notes.maps) == 4
    first, second, third, fourth = (bytes(params.maps) for params in notes.params)
    assert first == second == fourth == b"\1" * 128 + b"\2" * 128
    assert third == b"\3" * 128 + b"\4" * 128


@pytest.mark.parametrize(("offset", "expected"), [(0, 1), (8, 1), (1, 0)])
def test_vector_loads_need_queries_on_16_bytes(notes: DecodeNotes, offset: int, expected: int) -> None:
    etap_rt.mla_decode(**arguments(offset=offset))
    assert notes.params[0].q_vector_loads == expected


def test_mask_and_scale_are_those_of_the_call(notes: DecodeNotes) -> None:
    call = on_gpu(arguments())
    options = [(False, SCALE), (True, 0.5), (True, 0.5), (True, SCALE), (False, 1)]
    for causal, scale in options:
        etap_rt.mla_decode(**{**call, "softmax_scale": scale}, causal=causal)
    assert [params.causal for params in notes.params] == [causal for causal, _ in options]
    scales = [pytest.approx(scale * 1.4426950408889634, rel=1e-6) for _, scale in options]
    assert [params.scale_log2 for params in notes.params] == scales


@pytest.mark.parametrize(("name", "value"), [("softmax_scale", -1.0), ("softmax_scale", "1"), ("causal", 1)])
def test_mask_and_scale_of_a_call_that_was_seen_are_checked(notes: DecodeNotes, name: str, value: Any) -> None:
    call = on_gpu(arguments())
    etap_rt.mla_decode(**call)
    with pytest.raises((etap_rt.ArgumentError, etap_rt.ArgumentTypeError), match=name):
        etap_rt.mla_decode(**{**call, name: value})
    assert len(notes.launches) == 1


@pytest.mark.parametrize(("page_size", "gather"), [(1, 1), (2, 2), (4, 3), (8, 0), (64, 0)])
def test_rows_of_the_smallest_pages_are_gathered(notes: DecodeNotes, page_size: int, gather: int) -> None:
    call = arguments(page_size=page_size)
    etap_rt.mla_decode(**call)
    (params,) = notes.params
    assert params.gather == gather
    assert (params.k_latent, params.k_rope) == (call["kv_cache"].data_ptr(), call["kv_cache"].data_ptr() + 1024)
    assert list(params.k_strides) == list(params.k_rope_strides) == [page_size * 576, 576]
    assert params.table_capacity == 4 * page_size


def test_ragged_queries_and_page_lists_arrive(notes: DecodeNotes) -> None:
    call = arguments(batch=5)
    call["q"] = call["q"][:, 0]
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    call["cache_seqlens"] = call["cache_seqlens"][:2]
    for pages in (7, 9):
        indices, indptr = torch.zeros(pages, dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)
        etap_rt.mla_decode(**{**call, "block_table": (indices, indptr)}, cu_seqlens_q=offsets)
        params = notes.params[-1]
        assert (params.cu_seqlens_q, params.page_indptr) == (offsets.data_ptr(), indptr.data_ptr())
        assert (params.block_table, params.max_pages, params.table_stride) == (indices.data_ptr(), pages, 0)
        assert (params.batch, params.total_q, params.s_q, params.share) == (2, 5, 0, 66)
        assert list(params.q_strides) == [0, 16 * 576, 576]


@pytest.mark.parametrize(
    ("batch", "heads", "lanes", "share", "stack", "head_start"),
    [(8, 128, 66, 8, 1, 392), (128, 128, 66, 0, 2, MOST_TILES), (140, 16, SMS, 0, 2, 0)],
)
def test_a_kernel_is_told_how_to_share_out_or_to_stack_units_and_when_to_count_on_that(
    notes: DecodeNotes, batch: int, heads: int, lanes: int, share: int, stack: int, head_start: int
) -> None:
    etap_rt.mla_decode(**arguments(batch=batch, heads=heads))
    (params,) = notes.params
    assert (params.lanes, params.share, params.stack) == (lanes, share, stack)
    assert params.head_start_tiles == head_start


def lanes_of_columns(params: Params) -> list[int]:
    """As the kernel finds them, in 64 bits: lane_of_column."""
    lanes = []
    for column in range(params.lanes):
        spare = column * params.spare_lanes + (1 << 31)
        before, after = spare >> 32, spare + params.spare_lanes >> 32
        assert spare + params.spare_lanes < 1 << 64
        lanes.append(params.even_lanes + before if after > before else column - before)
    return lanes


@pytest.mark.parametrize("batch", [1, 2, 5, 7, 16, 20, 33, 66, 67, 100, 131, 132, 133, 140, 264, 265, 1000])
@pytest.mark.parametrize("heads", [16, 128])
def test_every_lane_has_a_column_of_ctas(notes: DecodeNotes, batch: int, heads: int) -> None:
    etap_rt.mla_decode(**arguments(batch=batch, heads=heads))
    (params,) = notes.params
    assert sorted(lanes_of_columns(params)) == list(range(params.lanes))


@pytest.mark.parametrize(
    ("batch", "columns"),
    [(16, [16, 49, 82, 115]), (128, [16, 49, 82, 115]), (65, [33, 99]), (7, [11, 33, 55, 77, 99, 121])],
)
def test_lanes_that_an_even_division_leaves_idle_are_spread_over_the_columns(
    notes: DecodeNotes, batch: int, columns: list[int]
) -> None:
    etap_rt.mla_decode(**arguments(batch=batch))
    (params,) = notes.params
    idle = [column for column, lane in enumerate(lanes_of_columns(params)) if lane >= params.even_lanes]
    assert idle == columns


def test_a_launch_that_was_made_before_has_the_patience_that_is_asked_for_now(
    notes: DecodeNotes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or tests with less of it would not see anybody give up."""
    call = arguments()
    for patience in (500_000, 0, 0, 7):
        monkeypatch.setattr(decode, "PATIENCE", patience)
        etap_rt.mla_decode(**call)
    assert [params.patience for params in notes.params] == [500_000, 0, 0, 7]


def test_a_log_sum_exp_is_natural(notes: DecodeNotes) -> None:
    etap_rt.mla_decode(**arguments(), return_lse=True)
    (params,) = notes.params
    assert (params.lse_factor, params.lse_no_key) == (pytest.approx(0.6931471805599453), float("-inf"))


@pytest.mark.parametrize("capture", [0, 7])
def test_launches_may_overlap_the_one_before(notes: DecodeNotes, monkeypatch: pytest.MonkeyPatch, capture: int) -> None:
    monkeypatch.setattr(driver, "stream_state", lambda device, stream: (stream, capture, SMS))
    monkeypatch.setattr(interop, "empty", lambda layout, owner, shape, dtype: torch.empty(shape, dtype=torch.uint8))
    call = arguments()
    etap_rt.mla_decode(**call, out=torch.empty(2, 1, 16, 512, dtype=torch.bfloat16))
    assert (len(notes.launches), notes.early) == (1, 1)


@pytest.mark.parametrize("planned", [False, True])
def test_a_stream_that_begins_to_be_captured_gets_a_workspace_of_the_graph(
    notes: DecodeNotes, monkeypatch: pytest.MonkeyPatch, planned: bool
) -> None:
    call = on_gpu(arguments())
    plan = etap_rt.plan_decode(**call)
    made: list[Any] = []

    def empty(layout: Layout, owner: Any, shape: tuple[int, ...], dtype: str) -> Any:
        made.append(owner.new_empty(shape, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.uint8))
        return made[-1]

    monkeypatch.setattr(interop, "empty", empty)
    for capture in (0, 0, 7, 7, 8, 0):
        monkeypatch.setattr(driver, "stream_state", lambda device, stream, capture=capture: (stream, capture, SMS))
        if planned:
            plan.run(call["q"])
        else:
            etap_rt.mla_decode(**call)
    scratch = [params.partial_stats for params in notes.params]
    assert scratch[0] == scratch[1] == scratch[5] == 1 << 30
    of_graphs = [x.data_ptr() for x in made if x.dtype == torch.uint8]
    assert scratch[2:5] == of_graphs and len(set(of_graphs)) == 3


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("streams", [((1, 1), (2, 2)), ((2, -1), (2, -2))], ids=["of two handles", "of one handle"])
def test_streams_that_take_turns_keep_their_own_workspaces(
    notes: DecodeNotes, monkeypatch: pytest.MonkeyPatch, streams: tuple[tuple[int, int], ...], planned: bool
) -> None:
    addresses = itertools.count(1 << 30, 1 << 20)
    monkeypatch.setattr(driver, "allocate_zeroed", lambda device, size: next(addresses))
    call = on_gpu(arguments())
    plan = etap_rt.plan_decode(**call)
    turns = [streams[i] for i in (0, 1, 1, 0)]
    for handle, identity in turns:
        monkeypatch.setattr(interop, "current_stream", lambda layout, handle=handle: handle)
        monkeypatch.setattr(driver, "stream_state", lambda device, stream, identity=identity: (identity, 0, SMS))
        if planned:
            plan.run(call["q"])
        else:
            etap_rt.mla_decode(**call)
    first, second, third, fourth = ((params.partial_stats, params.counters) for params in notes.params)
    assert first == fourth and second == third and len({*first, *second}) == 4
    assert [stream for *_, stream in notes.launches] == [handle for handle, _ in turns]


@pytest.mark.parametrize("planned", [False, True])
def test_threads_do_not_mix_their_launches(notes: DecodeNotes, monkeypatch: pytest.MonkeyPatch, planned: bool) -> None:
    addresses = itertools.count(1 << 30, 1 << 20)
    monkeypatch.setattr(driver, "allocate_zeroed", lambda device, size: next(addresses))
    monkeypatch.setattr(interop, "current_stream", lambda layout: threading.get_ident())
    call = on_gpu(arguments())
    plan = etap_rt.plan_decode(**call)
    launched, launch = [], notes.launch

    def launch_slowly(*arguments: Any) -> None:
        time.sleep(0)  # lets another thread run, as a call of the driver does
        launch(*arguments)
        launched.append((threading.get_ident(), notes.params[-1].q_latent, notes.launches[-1][-1]))

    monkeypatch.setattr(notes, "launch", launch_slowly)
    expected = {}

    def work() -> None:
        q = CudaTensor(torch.zeros_like(call["q"].tensor))
        expected[threading.get_ident()] = q
        for _ in range(200):
            if planned:
                plan.run(q)
            else:
                etap_rt.mla_decode(**{**call, "q": q})
        together.wait()  # thread identifiers are given to others again

    together = threading.Barrier(4)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(launched) == 800
    assert all(expected[thread].data_ptr() == q and thread == stream for thread, q, stream in launched)
    scratch = {(stream, params.counters) for (*_, stream), params in zip(notes.launches, notes.params)}
    assert len(scratch) == 4 == len({counters for _, counters in scratch})


def test_128_heads_are_two_row_tiles_of_one_lane(notes: DecodeNotes) -> None:
    etap_rt.mla_decode(**arguments(heads=128))
    params = notes.params[0]
    assert (params.lanes, params.row_groups, params.passes) == (SMS // 2, 2, 1)
    assert notes.launches[0][0] == SMS


def test_an_empty_batch_launches_nothing(notes: DecodeNotes) -> None:
    for call in (arguments(batch=0), on_gpu(arguments(batch=0))):
        for _ in range(2):
            assert etap_rt.mla_decode(**call).shape == (0, 1, 16, 512)
        assert etap_rt.plan_decode(**call).run(call["q"]).shape == (0, 1, 16, 512)
    assert not notes.launches


@pytest.mark.parametrize("as_is", [lambda call: call, on_gpu], ids=["described", "recognised"])
def test_a_plan_runs_other_queries_into_its_own_outputs(notes: DecodeNotes, as_is: Any) -> None:
    call = arguments()
    plan = etap_rt.plan_decode(**as_is(call), return_lse=True)
    assert not notes.launches
    odd = torch.zeros(call["q"].numel() + 1, dtype=torch.bfloat16)[1:].view(call["q"].shape)
    queries = list(as_is({"first": torch.zeros_like(call["q"]), "second": odd}).values())
    for q in queries:
        assert plan.run(q) is plan.out
    assert [params.q_latent for params in notes.params] == [q.data_ptr() for q in queries]
    assert [params.q_rope for params in notes.params] == [q.data_ptr() + 1024 for q in queries]
    assert [params.q_vector_loads for params in notes.params] == [1, 0]
    assert {params.k_latent for params in notes.params} == {call["kv_cache"].data_ptr()}
    assert {(params.out, params.lse) for params in notes.params} == {(plan.out.data_ptr(), plan.lse.data_ptr())}


def test_a_plan_launches_the_kernel_of_the_sources_of_its_run(notes: DecodeNotes, tmp_path: Path) -> None:
    (tmp_path / "mla_decode.cu").write_text("// another")
    call = arguments()
    plan = etap_rt.plan_decode(**call)
    for _ in range(2):
        plan.run(call["q"])
        with etap_rt.kernel_sources(tmp_path):
            plan.run(call["q"])
            plan.run(call["q"])
    assert (len(notes.specs), len(notes.launches)) == (4, 6)


def test_a_plan_launches_a_grid_for_the_sms_of_its_stream(notes: DecodeNotes, monkeypatch: pytest.MonkeyPatch) -> None:
    call = arguments()
    plan = etap_rt.plan_decode(**call)
    for sms in (SMS, 32, 32, SMS):
        monkeypatch.setattr(driver, "stream_state", lambda device, stream, sms=sms: (stream, 0, sms))
        plan.run(call["q"])
    assert [grid for grid, *_ in notes.launches] == [SMS, 32, 32, SMS]


def test_a_captured_run_of_a_plan_leaves_nothing_of_its_workspace_to_the_next(
    notes: DecodeNotes, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = arguments()
    plan = etap_rt.plan_decode(**call)
    memory = torch.zeros(1, dtype=torch.uint8)
    monkeypatch.setattr(interop, "empty", lambda layout, owner, shape, dtype: memory)
    captures = iter((0, 7, 0, 0))
    monkeypatch.setattr(driver, "stream_state", lambda device, stream: (stream, next(captures), SMS))
    for _ in range(4):
        plan.run(call["q"])
    eager, captured, *others = [params.partial_stats for params in notes.params]
    assert (captured, others) == (memory.data_ptr(), [eager] * 2)


def test_a_plan_on_the_cpu_computes_what_a_call_computes() -> None:
    call = arguments()
    call["kv_cache"].normal_()
    call["cache_seqlens"] += 50
    plan = etap_rt.plan_decode(**call)
    for _ in range(2):
        call["q"] = torch.randn_like(call["q"])
        assert torch.equal(plan.run(call["q"]), etap_rt.mla_decode(**call))


@pytest.mark.parametrize(
    "other",
    [
        lambda q: q[:1],
        lambda q: q.half(),
        lambda q: (q[..., :512], q[..., 512:]),
        lambda q: torch.zeros(2, 1, 32, 576, dtype=q.dtype)[:, :, :16],
    ],
    ids=["shape", "dtype", "split", "strides"],
)
def test_a_plan_refuses_queries_of_another_layout(notes: DecodeNotes, other: Any) -> None:
    call = arguments()
    plan = etap_rt.plan_decode(**call)
    with pytest.raises(etap_rt.ArgumentError, match=r"^q(\[0\])?: got (shape|dtype|strides|2 arrays).*planned"):
        plan.run(other(call["q"]))
    with pytest.raises(etap_rt.ArgumentError, match=r"^q(\[0\])?: got .*planned"):
        q = other(call["q"])
        seen = tuple(map(CudaTensor, q)) if isinstance(q, tuple) else CudaTensor(q)
        etap_rt.plan_decode(**on_gpu(call)).run(seen)
    assert not notes.launches


def test_a_plan_refuses_queries_that_begin_within_an_element(notes: DecodeNotes) -> None:
    call = on_gpu(arguments())
    q, plan = call["q"], etap_rt.plan_decode(**call)
    shifted = torch.frombuffer(bytearray(2 * q.numel() + 1), dtype=torch.bfloat16, offset=1).view(q.shape)
    with pytest.raises(etap_rt.ArgumentError, match="^q: got address 0x"):
        plan.run(CudaTensor(shifted))
    assert not notes.launches


@given(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1))
@example(2**31 - 1, 1)
@example(2**31 - 1, 2**30 + 1)
@example(2**31 - 1, 2**31 - 1)
@example(2**31 - 2, 2**31 - 1)
def test_dividers_divide(n: int, divisor: int) -> None:
    shift, multiplier = divmod(divider(divisor), 2**32)
    assert shift < 32
    assert (2 * n * multiplier >> 32) >> shift == n // divisor


def test_a_plan_refuses_queries_in_the_memory_of_its_outputs(notes: DecodeNotes) -> None:
    call = arguments()
    wide = torch.zeros((*call["q"].shape[:-1], 576 + 512), dtype=torch.bfloat16)
    queries, out = wide[..., :576], wide[..., 576:]
    for convert in (on_gpu, dict):  # a tensor that is recognised, and arrays that are looked at
        planned = convert(call | {"q": queries, "out": out})
        plan = etap_rt.plan_decode(**planned)
        inside = wide.as_strided(queries.shape, queries.stride(), 512)
        with pytest.raises(etap_rt.ArgumentError, match="^q: got memory of an output, accepted is memory apart"):
            plan.run(CudaTensor(inside) if convert is on_gpu else inside)
    assert not notes.launches


def test_a_plan_takes_queries_between_the_rows_of_its_outputs(notes: DecodeNotes) -> None:
    call = arguments()
    wide = torch.zeros((*call["q"].shape[:-1], 576 + 512), dtype=torch.bfloat16)
    other = torch.zeros_like(wide)[..., :576]
    plan = etap_rt.plan_decode(**on_gpu(call | {"q": other, "out": wide[..., 576:]}))
    plan.run(CudaTensor(wide[..., :576]))
    assert len(notes.launches) == 1
