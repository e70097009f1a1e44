// Shared-memory barriers that count arrivals and bytes (PTX manual, "mbarrier").
#pragma once

namespace hopper {

using u32 = unsigned int;
using u64 = unsigned long long;

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Of something that lies within `base`, worked out anew: the compiler does not keep the sum in a register.
__device__ __forceinline__ u32 shared_address_within(const void* base, const void* p) {
    u32 address = shared_address(base);
    asm volatile("" : "+r"(address));
    return address + u32(static_cast<const char*>(p) - static_cast<const char*>(base));
}

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; once, before the CTA-wide barrier.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

template <int ARRIVALS = 1>
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(ARRIVALS) : "memory");
}

// Arrives once and adds `bytes` that the copy engine still has to bring before the phase can end.
__device__ __forceinline__ void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Waits until the phase of the given parity has ended.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// The same if `ended` is 0.
__device__ __forceinline__ void mbarrier_wait_unless(u32 ended, u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "setp.ne.u32 done, %2, 0;\n"
        "@done bra over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "over:\n"
        "}\n" ::"r"(barrier),
        "r"(parity), "r"(ended)
        : "memory");
}

// 1 if the phase of the given parity has ended, otherwise 0.
__device__ __forceinline__ u32 mbarrier_test(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done;
}

}  // namespace hopper
