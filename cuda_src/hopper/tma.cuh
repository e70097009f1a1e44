// The bulk tensor copy engine (PTX manual, "cp.async.bulk.tensor").
#pragma once

#include "hopper/mbarrier.cuh"

namespace hopper {

// The 128 opaque bytes that cuTensorMapEncodeTiled fills in.
struct alignas(64) TensorMap {
    char opaque[128];
};

__device__ __forceinline__ void tma_prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box at (x, y, z) of a three-dimensional map to shared memory and reports its bytes to `barrier`. In L2 it makes
// room before anything else does (PTX manual, "createpolicy"): a cache is read once.
__device__ __forceinline__ void tma_load_3d(u32 destination, const TensorMap* map, u32 barrier, int x, int y, int z) {
    asm volatile(
        "{\n.reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_first.b64 policy;\n"
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], policy;\n}\n"
        ::"r"(destination), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

}  // namespace hopper
