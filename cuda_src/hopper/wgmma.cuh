// Warpgroup matrix products m64nNk16, both operands in shared memory (PTX manual, "wgmma.mma_async").
#pragma once

#include "hopper/mbarrier.cuh"

namespace hopper {

// Operands lie in rows of 128 bytes with the 128-byte swizzle, atoms of eight rows 1024 bytes apart. Their 64-bit
// descriptors differ in the address alone, so only the low word is carried about. K-major operands step 16 elements
// along K by 32 bytes; an M-major one of 64 elements by 16 rows, 2048 bytes.
constexpr u32 DESCRIPTOR_HIGH = 1u << 30 | 1024 >> 4;  // swizzle mode, stride between atoms
constexpr u32 DESCRIPTOR_LOW = (1024 >> 4) << 16;      // the same stride along M, where there is but one atom

__device__ __forceinline__ u32 operand_descriptor(u32 address) { return DESCRIPTOR_LOW + (address >> 4); }

constexpr u32 K_MAJOR_STEP = 32 >> 4;
constexpr u32 M_MAJOR_STEP = 2048 >> 4;

// Orders register and shared-memory writes of this warp before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of products issued since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING of the committed groups are still running.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Waits for the PENDING + 1 groups that were committed last, one after the other; calls done(0), done(1) ... as they end.
template <int PENDING, int ENDED = 0, typename Done>
__device__ __forceinline__ void wgmma_wait_each(const Done& done) {
    wgmma_wait<PENDING>();
    done(ENDED);
    if constexpr (PENDING > 0) wgmma_wait_each<PENDING - 1, ENDED + 1>(done);
}

// Keeps the compiler from moving reads of an accumulator above the wait that makes them valid.
template <int COUNT>
__device__ __forceinline__ void pin(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define HOPPER_MMA(N, TYPE, LIST, A, B, ACCUMULATE, TRANSPOSE, HIGH, ...)                                          \
    asm volatile(                                                                                            \
        "{\n.reg .pred accumulate;\n.reg .b64 a, b;\nsetp.ne.b32 accumulate, %" ACCUMULATE ", 0;\n"         \
        "mov.b64 a, {%" A ", %" HIGH "};\nmov.b64 b, {%" B ", %" HIGH "};\n"                                 \
        "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" LIST "}, a, b"                   \
        ", accumulate, 1, 1, %" TRANSPOSE ", 0;\n}\n"                                                        \
        : __VA_ARGS__                                                                                        \
        : "r"(a), "r"(b), "r"(accumulate), "n"(int(A_M_MAJOR)), "n"(DESCRIPTOR_HIGH))

#define HOPPER_MMA_TYPED(N, LIST, A, B, ACCUMULATE, TRANSPOSE, HIGH, ...)                                          \
    if constexpr (BF16)                                                                                      \
        HOPPER_MMA(N, "bf16", LIST, A, B, ACCUMULATE, TRANSPOSE, HIGH, __VA_ARGS__);                               \
    else                                                                                                     \
        HOPPER_MMA(N, "f16", LIST, A, B, ACCUMULATE, TRANSPOSE, HIGH, __VA_ARGS__)

#define HOPPER_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HOPPER_L8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define HOPPER_L16 HOPPER_L8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define HOPPER_L32 HOPPER_L16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

// d[64, N] = a[64, 16] b[16, N] (+ d). Thread t of the warpgroup holds, for columns 8j + 2(t % 4) + {0, 1}, rows
// 16(t / 32) + (t % 32) / 4 in d[4j + {0, 1}] and that row + 8 in d[4j + {2, 3}]. B is K-major.
template <int N, bool BF16, bool A_M_MAJOR>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], u32 a, u32 b, int accumulate) {
    static_assert(N == 8 || N == 16 || N == 24 || N == 32 || N == 64, "no wrapper for this N");
    if constexpr (N == 8) {
        HOPPER_MMA_TYPED("8", "%0,%1,%2,%3", "4", "5", "6", "7", "8", HOPPER_D4(0));
    } else if constexpr (N == 16) {
        HOPPER_MMA_TYPED("16", HOPPER_L8, "8", "9", "10", "11", "12", HOPPER_D4(0), HOPPER_D4(4));
    } else if constexpr (N == 24) {
        HOPPER_MMA_TYPED("24", HOPPER_L8 ",%8,%9,%10,%11", "12", "13", "14", "15", "16", HOPPER_D4(0), HOPPER_D4(4),
                         HOPPER_D4(8));
    } else if constexpr (N == 32) {
        HOPPER_MMA_TYPED("32", HOPPER_L16, "16", "17", "18", "19", "20", HOPPER_D4(0), HOPPER_D4(4), HOPPER_D4(8),
                         HOPPER_D4(12));
    } else {
        HOPPER_MMA_TYPED("64", HOPPER_L32, "32", "33", "34", "35", "36", HOPPER_D4(0), HOPPER_D4(4), HOPPER_D4(8),
                         HOPPER_D4(12), HOPPER_D4(16), HOPPER_D4(20), HOPPER_D4(24), HOPPER_D4(28));
    }
}

#undef HOPPER_MMA
#undef HOPPER_MMA_TYPED
#undef HOPPER_D4
#undef HOPPER_L8
#undef HOPPER_L16
#undef HOPPER_L32

}  // namespace hopper
