// Attention over two parts of a context, combined: out and lse over both from out and lse over each.
//
//   lesser = exp(-|lse_a - lse_b|)                        weight of the part that counts less; the other's is 1
//   out    = (greater part + lesser * lesser part) / (1 + lesser)
//   lse    = max(lse_a, lse_b) + log(1 + lesser)
//
// A row is one head of one query token: `chunks` x 16 bytes of out and one lse. A warp has a row, a lane every 32nd
// chunk of it. Outputs may lie where inputs do: a lane reads whatever it replaces before it writes.

using u32 = unsigned int;
using i64 = long long;

constexpr bool IS_FP32 = ELEMENT_BYTES == 4;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int PASSES = 4;  // chunks a lane has in flight
#define NEG_INF (-__int_as_float(0x7f800000))

// One out and its lse. Strides of out are in chunks, of lse in elements.
struct State {
    uint4* out;
    float* lse;
    i64 out_strides[3];  // of (request, query token, head)
    i64 lse_strides[3];
};

struct Params {
    State a, b, merged;
    u32 rows;
    u32 queries;  // of a request
    u32 heads;
    u32 chunks;  // of a row
};

// Elements of a 32-bit word: one of fp32, or two of 16 bits, the lower half first.
__device__ __forceinline__ float2 unpack(u32 word) {
    float2 values;
    if constexpr (IS_FP32) {
        values = make_float2(__uint_as_float(word), 0.0f);
    } else if constexpr (IS_BF16) {
        values = make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
    } else {
        asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
            "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
            : "=f"(values.x), "=f"(values.y)
            : "r"(word));
    }
    return values;
}

__device__ __forceinline__ u32 pack(float2 values) {
    u32 word;
    if constexpr (IS_FP32) {
        word = __float_as_uint(values.x);
    } else if constexpr (IS_BF16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values.y), "f"(values.x));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values.y), "f"(values.x));
    }
    return word;
}

// What a part adds: nothing if its weight is 0, whatever it holds, NaN included.
__device__ __forceinline__ float weighted(float weight, float value) { return weight == 0.0f ? 0.0f : weight * value; }

__device__ __forceinline__ u32 merge_word(float weight_a, u32 a, float weight_b, u32 b) {
    const float2 x = unpack(a), y = unpack(b);
    return pack(make_float2(weighted(weight_a, x.x) + weighted(weight_b, y.x),
                            weighted(weight_a, x.y) + weighted(weight_b, y.y)));
}

__device__ __forceinline__ i64 offset(const i64 (&strides)[3], u32 i, u32 j, u32 k) {
    return i * strides[0] + j * strides[1] + k * strides[2];
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) merge_states(const __grid_constant__ Params p) {
    const u32 row = blockIdx.x * WARPS + threadIdx.x / 32;
    const u32 lane = threadIdx.x % 32;
    if (row >= p.rows) return;
    const u32 head = row % p.heads, token = row / p.heads;
    const u32 query = token % p.queries, request = token / p.queries;

    const uint4* a = p.a.out + offset(p.a.out_strides, request, query, head);
    const uint4* b = p.b.out + offset(p.b.out_strides, request, query, head);
    uint4* merged = p.merged.out + offset(p.merged.out_strides, request, query, head);
    const float lse_a = p.a.lse[offset(p.a.lse_strides, request, head, query)];
    const float lse_b = p.b.lse[offset(p.b.lse_strides, request, head, query)];

    // Weights add up to 1; where neither part has a key there is nothing to weigh, and all is 0.
    const bool empty = lse_a == NEG_INF && lse_b == NEG_INF;
    const float lesser = empty ? 0.0f : expf(-fabsf(lse_a - lse_b));
    const float of_greater = empty ? 0.0f : 1.0f / (1.0f + lesser), of_lesser = lesser * of_greater;
    const float weight_a = lse_a < lse_b ? of_lesser : of_greater;
    const float weight_b = lse_a < lse_b ? of_greater : of_lesser;

    for (u32 start = lane; start < p.chunks; start += PASSES * 32) {
        uint4 from_a[PASSES], from_b[PASSES];
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const u32 i = start + pass * 32;
            if (i < p.chunks) {
                from_a[pass] = a[i];
                from_b[pass] = b[i];
            }
        }
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const u32 i = start + pass * 32;
            if (i < p.chunks) {
                const uint4 x = from_a[pass], y = from_b[pass];
                merged[i] = make_uint4(merge_word(weight_a, x.x, weight_b, y.x), merge_word(weight_a, x.y, weight_b, y.y),
                                       merge_word(weight_a, x.z, weight_b, y.z), merge_word(weight_a, x.w, weight_b, y.w));
            }
        }
    }

    __syncwarp();  // all lanes have read the parts' lse, which may be where this one goes
    if (lane == 0) p.merged.lse[offset(p.merged.lse_strides, request, head, query)] = fmaxf(lse_a, lse_b) + log1pf(lesser);
}

static_assert(sizeof(uint4) == 16 && sizeof(State) == 64 && sizeof(Params) == 208, "as in states.py");
