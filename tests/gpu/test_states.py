"""On a GPU: merge_states, the operators of torch, decode over several ranks with NCCL, and the worked example."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch without CUDA", allow_module_level=True)

from etap_rt import ArgumentError, mla_decode, torch_op  # noqa: E402
from etap_rt.states import merge_states  # noqa: E402
from tests.cache_model import CUPY, TORCH_CUDA, Library, host  # noqa: E402
from tests.cases import BFLOAT16_ERROR, DEEPSEEK_SCALE, Case, make_inputs  # noqa: E402
from tests.op_cases import OP_CASES, DecodeLayer, finite, layer_inputs, operator_arguments  # noqa: E402
from tests.parallel_cases import PARALLEL_CASES, ParallelCase, assert_solved, results, solve_together  # noqa: E402
from tests.state_cases import DTYPES, STATE_CASES, StateCase, assert_merged, make_state, place  # noqa: E402
from tests.tool_modules import import_tool  # noqa: E402

mla_layer: Any = import_tool("mla_layer")

OPERATORS = torch.ops.etap_rt
HIDDEN, HEADS = 256, 16
BUSY_CYCLES = 20_000_000  # some 10 ms


def assert_same(got: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for x, y in zip(got, expected):
        assert torch.equal(x, y)


# ---- merge_states ----


@pytest.mark.parametrize("library", [TORCH_CUDA, CUPY], ids=str)
@pytest.mark.parametrize("case", STATE_CASES, ids=str)
def test_merging_is_exact_in_float32_and_rounded_once(case: StateCase, library: Library) -> None:
    a, b = make_state(case, 1), make_state(case, 2)
    nothing = np.full(case.shape, np.nan, DTYPES[case.dtype]), np.full(case.lse_shape, np.nan, np.float32)
    out, lse = place(case, *nothing).on(library.array)
    returned = merge_states(*a.on(library.array), *b.on(library.array), out=out, lse=lse)
    assert returned[0] is out and returned[1] is lse
    assert_merged(case, a, b, host(out), host(lse))

    made = merge_states(*a.on(library.array), *b.on(library.array))
    assert type(made[0]) is type(made[1]) is type(out)
    for x, y in zip(made, (out, lse)):
        assert np.array_equal(host(x), host(y))


def test_writing_between_outputs_touches_nothing_else() -> None:
    case = next(case for case in STATE_CASES if case.name == "strided-bfloat16")
    a, b = make_state(case, 1).on(TORCH_CUDA.array), make_state(case, 2).on(TORCH_CUDA.array)
    wide = torch.full((*case.shape[:-1], case.shape[-1] + 16), 7.0, dtype=torch.bfloat16, device="cuda")
    merge_states(*a, *b, out=wide[..., 8:-8])
    assert (wide[..., :8] == 7).all() and (wide[..., -8:] == 7).all()
    assert torch.equal(wide[..., 8:-8], merge_states(*a, *b)[0])


@pytest.mark.parametrize("case", STATE_CASES, ids=str)
def test_outputs_may_be_inputs(case: StateCase) -> None:
    expected = merge_states(*make_state(case, 1).on(TORCH_CUDA.array), *make_state(case, 2).on(TORCH_CUDA.array))
    for into in (0, 1):
        parts = make_state(case, 1).on(TORCH_CUDA.array), make_state(case, 2).on(TORCH_CUDA.array)
        assert_same(merge_states(*parts[0], *parts[1], out=parts[into][0], lse=parts[into][1]), expected)


def test_merging_waits_for_nothing_and_replays_in_a_graph() -> None:
    case = STATE_CASES[0]
    a, b, other = (make_state(case, seed).on(TORCH_CUDA.array) for seed in (1, 2, 3))
    merge_states(*a, *b)
    expected = merge_states(*other, *b)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged = merge_states(*a, *b)
    torch.cuda._sleep(BUSY_CYCLES)
    for x, y in zip(a, other):
        x.copy_(y)
    graph.replay()
    assert not torch.cuda.current_stream().query(), "nothing waited"
    assert_same(merged, expected)


@pytest.mark.parametrize("heads", [16, 128])
def test_decoding_in_parts_and_merging_is_decoding(heads: int) -> None:
    torch.manual_seed(0)
    s_q, prefix, tokens = 2, 1024, 3000
    q = torch.randn(1, s_q, heads, 576, dtype=torch.bfloat16, device="cuda")
    cache = torch.randn(47, 64, 576, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(47, device="cuda").int().view(1, 47)

    def decode(table: Any, length: int, causal: bool) -> Any:
        lengths = torch.tensor([length], dtype=torch.int32, device="cuda")
        return mla_decode(q, cache, table, lengths, softmax_scale=DEEPSEEK_SCALE, causal=causal, return_lse=True)

    whole, whole_lse = decode(table, tokens, True)
    pages = prefix // 64
    parts = decode(table[:, :pages], prefix, False), decode(table[:, pages:], tokens - prefix, True)
    out, lse = merge_states(*parts[0], *parts[1])
    assert (out.float() - whole.float()).norm() <= 2 * BFLOAT16_ERROR * whole.float().norm()
    torch.testing.assert_close(lse, whole_lse, atol=5e-5, rtol=1e-6)


def test_parts_in_different_places_are_refused() -> None:
    (out, lse), (other, other_lse) = (make_state(STATE_CASES[0], seed).on(TORCH_CUDA.array) for seed in (1, 2))
    with pytest.raises(ArgumentError, match="^out_b: got device cpu:0, accepted is cuda:0"):
        merge_states(out, lse, other.cpu(), other_lse)
    with pytest.raises(ArgumentError, match="^lse_b: got device cpu:0, accepted is cuda:0"):
        merge_states(out, lse, other, other_lse.cpu())


# ---- Operators of torch ----


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_operators_compute_what_mla_decode_computes(case: Case) -> None:
    call = make_inputs(case).on(TORCH_CUDA.array)
    expected = mla_decode(**call, return_lse=True)
    inputs, options = operator_arguments(call)
    assert_same(OPERATORS.mla_decode(*inputs, **options), expected)
    out, lse = (torch.zeros_like(x) for x in expected)
    OPERATORS.mla_decode_out(*inputs, out, lse, **options)
    assert_same((out, lse), expected)
    assert_same(torch_op.mla_decode(**call, return_lse=True), expected)


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck_passes(case: Case) -> None:
    call = finite(make_inputs(case).on(TORCH_CUDA.array))
    out, lse = mla_decode(**call, return_lse=True)
    inputs, options = operator_arguments(call)
    torch.library.opcheck(OPERATORS.mla_decode.default, inputs, options)
    torch.library.opcheck(OPERATORS.mla_decode_out.default, (*inputs, out, lse), options)


def compilers() -> list[Any]:
    missing = importlib.util.find_spec("triton") is None
    needs_triton = pytest.mark.skipif(missing, reason="no triton")
    return [
        {"backend": "aot_eager"},
        pytest.param({"backend": "inductor"}, marks=needs_triton),
        pytest.param({"mode": "reduce-overhead"}, marks=needs_triton),  # in CUDA graphs
    ]


@pytest.mark.parametrize("options", compilers(), ids=str)
@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in-place"])
def test_a_compiled_layer_matches_the_eager_one(options: dict[str, str], in_place: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = DecodeLayer(HIDDEN, HEADS, in_place).to("cuda", torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, **options)
    with torch.no_grad():
        inputs = layer_inputs(4, HIDDEN, "cuda")
        for _ in range(4):  # the first calls are for compiling and capturing
            for x, y in zip(compiled(*inputs), layer(*inputs)):
                torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
            inputs[0].normal_()


# ---- Ranks ----


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the ranks have found, one for each GPU, as far as they can share the heads."""
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        pytest.skip("torch without NCCL")
    ranks = 1 << (min(8, torch.cuda.device_count()).bit_length() - 1)
    directory = tmp_path_factory.mktemp("ranks")
    solve_together(directory, ranks, "cuda")
    return results(directory, ranks)


@pytest.mark.parametrize("case", PARALLEL_CASES, ids=str)
def test_ranks_together_find_what_one_process_finds(case: ParallelCase, found: list[dict[str, Any]]) -> None:
    assert_solved(case, found, 2 * BFLOAT16_ERROR)


# ---- The worked example ----


@pytest.mark.parametrize("heads", [8, 16])
def test_decoding_is_the_layer_that_is_not_absorbed(heads: int) -> None:
    for error in mla_layer.compare(heads, 8, "cuda"):
        assert error.to_expanded <= mla_layer.ACCEPTED_ERROR
        assert error.to_float32 <= 1.5 * error.expanded_to_float32, "no further from the truth than the other way"
