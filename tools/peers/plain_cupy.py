"""What CuPy offers: gather the pages, multiply, softmax, multiply. One query a request, all of one length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers import Inputs, Unsuitable, why_no_gpu, why_not_importable

name = "CuPy"


def available() -> str:
    return why_no_gpu() or why_not_importable("cupy")


def version() -> str:
    import cupy

    return f"cupy {cupy.__version__}"


def prepare(inputs: Inputs) -> Callable[[], Any]:
    import cupy
    import torch

    batch, s_q, heads, dims = inputs.q.shape
    length = inputs.lengths[0]
    if inputs.q.dtype != torch.float16:
        raise Unsuitable("its matrix product takes float16, not bfloat16")
    if s_q > 1 or set(inputs.lengths) != {length}:
        raise Unsuitable("written here for one query a request and equal lengths")
    q, cache, table = map(cupy.from_dlpack, (inputs.q.view(batch, heads, dims), inputs.kv_cache, inputs.block_table))
    out = cupy.from_dlpack(inputs.out.view(batch, heads, inputs.latent_dim))

    def call() -> Any:
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        with stream:
            keys = cache[table].reshape(batch, -1, dims)[:, :length]
            scores = cupy.matmul(q, keys.transpose(0, 2, 1)).astype(cupy.float32) * inputs.softmax_scale
            weights = cupy.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[...] = cupy.matmul(weights.astype(q.dtype), keys[..., : inputs.latent_dim])
        return inputs.out

    return call
