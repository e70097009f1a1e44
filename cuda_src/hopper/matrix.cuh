// 8 x 8 matrices of 16-bit elements held across a warp (PTX manual, "stmatrix", "movmatrix"), and conversions.
// Lane l holds elements (row l / 4, columns 2(l % 4) + {0, 1}) of a matrix in one register.
#pragma once

#include "hopper/mbarrier.cuh"

namespace hopper {

template <bool BF16>
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 packed;
    if constexpr (BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Four floats times `scale`, in fp16 or as they are, and back.
__device__ __forceinline__ void pack_four(uint2& packed, const float* v, float scale) {
    packed = make_uint2(pack<false>(v[0] * scale, v[1] * scale), pack<false>(v[2] * scale, v[3] * scale));
}
__device__ __forceinline__ void pack_four(float4& packed, const float* v, float scale) {
    packed = make_float4(v[0] * scale, v[1] * scale, v[2] * scale, v[3] * scale);
}
__device__ __forceinline__ float2 unpack_half(u32 packed) {
    float2 v;
    asm("{\n.reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n}\n"
        : "=f"(v.x), "=f"(v.y)
        : "r"(packed));
    return v;
}
__device__ __forceinline__ float4 unpack_four(const uint2& packed) {
    const float2 first = unpack_half(packed.x), second = unpack_half(packed.y);
    return make_float4(first.x, first.y, second.x, second.y);
}
__device__ __forceinline__ float4 unpack_four(const float4& packed) { return packed; }

// Stores two matrices transposed: lane l < 16 gives the address of the 16 bytes that hold column l % 8 of matrix l / 8.
__device__ __forceinline__ void store_transposed_x2(u32 address, u32 first, u32 second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(first), "r"(second)
                 : "memory");
}

__device__ __forceinline__ u32 transpose(u32 matrix) {
    u32 transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Of a number that is neither subnormal nor above 2^126, whose reciprocal would be.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace hopper
