"""The adapters of tools/peers against stand-ins with the real libraries' signatures, which compute with mla_decode."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import etap_rt
from tests.cpu.test_tools_peers import decode, inputs_of
from tests.tool_modules import import_tool

torch = pytest.importorskip("torch")
peers = import_tool("peers")
peer_bench = import_tool("peer_bench")

# As the libraries of vLLM 0.26 register them.
DENSE_DECODE_FWD = (
    "dense_decode_fwd(Tensor q, Tensor kcache, int head_size_v, Tensor seqlens_k, Tensor block_table, "
    "float softmax_scale, bool is_causal, Tensor(a)? tile_scheduler_metadata, Tensor(b)? num_splits, "
    "Tensor(c!)? out_) -> (Tensor(c!), Tensor, Tensor(a)?, Tensor(b)?)"
)
FA3_FWD = (
    "fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
    "int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
    "float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap, "
    "bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, "
    "Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"
)
FA3_METADATA = (
    "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, "
    "int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? leftpad_k, int? page_size, int max_seqlen_k_new, "
    "bool is_causal, int window_size_left, int window_size_right, bool has_softcap, int num_splits, bool? pack_gqa, "
    "int sm_margin) -> Tensor"
)


def attend(q: Any, latent: Any, rope: Any, table: Any, lengths: Any, scale: float, causal: bool) -> Any:
    """mla_decode with keys (pages, page size, 1, dims) and queries (latent, rope) of (b, s_q, h, dims)."""
    cache = torch.cat([latent, rope], -1).squeeze(2)
    return etap_rt.mla_decode(torch.cat(q, -1), cache, table, lengths, softmax_scale=scale, causal=causal)


def dense_decode_fwd(
    q: Any,
    cache: Any,
    dims: int,
    lengths: Any,
    table: Any,
    scale: float,
    causal: bool,
    plan: Any,
    splits: Any,
    out: Any,
) -> Any:
    assert (plan is None) == (splits is None)
    batch, s_q, heads, _ = q.shape
    assert out.shape == (batch, 1, s_q * heads, dims), "as the operator asks"
    result = attend((q[..., :dims], q[..., dims:]), cache[..., :dims], cache[..., dims:], table, lengths, scale, causal)
    plan = torch.zeros(1) if plan is None else plan.clone()
    return out.copy_(result.view(out.shape)), torch.zeros(1), plan, torch.ones(1)


def fa3_metadata(batch: int, s_q: int, longest: int, heads: int, heads_k: int, dim: int, dim_v: int, *rest: Any) -> Any:
    assert (heads_k, dim, dim_v) == (1, 64, 512)
    assert rest[1].max() == longest
    assert rest[2].tolist() == [i * s_q for i in range(batch + 1)]
    return torch.full((1,), 7)


def fa3_fwd(q: Any, k: Any, v: Any, k_new: Any, v_new: Any, q_v: Any, out: Any, starts: Any, *rest: Any) -> Any:
    lengths, s_q, longest, table = rest[3:7]
    scale, causal = rest[15:17]
    assert longest == lengths.max()
    assert rest[17:19] == (-1, -1)
    assert rest[21].item() == 7  # the schedule
    shape = (len(starts) - 1, s_q, q.shape[1], -1)
    result = attend((q_v.reshape(shape), q.reshape(shape)), v, k, table, lengths, scale, causal)
    out.copy_(result.view(out.shape))
    return [torch.zeros(1)]


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    flash_mla, fa3 = (torch.library.Library(name, "DEF") for name in ("_flashmla_C", "_vllm_fa3_C"))
    flash_mla.define(DENSE_DECODE_FWD)
    flash_mla.impl("dense_decode_fwd", dense_decode_fwd, "CPU")
    fa3.define(FA3_FWD)
    fa3.impl("fwd", fa3_fwd, "CPU")
    fa3.define(FA3_METADATA)
    fa3.impl("get_scheduler_metadata", fa3_metadata, "CPU")
    yield
    flash_mla._destroy()
    fa3._destroy()


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the other libraries."""
    flash_mla = ModuleType("flash_mla")

    def flash_mla_with_kvcache(
        q: Any,
        k_cache: Any,
        block_table: Any,
        cache_seqlens: Any,
        head_dim_v: int,
        tile_scheduler_metadata: Any,
        num_splits: Any,
        softmax_scale: Any = None,
        causal: bool = False,
    ) -> Any:
        assert (tile_scheduler_metadata, num_splits) == ("schedule", "splits")
        q = (q[..., :head_dim_v], q[..., head_dim_v:])
        parts = k_cache[..., :head_dim_v], k_cache[..., head_dim_v:]
        return attend(q, *parts, block_table, cache_seqlens, softmax_scale, causal), None

    flash_mla.get_mla_metadata = lambda lengths, rows, heads_k: ("schedule", "splits")
    flash_mla.flash_mla_with_kvcache = flash_mla_with_kvcache

    fa3 = ModuleType("flash_attn_interface")

    def flash_attn_with_kvcache(
        q: Any,
        k_cache: Any,
        v_cache: Any,
        qv: Any = None,
        cache_seqlens: Any = None,
        page_table: Any = None,
        softmax_scale: Any = None,
        causal: bool = False,
    ) -> Any:
        return attend((qv, q), v_cache, k_cache, page_table, cache_seqlens, softmax_scale, causal)

    fa3.flash_attn_with_kvcache = flash_attn_with_kvcache

    flashinfer = ModuleType("flashinfer.mla")

    class BatchMLAPagedAttentionWrapper:
        def __init__(self, workspace: Any, backend: str) -> None:
            assert backend == "fa3"

        def plan(self, **arguments: Any) -> None:
            self.arguments = arguments

        def run(self, q_nope: Any, q_pe: Any, ckv_cache: Any, kpe_cache: Any, out: Any) -> None:
            plan = self.arguments
            batch = len(plan["qo_indptr"]) - 1
            counts = plan["kv_indptr"].diff().tolist()
            table = torch.nn.utils.rnn.pad_sequence(plan["kv_indices"].split(counts), batch_first=True)
            q = [part.reshape(batch, -1, plan["num_heads"], part.shape[-1]) for part in (q_nope, q_pe)]
            parts = ckv_cache.unsqueeze(2), kpe_cache.unsqueeze(2)
            result = attend(q, *parts, table, plan["kv_len_arr"], plan["sm_scale"], plan["causal"])
            out.copy_(result.view(out.shape))

    flashinfer.BatchMLAPagedAttentionWrapper = BatchMLAPagedAttentionWrapper
    for module in (flash_mla, fa3, flashinfer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("module", peers.MODULES[:5])
@pytest.mark.parametrize(("lengths", "s_q"), [((64, 64), 1), ((100, 7, 130), 2)])
def test_the_adapter_hands_over_the_inputs(module: str, lengths: tuple[int, ...], s_q: int) -> None:
    inputs = inputs_of(lengths, s_q)
    ours = decode(inputs)
    call = peer_bench.prepare(import_tool(f"peers.{module}"), inputs, ours)
    assert callable(call), call
    assert torch.equal(call(), ours)


@pytest.mark.parametrize("module", ["flash_mla", "vllm_flash_mla"])
@pytest.mark.usefixtures("modules")
def test_other_pages_are_not_for_flash_mla(module: str) -> None:
    inputs = inputs_of((64,))
    small = type(inputs)(**{**vars(inputs), "kv_cache": inputs.kv_cache.view(2, 32, 576)})
    with pytest.raises(peers.Unsuitable, match="pages of 64 tokens only"):
        import_tool(f"peers.{module}").prepare(small)
