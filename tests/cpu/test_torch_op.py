"""The operators of torch: schemas, fake tensors, torch.compile, and that nothing is registered unasked."""

from __future__ import annotations

import fractions
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")

from etap_rt import ArgumentError, ArgumentTypeError, mla_decode, torch_op  # noqa: E402
from tests.cases import Case, make_inputs, to_torch  # noqa: E402
from tests.op_cases import OP_CASES, DecodeLayer, finite, layer_inputs, operator_arguments  # noqa: E402

ROOT = Path(__file__).parents[2]
HIDDEN, HEADS = 64, 4
OPERATORS = torch.ops.etap_rt


def test_operators_are_registered_when_asked_for() -> None:
    code = (
        "import sys, etap_rt; assert 'torch' not in sys.modules\n"
        "import torch; assert not hasattr(torch.ops.etap_rt, 'mla_decode')\n"
        "import etap_rt.torch_op; torch.ops.etap_rt.mla_decode.default, torch.ops.etap_rt.mla_decode_out.default\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_schemas_say_what_is_written() -> None:
    assert not OPERATORS.mla_decode.default._schema.is_mutable
    arguments = OPERATORS.mla_decode_out.default._schema.arguments
    written = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    assert written == ["out", "lse"]


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_operators_compute_what_mla_decode_computes(case: Case) -> None:
    call = make_inputs(case).on(to_torch)
    expected, expected_lse = mla_decode(**call, return_lse=True)
    inputs, options = operator_arguments(call)
    out, lse = OPERATORS.mla_decode(*inputs, **options)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)

    out, lse = torch.zeros_like(expected), torch.zeros_like(expected_lse)
    assert OPERATORS.mla_decode_out(*inputs, out, lse, **options) is None
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    out.zero_()
    OPERATORS.mla_decode_out(*inputs, out, None, **options)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_the_function_takes_the_arguments_of_mla_decode(case: Case) -> None:
    call = make_inputs(case).on(to_torch)
    expected, expected_lse = mla_decode(**call, return_lse=True)
    assert torch.equal(torch_op.mla_decode(**call), expected)
    for given in ({}, {"out": torch.zeros_like(expected)}, {"lse": torch.zeros_like(expected_lse)}):
        out, lse = torch_op.mla_decode(**call, **given, return_lse=True)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        assert out is given.get("out", out) and lse is given.get("lse", lse)
    out = torch.zeros_like(expected)
    assert torch_op.mla_decode(**call, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck_passes(case: Case) -> None:
    call = finite(make_inputs(case).on(to_torch))
    out, lse = mla_decode(**call, return_lse=True)
    inputs, options = operator_arguments(call)
    torch.library.opcheck(OPERATORS.mla_decode.default, inputs, options)
    torch.library.opcheck(OPERATORS.mla_decode_out.default, (*inputs, out, lse), options)
    torch.library.opcheck(OPERATORS.mla_decode_out.default, (*inputs, out, None), options)


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_fake_outputs_look_like_real_ones(case: Case) -> None:
    call = make_inputs(case).on(to_torch)
    inputs, options = operator_arguments(call)
    real = OPERATORS.mla_decode(*inputs, **options)
    fake = OPERATORS.mla_decode(
        *(x.to("meta") for x in inputs),
        **{name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in options.items()},
    )
    for x, y in zip(fake, real):
        assert x.is_meta
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def test_queries_that_cannot_be_are_refused_while_tracing() -> None:
    inputs, options = operator_arguments(make_inputs(OP_CASES[0]).on(to_torch))
    q, *others = (x.to("meta") for x in inputs)
    with pytest.raises(ArgumentError, match="^q: got last dim 575, accepted is 576 or 320"):
        OPERATORS.mla_decode(q[..., 1:], *others, **options)
    with pytest.raises(ArgumentError, match=r"^q: got shape \(4, 576\)"):
        OPERATORS.mla_decode(q[0, 0], *others, **options)


def test_errors_of_mla_decode_come_through() -> None:
    call = make_inputs(OP_CASES[0]).on(to_torch)
    inputs, options = operator_arguments(call)
    with pytest.raises(ArgumentError, match="^softmax_scale: got -1.0"):
        OPERATORS.mla_decode(*inputs, **{**options, "softmax_scale": -1.0})
    with pytest.raises(ArgumentTypeError, match="^kv_cache: got tuple of 3"):
        torch_op.mla_decode(**{**call, "kv_cache": (call["kv_cache"],) * 3})
    with pytest.raises(ArgumentTypeError, match="^return_lse: got 1, accepted is True or False"):
        torch_op.mla_decode(**call, return_lse=1)


@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("causal", None, "causal: got None, accepted is True or False"),
        ("causal", 1, "causal: got 1, accepted is True or False"),
        ("softmax_scale", True, "softmax_scale: got True, accepted is a number of the host"),
        ("softmax_scale", torch.tensor(0.1), "softmax_scale: got tensor(0.1000), accepted is a number of the host"),
        ("softmax_scale", "x", "softmax_scale: got 'x', accepted is a number of the host"),
        ("q", np.zeros((1, 1, 16, 576), np.float16), "q: got ndarray, accepted is a torch tensor"),
        ("kv_cache", (torch.zeros(1), None), "kv_cache[1]: got NoneType, accepted is a torch tensor"),
        ("cache_seqlens", [1], "cache_seqlens: got list, accepted is a torch tensor"),
        ("lse", [1.0], "lse: got list, accepted is a torch tensor"),
    ],
)
def test_the_function_refuses_what_the_operators_would_convert(
    name: str, value: Any, message: str, given: bool
) -> None:
    call = make_inputs(OP_CASES[0]).on(to_torch)
    if given:
        call["out"] = torch_op.mla_decode(**call)
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        torch_op.mla_decode(**{**call, name: value})
    assert str(caught.value) == message


def test_the_function_can_be_traced_symbolically() -> None:
    call = make_inputs(OP_CASES[0]).on(to_torch)
    names = [name for name, x in call.items() if isinstance(x, torch.Tensor)]
    fixed = {name: x for name, x in call.items() if name not in names}

    class Layer(torch.nn.Module):
        def forward(self, q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any) -> Any:
            return torch_op.mla_decode(q, kv_cache, block_table, cache_seqlens, **fixed)

    traced = torch.fx.symbolic_trace(Layer())
    assert torch.equal(traced(*(call[name] for name in names)), torch_op.mla_decode(**call))


def test_the_scale_may_be_any_number_of_the_host() -> None:
    call = make_inputs(OP_CASES[0]).on(to_torch)
    expected = torch_op.mla_decode(**call | {"softmax_scale": 0.125})
    for scale in (np.float32(0.125), fractions.Fraction(1, 8)):
        assert torch.equal(torch_op.mla_decode(**call | {"softmax_scale": scale}), expected)


def test_backward_says_that_there_are_no_gradients() -> None:
    call = make_inputs(OP_CASES[0]).on(to_torch)
    call["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="etap_rt.*mla_decode"):
        torch_op.mla_decode(**call).sum().backward()


def compilers() -> list[Any]:
    missing = not any(map(shutil.which, ("g++", "clang++", "c++")))
    return ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(missing, reason="no C++ compiler"))]


@pytest.mark.parametrize("backend", compilers())
@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in-place"])
def test_a_compiled_layer_matches_the_eager_one(backend: str, in_place: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = DecodeLayer(HIDDEN, HEADS, in_place).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for batch in (3, 5):
            inputs = layer_inputs(batch, HIDDEN, "cpu")
            for x, y in zip(compiled(*inputs), layer(*inputs)):
                torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
