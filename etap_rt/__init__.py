"""Transposed multi-head latent attention (MLA) decoding on Hopper GPUs, compiled at run time.

The main entry is `mla_decode`; `PagedKVCache` keeps the pages it reads. Importing this package needs neither a
GPU nor torch nor CuPy: what a call needs is imported by the call.
"""

from __future__ import annotations

from etap_rt.arguments import check_inputs
from etap_rt.compiler import kernel_sources
from etap_rt.decode import DecodePlan, mla_decode, plan_decode
from etap_rt.errors import (
    ArgumentError,
    ArgumentTypeError,
    CompileError,
    EtapError,
    OutOfPagesError,
    SequenceError,
    UnsupportedError,
)
from etap_rt.kv_cache import PagedKVCache
from etap_rt.states import merge_states
from etap_rt.tracing import trace_decode

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CompileError",
    "DecodePlan",
    "EtapError",
    "OutOfPagesError",
    "PagedKVCache",
    "SequenceError",
    "UnsupportedError",
    "check_inputs",
    "kernel_sources",
    "merge_states",
    "mla_decode",
    "plan_decode",
    "trace_decode",
]
