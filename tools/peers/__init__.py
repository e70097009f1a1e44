"""Other libraries that compute the same attention, one adapter a file.

An adapter is a module with

    name                   how tables call it
    available() -> str     why it is skipped on this machine; empty if it can be tried
    version() -> str       of what is measured; only asked where it is available
    prepare(inputs)        a call without arguments that decodes `inputs` and returns out (b, s_q, h, latent)

What a library plans once a step (lengths to schedules, index arrays) is done by `prepare`, outside of the time that
is measured. `prepare` raises Unsuitable when the library does not take such inputs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, cast

MODULES = (
    "flash_mla",
    "vllm_flash_mla",
    "flash_attention_3",
    "vllm_flash_attention_3",
    "flashinfer_fa3",
    "plain_torch",
    "plain_cupy",
)


class Unsuitable(Exception):
    """A library does not take these inputs; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """One decode call in torch tensors on the GPU. Keys have latent + rope dims, values are the latent ones."""

    q: Any  # (b, s_q, h, latent + rope), contiguous
    kv_cache: Any  # (num_pages, page_size, latent + rope), contiguous
    block_table: Any  # (b, max_pages) int32, contiguous; zeros past a request's last page
    cache_seqlens: Any  # (b,) int32
    lengths: tuple[int, ...]  # the same on the host, for libraries that plan there
    softmax_scale: float
    out: Any  # (b, s_q, h, latent), contiguous; for libraries that write in place
    causal: bool = True
    latent_dim: int = 512

    @property
    def page_size(self) -> int:
        return cast(int, self.kv_cache.shape[1])


class Peer(Protocol):
    """What a module of this package offers."""

    name: str

    def available(self) -> str: ...

    def version(self) -> str: ...

    def prepare(self, inputs: Inputs) -> Callable[[], Any]: ...


# Extension libraries given on the command line, by the operator namespace that they register.
libraries: dict[str, Path] = {}


def all_peers() -> list[Peer]:
    """Every adapter, available or not."""
    return [cast(Peer, importlib.import_module(f"{__name__}.{module}")) for module in MODULES]


def why_not_importable(module: str) -> str:
    """Why `module` cannot be imported; empty if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation has exceptions of its own
        return f"{module} cannot be imported ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return ""


def why_no_gpu() -> str:
    """Why torch cannot run on a GPU; empty if it can."""
    missing = why_not_importable("torch")
    if missing:
        return missing
    import torch

    return "" if torch.cuda.is_available() else "torch sees no GPU"


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package}, version unknown"


def find_library(namespace: str, path_in_vllm: str) -> Path | None:
    """The extension library that registers torch.ops.<namespace>: given, or of an installed vLLM; None if neither."""
    if namespace in libraries:
        return libraries[namespace]
    vllm = importlib.util.find_spec("vllm")
    for directory in (vllm.submodule_search_locations or ()) if vllm else ():
        path = Path(directory) / path_in_vllm
        if path.is_file():
            return path
    return None


def why_no_library(namespace: str, path_in_vllm: str, option: str) -> str:
    """Why torch.ops.<namespace> is not to be had; empty if it is, which loads it."""
    missing = why_no_gpu()
    if missing:
        return missing
    path = find_library(namespace, path_in_vllm)
    if path is None:
        return f"vLLM is not installed, and {option} was not given"
    import torch

    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} cannot be loaded ({str(error).partition(chr(10))[0]})"
    return ""


def library_version(namespace: str, path_in_vllm: str) -> str:
    """Where torch.ops.<namespace> comes from."""
    return f"library {libraries[namespace].name}" if namespace in libraries else version_of("vllm")
