// The stream floor: brings the same pages into shared memory as mla_decode does, and computes nothing.
//
// One CTA on each SM takes an equal share of all key tiles; one thread keeps two stages of 64 keys in flight. No kernel
// that reads every page once can be faster than its loads.

#include "hopper/mbarrier.cuh"
#include "hopper/tma.cuh"

using namespace hopper;

constexpr int CHUNKS = 9;  // of 64 dims: 512 latent + 64 rope
constexpr int CHUNK_BYTES = 8192;  // 64 keys x 64 dims x 2 bytes
constexpr int STAGES = 2;

struct Params {
    TensorMap map;            // (576, page_size, num_pages), box 64 x 64 x 1
    const int* pages;         // page of every tile, in the order of the requests
    int tiles;
};

extern "C" __global__ void __launch_bounds__(32, 1) stream_floor(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char memory[];  // STAGES tiles of CHUNKS chunks; nobody reads them
    __shared__ u64 full[STAGES];                               // a stage's bytes have arrived
    if (threadIdx.x != 0) return;
    for (int i = 0; i < STAGES; ++i) mbarrier_init(shared_address(&full[i]), 1);
    mbarrier_init_fence();
    const int begin = int(static_cast<long long>(p.tiles) * blockIdx.x / gridDim.x);
    const int end = int(static_cast<long long>(p.tiles) * (blockIdx.x + 1) / gridDim.x);
    const u32 base = shared_address(memory);
    auto load = [&](int i) {
        const int stage = i % STAGES, page = p.pages[begin + i];
        const u32 barrier = shared_address(&full[stage]);
        mbarrier_arrive_expect(barrier, CHUNKS * CHUNK_BYTES);
        for (int j = 0; j < CHUNKS; ++j)
            tma_load_3d(base + (stage * CHUNKS + j) * CHUNK_BYTES, &p.map, barrier, j * 64, 0, page);
    };
    const int tiles = end - begin;
    for (int i = 0; i < STAGES && i < tiles; ++i) load(i);
    for (int i = 0; i < tiles; ++i) {
        mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES & 1);
        if (i + STAGES < tiles) load(i + STAGES);
    }
}
