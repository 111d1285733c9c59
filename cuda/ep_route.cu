// route: which row of which window each token takes. One block for each rank and for each expert; each counts through
// the tokens in their order, so that the answer is the same every time.
#include "ep_launch.cuh"

namespace {

constexpr uint32_t kThreads = 1024;  // even a prompt takes few turns
constexpr uint32_t kWarps = kThreads / 32;
constexpr uint32_t kReporters = 8;

// How many threads of the block before this one have `hit`; *total: how many in all.
__device__ uint32_t count_before(bool hit, uint32_t (&warp_hits)[kWarps], uint32_t* total) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t hits = __ballot_sync(~0u, hit);
    if (lane == 0) warp_hits[warp] = __popc(hits);
    __syncthreads();
    uint32_t before = __popc(hits & ((1u << lane) - 1));
    *total = 0;
    for (uint32_t w = 0; w < kWarps; ++w) {
        before += w < warp ? warp_hits[w] : 0;
        *total += warp_hits[w];
    }
    __syncthreads();
    return before;
}

__device__ void number_slots(const ep_rank& rank, uint32_t alive, uint32_t owner, uint32_t (&warp_hits)[kWarps]) {
    uint32_t sent = 0;
    for (uint32_t start = 0; start < rank.num_tokens; start += kThreads) {
        const uint32_t token = start + threadIdx.x;
        const bool goes = token < rank.num_tokens && ep_goes_to(rank, alive, token, owner);
        uint32_t total;
        const uint32_t slot = sent + count_before(goes, warp_hits, &total);
        if (token < rank.num_tokens) {
            rank.slots[(uint64_t)token * rank.shape.num_ranks + owner] = goes ? static_cast<int32_t>(slot) : -1;
        }
        sent += total;
    }
    if (threadIdx.x == 0) rank.state->sent[owner] = sent;
}

__device__ void number_rows(const ep_rank& rank, const ep_offsets& at, uint32_t alive, uint32_t expert,
                            uint32_t (&warp_hits)[kWarps]) {
    uint32_t ignored = 0;
    const int32_t owner = ep_owner_of(rank, alive, static_cast<int32_t>(expert), &ignored);
    if (owner < 0) return;
    const uint32_t top_k = rank.shape.top_k;
    uint32_t count = 0;
    for (uint32_t start = 0; start < rank.num_tokens; start += kThreads) {
        const uint32_t token = start + threadIdx.x;
        bool chosen = false;
        for (uint32_t k = 0; token < rank.num_tokens && k < top_k; ++k) {
            chosen |= rank.topk_ids[(uint64_t)token * top_k + k] == static_cast<int32_t>(expert);
        }
        uint32_t total;
        const uint32_t ordinal = count + count_before(chosen, warp_hits, &total);
        for (uint32_t k = 0; chosen && k < top_k; ++k) {
            const uint64_t pair = (uint64_t)token * top_k + k;
            if (rank.topk_ids[pair] == static_cast<int32_t>(expert))
                rank.ordinals[pair] = static_cast<int32_t>(ordinal);
        }
        count += total;
    }
    const ep_view window = ep_view_of(rank, at, static_cast<uint32_t>(owner));
    if (threadIdx.x == 0) ep_counts_of(window, rank.rank)[rank.expert_index[expert]] = static_cast<int32_t>(count);
}

// The last blocks each look at a part of the ids.
__device__ void report_ids(const ep_rank& rank, uint32_t alive, uint32_t part) {
    uint32_t status = 0;
    const uint64_t pairs = (uint64_t)rank.num_tokens * rank.shape.top_k;
    for (uint64_t pair = part * kThreads + threadIdx.x; pair < pairs; pair += kReporters * kThreads) {
        (void)ep_owner_of(rank, alive, rank.topk_ids[pair], &status);
    }
    if (status) atomicOr(&rank.state->status, status);
}

__global__ void __launch_bounds__(kThreads) route(const __grid_constant__ ep_launch launch) {
    __shared__ uint32_t warp_hits[kWarps];
    const ep_rank& rank = launch.ranks[blockIdx.y];
    const uint32_t alive = rank.state->alive, num_ranks = rank.shape.num_ranks;
    if (blockIdx.x < num_ranks) {
        number_slots(rank, alive, blockIdx.x, warp_hits);
    } else if (blockIdx.x < num_ranks + rank.shape.num_experts) {
        number_rows(rank, launch.at, alive, blockIdx.x - num_ranks, warp_hits);
    } else {
        report_ids(rank, alive, blockIdx.x - num_ranks - rank.shape.num_experts);
    }
}

}  // namespace

extern "C" int32_t ep_route(const ep_rank* ranks, uint32_t count, void* stream) {
    if (!ep_ranks_fit(ranks, count, EP_NEEDS_SOURCE)) return EP_INVALID;
    const ep_shape& shape = ranks[0].shape;
    return ep_run(route, ranks, count, {shape.num_ranks + shape.num_experts + kReporters, kThreads}, stream);
}
