// dispatch: each token's row into the windows of the ranks that it goes to. A block for each token; its row is read
// once.
#include "ep_launch.cuh"
#include "ep_rows.h"

namespace {

// The rows in other windows that a token is written to.
struct Destinations {
    uint32_t count;
    uint32_t owners[EP_MAX_RANKS];
    uint64_t slots[EP_MAX_RANKS];
    ep_unit* rows[EP_MAX_RANKS];
    float* scales[EP_MAX_RANKS];
};

__device__ void find_destinations(const ep_rank& rank, const ep_offsets& at, uint32_t token, Destinations& found) {
    const uint32_t num_ranks = rank.shape.num_ranks, owner = threadIdx.x;
    if (threadIdx.x < 32) {
        const int32_t slot = owner < num_ranks ? rank.slots[(uint64_t)token * num_ranks + owner] : -1;
        const uint32_t mask = __ballot_sync(~0u, slot >= 0);
        if (slot >= 0) {
            const uint32_t place = __popc(mask & ((1u << owner) - 1));
            const ep_view window = ep_view_of(rank, at, owner);
            found.owners[place] = owner;
            found.slots[place] = ep_slot_of(window, rank.rank, static_cast<uint32_t>(slot));
            found.rows[place] = ep_row_of(window, found.slots[place]);
            found.scales[place] = ep_scales_of(window, found.slots[place]);
        }
        if (threadIdx.x == 0) found.count = __popc(mask);
    }
    __syncthreads();
}

__device__ void send_pairs(const ep_rank& rank, const ep_offsets& at, uint32_t token, const Destinations& to) {
    const uint32_t top_k = rank.shape.top_k;
    for (uint32_t i = threadIdx.x; i < to.count * top_k; i += blockDim.x) {
        const uint32_t d = i / top_k, k = i % top_k;
        const uint64_t pair = (uint64_t)token * top_k + k;
        const uint32_t owner = to.owners[d];
        const ep_view window = ep_view_of(rank, at, owner);
        const int32_t id = rank.topk_ids[pair];
        uint32_t ignored = 0;
        const bool here = ep_owner_of(rank, ~0u, id, &ignored) == static_cast<int32_t>(owner);
        ep_experts_of(window, to.slots[d])[k] = here ? rank.expert_index[id] : -1;
        ep_ordinals_of(window, to.slots[d])[k] = here ? rank.ordinals[pair] : -1;
        if (rank.shape.combine == EP_PARTIAL)
            ep_weights_of(window, to.slots[d])[k] = here ? rank.topk_weights[pair] : 0.0f;
    }
}

__device__ void send_values(const ep_rank& rank, uint32_t token, const Destinations& to) {
    const uint32_t units = static_cast<uint32_t>(ep_value_row_bytes(&rank.shape) / sizeof(ep_unit));
    const ep_unit* row = static_cast<const ep_unit*>(rank.hidden_states) + (uint64_t)token * units;
    for (uint32_t i = threadIdx.x; i < units; i += blockDim.x) {
        const ep_unit unit = row[i];
        for (uint32_t d = 0; d < to.count; ++d) to.rows[d][i] = unit;
    }
}

// A thread encodes 16 channels; eight neighbours share a scale.
template <class V>
__device__ void send_fp8(const ep_rank& rank, uint32_t token, const Destinations& to) {
    constexpr uint32_t kNeighbours = EP_GROUP / 16;
    const uint32_t pieces = rank.shape.hidden / 16;
    const ep_unit* row =
        static_cast<const ep_unit*>(rank.hidden_states) + (uint64_t)token * pieces * ep_channels<V>::kUnits;
    for (uint32_t start = threadIdx.x / 32 * 32; start < pieces; start += blockDim.x) {
        const uint32_t i = start + threadIdx.x % 32;
        float values[16] = {};
        if (i < pieces) ep_load16<V>(row + i * ep_channels<V>::kUnits, values);
        float amax = 0.0f;
#pragma unroll
        for (uint32_t j = 0; j < 16; ++j) amax = ep_larger(amax, values[j]);
#pragma unroll
        for (uint32_t apart = kNeighbours / 2; apart > 0; apart /= 2) {
            amax = ep_larger(amax, __shfl_xor_sync(~0u, amax, static_cast<int>(apart)));
        }
        if (i >= pieces) continue;
        const ep_scale scale = ep_scale_of(amax);
        const ep_unit unit = ep_encode(values, scale.inverse);
        for (uint32_t d = 0; d < to.count; ++d) {
            to.rows[d][i] = unit;
            if (i % kNeighbours == 0) to.scales[d][i / kNeighbours] = scale.scale;
        }
    }
}

enum class Wire { kValues, kFp8OfFloat32, kFp8OfBfloat16 };

template <Wire kWire>
__global__ void __launch_bounds__(kMaxThreads) dispatch(const __grid_constant__ ep_launch launch) {
    __shared__ Destinations to;
    const ep_rank& rank = launch.ranks[blockIdx.y];
    const uint32_t token = blockIdx.x;
    if (token >= rank.num_tokens) return;
    find_destinations(rank, launch.at, token, to);
    send_pairs(rank, launch.at, token, to);
    if constexpr (kWire == Wire::kValues) send_values(rank, token, to);
    if constexpr (kWire == Wire::kFp8OfFloat32) send_fp8<float>(rank, token, to);
    if constexpr (kWire == Wire::kFp8OfBfloat16) send_fp8<ep_bf16>(rank, token, to);
}

}  // namespace

extern "C" int32_t ep_dispatch(const ep_rank* ranks, uint32_t count, void* stream) {
    if (!ep_ranks_fit(ranks, count, EP_NEEDS_SOURCE)) return EP_INVALID;
    const ep_shape& shape = ranks[0].shape;
    const uint32_t most = ep_most_tokens(ranks, count);
    if (most == 0) return EP_OK;
    if (shape.wire == EP_VALUES) {
        const uint32_t units = static_cast<uint32_t>(ep_value_row_bytes(&shape) / sizeof(ep_unit));
        return ep_run(dispatch<Wire::kValues>, ranks, count, {most, ep_threads_for(units)}, stream);
    }
    const ep_grid grid = {most, ep_threads_for(shape.hidden / 16)};
    if (shape.value == EP_FLOAT32) return ep_run(dispatch<Wire::kFp8OfFloat32>, ranks, count, grid, stream);
    return ep_run(dispatch<Wire::kFp8OfBfloat16>, ranks, count, grid, stream);
}
