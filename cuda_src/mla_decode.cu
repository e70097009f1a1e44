// Multi-head latent attention decoding, transposed (FlashMLA-ETAP, arXiv 2506.01969): keys on wgmma's M, query rows on N.
//
//   S^T[64 keys, ROWS]  = K[64, latent + rope] Q^T            scores of one key tile
//   P^T                 = 2^(scale S^T - reference)           online softmax, along M
//   O^T[latent, ROWS]  += V^T[latent, 64 keys] P^T            V is the latent part of K: the same shared memory
//
// One CTA on each SM walks over its share of all key tiles (see schedule.py for the vocabulary). Its actors:
//
//   producer, three warps      bring key tiles in chunks of 64 dims x 64 keys (8 KiB) through a ring of SLOTS chunks
//   warpgroups 0 and 1         take the scores and softmax of even and odd tiles. Either they publish P^T to each other, and
//                              each accumulates one half of the latent dims of O^T for every tile; or, with OWN_TILES, each
//                              accumulates all dims for its own, and they exchange halves at the end of a segment
//   coordinator, one warp      tells other CTAs when this one's partial results are there, waits for theirs
//
// Shared memory               written by                read by               between them
//   ring[slot]                producer                  wgmma                 chunk_full (bytes, or lanes of the producing
//                                                                             warp), chunk_empty (4 warps)
//                             warps 4 to 7 (HeadStart)  wgmma                 the same
//                                                       nobody: passed over   chunk_full, chunk_empty (the coordinator, for
//                                                                             4 warps)
//                             a warpgroup, its half of  the other             sums_full, chunk_empty
//                             the other's O^T
//   q                         warpgroup 0               wgmma                 CONSUMER_BARRIER, q_empty (everyone below)
//   p[w]                      warpgroup w               wgmma of the other    p_full[w] (7 threads); free again because w
//                                                                             waits for the other's next P^T first
//                                                       wgmma of w            the warpgroup's barrier or vote, p_full[w]
//   p[0], if the only one     either                    wgmma of both         p_full; p_empty (8 warps)
//   shift, factor[w],         warpgroup w               both                  p_full[w]
//   rescale[w]
//   shift[w]                  warpgroup w               w                     the warpgroup's barrier
//                                                       both, coordinator     sums_full, q_empty
//   sums (where q was, or     both warpgroups           both, coordinator     sums_full (256 threads and the coordinator's
//   apart)                                                                    first lane), q_empty (256 threads and the
//                                                                             coordinator's 32)
//   partial results           both warpgroups           coordinator           elements_left (8 warps), for its arrival
//   start, walk               coordinator               everyone              __syncthreads
//   head_start                warp 4                    everyone              __syncthreads
//   shared_units              coordinator               both                  sums_full
//   arrivals                  coordinator               both                  met (the coordinator's first lane)
//   shares (ring)             both warpgroups           both                  CONSUMER_BARRIER
//
// Constants: IS_BF16, LATENT_DIM, ROPE_DIM, ROWS of a row tile, OWN_TILES (see below), and GENERAL, without which there are no
// ragged queries, no page lists and no pages smaller than a tile: to step over those took longer than anything else before the
// first load.
//
// A unit whose tiles are divided over several lanes leaves partial results in the workspace; the lanes that shared it meet at a
// counter, and those that end with it merge it together, each a fixed part, in the order of the lanes.

#include "hopper/async_copy.cuh"
#include "hopper/matrix.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/sync.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

using namespace hopper;
using i64 = long long;
using u16 = unsigned short;

template <bool FIRST, typename A, typename B>
struct Select {
    using Type = A;
};
template <typename A, typename B>
struct Select<false, A, B> {
    using Type = B;
};

constexpr int TILE_KEYS = 64;
constexpr int CHUNK_DIMS = 64;
constexpr int CHUNK_BYTES = TILE_KEYS * CHUNK_DIMS * 2;
constexpr int LATENT_CHUNKS = LATENT_DIM / CHUNK_DIMS;
constexpr int ROPE_CHUNKS = ROPE_DIM / CHUNK_DIMS;
constexpr int TILE_CHUNKS = ROPE_CHUNKS + LATENT_CHUNKS;  // in this order: rope chunks are free first
constexpr int OWN_BLOCKS = LATENT_CHUNKS / 2;             // blocks of 64 dims of O^T that a warpgroup is to finish
constexpr int COLUMN_GROUPS = ROWS / 8;                   // columns of S^T and O^T come in groups of eight
constexpr int Q_CHUNK_BYTES = ROWS * CHUNK_DIMS * 2;
constexpr int P_BYTES = ROWS * TILE_KEYS * 2;
constexpr int GROUP_PIECES = LATENT_CHUNKS * 4;  // of 16 dims x 8 columns: [block of 64 dims][warp]
constexpr int MERGE_PIECES = COLUMN_GROUPS * GROUP_PIECES;

// How the warpgroups divide the work.
//   otherwise   each takes the scores and the softmax of every other tile and accumulates its half of the dims for every tile
//   OWN_TILES   each sees to every other tile alone, to all dims of it, and what the two have accumulated comes together at the
//               end of a segment: less waiting for each other, which is what there is to gain where memory brings tiles faster
//               than they are multiplied, and more instructions at the end. Up to 32 rows: more would not fit in the registers
// schedule.py decides. Measured in one run on an H200, 16 requests of 16K, without and with: on 32 SMs 8 rows 140.6 and 116.3
// us, 16 152.7 and 127.5, 24 182.3 and 141.6, 32 190.9 and 155.5, 16 in fp16 165.5 and 153.3; 16 rows on 48 SMs 108.8 and 93.4,
// 64 88.8 and 81.1, 72 87.0 and 81.8, 80 84.5 and 84.2; 32 rows on 80 SMs 87.5 and 86.0; one request of 2K on 32 SMs 11.0 and
// 11.6. In others 96 SMs 82.7 and 85.1, 132 SMs 78.0 and 77.3, there 16 requests of 512 12.6 and 13.4, one 11.2 and 13.0, of
// which 1.0 is code behind a kernel's first 64 KB, slow the first time.
static_assert(!OWN_TILES || ROWS <= 32, "registers for all dims of O^T");
constexpr int OUTPUT_BLOCKS = OWN_TILES ? LATENT_CHUNKS : OWN_BLOCKS;  // that a warpgroup accumulates
constexpr __device__ int own(int b) { return OWN_TILES ? 2 * b : b; }  // which of them is the b-th that it is to finish

constexpr int WARPGROUP = 128;
constexpr int CONSUMERS = 2 * WARPGROUP;
constexpr int CONSUMER_WARPS = CONSUMERS / 32;
constexpr int PRODUCER_WARPS = 3;
constexpr int COORDINATOR_WARP = CONSUMER_WARPS + PRODUCER_WARPS;
constexpr int THREADS = (COORDINATOR_WARP + 1) * 32;
// Together what a CTA starts with, 3 * 168. NVRTC up to 12.4 needs more than 40 for the producers, with more rows than 32 more
// than 224 for the consumers; 12.9 needs more than 40 for the producers with any rows.
constexpr bool MORE_FOR_PRODUCERS = ROWS <= 32 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ == 9);
constexpr int PRODUCER_REGISTERS = MORE_FOR_PRODUCERS ? 56 : 40;
constexpr int CONSUMER_REGISTERS = MORE_FOR_PRODUCERS ? 224 : 232;
constexpr int WARPGROUP_BARRIER = 1;  // named barrier of one warpgroup: + its number
constexpr int CONSUMER_BARRIER = 3;   // of both

// How many powers of two a weight may exceed 1 by before the columns are rescaled. None in fp16, which is for accuracy: the
// heaviest weight is then exact (rmse, 16 requests of 4K: 1.07 times that of rounding the result; with 8 it is 1.2, on the CPU
// backend).
constexpr float MOST_GROWTH = IS_BF16 ? 8.0f : 0.0f;
constexpr float MOST_WEIGHT = IS_BF16 ? 256.0f : 1.0f;
#define NEG_INF (-__int_as_float(0x7f800000))

// Four elements of a partial result: of 16 dims x 8 columns those that a thread holds of a wgmma. For bf16 results they are
// kept in fp16, times a power of two of the warp that brings its largest between 2^14 and 2^15: the rounding is an eighth of
// the result's, and L2, which a merge waits for, moves half. For fp16 results it would be as large as theirs. Measured in one
// run on an H100, fp32 and fp16: 16 requests of 512 tokens 13.5 and 13.1 us, one of 8K 14.9 and 14.4, mixed lengths 75.4 and
// 74.5.
constexpr bool HALF_PARTIALS = IS_BF16;
constexpr int PARTIAL_TOP = 14;
using Quad = Select<HALF_PARTIALS, uint2, float4>::Type;
constexpr float MOST_FINITE = 3.402823466e38f;

constexpr int REFERENCES = OWN_TILES ? 2 : 1;  // one of each warpgroup, or one for both

// Sums of P^T at the end of a segment, [column][warp]. If the warpgroups share tiles they lie where Q was, which nobody needs
// any more: every score of the segment was published before.
using ColumnSums = float4[ROWS][CONSUMER_WARPS / 4];
struct WithQueries {};

struct Statistics {
    alignas(16) float warp_max[REFERENCES][ROWS][4];  // of a warpgroup's warps, while it takes the maxima of a tile's columns
    float shift[REFERENCES][ROWS];      // minus the reference, in the log2 domain; P^T = 2^(x + shift). MOST_FINITE, not
                                        // infinite, where no key was seen: so much less than nothing gives weight 0
    float factor[2][ROWS];              // of the rescaling before an even, an odd tile; not with OWN_TILES
    int rescale[2];                     // whether there is one
};

// Division by a number d that the host knows, 2^(shift - 1) < d <= 2^shift: floor(n * multiplier / 2^(31 + shift)) with
// multiplier = ceil(2^(31 + shift) / d) < 2^32 is exact for 0 <= n < 2^31.
struct Divider {
    u32 multiplier, shift;
    __device__ __forceinline__ int operator()(int n) const { return int(__umulhi(2 * u32(n), multiplier) >> shift); }
};

// How far entry `index` >= 0 lies from the first: two multiplications, where a signed index takes four.
__device__ __forceinline__ i64 offset(int index, i64 stride) { return i64(u64(u32(index)) * u64(stride)); }

// Of a partial result, beside the elements.
struct SlotStatistics {
    float2 columns[ROWS];          // reference, sum
    float scales[CONSUMER_WARPS];  // what the elements of each warp are to be multiplied with, with HALF_PARTIALS
};

struct Params {
    TensorMap latent_map;  // (dims, page_size, num_pages), box 64 x min(page_size, 64) x 1
    TensorMap rope_map;
    const u16* k_latent;  // what the maps describe
    const u16* k_rope;
    const u16* q_latent;
    const u16* q_rope;
    u16* out;
    float* lse;  // or null
    const int* block_table;  // or the pages of all requests, one list after the other
    const int* cache_seqlens;
    const int* cu_seqlens_q;        // or null: s_q queries a request
    const int* page_indptr;         // or null: block_table is a table
    Quad* partials;                 // [slot][column group][block of 64 dims][warp][lane of the warp]
    SlotStatistics* partial_stats;  // [slot]
    u32* counters;                  // [lane of the grid][row group][COUNTER_WORDS]; zero between launches
    i64 k_strides[2];               // elements, of (page, token)
    i64 k_rope_strides[2];
    i64 q_strides[3];               // elements, of (request, query token, head)
    i64 q_rope_strides[3];
    i64 out_strides[3];
    i64 lse_strides[3];
    i64 table_stride;
    i64 seqlens_stride;
    Divider by_heads, by_page_tiles, by_lanes, by_share, by_row_groups, by_passes;
    int batch;
    int s_q;
    int total_q;  // of all requests, with cu_seqlens_q
    int heads;
    int max_pages;       // columns of the table, or entries of the lists
    int table_capacity;  // tokens of a request whose row of the table is full
    int page_size;
    int page_tiles;  // key tiles of a page, 1 for pages smaller than a tile
    int tile_pages;  // pages of a key tile, 1 for pages that hold whole tiles
    int gather;      // pages are so small that threads copy the rows of a tile rather than the copy engine:
                     // log2(page_size) + 1, 0 for larger pages
    int lanes;
    int share;        // lanes of each unit when they are shared out evenly, 0 when there are more units than lanes
    int stack;        // units of each lane then, otherwise 1
    int even_lanes;   // lanes that are used when they are shared out evenly, or units are
    u32 spare_lanes;  // the others, as a part of all: times 2^32, rounded down
    int even_slack;   // tiles that the busiest of the lanes that share units may have more than in a row
    int row_groups;
    int passes;        // of a request with s_q queries
    int chunks_ahead;  // at least one, fewer than a tile has: see IN_TURNS
    int head_start_tiles;  // requests of up to so many tiles, all alike, are divided evenly: see HeadStart
    int causal;
    int q_vector_loads;  // every row of q starts on 16 bytes
    int patience;        // clock cycles a CTA waits for the lanes it shares a unit with
    float scale_log2;    // softmax_scale * log2(e)
    float lse_factor;    // from log2 to what the caller wants
    float lse_no_key;    // lse of a query that sees no key
    u64* trace;          // [CTA][TRACE_WORDS], with TRACE
};

// Of the unit that starts in a lane: arrivals, departures. Of the lane itself: whether it gave up waiting for the unit that it
// is to merge. A line of L2 for each lane, as many look at a word at once. Measured in one run on an H200, three words each and
// so: 16 requests of 4K 26.66 and 26.59 us, 32 of 2K 26.72 and 26.62, of 8K 76.26 and 76.13.
constexpr int LINE_WORDS = 32;  // of L2
constexpr int COUNTER_WORDS = LINE_WORDS;

__device__ __forceinline__ u32* counter_of(const Params& p, int lane, int row_group) {
    return p.counters + (lane * p.row_groups + row_group) * COUNTER_WORDS;
}

// Partial results: a lane has one slot for the unit it starts in the middle of, one for the unit it starts. Lanes that share
// a unit lie at a distance that the compiler knows.
constexpr int LANE_SLOTS = 2;

__device__ __forceinline__ int partial_slot(const Params& p, int lane, bool starts, int row_group) {
    return LANE_SLOTS * lane + (starts ? 1 : 0) + row_group * (LANE_SLOTS * p.lanes);
}

struct Range {
    int begin, count;
};

constexpr i64 MOST_TOKENS = 0x7fffffff;

// Entries [list[i], list[i + 1]) of an array of `limit`, whatever the list says.
__device__ __forceinline__ Range list_range(const int* list, int i, int limit) {
    const int begin = max(0, min(list[i], limit));
    return {begin, max(0, min(list[i + 1], limit) - begin)};
}

__device__ __forceinline__ Range queries_of(const Params& p, int request) {
    return GENERAL && p.cu_seqlens_q ? list_range(p.cu_seqlens_q, request, p.total_q) : Range{0, p.s_q};
}

__device__ __forceinline__ int passes_of(const Params& p, int request) {
    if (!GENERAL || !p.cu_seqlens_q) return p.passes;
    const int tiles = (queries_of(p, request).count * p.heads + ROWS - 1) / ROWS;
    return p.by_row_groups(tiles + p.row_groups - 1);
}

// A length as the caller gave it, and as it counts: of tokens that there are pages for.
__device__ __forceinline__ int given_seqlen(const Params& p, int request) {
    return p.cache_seqlens[offset(request, p.seqlens_stride)];
}
__device__ __forceinline__ int seqlen_within(int given, int capacity) { return max(0, min(given, capacity)); }

__device__ __forceinline__ int seqlen_of(const Params& p, int request) {
    int capacity = p.table_capacity;
    if (GENERAL && p.page_indptr)
        capacity = int(min(i64(list_range(p.page_indptr, request, p.max_pages).count) * p.page_size, MOST_TOKENS));
    return seqlen_within(given_seqlen(p, request), capacity);
}

__device__ __forceinline__ const int* pages_of(const Params& p, int request) {
    return p.block_table +
           (GENERAL && p.page_indptr ? list_range(p.page_indptr, request, p.max_pages).begin : offset(request, p.table_stride));
}

// When things happened in a CTA, for tools/trace.py; nothing at all unless compiled with TRACE.
enum TraceWord { TRACE_SM, TRACE_START, TRACE_FIRST_TILE, TRACE_LAST_TILE, TRACE_MERGE, TRACE_END, TRACE_WORDS };
#ifndef TRACE
#define TRACE 0
#endif

__device__ __forceinline__ void trace(const Params& p, TraceWord word) {
    if constexpr (TRACE) {
        if (threadIdx.x > 0) return;
        u64* words = p.trace + i64(blockIdx.x) * TRACE_WORDS;
        if (word == TRACE_START) {
            words[TRACE_SM] = sm_number();
            words[TRACE_FIRST_TILE] = words[TRACE_LAST_TILE] = words[TRACE_MERGE] = 0;
        }
        words[word] = global_time();
    }
}

__device__ __forceinline__ int unit_tiles_of(int seqlen) {
    return seqlen <= TILE_KEYS ? 1 : int((unsigned(seqlen) + TILE_KEYS - 1) / TILE_KEYS);
}

// `total` things divided over lanes: `base` each, the first `extra` lanes one more.
struct Division {
    int lanes, base, extra;

    __device__ __forceinline__ Division(int total, int lanes_, const Divider& by_lanes)
        : lanes(min(total, lanes_)), base(total < lanes_ ? 1 : by_lanes(total)), extra(total - base * lanes) {}
    __device__ __forceinline__ int begin(int lane) const { return lane * base + min(lane, extra); }
    __device__ __forceinline__ int lane_of(int index) const {
        const int wide = extra * (base + 1);
        const bool among_wide = index < wide;  // one division rather than two: its code is long
        return (among_wide ? 0 : extra) + (among_wide ? index : index - wide) / (among_wide ? base + 1 : base);
    }
};

// What a lane loses by starting on another unit, in tiles. Measured in one run on an H200 with 1, 2, 3, 4 and 6: mixed lengths
// 57.0, 53.8, 53.3, 53.3, 53.3 us and 67.1, 65.7, 65.1, 65.1, 64.9; 40 requests of 4K 56.3, 56.0, 56.5, 55.9, 57.0.
constexpr int SWITCH_TILES = 4;

// How much more than an equal share the busiest lane may get in the even division, if that spares everybody the merge, as a
// part of it and, with one unit a lane, in tiles. Measured on H100s, not in one run, 128 heads, 128 requests: of 8K 572 to
// 576 us with 253 cells a lane, 515 to 525 with 260 (two requests each); of 4K 329, and 275 to 278. On an H200, in one run, 16
// heads, 120 requests, in a row and evenly: of 2K 81.1 and 77.6 us, of 8K (11 tiles more) 271.8 and 278.8; 110 of 1K 44.2 and
// 40.9. Where lanes share units in any case, an equal share wins: 24 requests of 8K (2 tiles more) 64.0 and 65.4, of 16K (5
// more) 113.7 and 119.4, 40 of 4K (2 more) 55.7 and 56.8; with equal shares the even division: 16 requests of 16K 78.8 and
// 77.7. So it does with a tile more where nearly all lanes are used (even_slack), as it starts earlier and every lane has one
// segment: 16 requests of 32K, in a row and evenly, 145.9 and 145.2; of 64K (3 more) 280.0 and 280.4, 32 of 64K (6 more) 546.7
// and 549.5.
constexpr int EVEN_SLACK_LOG2 = 3;
constexpr int WHOLE_SLACK = 6;

// How the tiles are divided, found by the prologue (schedule.py: divide).
//   even       every unit gets the same number of lanes, every lane at most one segment; with more units than lanes every lane
//              gets the same number of units
//   otherwise  all units stand in a row, SWITCH_TILES empty cells before each (none when there are fewer tiles than lanes),
//              and every lane gets the same number of cells
struct Start {
    int even;
    int gap;    // empty cells before each unit
    int cells;  // of all units
};

// Where a lane starts if the division is even: known before the lengths are.
struct EvenStart {
    int unit, index;  // its first unit; the index-th of the lanes that share it
    int request, pass;

    __device__ __forceinline__ EvenStart(const Params& p, int lane)
        : unit(p.share ? p.by_share(lane) : lane * p.stack),
          index(p.share ? lane - unit * p.share : 0),
          request(p.by_passes(unit)),
          pass(unit - request * p.passes) {}
};

// Walks over the segments of one lane. Every warp keeps one, the same in all its threads.
struct Walk {
    int request, pass, passes;
    int seqlen;
    int unit_begin, unit_tiles;  // first cell after the gap, tiles of the segment's unit
    int tile_begin, tile_end;    // of the segment, within the unit
    int end;                     // of the lane's cells; when the division is even, each of its units is a cell

    // With an even division; `request` and its `seqlen` are there.
    __device__ __forceinline__ void start_evenly(const Params& p, const EvenStart& even) {
        look_at_request(p);
        pass = even.pass;
        const Division division(unit_tiles, max(1, p.share), p.by_share);
        const bool used = request < p.batch && even.index < division.lanes;
        unit_begin = 0;
        end = min(p.stack, p.batch * p.passes - even.unit);
        tile_begin = used ? division.begin(even.index) : 0;
        tile_end = used ? division.begin(even.index + 1) : 0;
    }
    // With cells [begin, lane_end) of all units; the first pass over `request` begins at `first`, gap included.
    __device__ __forceinline__ void start_in_a_row(const Params& p, const Start& start, int first, int begin, int lane_end) {
        look_at_request(p);
        const int unit_cells = unit_tiles + start.gap;
        pass = passes > 1 ? (begin - first) / unit_cells : 0;
        unit_begin = first + pass * unit_cells + start.gap;
        end = lane_end;
        tile_begin = max(0, begin - unit_begin);
        tile_end = min(unit_tiles, end - unit_begin);
        if (begin < lane_end && tile_end <= tile_begin) next(p, start);  // all of it lies in gaps, or this unit's part of it
    }
    __device__ __forceinline__ bool active() const { return tile_begin < tile_end; }
    __device__ __forceinline__ bool starts() const { return tile_begin == 0; }
    __device__ __forceinline__ bool ends() const { return tile_end == unit_tiles; }
    __device__ __forceinline__ bool whole() const { return starts() && ends(); }
    // Whether the segment is the lane's last one, as far as that is easily seen: it may be although this says no, and with an
    // even division where lanes have several units each of them counts.
    __device__ __forceinline__ bool surely_last(const Start& start) const { return start.even || !ends(); }
    // Tiles of the segment that hold keys: a request without keys owns one tile that does not.
    __device__ __forceinline__ int key_tiles() const { return seqlen == 0 ? 0 : tile_end - tile_begin; }

    __device__ __forceinline__ void next(const Params& p, const Start& start) {
        unit_begin += start.even ? 1 : unit_tiles + start.gap;
        tile_begin = tile_end = 0;
        if (unit_begin >= end) return;
        if (++pass == passes) {
            pass = 0;
            do {
                ++request;
                seqlen = request < p.batch ? seqlen_of(p, request) : 0;
                look_at_request(p);
            } while (passes == 0);
        }
        tile_end = start.even ? unit_tiles : min(unit_tiles, end - unit_begin);
        make_uniform();
    }
    // The compiler keeps in uniform registers only what it knows to be the same in all threads of the warp.
    __device__ __forceinline__ void make_uniform() {
        request = uniform(request);
        pass = uniform(pass);
        passes = uniform(passes);
        seqlen = uniform(seqlen);
        unit_begin = uniform(unit_begin);
        unit_tiles = uniform(unit_tiles);
        tile_begin = uniform(tile_begin);
        tile_end = uniform(tile_end);
        end = uniform(end);
    }

private:
    __device__ __forceinline__ void look_at_request(const Params& p) {
        passes = request < p.batch ? passes_of(p, request) : 1;
        unit_tiles = unit_tiles_of(seqlen);
    }
};

// What a warp keeps while it goes through the segments of its lane, the same in all its threads.
struct Progress {
    Walk walk;
    int lane, row_group;
    bool first;        // whether the segment is the lane's first
    u32 phase;         // of what happens once a segment
    int shared_units;  // that it has left partial results of. At most two: the one it starts in the middle of and the one it
                       // does not finish

    __device__ __forceinline__ void next_segment(const Params& p, const Start& start) {
        walk.next(p, start);
        first = false;
        phase ^= 1;
    }
};

// In registers, for NVRTC up to 12.4 in shared memory: they keep it in those of every thread and have too few beside the
// accumulators, where newer ones use registers that the threads of a warp share.
constexpr bool PROGRESS_IN_MEMORY = __CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ < 5 && ROWS > 16;

// Whether warpgroups that share tiles vote on moving the references before they take the weights, as is best in fp16, where
// they move with many a tile. In bf16 they hardly ever do after the first: the weights are taken with what there is, and a vote
// finds whether to take them again. Measured on H200s: fp16, 16 requests of 2K, a vote before and after 20.0 and 20.4 us; bf16,
// 128 heads, 128 requests of 8K, a vote before and none at all 485.6 and 475.9. NVRTC up to 12.4 and 12.9 have too few
// registers with 64 rows to vote after.
constexpr bool VOTE_FIRST = !IS_BF16 || (ROWS > 32 && (PROGRESS_IN_MEMORY || MORE_FOR_PRODUCERS));

// A unit that several lanes share, for the merge.
struct SharedUnit {
    int request, pass;
    int first_lane, members;
    int mergers;  // the first of the members: all, but the last one only if this unit is also the last of its lane
};

// With IN_TURNS warpgroups that share tiles multiply first what the other one waits for: what is left of a tile's scores before
// the first chunks of the next tile; and who has the next tile's scores to go on with begins the outputs of this one a block
// before the other. Measured on H200s: scores in turns 64 heads, 128 requests of 4K, 157.1 and 154.6 us, 128 heads, 8K, 505.1
// and 502.6; outputs in turns 128 heads 501.3 and 488.1. There is one buffer for P^T, not two, and one slot more in the ring:
// 64 heads 153.5 and 152.1. Up to 32 rows nothing is gained, up to 16 it takes 1 percent longer.
//
// Chunks of its next tile that a warpgroup multiplies before it turns to the tile in between (chunks_ahead): products for the
// time of the other's softmax, but they stay in the ring until the outputs of their tile. Measured in one run on an H200, 0, 1,
// 2, 3, 4 chunks: 64 heads, 128 requests of 4K, 153.2, 153.3, 155.2, 156.9, 159.0 us; 32 requests of 8K with 4 queries each
// 84.4, 84.2, 85.0, 85.7, 86.6; where products are scarcer than memory, 128 heads, 8K, 493, 485, 480, 480, 490, and 64 heads,
// 16 requests of 16K on 32 SMs 238.3, 233.4, 228.8, 228.0, 230.3; where the ring has room, 32 heads, 128 requests of 4K, 150.1,
// 149.7, 149.5, 149.2, 149.2. To go on until P^T of the tile in between is there, by a vote of the warpgroup before every 1, 3,
// 5 or 9 chunks, took up to 30 percent longer where products are scarce. With 16 rows, which wait for memory, the outputs of
// the tile before are held up by more chunks than have arrived when its weights are there. The whole tile, 7, 5, 3 chunks: 16
// requests of 1K 14.74, 14.38, 14.43, 14.35 us, of 4K 27.18, 26.96, 26.56, 26.78, of 8K 43.74, 43.58, 43.17, 43.31; 5, 4, 3:
// of 4K 27.04, 26.88, 26.78, of 16K 78.08, 77.89, 77.73, 32 of 2K 27.01, 26.82, 26.69; 3, 2, 1: 16 of 1K 14.34, 14.05, 14.14,
// of 4K 26.94, 26.96, 26.93, of 16K 78.08, 77.95, 78.02, 32 of 512 14.29, 13.98, 14.02, of 8K 78.06, 77.90, 78.10. That is so
// since fewer chunks are asked for at the end (LAST_TILES); before, it gained nothing.
constexpr bool IN_TURNS = ROWS > 16;
constexpr int P_BUFFERS = IN_TURNS && !OWN_TILES ? 1 : 2;

constexpr int SHARED_LIMIT = 232448;
constexpr int FIXED_BYTES =
    TILE_CHUNKS * Q_CHUNK_BYTES + P_BUFFERS * P_BYTES + sizeof(Statistics) +
    sizeof(Select<OWN_TILES, ColumnSums, WithQueries>::Type) + sizeof(Start) + sizeof(Walk) +
    (PROGRESS_IN_MEMORY ? THREADS / 32 : 1) * sizeof(Progress) + 2 * sizeof(SharedUnit) + 12 * 8;
constexpr int SLOTS = (SHARED_LIMIT - FIXED_BYTES) / (CHUNK_BYTES + 2 * 8);
static_assert(SLOTS >= 2 * TILE_CHUNKS - ROPE_CHUNKS, "two tiles have to fit, less what is free after the scores");

// Chunks of its last tile in which a warpgroup with OWN_TILES leaves its share of the other's dims, in fp32.
constexpr int EXCHANGE_CHUNKS = (OWN_BLOCKS * CHUNK_DIMS * ROWS * 4 + CHUNK_BYTES - 1) / CHUNK_BYTES;
static_assert(!OWN_TILES || SLOTS >= 2 * TILE_CHUNKS, "from a tile to the one after next is once round the ring at most");

struct Shared {
    unsigned char ring[SLOTS][CHUNK_BYTES];
    unsigned char q[TILE_CHUNKS][Q_CHUNK_BYTES];
    unsigned char p[P_BUFFERS][P_BYTES];
    u64 chunk_full[SLOTS];
    u64 chunk_empty[SLOTS];
    u64 p_full[2];
    u64 met[2];
    u64 sums_full, q_empty, elements_left, p_empty, scores_turn, output_turn;
    Start start;
    Walk walk;  // of the first segment
    Progress progress[PROGRESS_IN_MEMORY ? THREADS / 32 : 1];  // of each warp
    SharedUnit shared_units[2];
    u32 head_start;   // whether there is one
    u32 arrivals[2];  // of the shared units, as the coordinator saw them last
    Statistics statistics;
    Select<OWN_TILES, ColumnSums, WithQueries>::Type sums;
};
static_assert(sizeof(Shared) <= SHARED_LIMIT, "shared memory of a CTA");

// The progress of a warp, wherever it is kept.
template <bool IN_MEMORY>
class Kept {
public:
    __device__ __forceinline__ Kept(Shared&, const Progress& start) : progress(start) {}
    __device__ __forceinline__ const Progress* operator->() const { return &progress; }
    template <typename Change>
    __device__ __forceinline__ void change(const Change& how) {
        how(progress);
    }

private:
    Progress progress;
};

template <>
class Kept<true> {
public:
    __device__ __forceinline__ Kept(Shared& shared, const Progress& start) : s(shared) {
        get() = start;
        __syncwarp();
    }
    __device__ __forceinline__ const Progress* operator->() const { return &get(); }
    template <typename Change>
    __device__ __forceinline__ void change(const Change& how) {
        Progress changed = get();
        how(changed);
        __syncwarp();
        get() = changed;
        __syncwarp();
    }

private:
    // The thread is asked for anew each time: the address would be kept in a register, which is what this is to spare.
    __device__ __forceinline__ Progress& get() const { return s.progress[thread_again() / 32]; }

    Shared& s;
};

using WarpProgress = Kept<PROGRESS_IN_MEMORY>;

// What follows from a warp's progress: worked out once, or, where registers are scarce, whenever it is asked for.
template <typename Value>
__device__ __forceinline__ auto derived(const Value& value) {
    if constexpr (PROGRESS_IN_MEMORY) {
        return value;
    } else {
        const auto once = value();
        return [once] { return once; };
    }
}

// Chunks go round the ring in the order they are used; every time round flips the parity of a slot's barriers.
struct Place {
    int slot;
    u32 parity;

    __device__ __forceinline__ Place(int slot_, u32 parity_) : slot(slot_), parity(parity_) {}
    __device__ __forceinline__ Place ahead(int chunks) const {
        const bool wrap = slot + chunks >= SLOTS;
        return {slot + chunks - (wrap ? SLOTS : 0), parity ^ u32(wrap)};
    }
    __device__ __forceinline__ Place back(int chunks) const {
        const bool wrap = slot < chunks;
        return {slot - chunks + (wrap ? SLOTS : 0), parity ^ u32(wrap)};
    }
};

// ---------------------------------------------------------------------------------------------- prologue

// The consumer warps from this one on load one chunk each ahead: see HeadStart.
constexpr int HEAD_START_WARP = WARPGROUP / 32;
constexpr int HEAD_START = CONSUMER_WARPS - HEAD_START_WARP;

__device__ __forceinline__ void init_slot(const Params& p, Shared& s, int slot) {
    mbarrier_init(shared_address(&s.chunk_full[slot]), GENERAL && p.gather ? 32 : 1);
    mbarrier_init(shared_address(&s.chunk_empty[slot]), 4);
}

// By one thread of each consumer warp: an initialisation takes some 30 cycles, and the rest waits for it. The slots that a warp
// fills in a head start are its own, the rest are dealt out to the others.
__device__ __forceinline__ void init_barriers(const Params& p, Shared& s, int warp) {
    if (threadIdx.x % 32 > 0) return;
    if (warp >= HEAD_START_WARP) {
        init_slot(p, s, warp - HEAD_START_WARP);
        if (warp == HEAD_START_WARP) s.head_start = 0;
    } else {
#pragma unroll 1
        for (int i = HEAD_START + warp; i < SLOTS; i += HEAD_START_WARP) init_slot(p, s, i);
    }
    if (warp < 2) {
        if constexpr (!OWN_TILES) mbarrier_init(shared_address(&s.p_full[warp]), 4 + 3);
        mbarrier_init(shared_address(&s.met[warp]), 1);
    }
    if (warp == 2) {
        mbarrier_init(shared_address(&s.sums_full), CONSUMERS + 1);
        mbarrier_init(shared_address(&s.q_empty), CONSUMERS + 32);
        mbarrier_init(shared_address(&s.elements_left), CONSUMER_WARPS);
    }
    if (!OWN_TILES && IN_TURNS && warp == 3) {
        mbarrier_init(shared_address(&s.p_empty), CONSUMER_WARPS);
        mbarrier_init(shared_address(&s.scores_turn), WARPGROUP / 32);
        mbarrier_init(shared_address(&s.output_turn), WARPGROUP / 32);
    }
    mbarrier_init_fence();
}

// How the tiles are divided and where this lane starts: a scan over the lengths by each warp that asks, for itself. Thread l
// takes the l-th block of requests.
__device__ __forceinline__ Walk find_walk(const Params& p, int lane, Start& start) {
    constexpr int TOO_LONG = 1 << 30;  // to be shared out evenly: a request of other passes than the host counted on
    const int l = threadIdx.x % 32;
    const int each = int(u32(p.batch + 31) / 32);
    const int begin = min(l * each, p.batch), end = min(begin + each, p.batch);
    int seqlen = begin < end ? seqlen_of(p, begin) : 0;
    const EvenStart even(p, lane);
    Walk walk;
    walk.request = even.request;
    walk.seqlen = walk.request < p.batch ? seqlen_of(p, walk.request) : 0;
    int tiles = 0, units = 0, longest = 0;
#pragma unroll 1
    for (int r = begin; r < end; ) {
        const int passes = passes_of(p, r), unit_tiles = unit_tiles_of(seqlen);
        units += passes;
        tiles += passes * unit_tiles;
        longest = max(longest, !GENERAL || passes == p.passes ? unit_tiles : TOO_LONG);
        if (++r < end) seqlen = seqlen_of(p, r);
    }
    const int total = __reduce_add_sync(~0u, tiles);
    longest = __reduce_max_sync(~0u, longest);
    start.gap = total > p.lanes ? SWITCH_TILES : 0;
    start.cells = total + start.gap * (GENERAL ? int(__reduce_add_sync(~0u, units)) : p.batch * p.passes);
    const int in_a_row = p.by_lanes(start.cells + p.lanes - 1);
    const int slack = p.share > 1 ? p.even_slack : min(in_a_row >> EVEN_SLACK_LOG2, p.share ? WHOLE_SLACK : in_a_row);
    const i64 evenly = p.share ? p.by_share(longest + p.share - 1) : i64(p.stack) * (longest + start.gap);
    start.even = (!GENERAL || longest < TOO_LONG) && evenly <= in_a_row + slack;
    if (start.even) {
        walk.start_evenly(p, even);
        return walk;
    }
    const int own = tiles + start.gap * units;
    int after = own;  // cells up to and with this thread's
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int below = __shfl_up_sync(~0u, after, d);
        if (l >= d) after += below;
    }
    const Division division(start.cells, p.lanes, p.by_lanes);
    const int target = division.begin(lane);
    const u32 found = __ballot_sync(~0u, target >= after - own && target < after);
    const int source = found ? __ffs(found) - 1 : 31;
    int first = __shfl_sync(~0u, after - own, source);
    walk.request = found ? __shfl_sync(~0u, begin, source) : p.batch;
    // With one request a thread the length is here; to load it again would take some hundred cycles.
    walk.seqlen = !found ? 0 : each == 1 ? __shfl_sync(~0u, seqlen, source) : seqlen_of(p, walk.request);
    while (each > 1 && walk.request < p.batch) {
        const int cells = (unit_tiles_of(walk.seqlen) + start.gap) * passes_of(p, walk.request);
        if (target < first + cells) break;
        first += cells;
        ++walk.request;
        walk.seqlen = walk.request < p.batch ? seqlen_of(p, walk.request) : 0;
    }
    walk.start_in_a_row(p, start, first, target, lane < division.lanes ? division.begin(lane + 1) : target);
    return walk;
}

// Has brought to L2 what will be read one after the other: the lengths, the table, the tensor maps, and the words at which
// this lane meets others. Most batches are even enough that the lane's share of the requests is also where it starts.
__device__ __forceinline__ void prefetch_inputs(const Params& p, int lane, int row_group) {
    const int l = threadIdx.x % 32;
    if (l * LINE_WORDS < p.batch) prefetch_l2(p.cache_seqlens + offset(l * LINE_WORDS, p.seqlens_stride));
    if (l * LINE_WORDS < p.max_pages)
        prefetch_l2(p.block_table + offset(p.by_lanes(lane * p.batch), p.table_stride) + l * LINE_WORDS);
    if (l == 0) {
        tma_prefetch_map(&p.latent_map);
        tma_prefetch_map(&p.rope_map);
        prefetch_l2(counter_of(p, lane, row_group));
    }
}

// ---------------------------------------------------------------------------------------------- producer

// In the last tiles of its last segment a CTA asks for no more than so many chunks at a time. If it asked for all that it has
// room for, they would arrive together, to be multiplied one tile after the other when nothing else is left to do, and they
// would take from the memory what lanes that are behind need more. Measured on H200s, each in one run: without, and with 7
// chunks in the last three tiles of every segment, 16 requests of 2K 19.15 and 18.86 us, of 8K 44.03 and 43.57, of 64K 272.0
// and 271.3, 32 of 8K 77.06 and 76.37, mixed lengths 50.91 and 50.54, 59.74 and 59.23; with 4 chunks in three tiles 19.60,
// 44.51, 274.7, 77.36, 53.06, 62.21; with 13 in all tiles as with 7 up to 8K, from 16K on 1 percent longer than without. In
// every segment, and in the last one only: 16 requests of 32K 145.7 and 145.0, mixed lengths 51.41 and 51.15, 63.36 and 62.78.
// There, three, four, five tiles: 16 requests of 8K 43.25, 43.42, 43.50, of 16K 78.10, 77.89, 77.82, of 32K 144.5, 144.2,
// 144.5, mixed lengths 62.74, 62.35, 62.53; 10 chunks in five 43.86, 78.14, 145.0, 63.09. With OWN_TILES it takes longer: 32
// SMs 124.0 and 124.6.
//
// Each warp waits for the chunk so far before its own, by the parity of its slot's barrier: the next chunk in that slot has to
// be the same warp's, or it might be there before the warp has looked.
constexpr int LAST_TILES = 4;
constexpr int LAST_IN_FLIGHT = 6 + SLOTS % PRODUCER_WARPS;
constexpr bool LAST_LIMITED = !OWN_TILES && TILE_CHUNKS % PRODUCER_WARPS == 0;
static_assert(!LAST_LIMITED || (SLOTS - LAST_IN_FLIGHT) % PRODUCER_WARPS == 0, "its next chunk is the same warp's");

// Brings every PRODUCER_WARPS-th chunk of one tile that lies in `parts` pages. Thread l of the warp copies parts l and
// l + 32, of `page` and `second`. What it brings makes room in L2 before anything else does. Measured in one run on an H200, as
// anything else and so: mixed lengths 52.3 and 51.1, 61.4 and 59.8, 63.6 and 61.7 us, 16 requests of 64K 274.9 and 272.2, 32
// requests of 8K with the same pages 43.6 and 43.7, with the same first 4K 50.2 and 49.9.
__device__ __forceinline__ void produce_tile(const Params& p, Shared& s, const Place& first, int parts, int token, int page,
                                             int second, bool near_end) {
    const int l = threadIdx.x % 32, warp = uniform(threadIdx.x / 32 - CONSUMER_WARPS);
    const u32 part_bytes = CHUNK_BYTES / u32(parts);
#pragma unroll 1
    for (int j = warp; j < TILE_CHUNKS; j += PRODUCER_WARPS) {
        const Place place = first.ahead(j);
        const u32 full = shared_address(&s.chunk_full[place.slot]);
        if (LAST_LIMITED && near_end) {
            const Place before = place.back(LAST_IN_FLIGHT);
            mbarrier_wait(shared_address(&s.chunk_full[before.slot]), before.parity);
        }
        mbarrier_wait(shared_address(&s.chunk_empty[place.slot]), place.parity ^ 1);
        if (l == 0) mbarrier_arrive_expect(full, CHUNK_BYTES);
        __syncwarp();
        const TensorMap* map = j < ROPE_CHUNKS ? &p.rope_map : &p.latent_map;
        const int dim = (j < ROPE_CHUNKS ? j : j - ROPE_CHUNKS) * CHUNK_DIMS;
        const u32 target = shared_address(s.ring[place.slot]);
        if (l < parts) tma_load_3d(target + l * part_bytes, map, full, dim, token, page);
        if (l + 32 < parts) tma_load_3d(target + (l + 32) * part_bytes, map, full, dim, token, second);
    }
}

// The same for pages of few tokens, row by row: eight threads copy the 128 bytes of a row. Thread l holds the pages of
// parts l and l + 32. Rows past the `keys` of the request are cleared, not read.
__device__ __forceinline__ void gather_tile(const Params& p, Shared& s, const Place& first, int page, int second, int keys) {
    const int l = threadIdx.x % 32, warp = uniform(threadIdx.x / 32 - CONSUMER_WARPS);
    const int piece = l % 8, shift = p.gather - 1;
    constexpr int UNROLL = ROWS <= 32 ? 8 : PROGRESS_IN_MEMORY ? 1 : 2;  // as many as the registers of a producer allow
#pragma unroll 1
    for (int j = warp; j < TILE_CHUNKS; j += PRODUCER_WARPS) {
        const Place place = first.ahead(j);
        const bool rope = j < ROPE_CHUNKS;
        const u16* source = (rope ? p.k_rope + j * CHUNK_DIMS : p.k_latent + (j - ROPE_CHUNKS) * CHUNK_DIMS) + piece * 8;
        const i64 page_stride = rope ? p.k_rope_strides[0] : p.k_strides[0];
        const int token_stride = int(rope ? p.k_rope_strides[1] : p.k_strides[1]);  // see arguments.py for its limit
        const u32 target = shared_address(s.ring[place.slot]) + l / 8 * 128;
        mbarrier_wait(shared_address(&s.chunk_empty[place.slot]), place.parity ^ 1);
#pragma unroll UNROLL
        for (int i = 0; i < TILE_KEYS / 4; ++i) {
            const int row = i * 4 + l / 8, part = row >> shift;
            const int id = __shfl_sync(~0u, part < 32 ? page : second, part % 32);
            copy_16_bytes(target + i * 4 * 128 + ((piece ^ (row & 7)) << 4),
                          source + id * page_stride + (row - (part << shift)) * token_stride, row < keys);
        }
        copy_arrive(shared_address(&s.chunk_full[place.slot]));
    }
}

// What the threads of a producing warp know of a segment's pages: with whole tiles in a page, thread l that of tile i + l;
// otherwise parts l and l + 32 of tile i. Past the last page of the request the first of the tile once more: the barrier
// counts whole chunks, and what lies there is never used.
struct Pages {
    int page = 0, second = 0;

    Pages() = default;
    __device__ __forceinline__ Pages(const Params& p, const Walk& walk, int i) {
        const int l = threadIdx.x % 32, tiles = walk.key_tiles();
        if (i >= tiles) return;
        const int* table = pages_of(p, walk.request);
        if (!GENERAL || p.tile_pages == 1) {
            if (i + l < tiles) page = table[p.by_page_tiles(walk.tile_begin + i + l)];
        } else {
            const int first = (walk.tile_begin + i) * p.tile_pages;
            auto page_of = [&](int part) {
                const bool used = part < p.tile_pages && (first + part) * p.page_size < walk.seqlen;
                return table[first + (used ? part : 0)];
            };
            page = page_of(l);
            second = page_of(l + 32);
        }
    }
};

// Token within its page where a tile begins.
__device__ __forceinline__ int first_token(const Params& p, int tile) {
    return (tile - p.by_page_tiles(tile) * p.page_tiles) * TILE_KEYS;
}

// The first tile, if it lies in one page, apart from the loops over all others: without them the barriers are told what to
// expect while the number of the page is on its way, and the loads leave together. If a head start has loaded the first chunks,
// the others.
__device__ __forceinline__ bool produce_first_tile(const Params& p, Shared& s, const Walk& walk, int warp, int token, int page,
                                                   int first_slot, bool started) {
    if ((GENERAL && p.tile_pages > 1) || walk.key_tiles() == 0) return false;
    if (threadIdx.x % 32 > 0) return true;
    const auto to_load = [&](int i) {  // of the chunks i, i + 1 ... this warp's
        const int j = i + warp;
        return (i + PRODUCER_WARPS <= TILE_CHUNKS || j < TILE_CHUNKS) && (i >= HEAD_START || j >= HEAD_START || !started);
    };
#pragma unroll
    for (int i = 0; i < TILE_CHUNKS; i += PRODUCER_WARPS)
        if (to_load(i)) mbarrier_arrive_expect(shared_address(&s.chunk_full[first_slot + i + warp]), CHUNK_BYTES);
#pragma unroll
    for (int i = 0; i < TILE_CHUNKS; i += PRODUCER_WARPS) {
        const int j = i + warp;
        if (to_load(i))
            tma_load_3d(shared_address(s.ring[first_slot + j]),
                        i < ROPE_CHUNKS && j < ROPE_CHUNKS ? &p.rope_map : &p.latent_map,
                        shared_address(&s.chunk_full[first_slot + j]),
                        (j < ROPE_CHUNKS ? j : j - ROPE_CHUNKS) * CHUNK_DIMS, token, page);
    }
    return true;
}

// A head start: while the producers find out how the tiles are divided, warps with nothing to do yet load the first chunks of
// the lane's first tile as if the division were even. It is if the requests are alike, of which the warp looks at some; should
// it turn out that it is not, everybody passes over these chunks. Measured in one run on an H200, without and with: 16 requests
// of 512 13.12 and 12.80 us, of 2K 19.58 and 19.18, of 8K 45.23 and 44.83, 32 of 512 15.50 and 14.74; mixed lengths, of which
// none got one, 52.13 and 52.18, 61.09 and 61.04. One that did not look at other requests: mixed lengths 51.9 and 52.4. Those
// were three chunks; three, four and eight, one by each warp: 16 requests of 512 12.22, 12.03 and 12.45, of 1K 14.69, 14.51 and
// 14.78, of 2K 18.27, 18.08 and 18.37, from 8K on alike.
struct HeadStart {
    int own = 0, other = 0;  // lengths: of the request with which the lane starts; of another, in each thread a different one

    HeadStart() = default;
    // Asks for what it needs to know.
    __device__ __forceinline__ HeadStart(const Params& p, const EvenStart& even)
        : own(given_seqlen(p, min(even.request, p.batch - 1))),
          other(given_seqlen(p, min(int(threadIdx.x % 32), p.batch - 1))) {}

    // Loads chunk j.
    __device__ __forceinline__ void load(const Params& p, Shared& s, const EvenStart& even, int j) const {
        const int seqlen = seqlen_within(own, p.table_capacity), tiles = unit_tiles_of(seqlen);
        const Division division(tiles, max(1, p.share), p.by_share);
        const bool used = even.request < p.batch && even.index < division.lanes;
        if (!used || seqlen == 0 || tiles > p.head_start_tiles) return;
        const int tile = division.begin(even.index);
        const int page = pages_of(p, even.request)[p.by_page_tiles(tile)];
        // While it is on its way.
        if (!__all_sync(~0u, unit_tiles_of(seqlen_within(other, p.table_capacity)) == tiles)) return;
        if (threadIdx.x % 32 > 0) return;
        if (j == 0) s.head_start = 1;
        const u32 full = shared_address(&s.chunk_full[j]);
        mbarrier_arrive_expect(full, CHUNK_BYTES);
        tma_load_3d(shared_address(s.ring[j]), j < ROPE_CHUNKS ? &p.rope_map : &p.latent_map, full,
                    (j < ROPE_CHUNKS ? j : j - ROPE_CHUNKS) * CHUNK_DIMS, first_token(p, tile), page);
    }
};

// `pages` are the first of the first segment, of which `begun` tiles are on their way.
__device__ __forceinline__ void produce(const Params& p, Shared& s, const Progress& start_of_lane, Pages pages, int begun,
                                        int first_slot) {
    WarpProgress now(s, start_of_lane);
    Place place(first_slot + begun * TILE_CHUNKS, 0);
    while (now->walk.active()) {
        const int tiles = now->walk.key_tiles();
        const bool last = now->walk.surely_last(s.start);
        if (!GENERAL || p.tile_pages == 1) {
            for (int group = 0; group < tiles; group += 32) {
                const Pages next(p, now->walk, group + 32);
                const int count = min(32, tiles - group);
                for (int i = begun; i < count; ++i) {
                    const int page = __shfl_sync(~0u, pages.page, i);
                    const int tile = group + i;
                    produce_tile(p, s, place, 1, first_token(p, now->walk.tile_begin + tile), page, page,
                                 last && tiles - tile <= LAST_TILES);
                    place = place.ahead(TILE_CHUNKS);
                }
                begun = 0;
                pages = next;
            }
        } else {
            for (int i = 0; i < tiles; ++i) {
                const Pages next(p, now->walk, i + 1);
                if (p.gather)
                    gather_tile(p, s, place, pages.page, pages.second,
                                now->walk.seqlen - (now->walk.tile_begin + i) * TILE_KEYS);
                else
                    produce_tile(p, s, place, p.tile_pages, 0, pages.page, pages.second,
                                 last && tiles - i <= LAST_TILES);
                place = place.ahead(TILE_CHUNKS);
                pages = next;
            }
        }
        now.change([&](Progress& progress) { progress.next_segment(p, s.start); });
        pages = Pages(p, now->walk, 0);
    }
}

// ---------------------------------------------------------------------------------------------- consumers

struct RowTile {
    int first;       // first query row of the tile within the request
    int count;       // rows that exist, 0 when the tile lies past the last row
    int first_token; // of the request, in q and out
    int queries;     // of the request
};

__device__ __forceinline__ RowTile row_tile_of(const Params& p, int request, int pass, int row_group) {
    const int first = (pass * p.row_groups + row_group) * ROWS;
    const Range queries = queries_of(p, request);
    return {first, max(0, min(ROWS, queries.count * p.heads - first)), queries.begin, queries.count};
}

// Query rows to shared memory: chunk j, row n at n * 128 bytes, 16-byte pieces swizzled by the row. Eight threads take
// a row, a piece of every chunk each.
__device__ __forceinline__ void copy_queries(const Params& p, Shared& s, int request, const RowTile& rows) {
    const int piece = threadIdx.x % 8;
#pragma unroll 1
    for (int n = threadIdx.x / 8; n < ROWS; n += WARPGROUP / 8) {
        const int row = rows.first + n, token = p.by_heads(row), head = row - token * p.heads;
        const int place = rows.first_token + token;
        const u16* latent = p.q_latent + offset(request, p.q_strides[0]) + offset(place, p.q_strides[1]) +
                            offset(head, p.q_strides[2]) + piece * 8;
        const u16* rope = p.q_rope + offset(request, p.q_rope_strides[0]) + offset(place, p.q_rope_strides[1]) +
                          offset(head, p.q_rope_strides[2]) + piece * 8;
        const u32 target = n * 128 + ((piece ^ (n & 7)) << 4);
        const bool exists = n < rows.count;
        if (p.q_vector_loads) {
#pragma unroll
            for (int j = 0; j < TILE_CHUNKS; ++j)
                copy_16_bytes(shared_address(s.q[j]) + target,
                              j < ROPE_CHUNKS ? rope + j * CHUNK_DIMS : latent + (j - ROPE_CHUNKS) * CHUNK_DIMS, exists);
        } else {
#pragma unroll 1
            for (int i = 0; i < TILE_CHUNKS * 8; ++i) {
                const int j = i / 8;
                const u16* source = j < ROPE_CHUNKS ? rope + j * CHUNK_DIMS : latent + (j - ROPE_CHUNKS) * CHUNK_DIMS;
                reinterpret_cast<u16*>(s.q[j] + target)[i % 8] = exists ? source[i % 8] : u16(0);
            }
        }
    }
}

// The first product of a tile's scores, the first ones of a segment's O^T are told not to accumulate. NVRTC up to 12.8 clears
// accumulators all the same, within the loops, and serializes the products; there they are cleared before, with up to two
// instructions for each.
constexpr bool ACCUMULATORS_CLEARED = __CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ < 9;

__device__ __forceinline__ ColumnSums& sums_of(Shared& s) {
    return *reinterpret_cast<ColumnSums*>(OWN_TILES ? static_cast<void*>(&s.sums) : static_cast<void*>(s.q));
}

// A column at the end of a segment, of both warpgroups together.
struct Column {
    float reference, sum;
    float factors[2];  // with OWN_TILES: from each warpgroup's reference to this one

    __device__ __forceinline__ float factor(int warpgroup) const { return warpgroup == 0 ? factors[0] : factors[1]; }
    __device__ __forceinline__ Column(Shared& s, int n) {
        const auto sum_of = [&](int w) {
            const float4 v = sums_of(s)[n][w];
            return (v.x + v.y) + (v.z + v.w);
        };
        const auto& shift = s.statistics.shift;
        reference = -shift[0][n];
        if constexpr (OWN_TILES) {
            reference = fmaxf(reference, -shift[1][n]);
#pragma unroll
            for (int w = 0; w < 2; ++w) factors[w] = exp2_approx(-shift[w][n] - reference);
            sum = factors[0] * sum_of(0) + factors[1] * sum_of(1);
        } else {
            sum = sum_of(0) + sum_of(1);
        }
    }
};

// One warpgroup's view of the pipeline.
struct Consumer {
    const Params& p;
    Shared& s;
    const int warpgroup, warp, lane;  // warp within the warpgroup, lane within the warp
    Place here;                       // of the first chunk of the tile at hand
    Place theirs = {0, 0};            // with OWN_TILES: of the other's last one of a segment
    u32 p_phase = 0;                  // bit w: parity of the next P^T of warpgroup w; bit 2: of the tile, for p_empty and turns
    bool traced = false;              // with TRACE: whether the first tile is

    float o[OUTPUT_BLOCKS][ROWS / 2];  // O^T, see wgmma for the layout
    float x[ROWS / 2];                 // S^T
    float sums[COLUMN_GROUPS][2];      // of this thread's keys, this warpgroup's tiles

    __device__ __forceinline__ Consumer(const Params& params, Shared& shared, int first_slot)
        : p(params),
          s(shared),
          warpgroup(uniform(threadIdx.x / WARPGROUP)),
          warp(uniform(threadIdx.x / 32 % 4)),
          lane(threadIdx.x % 32),
          here(first_slot, 0) {}

    // Column of element e of a column group that this thread holds.
    __device__ __forceinline__ int column(int group, int e) const { return group * 8 + lane % 4 * 2 + e % 2; }

    // The block of latent dims that o[n] holds: every other one is this warpgroup's to finish, so that chunks are done with in
    // the order in which the ring brings new ones.
    static __device__ __forceinline__ int block_of(int warpgroup, int n) {
        return OWN_TILES ? n ^ warpgroup : 2 * n + warpgroup;
    }
    __device__ __forceinline__ int block(int n) const { return block_of(warpgroup, n); }
    __device__ __forceinline__ int chunk(int n) const { return ROPE_CHUNKS + block(n); }

    __device__ __forceinline__ void release(const Place& place) {
        if (lane == 0) mbarrier_arrive(shared_address(&s.chunk_empty[place.slot]));
    }

    __device__ __forceinline__ u32 slot_descriptor(int slot) const {
        return operand_descriptor(shared_address(s.ring)) + slot * (CHUNK_BYTES >> 4);
    }

    // What threads copied are ordinary writes. Apart from the products, which would wait for each other around it.
    __device__ __forceinline__ void fence_gathered(const Place& first, int from, int to) {
        Place place = first.ahead(from);
#pragma unroll 1
        for (int j = from; j < to; ++j) {
            mbarrier_wait(shared_address(&s.chunk_full[place.slot]), place.parity);
            place = place.ahead(1);
        }
        fence_async_proxy();
    }

    // S^T += K Q^T for chunks [from, to) of the tile that begins at `first`, as they arrive; complete on return. `begun` is
    // called when all of them are on their way. Where the next chunk lies is worked out beside the products, by few
    // instructions that depend on each other: of one warpgroup alone on an H200, 16 rows, the 36 products of a tile that is
    // there took 1620 cycles if a slot's number became its addresses for each chunk anew, take 1220 so, 960 in a row rather
    // than in a loop, and 850 without barriers. In a loop and in a row, 16 requests of 16K on 32 SMs: 128.9 and 125.9 us.
    template <typename Begun>
    __device__ __forceinline__ void multiply_scores(const Place& first, int from, int to, const Begun& begun) {
        if (ACCUMULATORS_CLEARED && from == 0)
#pragma unroll
            for (int i = 0; i < ROWS / 2; ++i) x[i] = 0.0f;
        if (GENERAL && p.gather) fence_gathered(first, from, to);
        const Place place = first.ahead(from);
        u32 k = slot_descriptor(place.slot), q = operand_descriptor(shared_address(s.q)) + from * (Q_CHUNK_BYTES >> 4);
        u32 full = shared_address(&s.chunk_full[place.slot]), parity = place.parity, ready = 0;
        int room = SLOTS - place.slot;  // chunks until the ring begins anew
#pragma unroll (OWN_TILES && ROWS <= 16 ? TILE_CHUNKS : 1)
        do {  // once at least, or NVRTC 12.3 sees the accumulators come from elsewhere
            mbarrier_wait_unless(ready, full, parity);
            wgmma_fence();
            const u32 chunk_k = k;
            k += CHUNK_BYTES >> 4;
            full += sizeof(u64);
            if (--room == 0) {
                k -= SLOTS * (CHUNK_BYTES >> 4);
                full -= SLOTS * sizeof(u64);
                parity ^= 1;
            }
#pragma unroll
            for (int step = 0; step < CHUNK_DIMS / 16; ++step) {
                wgmma<ROWS, IS_BF16, false>(x, chunk_k + step * K_MAJOR_STEP, q + step * K_MAJOR_STEP,
                                            ACCUMULATORS_CLEARED || step > 0 || from > 0);
                // Whether the next one is there, as the answer takes a while.
                if (step == 0) ready = mbarrier_test(full, parity);
            }
            q += Q_CHUNK_BYTES >> 4;
        } while (++from < to);
        wgmma_commit();
        begun();
        wgmma_wait<0>();
        pin(x);
        if (TRACE && !traced) {
            traced = true;
            trace(p, TRACE_FIRST_TILE);
        }
    }

    // O^T += V^T P^T for the tile at hand, with P^T in the given buffer; complete on return. Calls ended(n) when the products
    // of the n-th chunk are.
    template <typename Ended>
    __device__ __forceinline__ void multiply_output(int buffer, bool accumulate, const Ended& ended) {
        const u32 weights = operand_descriptor(shared_address(s.p) + u32(buffer) * P_BYTES);
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < OUTPUT_BLOCKS; ++n) {
            const u32 v = slot_descriptor(here.ahead(chunk(n)).slot);
#pragma unroll
            for (int step = 0; step < TILE_KEYS / 16; ++step)
                wgmma<ROWS, IS_BF16, true>(o[n], v + step * M_MAJOR_STEP, weights + step * K_MAJOR_STEP,
                                           step > 0 || accumulate);
            wgmma_commit();
        }
        // Each chunk goes back to the producer as soon as its own products end, rather than with the others of the tile.
        // Measured: 128 requests of 4K, 64 heads, 176 us with, 184 without; 32 SMs, 16 requests of 16K, 156 and 161.
        wgmma_wait_each<OUTPUT_BLOCKS - 1>(ended);
        pin_output();
    }

    __device__ __forceinline__ void warpgroup_barrier() const {
        if (warpgroup == 0)
            named_barrier<WARPGROUP_BARRIER, WARPGROUP>();
        else
            named_barrier<WARPGROUP_BARRIER + 1, WARPGROUP>();
    }

    // The same, returning whether any of the warpgroup's threads brought `vote`.
    __device__ __forceinline__ bool warpgroup_any(bool vote) const {
        return warpgroup == 0 ? named_barrier_any<WARPGROUP_BARRIER, WARPGROUP>(vote)
                              : named_barrier_any<WARPGROUP_BARRIER + 1, WARPGROUP>(vote);
    }

    __device__ __forceinline__ void pin_output() {
#pragma unroll
        for (int b = 0; b < OUTPUT_BLOCKS; ++b) pin(o[b]);
    }

    // No product may be running.
    __device__ __forceinline__ void scale_column(int group, int e, float factor) {
#pragma unroll
        for (int b = 0; b < OUTPUT_BLOCKS; ++b) {
            o[b][group * 4 + e] *= factor;
            o[b][group * 4 + e + 2] *= factor;
        }
        sums[group][e] *= factor;
    }

    // Keys past the end may hold anything, NaN included, and 0 * NaN is NaN: zero those dims of them that this warpgroup
    // multiplies.
    __device__ __forceinline__ void zero_values_past(int valid) {
        const int thread = threadIdx.x % WARPGROUP;
#pragma unroll 1
        for (int n = 0; n < OUTPUT_BLOCKS; ++n) {
            uint4(*const rows)[8] = reinterpret_cast<uint4(*)[8]>(s.ring[here.ahead(chunk(n)).slot]);
#pragma unroll 1
            for (int row = valid + thread / 8; row < TILE_KEYS; row += WARPGROUP / 8)
                rows[row][thread % 8] = make_uint4(0, 0, 0, 0);
        }
        fence_async_proxy();
        warpgroup_barrier();
    }

    // Takes the column maxima of the tile into the references, of which `shift` are this thread's, and rescales what has been
    // accumulated. Each step is taken for all columns before the next one, or the columns would wait for each other's shuffles
    // and loads.
    __device__ __forceinline__ void move_reference(bool first, float2 (&shift)[COLUMN_GROUPS]) {
        Statistics& st = s.statistics;
        const int mine = OWN_TILES ? warpgroup : 0;
        float top[COLUMN_GROUPS][2], old[COLUMN_GROUPS][2];
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                old[g][e] = first ? -MOST_FINITE : -st.shift[mine][column(g, e)];
                top[g][e] = fmaxf(x[g * 4 + e], x[g * 4 + e + 2]);
            }
#pragma unroll
        for (int d = 4; d < 32; d *= 2)
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g)
#pragma unroll
                for (int e = 0; e < 2; ++e) top[g][e] = fmaxf(top[g][e], __shfl_xor_sync(~0u, top[g][e], d));
        if (lane < 4) {
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g)
#pragma unroll
                for (int e = 0; e < 2; ++e) st.warp_max[mine][column(g, e)][warp] = top[g][e];
        }
        warpgroup_barrier();
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float4 m = *reinterpret_cast<const float4*>(st.warp_max[mine][column(g, e)]);
                top[g][e] = fmaxf(fmaxf(fmaxf(m.x, m.y), fmaxf(m.z, m.w)) * p.scale_log2, old[g][e]);
            }
        const bool writes = warp == 0 && lane < 4;
        if (writes) {
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g)
#pragma unroll
                for (int e = 0; e < 2; ++e) st.shift[mine][column(g, e)] = -top[g][e];
        }
        if (!first) {
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float factor = top[g][e] == old[g][e] ? 1.0f : exp2_approx(old[g][e] - top[g][e]);
                    scale_column(g, e, factor);
                    if (!OWN_TILES && writes) st.factor[warpgroup][column(g, e)] = factor;
                }
        }
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g) shift[g] = {-top[g][0], -top[g][1]};
    }

    // Scores of keys that a query does not see.
    __device__ __forceinline__ void mask(int first_key, int seqlen, int seen_by_all, const RowTile& rows) {
        if (u32(first_key) + TILE_KEYS <= u32(seen_by_all)) return;
        const int key = first_key + warp * 16 + lane / 4;
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int token = p.by_heads(rows.first + column(g, e));
                const int seen = p.causal ? min(seqlen, seqlen - rows.queries + 1 + token) : seqlen;
                if (key + (e < 2 ? 0 : 8) >= seen) x[g * 4 + e] = NEG_INF;
            }
    }

    // P^T to shared memory, for wgmma once all warps have passed a barrier; `added`: of this thread's keys, its columns' sums.
    // Returns whether one of this thread's weights exceeds what P is to hold.
    __device__ __forceinline__ bool store_weights(const float2 (&shift)[COLUMN_GROUPS], float (&added)[COLUMN_GROUPS][2]) {
        float top[2] = {0.0f, 0.0f};
        // All weights before the first is stored: one column group after the other would wait for each group's chain of
        // exponentials anew.
        u32 weights[COLUMN_GROUPS][2];
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g) {
            float w[4];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float of_column = e == 0 ? shift[g].x : shift[g].y;
                w[e] = exp2_approx(fmaf(x[g * 4 + e], p.scale_log2, of_column));
                w[e + 2] = exp2_approx(fmaf(x[g * 4 + e + 2], p.scale_log2, of_column));
                added[g][e] = w[e] + w[e + 2];
                top[e] = fmaxf(top[e], fmaxf(w[e], w[e + 2]));
            }
            weights[g][0] = pack<IS_BF16>(w[0], w[1]);
            weights[g][1] = pack<IS_BF16>(w[2], w[3]);
        }
        // P is kept [column][key], K-major: 128 bytes a column, 16-byte pieces swizzled by the column.
        const int n = lane % 8, piece = warp * 2 + lane / 8 % 2;
        const u32 target = shared_address(s.p[P_BUFFERS == 1 ? 0 : warpgroup]) + n * 128 + ((piece ^ n) << 4);
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g) store_transposed_x2(target + g * 8 * 128, weights[g][0], weights[g][1]);
        const bool exceeded = fmaxf(top[0], top[1]) > MOST_WEIGHT;  // known before the fence ends
        fence_async_proxy();
        return exceeded;
    }

    __device__ __forceinline__ void add_sums(const float (&added)[COLUMN_GROUPS][2]) {
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g)
#pragma unroll
            for (int e = 0; e < 2; ++e) sums[g][e] += added[g][e];
    }

    // Whether a score of this thread exceeds its column's reference by more than P is to hold: without the weights.
    __device__ __forceinline__ bool exceeds(const float2 (&shift)[COLUMN_GROUPS]) const {
        float growth[2] = {NEG_INF, NEG_INF};
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g) {
            growth[0] = fmaxf(growth[0], fmaf(fmaxf(x[g * 4], x[g * 4 + 2]), p.scale_log2, shift[g].x));
            growth[1] = fmaxf(growth[1], fmaf(fmaxf(x[g * 4 + 1], x[g * 4 + 3]), p.scale_log2, shift[g].y));
        }
        return fmaxf(growth[0], growth[1]) > MOST_GROWTH;
    }

    // All key tiles of a segment; tile indices count from its start. `rows`: those of the segment, when asked.
    template <typename Rows>
    __device__ __forceinline__ void run_tiles(const WarpProgress& now, const Rows& rows) {
        const auto tiles = derived([&] { return now->walk.key_tiles(); });
        const auto keys_of_last = derived([&] {
            return now->walk.ends() ? now->walk.seqlen - (now->walk.unit_tiles - 1) * TILE_KEYS : TILE_KEYS;
        });
        // The first row sees the fewest keys, perhaps none.
        const auto seen_by_all = derived([&] {
            const int seqlen = now->walk.seqlen;
            return p.causal ? max(0, min(seqlen, seqlen - rows().queries + 1 + p.by_heads(rows().first))) : seqlen;
        });
        const auto mask_tile = [&](int i) {
            mask((now->walk.tile_begin + i) * TILE_KEYS, now->walk.seqlen, seen_by_all(), rows());
        };
        const auto zero_tile = [&](int i) {
            if (i == tiles() - 1 && keys_of_last() < TILE_KEYS) zero_values_past(keys_of_last());
        };
        if constexpr (OWN_TILES)
            run_own_tiles(tiles, mask_tile, zero_tile);
        else
            run_shared_tiles(tiles, mask_tile, zero_tile);
    }

    // ---- tiles that both warpgroups share

    __device__ __forceinline__ void load_shift(float2 (&shift)[COLUMN_GROUPS]) const {
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g)
            shift[g] = *reinterpret_cast<const float2*>(&s.statistics.shift[0][column(g, 0)]);
    }

    // Softmax of a finished S^T, published as P^T; there on return. No product may be running.
    __device__ __forceinline__ void publish_weights(bool first, float2 (&shift)[COLUMN_GROUPS]) {
        bool move = first || (VOTE_FIRST && warpgroup_any(exceeds(shift)));
        bool counted = false;  // whether this thread's sums have its weights
        for (;; move = true) {
            if (move) move_reference(first, shift);
            float added[COLUMN_GROUPS][2];
            const bool exceeded = store_weights(shift, added) && !VOTE_FIRST && !move;
            if (!exceeded && !counted) add_sums(added);
            counted = !exceeded;
            if (VOTE_FIRST) {
                // As a vote is: between what moving reads and P^T here, and the other warpgroup's.
                if (move || P_BUFFERS == 1) warpgroup_barrier();
                break;
            }
            if (!warpgroup_any(exceeded)) break;
        }
        if (threadIdx.x % WARPGROUP == 0) s.statistics.rescale[warpgroup] = move && !first;
        __syncwarp();
        // For its warp; and the four threads that move_reference has write, each for itself.
        if (lane == 0 || (warp == 0 && lane < 4)) mbarrier_arrive(shared_address(&s.p_full[warpgroup]));
        if (VOTE_FIRST)
            wait_published(warpgroup);
        else
            p_phase ^= 1u << warpgroup;  // the vote was this warpgroup's own barrier
    }

    __device__ __forceinline__ void wait_published(int w) {
        mbarrier_wait(shared_address(&s.p_full[w]), p_phase >> w & 1);
        p_phase ^= 1u << w;
    }

    // Waits for P^T of a tile of the other warpgroup; if that rescaled before it, follows.
    __device__ __forceinline__ void wait_weights() {
        const int w = warpgroup ^ 1;
        wait_published(w);
        if (s.statistics.rescale[w]) {
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g)
#pragma unroll
                for (int e = 0; e < 2; ++e) scale_column(g, e, s.statistics.factor[w][column(g, e)]);
        }
    }

    template <typename Tiles, typename Mask, typename Zero>
    __device__ __forceinline__ void run_shared_tiles(const Tiles& tiles, const Mask& mask_tile, const Zero& zero_tile) {
        const int ahead = p.chunks_ahead;
        if (warpgroup == 0) multiply_scores(here, 0, ahead, [] {});
#pragma unroll 1
        for (int i = 0; i < tiles(); ++i) {
            const bool mine = (i & 1) == warpgroup;
            const u32 parity = p_phase >> 2 & 1;
            if (mine) {
                float2 shift[COLUMN_GROUPS];
                u32 empty = 0;
                multiply_scores(here, ahead, TILE_CHUNKS, [&] {
                    if (IN_TURNS && lane == 0) mbarrier_arrive(shared_address(&s.scores_turn));
                    if constexpr (!PROGRESS_IN_MEMORY) load_shift(shift);
                    if constexpr (IN_TURNS) empty = mbarrier_test(shared_address(&s.p_empty), parity ^ 1);
                });
                if constexpr (IN_TURNS) mbarrier_wait_unless(empty, shared_address(&s.p_empty), parity ^ 1);
                if constexpr (PROGRESS_IN_MEMORY) load_shift(shift);
#pragma unroll
                for (int j = 0; j < ROPE_CHUNKS; ++j) release(here.ahead(j));
                mask_tile(i);
                publish_weights(i == 0, shift);
            } else {
                if (i + 1 < tiles()) {
                    // Runs while the other warpgroup takes the softmax of tile i.
                    if constexpr (IN_TURNS) mbarrier_wait(shared_address(&s.scores_turn), parity);
                    multiply_scores(here.ahead(TILE_CHUNKS), 0, ahead, [] {});
                }
                wait_weights();
            }
            p_phase ^= 4;
            zero_tile(i);
            if (IN_TURNS && mine) mbarrier_wait(shared_address(&s.output_turn), parity);
            multiply_output(P_BUFFERS == 1 ? 0 : i & 1, i > 0, [&](int n) {
                release(here.ahead(chunk(n)));
                if (IN_TURNS && n == 0 && !mine && lane == 0) mbarrier_arrive(shared_address(&s.output_turn));
            });
            if (IN_TURNS && lane == 0) mbarrier_arrive(shared_address(&s.p_empty));
            here = here.ahead(TILE_CHUNKS);
        }
    }

    // ---- tiles of this warpgroup alone

    // Softmax of a finished S^T, to P^T. No product may be running. The weights are taken with the references as they are, and
    // again if the barrier that they need in any case finds that these have to be moved.
    __device__ __forceinline__ void make_weights(bool first, float2 (&shift)[COLUMN_GROUPS]) {
        float added[COLUMN_GROUPS][2];
        for (bool move = first;; move = true) {
            if (move) move_reference(first, shift);
            store_weights(shift, added);
            if (move) {
                warpgroup_barrier();
                break;
            }
            if (!warpgroup_any(exceeds(shift))) break;
        }
        add_sums(added);
    }

    // Before a warpgroup goes on to its next tile the other one has to be done with the tile before the one at hand. Slots that
    // are waited for next have held chunks of it, of which one has to know that they came: of a slot's phases a parity tells
    // only two apart, so to wait for a chunk while its predecessor is still on its way would be not to wait. A later tile can
    // come first, as when a page's address has to be looked up in memory. Asked beside the products of the first chunk, waited
    // for beside those half way. Measured on H200s, 16 requests of 16K on 32 SMs: without 124.9 us, so 125.4; waited for beside
    // the first chunk's 126.5, the last one's 127.4, ahead of the next tile 127.3.
    template <typename Tiles, typename Mask, typename Zero>
    __device__ __forceinline__ void run_own_tiles(const Tiles& tiles, const Mask& mask_tile, const Zero& zero_tile) {
        here = here.back((2 - warpgroup) * TILE_CHUNKS);
        int left = tiles() - warpgroup;
        float2 shift[COLUMN_GROUPS] = {};
#pragma unroll 1
        for (int i = warpgroup; left > 0; i += 2) {
            left -= 2;
            here = here.ahead(2 * TILE_CHUNKS);
            multiply_scores(here, 0, TILE_CHUNKS, [] {});
#pragma unroll
            for (int j = 0; j < ROPE_CHUNKS; ++j) release(here.ahead(j));
            mask_tile(i);
            make_weights(i < 2, shift);
            zero_tile(i);
            const Place before = here.back(1);  // the last chunk of the tile before
            const u32 empty = shared_address(&s.chunk_empty[before.slot]);
            u32 done = 0;
            multiply_output(warpgroup, i >= 2, [&](int n) {
                if (SLOTS > 2 * TILE_CHUNKS && left > 0) {
                    if (n == 0) done = mbarrier_test(empty, before.parity);
                    if (n == OUTPUT_BLOCKS / 2) mbarrier_wait_unless(done, empty, before.parity);
                }
                if (left > 0 || n < OUTPUT_BLOCKS - EXCHANGE_CHUNKS) release(here.ahead(chunk(n)));
            });
        }
        const bool last = (tiles() & 1) != warpgroup;  // whether the segment ends with a tile of this warpgroup
        if (tiles() > warpgroup) send();
        theirs = last ? here.back(TILE_CHUNKS) : here.ahead(TILE_CHUNKS);
        here = here.ahead(last ? TILE_CHUNKS : 2 * TILE_CHUNKS);
    }

    // The k-th chunk that a warpgroup keeps of the `tile` that is its last of a segment.
    static __device__ __forceinline__ Place kept_chunk(const Place& tile, int sender, int k) {
        return tile.ahead(ROPE_CHUNKS + block_of(sender, OUTPUT_BLOCKS - EXCHANGE_CHUNKS + k));
    }

    // Where this thread's four elements of a column group and of the receiver's b-th own block lie on the way.
    __device__ __forceinline__ float4& exchanged(const Place& tile, int sender, int b, int group) const {
        constexpr int CHUNK_ITEMS = CHUNK_BYTES / (WARPGROUP * int(sizeof(float4)));
        const int item = b * COLUMN_GROUPS + group;
        float4(*const items)[WARPGROUP] =
            reinterpret_cast<float4(*)[WARPGROUP]>(s.ring[kept_chunk(tile, sender, item / CHUNK_ITEMS).slot]);
        return items[item % CHUNK_ITEMS][threadIdx.x % WARPGROUP];
    }

    // What has been accumulated of the other warpgroup's dims, to the chunks that were kept.
    __device__ __forceinline__ void send() {
        warpgroup_barrier();  // all warps are done with them
#pragma unroll
        for (int b = 0; b < OWN_BLOCKS; ++b)
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g) {
                const float* v = &o[own(b) + 1][g * 4];
                exchanged(here, warpgroup, b, g) = make_float4(v[0], v[1], v[2], v[3]);
            }
    }

    // Takes in what the other warpgroup has accumulated of this one's dims. The chunks are released.
    __device__ __forceinline__ void receive() {
        const int sender = warpgroup ^ 1;
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g) {
            const Column even(s, column(g, 0)), odd(s, column(g, 1));
            const float even_own = even.factor(warpgroup), even_theirs = even.factor(sender);
            const float odd_own = odd.factor(warpgroup), odd_theirs = odd.factor(sender);
#pragma unroll
            for (int b = 0; b < OWN_BLOCKS; ++b) {
                const float4 v = exchanged(theirs, sender, b, g);
                float* const mine = &o[own(b)][g * 4];
                mine[0] = mine[0] * even_own + v.x * even_theirs;
                mine[1] = mine[1] * odd_own + v.y * odd_theirs;
                mine[2] = mine[2] * even_own + v.z * even_theirs;
                mine[3] = mine[3] * odd_own + v.w * odd_theirs;
            }
        }
        fence_async_proxy();  // before copies to where ordinary reads and writes were
        __syncwarp();
#pragma unroll
        for (int k = 0; k < EXCHANGE_CHUNKS; ++k) release(kept_chunk(theirs, sender, k));
    }

    // Without products O^T is 0.
    __device__ __forceinline__ void clear(bool output) {
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g) sums[g][0] = sums[g][1] = 0.0f;
        if (!ACCUMULATORS_CLEARED) {
            if (!output) return;
            keep_branch();
        }
#pragma unroll
        for (int b = 0; b < OUTPUT_BLOCKS; ++b)
#pragma unroll
            for (int i = 0; i < ROWS / 2; ++i) o[b][i] = 0.0f;
    }
};

// The part of row n of a row tile that is this thread's to write, from the first dim on; null for a row that does not exist.
__device__ __forceinline__ u16* output_row(const Params& p, int request, const RowTile& rows, int n) {
    const int row = rows.first + n, token = p.by_heads(row), head = row - token * p.heads;
    u16* const target = p.out + offset(request, p.out_strides[0]) + offset(rows.first_token + token, p.out_strides[1]) +
                        offset(head, p.out_strides[2]) + threadIdx.x % 4 * 2;
    return n < rows.count ? target : nullptr;
}

// Writes one column group of 16 dims: values as wgmma holds them, times `scale` of each of the two columns. Of `row` this
// thread writes what its quarter of the warp does: row lane / 4 of the group.
__device__ __forceinline__ void store_outputs(u16* row, int first_dim, const float* v, float scale_even, float scale_odd) {
    const u32 low = transpose(pack<IS_BF16>(v[0] * scale_even, v[1] * scale_odd));
    const u32 high = transpose(pack<IS_BF16>(v[2] * scale_even, v[3] * scale_odd));
    if (row) {
        *reinterpret_cast<u32*>(row + first_dim) = low;
        *reinterpret_cast<u32*>(row + first_dim + 8) = high;
    }
}

__device__ __forceinline__ void store_lse(const Params& p, int request, const RowTile& rows, int n, float reference,
                                          float sum) {
    if (n < rows.count && p.lse) {
        const int row = rows.first + n, token = p.by_heads(row), head = row - token * p.heads;
        p.lse[offset(request, p.lse_strides[0]) + offset(head, p.lse_strides[1]) +
              offset(rows.first_token + token, p.lse_strides[2])] =
            sum > 0.0f ? (reference + log2_approx(sum)) * p.lse_factor : sum == 0.0f ? p.lse_no_key : sum;
    }
}

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

// The exponent of the power of two that brings the largest element of a warp's O^T to PARTIAL_TOP. NaN does not count. With an
// infinite one it is 0: that element stays infinite, and the others are rounded to fp16 as they are.
__device__ __forceinline__ int partial_exponent(const float (&o)[OUTPUT_BLOCKS][ROWS / 2]) {
    float tops[OWN_BLOCKS], top = 0.0f;
#pragma unroll
    for (int b = 0; b < OWN_BLOCKS; ++b) {
        tops[b] = 0.0f;
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i) tops[b] = fmaxf(tops[b], fabsf(o[own(b)][i]));
        top = fmaxf(top, tops[b]);
    }
    const int exponent = int(__reduce_max_sync(~0u, __float_as_uint(top)) >> 23) - 127;
    return exponent > 127 ? 0 : min(PARTIAL_TOP - exponent, 126);
}

__device__ __forceinline__ float inverse(float sum) { return sum == 0.0f ? 0.0f : reciprocal_approx(sum); }

// Ends a segment: O^T goes out as a partial result, or as the result once the sums of all warps have come together.
// `target_of` tells where this thread's row of a column group goes.
template <typename Target>
__device__ __forceinline__ void finish_segment(Consumer& c, const Walk& walk, const RowTile& rows, int lane, int row_group,
                                               u32 phase, const Target& target_of) {
    const Params& p = c.p;
    Shared& s = c.s;
    const bool whole = walk.whole();
    ColumnSums& sums = sums_of(s);
    const auto leave_elements = [&] {
        const int slot = partial_slot(p, lane, walk.starts(), row_group);
        Quad* target = p.partials + (slot * MERGE_PIECES + c.warp) * 32 + c.lane;
        float scale = 1.0f;
        if constexpr (HALF_PARTIALS) {
            const int exponent = partial_exponent(c.o);
            scale = power_of_two(exponent);
            if (c.lane == 0) p.partial_stats[slot].scales[threadIdx.x / 32] = power_of_two(-exponent);
        }
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g)
            if (g * 8 < rows.count) {
#pragma unroll
                for (int b = 0; b < OWN_BLOCKS; ++b) {
                    const float* v = &c.o[own(b)][g * 4];
                    pack_four(target[(g * GROUP_PIECES + c.block(own(b)) * 4) * 32], v, scale);
                }
            }
    };
    const auto leave_sums = [&] {
#pragma unroll
        for (int d = 4; d < 32; d *= 2)
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g)
#pragma unroll
                for (int e = 0; e < 2; ++e) c.sums[g][e] += __shfl_xor_sync(~0u, c.sums[g][e], d);
        if (c.lane < 4) {
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    reinterpret_cast<float*>(sums[c.column(g, e)])[threadIdx.x / 32] = c.sums[g][e];
        }
        mbarrier_arrive(shared_address(&s.sums_full));
    };
    leave_sums();
    if (OWN_TILES && walk.key_tiles() > (c.warpgroup ^ 1)) {
        mbarrier_wait(shared_address(&s.sums_full), phase);
        c.receive();
    }
    if (!whole) {
        leave_elements();
        __syncwarp();
        if (c.lane == 0) mbarrier_arrive(shared_address(&s.elements_left));
    }
    if (whole) {
        mbarrier_wait(shared_address(&s.sums_full), phase);
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g) {
            const float even = inverse(Column(s, c.column(g, 0)).sum), odd = inverse(Column(s, c.column(g, 1)).sum);
            u16* const row = target_of(g);
#pragma unroll
            for (int b = 0; b < OWN_BLOCKS; ++b)
                store_outputs(row, c.block(own(b)) * CHUNK_DIMS + c.warp * 16, &c.o[own(b)][g * 4], even, odd);
        }
        if (threadIdx.x < ROWS) {
            const Column column(s, threadIdx.x);
            store_lse(p, walk.request, rows, threadIdx.x, column.reference, column.sum);
        }
    }
}

// ---------------------------------------------------------------------------------------------- merge

__device__ __forceinline__ u32* gave_up_word(const Params& p, const SharedUnit& unit, int merger, int row_group) {
    return counter_of(p, unit.first_lane + merger, row_group) + 2;
}

// Running combination of partial results for BLOCKS pieces of one column group.
template <int BLOCKS>
struct Merged {
    float v[BLOCKS][4] = {};
    float reference[2] = {NEG_INF, NEG_INF};
    float sum[2] = {};

    __device__ __forceinline__ void scale(int e, float factor) {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            v[b][e] *= factor;
            v[b][e + 2] *= factor;
        }
        sum[e] *= factor;
    }
};

// Adds the partial results of members [from, to) of a unit for `piece` and those that the same warp left after it, BLOCKS
// together, COUNT members in flight at a time, in their order. False if not all members have `arrived`, for which it waits
// only when it knows where to read.
//
// Its instructions run once, at some 7 cycles each, and nothing else is left to do meanwhile, so they are to be few: four
// threads see to the statistics and the weights of a member, and pass on what others need of them. Measured on an H200, every
// thread for itself, 17 members in flight and 9: one request of 512 tokens 11.9 and 11.3 us, 16 requests of 512 13.5 and 13.15;
// 9 and so: one request of 512 tokens 12.0 and 11.3, of 8K 14.1 and 13.8, 16 requests of 512 as long.
template <int COUNT, int BLOCKS, typename Arrived>
__device__ __forceinline__ bool merge_members(const Params& p, const SharedUnit& unit, int row_group, u32 piece, int from,
                                              int to, const Arrived& arrived, Merged<BLOCKS>& m) {
    constexpr int COUNTED = COUNT <= 4 ? 4 : 8;  // a power of two; with four, both halves of the warp do the same
    static_assert(COUNT <= COUNTED, "four threads each");
    constexpr int SLOT_VALUES = MERGE_PIECES * 32;
    const int lane = threadIdx.x % 32, pair = lane % 4, member = lane / 4 % COUNTED;
#pragma unroll 1
    do {
        const int count = min(COUNT, to - from), number = from + member;
        const SlotStatistics& statistics =
            p.partial_stats[partial_slot(p, unit.first_lane + number, number == 0, row_group)];
        // A member that starts the unit has its own in the next slot.
        const Quad* values =
            p.partials + (partial_slot(p, unit.first_lane + from, false, row_group) * MERGE_PIECES + piece) * 32 + lane;
        const Quad* first_values = values + (from == 0 ? SLOT_VALUES : 0);
        const float4* columns_at = reinterpret_cast<const float4*>(statistics.columns) + piece / GROUP_PIECES * 4 + pair;
        const float* scale_at = statistics.scales + piece % CONSUMER_WARPS;
        // The statistics first, as weights are made of them, and of the addresses what ptxas leaves before the wait. Measured in
        // one run on an H200, after the wait and elements first, and so: 16 requests of 4K 27.58 and 27.42 us, 32 of 2K 27.58
        // and 27.39.
        keep_pointer(values);
        keep_pointer(first_values);
        keep_pointer(columns_at);
        if constexpr (HALF_PARTIALS) keep_pointer(scale_at);
        if (!arrived()) return false;
        const float4 columns = load_shared_by_ctas(columns_at, member < count, make_float4(NEG_INF, 0, NEG_INF, 0));
        float scale = 1.0f;
        if constexpr (HALF_PARTIALS) scale = load_shared_by_ctas(scale_at, member < count, 0.0f);
        Quad v[COUNT][BLOCKS];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const Quad* const of_member = i == 0 ? first_values : values + i * LANE_SLOTS * SLOT_VALUES;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b)
                v[i][b] = load_shared_by_ctas(of_member + b * CONSUMER_WARPS * 32, i < count, Quad{});
        }
        float weights[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float reference = e == 0 ? columns.x : columns.z;
            float top = reference;
#pragma unroll
            for (int d = 4; d < 4 * COUNTED; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
            top = fmaxf(top, m.reference[e]);
            const float safe = top == NEG_INF ? 0.0f : top;
            weights[e] = exp2_approx(reference - safe);
            float sum = (e == 0 ? columns.y : columns.w) * weights[e];
#pragma unroll
            for (int d = 4; d < 4 * COUNTED; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
            m.scale(e, exp2_approx(m.reference[e] - safe));
            m.reference[e] = top;
            m.sum[e] += sum;
            weights[e] *= scale;
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const float even = __shfl_sync(~0u, weights[0], i * 4 + pair), odd = __shfl_sync(~0u, weights[1], i * 4 + pair);
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                const float4 four = unpack_four(v[i][b]);
                m.v[b][0] += four.x * even;
                m.v[b][1] += four.y * odd;
                m.v[b][2] += four.z * even;
                m.v[b][3] += four.w * odd;
            }
        }
    } while ((from += COUNT) < to);
    return true;
}

// Where pieces of a column group go, from `piece` on: worked out while others are waited for.
struct MergedTarget {
    RowTile rows;
    int group, in_group;
    u16* place;  // of this thread, or null

    __device__ __forceinline__ MergedTarget(const Params& p, const SharedUnit& unit, int row_group, u32 piece)
        : rows(row_tile_of(p, unit.request, unit.pass, row_group)),
          group(piece / GROUP_PIECES),
          in_group(piece % GROUP_PIECES),
          place(output_row(p, unit.request, rows, group * 8 + threadIdx.x % 32 / 4)) {
        if (place) place += in_group / 4 * CHUNK_DIMS + in_group % 4 * 16;
    }
    template <int BLOCKS>
    __device__ __forceinline__ void store(const Params& p, const SharedUnit& unit, const Merged<BLOCKS>& m) const {
        const int lane = threadIdx.x % 32;
        const float even = inverse(m.sum[0]), odd = inverse(m.sum[1]);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) store_outputs(place, b * 2 * CHUNK_DIMS, m.v[b], even, odd);
        if (in_group == 0 && lane < 8) {
            const bool odd = lane >= 4;  // by the two threads that hold them, one column each
            store_lse(p, unit.request, rows, group * 8 + lane % 4 * 2 + odd, odd ? m.reference[1] : m.reference[0],
                      odd ? m.sum[1] : m.sum[0]);
        }
    }
};

// The part of a shared unit that falls to merger `merger`, of pieces or of stripes: STRIPE_BLOCKS pieces of a column group that
// one warp left.
//   few members    stripes merger, merger + mergers, ...: their statistics are loaded once for all pieces, and those of a few
//                  members are as many loads as a warp can wait for together
//   many           pieces merger, merger + mergers, ...; where that leaves warps without one, several divide the members of a
//                  piece among them
// Measured in one run on an H100, pieces alone and both: mixed lengths 75.4 and 73.2 us, 32 requests of 2K 36.4 and 35.8, of 8K
// with 4 queries each 119.1 and 116.1. Pairs of pieces rather than fours, 16 rows: 32 requests of 512 tokens 17.6 and 17.1.
template <typename Arrived>
__device__ __forceinline__ void merge_part(const Params& p, Shared& s, const SharedUnit& unit, int index, int row_group,
                                           int merger, const Arrived& arrived) {
    constexpr int STRIPE_BLOCKS = ROWS <= 16 ? 2 : OWN_BLOCKS;
    constexpr int STRIPE_MEMBERS = HALF_PARTIALS ? 4 : 3;  // in flight together
    constexpr int PIECE_MEMBERS = 8;                       // likewise
    const int members = unit.members, mergers = unit.mergers;
    // Of columns that exist.
    const int pieces = (row_tile_of(p, unit.request, unit.pass, row_group).count + 7) / 8 * GROUP_PIECES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // In stripes a warp waits members / STRIPE_MEMBERS times, else for each of its pieces / (CONSUMER_WARPS * mergers).
    const bool many = CONSUMER_WARPS * mergers * members >= STRIPE_MEMBERS * MERGE_PIECES;
    if (many) {
        const int share_log2 = merger + 4 * mergers < pieces   ? 0
                               : merger + 2 * mergers < pieces ? 1
                               : merger + mergers < pieces     ? 2
                                                               : 3;
        const int helpers = 1 << share_log2;  // warps that divide a piece; if there are several, there is one round
        const int helper = warp & (helpers - 1);
        const int from = members * helper >> share_log2, to = members * (helper + 1) >> share_log2;
#pragma unroll 1
        for (int first = merger; first < pieces; first += (CONSUMER_WARPS >> share_log2) * mergers) {
            const u32 piece = first + (warp >> share_log2) * mergers;
            const MergedTarget target(p, unit, row_group, piece);
            Merged<1> m;
            if (int(piece) >= pieces ? !arrived()
                                     : !merge_members<PIECE_MEMBERS>(p, unit, row_group, piece, from, to, arrived, m))
                return;
            if (helpers > 1) {
                // The ring is idle: a slot carries the helpers' shares.
                static_assert(sizeof(Merged<1>[CONSUMER_WARPS][32]) <= CHUNK_BYTES, "one slot holds them");
                Merged<1>(*shares)[32] = reinterpret_cast<Merged<1>(*)[32]>(s.ring[index]);
                shares[warp][lane] = m;
                named_barrier<CONSUMER_BARRIER, CONSUMERS>();
                if (helper == 0)
#pragma unroll 1
                    for (int h = 1; h < helpers; ++h) {
                        const Merged<1>& share = shares[warp + h][lane];
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const float top = fmaxf(m.reference[e], share.reference[e]), safe = top == NEG_INF ? 0.0f : top;
                            const float add = exp2_approx(share.reference[e] - safe);
                            m.scale(e, exp2_approx(m.reference[e] - safe));
                            m.v[0][e] += share.v[0][e] * add;
                            m.v[0][e + 2] += share.v[0][e + 2] * add;
                            m.sum[e] += share.sum[e] * add;
                            m.reference[e] = top;
                        }
                    }
            }
            if (helper == 0 && int(piece) < pieces) target.store(p, unit, m);
        }
        return;
    }
#pragma unroll 1
    for (int stripe = merger + warp * mergers; stripe < pieces / STRIPE_BLOCKS; stripe += CONSUMER_WARPS * mergers) {
        constexpr int OF_GROUP = GROUP_PIECES / STRIPE_BLOCKS;
        const u32 in_group = stripe % OF_GROUP;
        const u32 piece = stripe / OF_GROUP * GROUP_PIECES + in_group % CONSUMER_WARPS +
                          in_group / CONSUMER_WARPS * (STRIPE_BLOCKS * CONSUMER_WARPS);
        const MergedTarget target(p, unit, row_group, piece);
        Merged<STRIPE_BLOCKS> m;
        if (!merge_members<STRIPE_MEMBERS>(p, unit, row_group, piece, 0, members, arrived, m)) return;
        target.store(p, unit, m);
    }
}

// Low half of the arrival word: members that have left their partial result. High half: members that gave up waiting.
constexpr u32 ARRIVED = 0xffff;
constexpr u32 GAVE_UP = 0x10000;

// A member leaves the unit for good; the last one cleans up, as nobody looks at these words again in this launch.
__device__ __forceinline__ void depart(const Params& p, const SharedUnit& unit, int row_group) {
    u32* arrivals = counter_of(p, unit.first_lane, row_group);
    if (atomic_add_acq_rel(arrivals + 1, 1) != u32(unit.members) - 1) return;
    if (load_acquire(arrivals) >= GAVE_UP)
#pragma unroll 1
        for (int merger = 0; merger < unit.mergers; ++merger) *gave_up_word(p, unit, merger, row_group) = 0;
    arrivals[0] = arrivals[1] = 0;
}

// What the coordinator knows of a shared unit, for the consumers.
__device__ __forceinline__ bool all_arrived(u32 arrivals, const SharedUnit& unit) {
    return (arrivals & ARRIVED) == u32(unit.members);
}

// After a CTA's own segments every merger merges its part of a shared unit as soon as all members have arrived. One that waits
// too long (the others may not even be running, when something else occupies their SMs) leaves its part to the members who see
// the arrivals complete. The last to arrive always does, so whatever else the GPU does, somebody gets everything done.
__device__ __forceinline__ void merge_unit(const Params& p, Shared& s, int index, int lane, int row_group) {
    const SharedUnit unit = s.shared_units[index];
    const int own = lane - unit.first_lane;
    u32 arrivals = 0;
    const auto arrived = [&] {
        mbarrier_wait(shared_address(&s.met[index]), 0);
        if (arrivals == 0) trace(p, TRACE_MERGE);
        arrivals = s.arrivals[index];
        return all_arrived(arrivals, unit);
    };
    // First the own part, if there is one, then, should anybody have given up, the parts of those.
    constexpr int OWN_TURN = -1;
#pragma unroll 1
    for (int turn = own < unit.mergers ? OWN_TURN : 0; turn < unit.mergers; ++turn) {
        if (turn != OWN_TURN) {
            if (!arrived() || arrivals < GAVE_UP) return;
            if (turn == own) continue;
            const volatile u32* gave_up = gave_up_word(p, unit, turn, row_group);
            // One thread looks for all: a member that finds out too late that everybody has arrived may write at this moment.
            if (!named_barrier_any<CONSUMER_BARRIER, CONSUMERS>(threadIdx.x == 0 && *gave_up)) continue;
            // The shares are about to be written anew. The vote sees to their readers too, but racecheck does not follow it.
            named_barrier<CONSUMER_BARRIER, CONSUMERS>();
        }
        merge_part(p, s, unit, index, row_group, turn == OWN_TURN ? own : turn, arrived);
    }
    if (threadIdx.x == 0) depart(p, unit, row_group);
}

// The lanes that share the unit of a segment of `lane`, and those that merge it. A lane that goes on to another unit would
// merge both, one after the other, when everything else is done: it leaves this one to those before it. Measured in one run on
// an H200, mixed lengths: 62.5 and 61.4 us, 64.6 and 64.0.
__device__ __forceinline__ SharedUnit shared_unit(const Params& p, const Start& start, const Walk& walk, int lane) {
    if (start.even) {
        const int members = min(p.share, walk.unit_tiles);
        return {walk.request, walk.pass, p.by_share(lane) * p.share, members, members};
    }
    const Division division(start.cells, p.lanes, p.by_lanes);
    const int end = walk.unit_begin + walk.unit_tiles;
    int first = 0, last = 0;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {  // the division's code once
        first = last;
        last = division.lane_of(i == 0 ? walk.unit_begin : end - 1);
    }
    const bool goes_on = division.begin(last + 1) > end + start.gap;
    return {walk.request, walk.pass, first, last - first + 1, last - first + (goes_on ? 0 : 1)};
}

__device__ __forceinline__ void coordinate(const Params& p, Shared& s, const Progress& start_of_lane, int first_slot) {
    WarpProgress now(s, start_of_lane);
    const int l = threadIdx.x % 32;
    // What has been passed over goes back to the producers.
#pragma unroll 1
    for (int j = 0; j < first_slot; ++j) {
        mbarrier_wait(shared_address(&s.chunk_full[j]), 0);
        if (l == 0) mbarrier_arrive<WARPGROUP / 32>(shared_address(&s.chunk_empty[j]));
    }
    int units = 0;
    while (now->walk.active()) {
        SharedUnit unit;
        if (!now->walk.whole()) {
            unit = shared_unit(p, s.start, now->walk, now->lane);
            if (l == 0) s.shared_units[units] = unit;
        }
        if (l == 0) mbarrier_arrive(shared_address(&s.sums_full));
        mbarrier_wait(shared_address(&s.sums_full), now->phase);
        if (!now->walk.whole()) {
            const int slot = partial_slot(p, now->lane, now->walk.starts(), now->row_group);
            for (int n = l; n < ROWS; n += 32) {
                const Column column(s, n);
                p.partial_stats[slot].columns[n] = make_float2(column.reference, column.sum);
            }
        }
        // Before the arrival, which waits for all writes: the next segment's queries go where the sums are. Measured in one run
        // on an H200, after it and before: mixed lengths 55.7 and 55.3, 67.3 and 66.8 us.
        mbarrier_arrive(shared_address(&s.q_empty));
        if (!now->walk.whole()) {
            mbarrier_wait(shared_address(&s.elements_left), units & 1);
            __syncwarp();
            // The barrier and the warp ordered everyone's partial results before this arrival.
            if (l == 0) add_release(counter_of(p, unit.first_lane, now->row_group), 1);
            __syncwarp();
            ++units;
        }
        now.change([&](Progress& progress) { progress.next_segment(p, s.start); });
    }
    if (l > 0) return;
    for (int i = 0; i < units; ++i) {
        const SharedUnit unit = s.shared_units[i];
        u32* arrivals = counter_of(p, unit.first_lane, now->row_group);
        const i64 begin = clock64();
        u32 seen = load_acquire(arrivals);
        // Who has no part looks once, in case it was the last to arrive.
        while (!all_arrived(seen, unit) && now->lane - unit.first_lane < unit.mergers) {
            if (clock64() - begin > p.patience) {
                *gave_up_word(p, unit, now->lane - unit.first_lane, now->row_group) = 1;
                seen = atomic_add_acq_rel(arrivals, GAVE_UP);
                break;
            }
            seen = load_acquire(arrivals);
        }
        s.arrivals[i] = seen;
        mbarrier_arrive(shared_address(&s.met[i]));
    }
    for (int i = 0; i < units; ++i) {
        const SharedUnit unit = s.shared_units[i];
        // With parts to take over, whoever merges them departs when they are done.
        if (!all_arrived(s.arrivals[i], unit) || s.arrivals[i] < GAVE_UP) depart(p, unit, now->row_group);
    }
}

__device__ __forceinline__ void consume(const Params& p, Shared& s, const Progress& start_of_lane, int first_slot) {
    WarpProgress now(s, start_of_lane);
    Consumer c(p, s, first_slot);
    // What has been passed over has to be there, as a parity tells only two phases of a slot apart: see the coordinator.
#pragma unroll 1
    for (int j = 0; j < first_slot; ++j) mbarrier_wait(shared_address(&s.chunk_empty[j]), 0);
    while (now->walk.active()) {
        const auto rows = derived([&] { return row_tile_of(p, now->walk.request, now->walk.pass, now->row_group); });
        if (!now->first) {
            const u32 q_empty = shared_address_within(&s, &s.q_empty);
            mbarrier_arrive(q_empty);
            if (c.warpgroup == 0) mbarrier_wait(q_empty, now->phase ^ 1);
        }
        if (c.warpgroup == 0) {
            if (!now->first || !s.start.even) {
                copy_wait_all();  // others may be on their way to the same place
                copy_queries(p, s, now->walk.request, rows());
            }
            copy_wait_all();
            fence_async_proxy();
        }
        c.clear(now->walk.key_tiles() <= (OWN_TILES ? c.warpgroup : 0));
        named_barrier<CONSUMER_BARRIER, CONSUMERS>();
        if (OWN_TILES && now->walk.key_tiles() <= c.warpgroup)
            for (int n = threadIdx.x % WARPGROUP; n < ROWS; n += WARPGROUP) s.statistics.shift[c.warpgroup][n] = MOST_FINITE;
        // Where outputs go, worked out while the first keys are on their way if there are registers to keep it. Measured in one
        // run on an H200, at the end and so: 16 requests of 64 tokens, 20 calls in a CUDA graph, 5.00 and 4.94 us each.
        constexpr bool TARGETS_AHEAD = ROWS <= 16;
        u16* targets[COLUMN_GROUPS];
        const auto find_target = [&](int g) { return output_row(p, now->walk.request, rows(), g * 8 + c.lane / 4); };
        if constexpr (TARGETS_AHEAD) {
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g) {
                targets[g] = find_target(g);
                keep_pointer(targets[g]);
            }
        }
        if (now->walk.key_tiles() > 0) c.run_tiles(now, rows);
        trace(p, TRACE_LAST_TILE);
        finish_segment(c, now->walk, rows(), now->lane, now->row_group, now->phase,
                       [&](int g) { return TARGETS_AHEAD ? targets[g] : find_target(g); });
        now.change([&](Progress& progress) {
            progress.shared_units += !progress.walk.whole();
            progress.next_segment(p, s.start);
        });
    }
    if (now->shared_units == 0) return;
    // The ring is idle: nobody multiplies any more, nor takes in what the other warpgroup has left there.
    if constexpr (OWN_TILES)
        named_barrier<CONSUMER_BARRIER, CONSUMERS>();
    else
        mbarrier_wait(shared_address(&s.sums_full), now->phase ^ 1);
#pragma unroll 1
    for (int i = 0; i < now->shared_units; ++i) merge_unit(p, s, i, now->lane, now->row_group);
}

// The lane of the CTAs [column * row_groups, (column + 1) * row_groups). CTAs next to each other run next to each other: on an
// H200 those of a GPC, one GPC after the other, and four of its eight GPCs have their way to memory in common. So the lanes
// that an even division leaves idle, the last ones, are spread over the columns. Measured in one run on an H200, at the end and
// spread: 16 requests of 16K 78.1 and 77.2 us, 32 of 16K 143.8 and 142.1, 128 of 4K 142.5 and 141.0, of 4K with 32 heads 145.2
// and 143.2. Next to each other at the beginning they are no better than at the end, nor is a grid without them.
__device__ __forceinline__ int lane_of_column(const Params& p, int column) {
    const u64 spare = u64(column) * p.spare_lanes + (1u << 31);
    const u32 before = u32(spare >> 32);
    const bool is_spare = u32((spare + p.spare_lanes) >> 32) > before;
    return is_spare ? p.even_lanes + int(before) : column - int(before);
}

// Grid: lanes * row_groups CTAs, of which row_groups after each other are one lane. Dynamic shared memory: sizeof(Shared).
extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_decode(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const int column = p.by_row_groups(blockIdx.x), row_group = blockIdx.x - column * p.row_groups;
    const int lane = lane_of_column(p, column);
    const int warp = uniform(threadIdx.x / 32);

    trace(p, TRACE_START);
    let_dependents_start();
    Start start;
    Walk walk;
    Pages pages;
    int token = 0;
    if (warp >= CONSUMER_WARPS) {
        wait_for_predecessor();
        walk = find_walk(p, lane, start);
        if (threadIdx.x == COORDINATOR_WARP * 32) {
            s.start = start;
            s.walk = walk;
        }
        pages = Pages(p, walk, 0);
        token = first_token(p, walk.tile_begin);
    } else {
        if (warp == CONSUMER_WARPS - 1) prefetch_inputs(p, lane, row_group);
        // What needs nothing of the kernel before is done while that ends. Measured in one run on an H200, behind the wait
        // and ahead of it: 16 requests of 64 tokens, 20 calls in a CUDA graph, 5.12 and 4.99 us each, others as long.
        const EvenStart even(p, lane);
        if (warp < HEAD_START_WARP) init_barriers(p, s, warp);
        wait_for_predecessor();
        const bool early = !GENERAL && warp >= HEAD_START_WARP;
        const HeadStart head_start = early ? HeadStart(p, even) : HeadStart();
        if (warp < WARPGROUP / 32) {
            // The queries of an even division, ahead of the keys: behind those they would arrive last.
            if (even.request < p.batch) copy_queries(p, s, even.request, row_tile_of(p, even.request, even.pass, row_group));
        }
        if (warp >= HEAD_START_WARP) init_barriers(p, s, warp);  // beside the loads of lengths
        if (early) head_start.load(p, s, even, warp - HEAD_START_WARP);
    }
    __syncthreads();
    const bool started = !GENERAL && s.head_start;
    int begun = 0;
    int first_slot;  // of the lane's first tile: behind the chunks of a head start if they are not of that tile
    if (warp < CONSUMER_WARPS) {
        first_slot = started && !s.start.even ? HEAD_START : 0;
        walk = s.walk;
    } else {
        // The consumers wait for them. Measured on an H200, behind the first tile's loads and before: 16 requests of 64 tokens,
        // 20 calls in a CUDA graph, 5.30 and 5.10 us each.
        registers_give_up<PRODUCER_REGISTERS>();
        first_slot = started && !start.even ? HEAD_START : 0;
        if (warp < COORDINATOR_WARP)
            begun = produce_first_tile(p, s, walk, warp - CONSUMER_WARPS, token, pages.page, first_slot, started && start.even);
    }
    first_slot = uniform(first_slot);
    auto start_of_lane = [&] {
        walk.make_uniform();
        return Progress{walk, lane, row_group, true, 0, 0};
    };
    // The compiler is to put the producers' code first, behind what led to it: from behind the consumers' its instructions
    // arrived later than the first tile. Measured on an H100, code last and first, in one
    // run, 16 requests: of 1K 18.1 and 17.3 us, of 2K 23.9 and 23.6.
    if (__builtin_expect(warp < CONSUMER_WARPS, 0)) {
        registers_take<CONSUMER_REGISTERS>();
        consume(p, s, start_of_lane(), first_slot);
        trace(p, TRACE_END);
    } else {
        if (warp == COORDINATOR_WARP)
            coordinate(p, s, start_of_lane(), first_slot);
        else
            produce(p, s, start_of_lane(), pages, begun, first_slot);
    }
}
