// An expert-parallel window: the memory of one rank into which its peers write rows for its experts, and out of which
// they read what the experts made of them. One header for the kernels (*.cu), their CPU twin (ep_host.cpp) and Python
// (experts/expert_parallel/structs.py): plain C with no dependency. Offsets are the same in every rank's window.
//
// A rank sends tokens, holds experts, or both: an engine with its workers is a group in which one rank has all the
// tokens and the others have all the experts. Each layer is one cycle of all ranks, of one number, its epoch n = 1, 2,
// ...:
//
//   1. route, dispatch   a source writes rows, metadata and counts into the windows of the ranks that own its experts
//   2. sync(dispatch)    stores {n, rows sent} into its cell in every live window; waits for its own cells to show n
//   3. expand            an owner copies the rows to expert-major order and tells where each source's rows are
//   (`bases`)
//   4. the experts       compute into `out`, in the owner's own window; with EP_PARTIAL, reduce then sums them up
//   5. sync(combine)     as 2, of the combine cells
//   6. combine           a source reads its expert rows out of the owners' windows and adds them
//
// One copy of each region is enough. What a source writes in cycle n + 1 (1) comes after it has seen the combine cells
// of n, which an owner stores after it has read everything of n (3). What an owner writes in n + 1 (3, 4) comes after
// it has seen the dispatch cells of n + 1, which a source stores after it has read everything of n (6). This holds
// between ranks that wait for each other. One that has been given up (ep_state.alive) may write into its own regions at
// any time, and nobody reads them; what it reads itself may be torn, and its own waits tell it so in the next cycle at
// the latest. So results count only once the status is read after a last sync, and an owner begins no step that it was
// not told to. Who was given up comes back only with a new group: new windows, epoch 0.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define EP_FUNCTION static inline __host__ __device__
#else
#define EP_FUNCTION static inline
#endif

#define EP_MAX_RANKS 16
#define EP_MAX_TOP_K 32
#define EP_MAX_COUNTS 8192  // local experts x ranks: an owner sums them up in the memory of one thread block
#define EP_GROUP 128        // channels that share one scale, with EP_FP8

enum ep_value { EP_FLOAT32 = 0, EP_BFLOAT16 = 1 };

// How rows travel to the experts: as they are, or as e4m3 with a float32 scale for each EP_GROUP channels.
enum ep_wire { EP_VALUES = 0, EP_FP8 = 1 };

// How they come back. EP_EXACT: one row for each (token, k), weighted and added at the source in top-k order, so that
// the sum does not depend on who computed what. EP_PARTIAL: each owner adds those of its experts, and the source adds
// one row for each owner: fewer bytes, another rounding.
enum ep_combine { EP_EXACT = 0, EP_PARTIAL = 1 };

// EP_TO_OWNERS: a token goes to the ranks that own its experts. EP_TO_ALL: every token goes to every rank, and with
// EP_PARTIAL comes back from every rank: all-gather and reduce-scatter, the baseline.
enum ep_routing { EP_TO_OWNERS = 0, EP_TO_ALL = 1 };

enum ep_phase { EP_DISPATCH = 0, EP_COMBINE = 1 };

// How large a window is and what is in it. `size` is sizeof the struct, here and below.
//
// max_local_experts: of any rank. num_sources: ranks 0 to num_sources - 1 may have tokens. max_tokens: that a source
// sends in one cycle. max_rows: expert rows of one cycle that a rank has room for, padding included. alignment: each
// expert's rows begin at a multiple of it.
struct ep_shape {
    uint32_t size;
    uint32_t num_ranks;
    uint32_t num_experts;
    uint32_t max_local_experts;
    uint32_t top_k;
    uint32_t max_tokens;
    uint32_t max_rows;
    uint32_t hidden;
    uint32_t value;
    uint32_t wire;
    uint32_t combine;
    uint32_t routing;
    uint32_t alignment;
    uint32_t num_sources;
};

// At offset 0. abort: any end sets it to end this rank's waits for good. What a window is made for is told beside its
// handle (an order of the engine's) and never read out of a peer's memory.
struct ep_header {
    uint32_t abort;
};

// The only words that are polled. epoch_and_value: the cycle's number in the high half; in the low half the rows that
// were sent (dispatch) or 0. Waiters compare for equality, which wrapping around does not harm.
struct ep_cell {
    uint64_t epoch_and_value;
    uint8_t padding[56];
};

// Where the regions begin, in bytes; each is aligned to 128. What comes from `experts` on is for an owner: with
// EP_TO_OWNERS a rank without experts has no memory there. R: num_ranks, S: num_sources, T: max_tokens,
// L: max_local_experts, K: top_k, H: hidden.
struct ep_offsets {
    uint64_t cells;     // struct ep_cell [2 phases, R sources]
    uint64_t counts;    // int32 [R sources, L]: rows for each local expert; written by the source
    uint64_t bases;     // int32 [R sources, L]: where those rows begin in `out`, -1: no room; written by the owner
    uint64_t experts;   // int32 [S, T slots, K]: the pair's local expert, -1: another rank's
    uint64_t ordinals;  // int32 [S, T slots, K]: the pair's place among the source's rows for that expert
    uint64_t weights;   // float32 [S, T slots, K]; only with EP_PARTIAL
    uint64_t rows;      // [S, T slots] rows as they travel
    uint64_t scales;    // float32 [S, T slots, H / EP_GROUP]; only with EP_FP8
    uint64_t out;       // values [max_rows, H]: the experts' rows
    uint64_t sums;      // values [S, T slots, H]; only with EP_PARTIAL
    uint64_t total;
};

EP_FUNCTION uint32_t ep_value_bytes(const struct ep_shape* shape) { return shape->value == EP_FLOAT32 ? 4 : 2; }

EP_FUNCTION uint32_t ep_row_bytes(const struct ep_shape* shape) {
    return shape->wire == EP_FP8 ? shape->hidden : shape->hidden * ep_value_bytes(shape);
}

EP_FUNCTION uint32_t ep_num_groups(const struct ep_shape* shape) { return shape->hidden / EP_GROUP; }

EP_FUNCTION uint64_t ep_align(uint64_t bytes) { return (bytes + 127) & ~(uint64_t)127; }

// Whether the numbers are such that no offset overflows and every row is made of 16-byte units.
EP_FUNCTION int32_t ep_valid(const struct ep_shape* shape) {
    const int32_t sizes = shape->size == sizeof *shape && shape->num_ranks >= 1 && shape->num_ranks <= EP_MAX_RANKS &&
                          shape->num_sources >= 1 && shape->num_sources <= shape->num_ranks &&
                          shape->num_experts >= 1 && shape->num_experts <= 1u << 16 && shape->max_local_experts >= 1 &&
                          shape->max_local_experts * shape->num_ranks <= EP_MAX_COUNTS && shape->top_k >= 1 &&
                          shape->top_k <= EP_MAX_TOP_K && shape->max_tokens >= 1 && shape->max_tokens <= 1u << 20 &&
                          shape->max_rows >= 1 && shape->max_rows <= 1u << 26 && shape->hidden >= 1 &&
                          shape->hidden <= 1u << 16 && shape->alignment >= 1 && shape->alignment <= 1u << 10 &&
                          shape->max_rows % shape->alignment == 0;
    const int32_t kinds = shape->value <= EP_BFLOAT16 && shape->wire <= EP_FP8 && shape->combine <= EP_PARTIAL &&
                          shape->routing <= EP_TO_ALL &&
                          (shape->routing == EP_TO_OWNERS || shape->combine == EP_PARTIAL);
    return sizes && kinds && shape->hidden * ep_value_bytes(shape) % 16 == 0 &&
           (shape->wire != EP_FP8 || shape->hidden % EP_GROUP == 0);
}

EP_FUNCTION struct ep_offsets ep_offsets_of(const struct ep_shape* shape) {
    const uint64_t slots = (uint64_t)shape->num_sources * shape->max_tokens;
    const uint64_t counts = (uint64_t)shape->num_ranks * shape->max_local_experts * sizeof(int32_t);
    const uint64_t pairs = slots * shape->top_k * sizeof(int32_t);
    const uint64_t value_row = (uint64_t)shape->hidden * ep_value_bytes(shape);
    const int32_t partial = shape->combine == EP_PARTIAL;
    struct ep_offsets at;
    at.cells = ep_align(sizeof(struct ep_header));
    at.counts = at.cells + ep_align(2 * (uint64_t)shape->num_ranks * sizeof(struct ep_cell));
    at.bases = at.counts + ep_align(counts);
    at.experts = at.bases + ep_align(counts);
    at.ordinals = at.experts + ep_align(pairs);
    at.weights = at.ordinals + ep_align(pairs);
    at.rows = at.weights + (partial ? ep_align(pairs) : 0);
    at.scales = at.rows + ep_align(slots * ep_row_bytes(shape));
    at.out = at.scales + (shape->wire == EP_FP8 ? ep_align(slots * ep_num_groups(shape) * sizeof(float)) : 0);
    at.sums = at.out + ep_align(shape->max_rows * value_row);
    at.total = at.sums + (partial ? ep_align(slots * value_row) : 0);
    return at;
}
