// Asynchronous 16-byte copies of a thread from global to shared memory (PTX manual, "cp.async").
#pragma once

#include "hopper/mbarrier.cuh"

namespace hopper {

// Copies 16 bytes, or writes 16 bytes of zeros when `valid` is false; `source` is not read then.
__device__ __forceinline__ void copy_16_bytes(u32 destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination),
                 "l"(__cvta_generic_to_global(source)), "r"(valid ? 16 : 0)
                 : "memory");
}

// Waits for all copies of this thread.
__device__ __forceinline__ void copy_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Arrives at `barrier` when all copies of this thread so far are done; one of the arrivals that the barrier expects.
__device__ __forceinline__ void copy_arrive(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Asks for the line at `address` to be brought into L2.
__device__ __forceinline__ void prefetch_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

}  // namespace hopper
