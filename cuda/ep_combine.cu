// combine and reduce: weighted sums of rows that lie here and there, in a fixed order. A block for each sum.
#include "ep_launch.cuh"
#include "ep_rows.h"

namespace {

struct Terms {
    uint32_t count;
    ep_term list[EP_MAX_TOP_K > EP_MAX_RANKS ? EP_MAX_TOP_K : EP_MAX_RANKS];
};

constexpr uint32_t kAtOnce = 4;  // loads in flight of one thread

// Whether all that this thread stored is finite.
template <class V>
__device__ bool add_up(const Terms& terms, uint32_t units, ep_unit* out) {
    bool finite = true;
    for (uint32_t i = threadIdx.x; i < units; i += blockDim.x) {
        float total[ep_unit_of<V>::kValues] = {};
        for (uint32_t first = 0; first < terms.count; first += kAtOnce) {
            ep_unit loaded[kAtOnce];
#pragma unroll
            for (uint32_t j = 0; j < kAtOnce; ++j) {
                const ep_unit* row = first + j < terms.count ? terms.list[first + j].row : nullptr;
                if (row) loaded[j] = row[i];
            }
#pragma unroll
            for (uint32_t j = 0; j < kAtOnce; ++j) {
                const bool there = first + j < terms.count && terms.list[first + j].row;
                if (there) ep_add_weighted(total, loaded[j], terms.list[first + j].weight);
            }
        }
        out[i] = ep_pack(total);
        finite = finite && ep_all_finite(total);
    }
    return finite;
}

// The source's: of pair k, or of rank k.
__device__ void find_terms(const ep_rank& rank, const ep_offsets& at, uint32_t alive, uint32_t token, Terms& terms,
                           uint32_t& any_lost) {
    const bool exact = rank.shape.combine == EP_EXACT;
    const uint32_t k = threadIdx.x, count = exact ? rank.shape.top_k : rank.shape.num_ranks;
    if (k < 32) {
        bool lost = false;
        if (k < count) {
            terms.list[k] = exact ? ep_exact_term(rank, at, alive, token, k, &lost)
                                  : ep_partial_term(rank, at, alive, token, k, &lost);
        }
        if (!exact && k < rank.shape.top_k) lost = lost || ep_pair_lost(rank, at, alive, token, k);
        const uint32_t losses = __ballot_sync(~0u, lost);
        if (k == 0) {
            terms.count = count;
            any_lost = losses;
        }
    }
    __syncthreads();
}

template <class V>
__global__ void __launch_bounds__(kMaxThreads) combine(const __grid_constant__ ep_launch launch) {
    __shared__ Terms terms;
    __shared__ uint32_t any_lost;
    const ep_rank& rank = launch.ranks[blockIdx.y];
    const uint32_t token = blockIdx.x;
    if (token >= rank.num_tokens) return;
    find_terms(rank, launch.at, rank.state->alive, token, terms, any_lost);
    const uint32_t units = static_cast<uint32_t>(ep_value_row_bytes(&rank.shape) / sizeof(ep_unit));
    ep_unit* out = static_cast<ep_unit*>(rank.output) + (uint64_t)token * units;
    const bool finite = any_lost ? true : add_up<V>(terms, units, out);
    const bool failed = __syncthreads_or(!finite) || any_lost;
    for (uint32_t i = threadIdx.x; failed && i < units; i += blockDim.x) out[i] = ep_unit{};
    if (threadIdx.x == 0) rank.failed[token] = failed;
}

template <class V>
__global__ void __launch_bounds__(kMaxThreads) reduce(const __grid_constant__ ep_launch launch) {
    __shared__ Terms terms;
    const ep_rank& rank = launch.ranks[blockIdx.y];
    const ep_view own = ep_view_of(rank, launch.at, rank.rank);
    const uint32_t units = static_cast<uint32_t>(ep_value_row_bytes(&rank.shape) / sizeof(ep_unit));
    if (threadIdx.x == 0) terms.count = rank.shape.top_k;
    for (uint32_t source = 0; source < rank.shape.num_ranks; ++source) {
        const uint32_t got = rank.state->got[source];
        for (uint32_t i = blockIdx.x; i < got; i += gridDim.x) {
            const uint64_t slot = ep_slot_of(own, source, i);
            if (threadIdx.x < rank.shape.top_k) {
                terms.list[threadIdx.x] = ep_local_term(own, source, slot, threadIdx.x);
            }
            __syncthreads();
            (void)add_up<V>(terms, units, ep_sum_of(own, slot));
            __syncthreads();
        }
    }
}

ep_grid grid_of(const ep_shape& shape, uint32_t blocks) {
    return {blocks, ep_threads_for(static_cast<uint32_t>(ep_value_row_bytes(&shape) / sizeof(ep_unit)))};
}

}  // namespace

extern "C" int32_t ep_combine(const ep_rank* ranks, uint32_t count, void* stream) {
    if (!ep_ranks_fit(ranks, count, EP_NEEDS_SOURCE)) return EP_INVALID;
    const uint32_t most = ep_most_tokens(ranks, count);
    if (most == 0) return EP_OK;
    const ep_grid grid = grid_of(ranks[0].shape, most);
    if (ranks[0].shape.value == EP_FLOAT32) return ep_run(combine<float>, ranks, count, grid, stream);
    return ep_run(combine<ep_bf16>, ranks, count, grid, stream);
}

extern "C" int32_t ep_reduce(const ep_rank* ranks, uint32_t count, void* stream) {
    if (!ep_ranks_fit(ranks, count, EP_NEEDS_PARTIAL)) return EP_INVALID;
    const ep_shape& shape = ranks[0].shape;
    const uint32_t most = shape.num_sources * shape.max_tokens;
    ep_grid grid = grid_of(shape, 0);
    if (const int32_t error = ep_resident_blocks(grid.threads, &grid.blocks)) return error;
    grid.blocks = grid.blocks < most ? grid.blocks : most;
    if (shape.value == EP_FLOAT32) return ep_run(reduce<float>, ranks, count, grid, stream);
    return ep_run(reduce<ep_bf16>, ranks, count, grid, stream);
}
