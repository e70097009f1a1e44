// The paged KV cache's own kernels: new tokens into their slots, copies of pages, and a step's tables.
//
// A layer of the cache is a contiguous matrix, one row of latent + rope 16-bit elements a slot:
//     slot = page * page_size + offset in the page
// so writing does not know what a page is. Everything moves in chunks of 16 bytes (8 elements).

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int CHUNK_BYTES = 16;
constexpr int THREADS = 320;  // the most a block has
constexpr int PASSES = 4;     // chunks a thread has in flight

struct WriteParams {
    const char* latent;  // (tokens, latent dims), cache dtype or fp32, rows latent_stride bytes apart
    const char* rope;    // (tokens, rope dims), likewise
    const u32* slots;    // (tokens,) int32 or int64; a token whose slot is outside of the layer, -1 say, is skipped
    uint4* layer;        // (num_slots, row_chunks)
    long long latent_stride;
    long long rope_stride;
    u32 num_slots;  // below 2^31
    int tokens;
    int latent_chunks;  // of a row of the layer
    int row_chunks;
    int latent_is_fp32;
    int rope_is_fp32;
    int slots_are_int64;
    int is_bf16;  // otherwise the cache is fp16
};

// Two fp32 values, rounded to nearest even, as one pair of 16-bit elements; `low` comes first in memory.
__device__ __forceinline__ u32 round_pair(float low, float high, bool is_bf16) {
    u32 pair;
    if (is_bf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
}

// Eight fp32 values, given by their bits, as one chunk.
__device__ __forceinline__ uint4 round_chunk(uint4 low, uint4 high, bool is_bf16) {
    return make_uint4(round_pair(__uint_as_float(low.x), __uint_as_float(low.y), is_bf16),
                      round_pair(__uint_as_float(low.z), __uint_as_float(low.w), is_bf16),
                      round_pair(__uint_as_float(high.x), __uint_as_float(high.y), is_bf16),
                      round_pair(__uint_as_float(high.z), __uint_as_float(high.w), is_bf16));
}

// A thread owns one column of chunks. blockDim.x is a whole number of rows, and a block writes PASSES times as many.
extern "C" __global__ void __launch_bounds__(THREADS) kv_write(const __grid_constant__ WriteParams p) {
    const int column = threadIdx.x % p.row_chunks;
    const int rows = blockDim.x / p.row_chunks;
    const long long first = static_cast<long long>(blockIdx.x) * rows * PASSES + threadIdx.x / p.row_chunks;

    const bool is_rope = column >= p.latent_chunks;
    const bool is_fp32 = is_rope ? p.rope_is_fp32 : p.latent_is_fp32;
    const long long stride = is_rope ? p.rope_stride : p.latent_stride;
    const int chunk = is_rope ? column - p.latent_chunks : column;
    const char* source = (is_rope ? p.rope : p.latent) + chunk * CHUNK_BYTES * (is_fp32 ? 2 : 1);

    // All loads of all passes go out before the first of them is needed.
    const int slot_words = p.slots_are_int64 ? 2 : 1;
    uint4 low[PASSES], high[PASSES];  // an fp32 chunk is twice as long
    u32 slots[PASSES], slots_high[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const long long token = first + pass * rows;
        slots[pass] = p.num_slots;
        slots_high[pass] = 0;
        if (token < p.tokens) {
            const uint4* values = reinterpret_cast<const uint4*>(source + token * stride);
            low[pass] = __ldg(values);
            if (is_fp32) high[pass] = __ldg(values + 1);
            slots[pass] = __ldg(p.slots + token * slot_words);
            if (p.slots_are_int64) slots_high[pass] = __ldg(p.slots + token * slot_words + 1);
        }
    }
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        if (slots[pass] < p.num_slots && slots_high[pass] == 0) {
            p.layer[static_cast<u64>(slots[pass]) * p.row_chunks + column] =
                is_fp32 ? round_chunk(low[pass], high[pass], p.is_bf16) : low[pass];
        }
    }
}

struct CopyParams {
    const char* source;  // layers source_layer_bytes apart, pages page_bytes apart within a layer
    char* destination;
    long long source_layer_bytes;
    long long destination_layer_bytes;
    long long page_bytes;
    const int* copies;  // (from page, to page, tokens) of each copy, in pinned host memory
    int layers;
    int row_chunks;
};

// Block copy * layers + layer copies the filled rows of one page of one layer. Either side may be pinned host memory.
extern "C" __global__ void __launch_bounds__(THREADS) page_copy(const __grid_constant__ CopyParams p) {
    __shared__ int copy[3];  // one trip over the bus a block, not one a warp
    const int layer = blockIdx.x % p.layers;
    if (threadIdx.x < 3) copy[threadIdx.x] = p.copies[3 * (blockIdx.x / p.layers) + threadIdx.x];
    __syncthreads();

    const auto from =
        reinterpret_cast<const uint4*>(p.source + layer * p.source_layer_bytes + copy[0] * p.page_bytes);
    const auto to =
        reinterpret_cast<uint4*>(p.destination + layer * p.destination_layer_bytes + copy[1] * p.page_bytes);
    const long long chunks = static_cast<long long>(copy[2]) * p.row_chunks;
    for (long long start = threadIdx.x; start < chunks; start += PASSES * blockDim.x) {
        uint4 values[PASSES];
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const long long i = start + pass * blockDim.x;
            if (i < chunks) values[pass] = from[i];
        }
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const long long i = start + pass * blockDim.x;
            if (i < chunks) to[i] = values[pass];
        }
    }
}

struct UpdateParams {
    const int* staged;   // pinned host memory: `batch` lengths, then `entries` pairs (index in the table, page)
    int* cache_seqlens;  // (batch,)
    int* block_table;
    int batch;
    int entries;
};

// A thread brings one length or one entry of the block table.
extern "C" __global__ void __launch_bounds__(THREADS) batch_update(const __grid_constant__ UpdateParams p) {
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < p.batch) {
        p.cache_seqlens[i] = p.staged[i];
    } else if (i < p.batch + static_cast<long long>(p.entries)) {
        const int* entry = p.staged + p.batch + 2 * (i - p.batch);
        p.block_table[entry[0]] = entry[1];
    }
}

static_assert(CHUNK_BYTES == sizeof(uint4), "a chunk is one vector access");
