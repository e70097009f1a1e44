"""Settings of the whole test run: what needs a Hopper GPU is skipped where there is none."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import settings

GPU_TESTS = Path(__file__).parent / "gpu"

# The machines that run this are shared and slow at times; a test that takes long is not a failure.
settings.register_profile("etap_rt", deadline=None)
settings.load_profile("etap_rt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_TESTS in item.path.parents and (missing := missing_for_gpu()):
            item.add_marker(pytest.mark.skip(reason=missing))


@functools.cache
def missing_for_gpu() -> str:
    """What GPU tests lack on this machine; empty if nothing."""
    try:
        import cupy

        capability = cupy.cuda.Device().compute_capability
    except Exception as error:  # no CuPy, no driver, no device: each has an exception of its own
        return f"no usable GPU ({type(error).__name__})"
    return "" if capability == "90" else f"GPU of compute capability {capability}, 90 is needed"
