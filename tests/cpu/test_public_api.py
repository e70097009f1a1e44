"""What users may rely on: the public names with their signatures, types and descriptions.

A change here is a change of the interface: it belongs into CHANGELOG.md, and what worked before goes on working for
one minor version, with a DeprecationWarning that names the replacement.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import etap_rt

ROOT = Path(__file__).parents[2]
_DECODE = "(q, kv_cache, block_table, cache_seqlens, *, softmax_scale, causal=True, cu_seqlens_q=None, "
_DECODE += "out=None, lse=None, return_lse=False)"
API = {
    "ArgumentError": "class of EtapError, ValueError",
    "ArgumentTypeError": "class of EtapError, TypeError",
    "CompileError": "class of EtapError",
    "CompileError.__init__": "(self, spec, options, log)",
    "DecodePlan": "class",
    "DecodePlan.lse": "attribute",
    "DecodePlan.out": "attribute",
    "DecodePlan.run": "(self, q)",
    "EtapError": "class of Exception",
    "OutOfPagesError": "class of EtapError",
    "OutOfPagesError.__init__": "(self, asked, free)",
    "PagedKVCache": "class",
    "PagedKVCache.__init__": (
        "(self, num_pages, page_size=64, num_layers=1, latent_dim=512, rope_dim=64, dtype='bfloat16', device='cuda', "
        "*, max_batch=256, max_pages_per_sequence=None)"
    ),
    "PagedKVCache.batch": "(self, sequences, rows=None)",
    "PagedKVCache.device": "attribute",
    "PagedKVCache.dtype": "attribute",
    "PagedKVCache.export": "(self, sequence, path=None)",
    "PagedKVCache.fork": "(self, sequence)",
    "PagedKVCache.free": "(self, sequence)",
    "PagedKVCache.import_": "(self, source)",
    "PagedKVCache.latent_dim": "attribute",
    "PagedKVCache.length": "(self, sequence)",
    "PagedKVCache.max_batch": "attribute",
    "PagedKVCache.max_pages_per_sequence": "attribute",
    "PagedKVCache.new_sequence": "(self)",
    "PagedKVCache.num_layers": "attribute",
    "PagedKVCache.num_pages": "attribute",
    "PagedKVCache.page_size": "attribute",
    "PagedKVCache.pages": "(self, layer)",
    "PagedKVCache.reserve": "(self, sequences, counts, *, out=None)",
    "PagedKVCache.rope_dim": "attribute",
    "PagedKVCache.sequences": "attribute",
    "PagedKVCache.stats": "(self)",
    "PagedKVCache.truncate": "(self, sequence, length)",
    "PagedKVCache.write": "(self, layer, slots, latent, rope)",
    "SequenceError": "class of EtapError, ValueError",
    "UnsupportedError": "class of EtapError",
    "UnsupportedError.__init__": "(self, what, needed)",
    "check_inputs": _DECODE,
    "kernel_sources": "(directory)",
    "merge_states": "(out_a, lse_a, out_b, lse_b, *, out=None, lse=None)",
    "mla_decode": _DECODE,
    "plan_decode": _DECODE,
    "trace_decode": (
        "(q, kv_cache, block_table, cache_seqlens, *, softmax_scale, causal=True, cu_seqlens_q=None, runs=2)"
    ),
}
_PARALLEL = _DECODE.replace("cu_seqlens_q=None, out=None, lse=None,", "newest_rank=None, cu_seqlens_q=None, @")
_PARALLEL = _PARALLEL.replace("@", "group=None, scatter_heads=False,")
# Modules that are public besides the package itself, and whether importing them needs torch.
MODULES = {"compat.flash_mla": False, "compat.flashinfer": False, "parallel": False, "torch_op": True}
API_OF_MODULES = {
    "compat.flash_mla": {
        "FlashMLASchedMeta": "class",
        "FlashMLASchedMeta.Config": "class",
        "FlashMLASchedMeta.__init__": (
            "(self, have_initialized=False, config=None, tile_scheduler_metadata=None, num_splits=None)"
        ),
        "FlashMLASchedMeta.config": "attribute",
        "FlashMLASchedMeta.have_initialized": "attribute",
        "FlashMLASchedMeta.num_splits": "attribute",
        "FlashMLASchedMeta.tile_scheduler_metadata": "attribute",
        "flash_mla_with_kvcache": (
            "(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None, "
            "softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, "
            "extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None, out=None, "
            "*, descale_q=None, descale_k=None)"
        ),
        "get_mla_metadata": (
            "(cache_seqlens=None, num_q_tokens_per_head_k=1, num_heads_k=1, num_heads_q=None, is_fp8_kvcache=False, "
            "topk=None, *, num_heads_per_head_k=None)"
        ),
    },
    "compat.flashinfer": {
        "BatchMLAPagedAttentionWrapper": "class",
        "BatchMLAPagedAttentionWrapper.__init__": (
            "(self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None, "
            "kv_len_arr=None, backend='auto')"
        ),
        "BatchMLAPagedAttentionWrapper.plan": (
            "(self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size, "
            "causal, sm_scale, q_data_type, kv_data_type, use_profiler=False)"
        ),
        "BatchMLAPagedAttentionWrapper.run": (
            "(self, q_nope, q_pe, ckv_cache, kpe_cache, out=None, lse=None, return_lse=False, profiler_buffer=None, "
            "kv_len=None, page_table=None, return_lse_base_on_e=False)"
        ),
    },
    "parallel": {
        "check_inputs": _PARALLEL,
        "combine_states": "(out, lse, *, group=None, scatter_heads=False)",
        "mla_decode": _PARALLEL,
    },
    "torch_op": {"mla_decode": _DECODE},
}
RESULTS = {
    "Batch": ("block_table", "cache_seqlens"),
    "CacheStats": ("total", "free", "used", "shared", "tokens", "bytes"),
    "SequenceTokens": ("latent", "rope"),
}
MADE_BY_DATACLASS = ("compat.flash_mla.FlashMLASchedMeta.__init__",)
# Objects that `plan_decode` and not users make.
NOT_CALLED_BY_USERS = ("DecodePlan.__init__",)

# Parameters that take arrays, wherever they occur.
ARRAYS = {"q", "kv_cache", "block_table", "cache_seqlens", "cu_seqlens_q", "out", "lse", "slots", "latent", "rope"}
ARRAYS |= {"out_a", "lse_a", "out_b", "lse_b", "k_cache", "qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"}
ARRAYS |= {"q_nope", "q_pe", "ckv_cache", "kpe_cache"}
SHAPE = re.compile(r"\((?:b|m|n|total_q|num_pages|num_layers)\b[^)]*,[^)]*\)|shape")
DTYPE = re.compile(r"bfloat16|float16|float32|int32|dtype")
ERROR = re.compile(r"\b[Rr]aises?\b")
SAME_AS_DECODE = re.compile(r"`(?:etap_rt\.)?mla_decode`(?:,| for| over| takes|'s)")


def module_named(name: str) -> Any:
    """A public module of the package; the test is skipped if it needs what is not there."""
    if MODULES.get(name):
        pytest.importorskip("torch")
    return importlib.import_module(f"etap_rt.{name}" if name else "etap_rt")


def members(module_name: str = "") -> Iterator[tuple[str, Any]]:
    """Every public name with its object; public members of classes, made here and not inherited, by Class.member."""
    module = module_named(module_name)
    own = [name for name, found in vars(module).items() if getattr(found, "__module__", "") == module.__name__]
    for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
        found = getattr(module, name)
        yield name, found
        if inspect.isclass(found):
            for member, value in vars(found).items():
                own_init = member == "__init__" and callable(value)
                if (own_init or not member.startswith("_")) and f"{name}.{member}" not in NOT_CALLED_BY_USERS:
                    yield f"{name}.{member}", value


def describe(found: Any) -> str:
    """A class with its public bases, an attribute, or a signature without types."""
    if inspect.isclass(found):
        bases = [base.__name__ for base in found.__mro__[1:] if not base.__name__.startswith("_")]
        known = [base for base in bases if base in ("EtapError", "ValueError", "TypeError")]
        bases = known or [base for base in bases if base == "Exception"]
        return f"class of {', '.join(bases)}" if bases else "class"
    if not callable(found):
        return "attribute"
    signature = inspect.signature(found)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def public() -> Iterator[tuple[str, str, Any]]:
    """Public names of all modules that can be imported here: module, name, object."""
    for module in ("", *MODULES):
        if not MODULES.get(module) or importlib.util.find_spec("torch"):
            yield from ((module, name, found) for name, found in members(module))


def functions() -> list[Any]:
    return [
        pytest.param(module, name, found, id=f"{module}.{name}".removeprefix("."))
        for module, name, found in public()
        if callable(found) and not inspect.isclass(found)
    ]


@pytest.mark.parametrize("module", ["", *MODULES], ids=lambda name: name or "etap_rt")
def test_names_and_signatures_are_those_that_were_promised(module: str) -> None:
    promised = API_OF_MODULES.get(module, API)
    found = {name: describe(value) for name, value in members(module)}
    changes = [f"missing: {name}: {promised[name]}" for name in promised.keys() - found.keys()]
    changes += [f"new: {name!r}: {found[name]!r}," for name in found.keys() - promised.keys()]
    changes += [
        f"{n!r}: promised {promised[n]!r}, found {found[n]!r}"
        for n in promised.keys() & found.keys()
        if promised[n] != found[n]
    ]
    assert not changes, "\n".join(["the interface changed:", *sorted(changes)])


def test_all_is_sorted_and_nothing_else_looks_public() -> None:
    assert sorted(etap_rt.__all__) == etap_rt.__all__
    public = {name for name, value in vars(etap_rt).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public - {"annotations"} == set(etap_rt.__all__)


def test_results_have_the_fields_that_were_promised() -> None:
    from etap_rt import kv_cache

    assert {name: getattr(kv_cache, name)._fields for name in RESULTS} == RESULTS


@pytest.mark.parametrize(("module", "name", "function"), functions())
def test_every_parameter_and_result_has_a_type(module: str, name: str, function: Callable[..., Any]) -> None:
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        assert parameter.name == "self" or parameter.annotation is not inspect.Parameter.empty, parameter.name
    if f"{module}.{name}" not in MADE_BY_DATACLASS:
        assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize(
    ("name", "found"), [pytest.param(name, x, id=name) for _, name, x in public() if not name.endswith("__init__")]
)
def test_everything_public_is_described(name: str, found: Any) -> None:
    if describe(found) == "attribute":  # its class says what it is, or its name does
        return
    text = inspect.getdoc(found) or ""
    assert re.match("[A-Z`]", text) and "." in text


@pytest.mark.parametrize(("module", "name", "function"), functions())
def test_what_takes_arrays_tells_their_shapes_and_dtypes_and_the_errors(
    module: str, name: str, function: Callable[..., Any]
) -> None:
    arrays = ARRAYS & inspect.signature(function).parameters.keys()
    if not arrays:
        return
    class_name, _, method = name.rpartition(".")
    of_class = inspect.getdoc(getattr(module_named(module), class_name)) or "" if class_name else ""
    text = of_class if method == "__init__" else inspect.getdoc(function) or ""
    assert ERROR.search(text + of_class)
    if SAME_AS_DECODE.search(text):
        return
    for array in arrays:
        assert re.search(rf"\b{array}\b|`{array}`", text), f"{array} is not described"
    assert SHAPE.search(text) and DTYPE.search(text)
    if "Args:" in text:
        described = set(re.findall(r"^ {4,8}(\w+(?:,\s+\w+)*):", text, re.MULTILINE))
        described |= set(re.findall(r"(?<=\. )(\w+):", text))
        names = {name for group in described for name in re.split(r",\s+", group)}
        assert names - {"Returns", "Raises"} >= inspect.signature(function).parameters.keys() - {"self"}


def test_errors_of_arguments_say_what_was_given_and_what_is_accepted() -> None:
    for error, base in ((etap_rt.ArgumentError, ValueError), (etap_rt.ArgumentTypeError, TypeError)):
        raised = error("q", "this", "that")
        assert isinstance(raised, base) and isinstance(raised, etap_rt.EtapError)
        assert str(raised) == "q: got this, accepted is that"
        assert (raised.argument, raised.given, raised.accepted) == ("q", "this", "that")


# ---- What README.md promises ----

# A row of the table: a promise, and the tests that hold it.
ROW = re.compile(r"^\| (?P<promise>[^|]+) \| (?P<tests>[^|]+) \|$", re.MULTILINE)
FILE_OR_TEST = re.compile(r"(?P<file>(?:tests/(?:cpu|gpu)/)?test_\w+\.py)|`(?P<test>test_\w+)`")


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Names of the test functions of a file."""
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def promises() -> list[Any]:
    text = (ROOT / "README.md").read_text()
    section = text.partition("\n## What we promise\n")[2].partition("\n## ")[0]
    rows = [row for row in ROW.finditer(section) if row["promise"].strip("-") and row["promise"] != "promise"]
    assert rows, "README.md has no table of what is promised"
    return [pytest.param(row["tests"], id=row["promise"]) for row in rows]


def named_by(text: str) -> list[tuple[Path, str]]:
    """Every test with the files that are named before it; a file without a folder is in the folder named last."""
    found, files, folder, last = [], [], Path(), ""
    for match in FILE_OR_TEST.finditer(text):
        if match["file"]:
            path = Path(match["file"])
            folder = path.parent if path.parent.name else folder
            files = [*files, folder / path.name] if last == "file" else [folder / path.name]
        else:
            found += [(file, match["test"]) for file in files]
        last = match.lastgroup or ""
    return found


@pytest.mark.parametrize("row", promises())
def test_the_test_that_holds_a_promise_is_there(row: str) -> None:
    tests = named_by(row)
    assert tests or row.startswith("the same: ")  # as the row above
    missing = [f"{file}: {test}" for file, test in tests if test not in names_in(ROOT / file)]
    assert not missing
