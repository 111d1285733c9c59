// The expert-parallel kernels: a plain C ABI with two implementations of the same bytes, CUDA (ep_*.cu) and CPU
// (ep_host.cpp). On the CPU all pointers are ordinary memory, the stream is ignored and every call ends when its work
// has.
//
// Every call takes the ranks that this process drives, one in production; several are virtual ranks that share a GPU.
// A call only launches; nothing synchronises with the host, allocates or resets, so all of it may be captured in a
// graph. Returns EP_OK, EP_INVALID before anything was launched, or the negative of a cudaError_t.
#pragma once

#include "ep_window.h"

#define EP_MAX_LOCAL_RANKS 8

enum ep_result { EP_OK = 0, EP_INVALID = 1 };

// What has gone wrong in a rank's cycles since the host last cleared it.
enum ep_status {
    EP_TIMED_OUT = 1,    // a peer did not arrive in time and is not waited for any more
    EP_ABORTED = 2,      // the window's abort word was set
    EP_BAD_ID = 4,       // a top-k id that is no expert
    EP_OVERFLOW = 8,     // more expert rows than max_rows
    EP_UNREACHABLE = 16  // a pair's expert is on a rank that is not alive
};

// A rank's own memory of its cycles, written by its kernels alone but for `alive` before the first and `status`.
struct ep_state {
    uint32_t size;
    uint32_t epoch;               // of the last sync(dispatch)
    uint32_t alive;               // bit r: rank r takes part; the rank itself always does
    uint32_t status;              // enum ep_status, or-ed
    uint32_t sent[EP_MAX_RANKS];  // rows for each rank in this cycle
    uint32_t got[EP_MAX_RANKS];   // rows from each rank in this cycle; 0 from one that is not alive
};

// One rank: its group's windows as this process maps them, and the tensors of one layer. T, K, H, L, R as in
// ep_window.h.
struct ep_rank {
    uint32_t size;
    uint32_t rank;
    struct ep_shape shape;
    uint64_t timeout_ns;  // how long a sync waits for its peers
    uint8_t* windows[EP_MAX_RANKS];
    struct ep_state* state;
    const int32_t* expert_rank;   // [num_experts]: who owns it, -1: nobody
    const int32_t* expert_index;  // [num_experts]: which of its owner's experts it is
    // The source's.
    uint32_t num_tokens;         // at most T
    uint32_t num_local_experts;  // at most L
    const void* hidden_states;   // values [num_tokens, H]
    const int32_t* topk_ids;     // [num_tokens, K], -1: none
    const float* topk_weights;   // [num_tokens, K]
    int32_t* slots;              // [T, R], by route: the token's row in each rank's window, -1: not sent there
    int32_t* ordinals;           // [T, K], by route
    void* output;                // values [num_tokens, H], by combine; a failed row is zero
    uint8_t* failed;             // [num_tokens], by combine: 1 if a pair was lost or the sum is not finite
    // The owner's.
    void* expert_rows;           // values [max_rows, H], by expand
    int32_t* expert_ends;        // [L], by expand: where each local expert's rows end, padding included
    const void* expert_results;  // values [max_rows, H]: what the experts made of expert_rows, for collect
};

#if defined(__cplusplus)
extern "C" {
#endif

// sizeof the structs as this library knows them, so that a caller can refuse another's.
void ep_struct_sizes(uint32_t* shape, uint32_t* state, uint32_t* rank);

// Bytes of a window, and where its regions lie; 0 if the shape is not valid.
uint64_t ep_window_bytes(const struct ep_shape* shape, struct ep_offsets* offsets);

// Make fresh memory of so many bytes a window: those of ep_window_bytes, or for a rank without experts those before
// ep_offsets.experts. Returns after it is one.
int32_t ep_window_format(uint8_t* window, uint64_t bytes, const struct ep_shape* shape);

// End all waits of the rank that owns this window, now and from now on.
int32_t ep_window_abort(uint8_t* window);

// Which row of which window each token takes, in order of the tokens: a function of topk_ids and `alive` alone.
int32_t ep_route(const struct ep_rank* ranks, uint32_t count, void* stream);

// Each token's row, once to each rank that it goes to, with what the owner must know of it.
int32_t ep_dispatch(const struct ep_rank* ranks, uint32_t count, void* stream);

// Publish and wait. The only call whose kernel waits, of one warp a rank; a peer that is late loses its bit of `alive`.
int32_t ep_sync(const struct ep_rank* ranks, uint32_t count, uint32_t phase, void* stream);

// Received rows to expert-major order: expert e's from expert_ends[e - 1], aligned, in order of (source, slot).
int32_t ep_expand(const struct ep_rank* ranks, uint32_t count, void* stream);

// The experts' results into `out`, as many rows as there are: their product knows no window.
int32_t ep_collect(const struct ep_rank* ranks, uint32_t count, void* stream);

// With EP_PARTIAL: the weighted sum of each received row's experts, from `out` to `sums`, in float32, in top-k order.
int32_t ep_reduce(const struct ep_rank* ranks, uint32_t count, void* stream);

// The sum of each token's rows in float32, in top-k order (EP_EXACT) or in order of the ranks (EP_PARTIAL), rounded
// once.
int32_t ep_combine(const struct ep_rank* ranks, uint32_t count, void* stream);

// What cudaGetErrorString says of a result.
const char* ep_result_text(int32_t result);

#if defined(__cplusplus)
}
#endif
