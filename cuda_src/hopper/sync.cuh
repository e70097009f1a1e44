// Ordering between threads: named barriers, the async proxy, and words that CTAs share (PTX manual, "barrier",
// "fence.proxy", "atom").
#pragma once

#include "hopper/mbarrier.cuh"

namespace hopper {

// Barrier ID among THREADS threads; 0 is __syncthreads'.
template <int ID, int THREADS>
__device__ __forceinline__ void named_barrier() {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

// The same, returning whether any of the threads brought `vote`.
template <int ID, int THREADS>
__device__ __forceinline__ bool named_barrier_any(bool vote) {
    int any;
    asm volatile(
        "{\n.reg .pred mine, all;\n"
        "setp.ne.b32 mine, %3, 0;\n"
        "barrier.cta.red.or.pred.aligned all, %1, %2, mine;\n"
        "selp.b32 %0, 1, 0, all;\n}\n"
        : "=r"(any)
        : "n"(ID), "n"(THREADS), "r"(int(vote))
        : "memory");
    return any;
}

// With programmatic dependent launch (PTX manual, "griddepcontrol"): lets the next kernel of the stream start as soon as
// there is room, and waits until the previous one has ended and its writes are visible. Otherwise they do nothing.
__device__ __forceinline__ void let_dependents_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// A value that is the same in all threads of a warp, put where the compiler knows it (a uniform register).
__device__ __forceinline__ int uniform(int value) {
    return static_cast<int>(__reduce_min_sync(~0u, static_cast<unsigned>(value)));
}

// The thread's number within its CTA, read anew: the compiler neither keeps it in a register nor what follows from it.
__device__ __forceinline__ u32 thread_again() {
    u32 thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// Moves registers between warpgroups (PTX manual, "setmaxnreg"); every warp of the warpgroup, once.
template <int COUNT>
__device__ __forceinline__ void registers_give_up() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Nanoseconds, the same clock on all SMs.
__device__ __forceinline__ u64 global_time() {
    u64 time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time)::"memory");
    return time;
}

__device__ __forceinline__ u32 sm_number() {
    u32 number;
    asm("mov.u32 %0, %%smid;" : "=r"(number));
    return number;
}

// This thread's ordinary writes to shared memory become visible to wgmma and the copy engine.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ u32 atomic_add_acq_rel(u32* word, u32 value) {
    u32 old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(word), "r"(value) : "memory");
    return old;
}

// Adds without bringing the old value back; everything this thread has seen happen is visible before.
__device__ __forceinline__ void add_release(u32* word, u32 value) {
    asm volatile("red.add.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ u32 load_acquire(const u32* word) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

// The compiler branches around what this stands beside, rather than doing it under a predicate.
__device__ __forceinline__ void keep_branch() { asm volatile("" ::: "memory"); }

// NVRTC works this pointer out once, as early as here, and adds constants to it, rather than making each sum out of what it was
// made of. ptxas may still put that later.
template <typename T>
__device__ __forceinline__ void keep_pointer(T*& p) {
    asm volatile("" : "+l"(p));
}

// Loads that skip L1, for what other CTAs of this launch have written, in the order in which they stand; `otherwise` unless
// `wanted`.
__device__ __forceinline__ float4 load_shared_by_ctas(const float4* p, bool wanted, float4 otherwise) {
    asm volatile(
        "{\n.reg .pred wanted;\n"
        "setp.ne.b32 wanted, %5, 0;\n"
        "@wanted ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];\n}\n"
        : "+f"(otherwise.x), "+f"(otherwise.y), "+f"(otherwise.z), "+f"(otherwise.w)
        : "l"(p), "r"(int(wanted))
        : "memory");
    return otherwise;
}

__device__ __forceinline__ uint2 load_shared_by_ctas(const uint2* p, bool wanted, uint2 otherwise) {
    asm volatile(
        "{\n.reg .pred wanted;\n"
        "setp.ne.b32 wanted, %3, 0;\n"
        "@wanted ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];\n}\n"
        : "+r"(otherwise.x), "+r"(otherwise.y)
        : "l"(p), "r"(int(wanted))
        : "memory");
    return otherwise;
}

__device__ __forceinline__ float load_shared_by_ctas(const float* p, bool wanted, float otherwise) {
    asm volatile(
        "{\n.reg .pred wanted;\n"
        "setp.ne.b32 wanted, %2, 0;\n"
        "@wanted ld.relaxed.gpu.global.f32 %0, [%1];\n}\n"
        : "+f"(otherwise)
        : "l"(p), "r"(int(wanted))
        : "memory");
    return otherwise;
}

}  // namespace hopper
