// expand: received rows to expert-major order. Every block sums the counts up for itself, which is quicker than a
// launch more; the first one tells the sources and the experts.
#include "ep_launch.cuh"
#include "ep_rows.h"

namespace {

// bases [num_ranks, num_local]: where the rows of (source, expert) begin, -1 without room. Uses the whole block.
__device__ void find_bases(const ep_rank& rank, const ep_offsets& at, int32_t* bases) {
    const ep_shape& shape = rank.shape;
    const uint32_t num_local = rank.num_local_experts;
    const ep_view own = ep_view_of(rank, at, rank.rank);
    const bool tells = blockIdx.x == 0;
    for (uint32_t i = threadIdx.x; i < shape.num_ranks * num_local; i += blockDim.x) {
        const uint32_t source = i / num_local, expert = i % num_local;
        bases[i] = rank.state->got[source] ? ep_counts_of(own, source)[expert] : 0;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        uint32_t start = 0;
        for (uint32_t first = 0; first < num_local; first += 32) {
            const uint32_t expert = first + threadIdx.x;
            uint32_t total = 0;
            for (uint32_t s = 0; expert < num_local && s < shape.num_ranks; ++s) total += bases[s * num_local + expert];
            const uint32_t padded = ep_padded(total, shape.alignment);
            uint32_t end = padded;
            for (uint32_t apart = 1; apart < 32; apart *= 2) {
                const uint32_t before = __shfl_up_sync(~0u, end, apart);
                if (threadIdx.x >= apart) end += before;
            }
            end += start;
            if (expert < num_local) {
                const bool fits = end <= shape.max_rows;
                uint32_t base = end - padded;
                for (uint32_t s = 0; s < shape.num_ranks; ++s) {
                    const uint32_t count = bases[s * num_local + expert];
                    bases[s * num_local + expert] = fits ? static_cast<int32_t>(base) : -1;
                    base += count;
                }
                if (tells) {
                    rank.expert_ends[expert] = static_cast<int32_t>(fits ? end : shape.max_rows);
                    if (!fits) atomicOr(&rank.state->status, EP_OVERFLOW);
                }
            }
            start = __shfl_sync(~0u, end, 31);
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; tells && i < shape.num_ranks * num_local; i += blockDim.x) {
        ep_bases_of(own, i / num_local)[i % num_local] = bases[i];
    }
}

// The rows that a received row is copied to.
struct Places {
    uint32_t count;
    uint32_t rows[EP_MAX_TOP_K];
};

__device__ void find_places(const ep_view& own, uint32_t num_local, const int32_t* bases, uint32_t source,
                            uint64_t slot, Places& found) {
    if (threadIdx.x < 32) {
        const uint32_t k = threadIdx.x;
        const int32_t expert = k < own.shape->top_k ? ep_experts_of(own, slot)[k] : -1;
        const int32_t base =
            expert >= 0 && static_cast<uint32_t>(expert) < num_local ? bases[source * num_local + expert] : -1;
        const uint32_t mask = __ballot_sync(~0u, base >= 0);
        if (base >= 0) {
            const uint32_t place = __popc(mask & ((1u << k) - 1));
            found.rows[place] = static_cast<uint32_t>(base + ep_ordinals_of(own, slot)[k]);
        }
        if (k == 0) found.count = __popc(mask);
    }
    __syncthreads();
}

enum class Form { kCopy, kFloat32, kBfloat16 };

__device__ void copy(const ep_unit* row, uint32_t units, const Places& to, ep_unit* out) {
    for (uint32_t i = threadIdx.x; i < units; i += blockDim.x) {
        const ep_unit unit = row[i];
        for (uint32_t p = 0; p < to.count; ++p) out[(uint64_t)to.rows[p] * units + i] = unit;
    }
}

template <class V>
__device__ void decode(const ep_unit* row, const float* scales, uint32_t hidden, const Places& to, ep_unit* out) {
    const uint32_t pieces = hidden / 16, kUnits = ep_channels<V>::kUnits;
    for (uint32_t i = threadIdx.x; i < pieces; i += blockDim.x) {
        float values[16];
        ep_decode(row[i], scales[i / (EP_GROUP / 16)], values);
        for (uint32_t p = 0; p < to.count; ++p) {
            ep_store16<V>(values, out + ((uint64_t)to.rows[p] * pieces + i) * kUnits);
        }
    }
}

template <Form kForm>
__global__ void __launch_bounds__(kMaxThreads) expand(const __grid_constant__ ep_launch launch) {
    __shared__ int32_t bases[EP_MAX_COUNTS];
    __shared__ Places to;
    const ep_rank& rank = launch.ranks[blockIdx.y];
    const ep_shape& shape = rank.shape;
    if (rank.num_local_experts == 0) return;
    find_bases(rank, launch.at, bases);
    const ep_view own = ep_view_of(rank, launch.at, rank.rank);
    ep_unit* out = static_cast<ep_unit*>(rank.expert_rows);
    const uint32_t units = ep_row_bytes(&shape) / sizeof(ep_unit);
    uint32_t first = 0;  // of this source, among all received rows
    for (uint32_t source = 0; source < shape.num_ranks; ++source) {
        const uint32_t got = rank.state->got[source];
        // This block takes the rows whose number among all is its own, modulo the blocks.
        for (uint32_t i = (blockIdx.x + gridDim.x - first % gridDim.x) % gridDim.x; i < got; i += gridDim.x) {
            const uint64_t slot = ep_slot_of(own, source, i);
            find_places(own, rank.num_local_experts, bases, source, slot, to);
            const ep_unit* row = ep_row_of(own, slot);
            if constexpr (kForm == Form::kCopy) copy(row, units, to, out);
            if constexpr (kForm == Form::kFloat32) decode<float>(row, ep_scales_of(own, slot), shape.hidden, to, out);
            if constexpr (kForm == Form::kBfloat16)
                decode<ep_bf16>(row, ep_scales_of(own, slot), shape.hidden, to, out);
            __syncthreads();
        }
        first += got;
    }
}

template <Form kForm>
int32_t run(const ep_rank* ranks, uint32_t count, uint32_t pieces, void* stream) {
    const ep_shape& shape = ranks[0].shape;
    const uint32_t threads = ep_threads_for(pieces), most = shape.num_sources * shape.max_tokens;
    ep_grid grid = {0, threads};
    if (const int32_t error = ep_resident_blocks(threads, &grid.blocks)) return error;
    grid.blocks = grid.blocks < most ? grid.blocks : most;
    return ep_run(expand<kForm>, ranks, count, grid, stream);
}

}  // namespace

extern "C" int32_t ep_expand(const ep_rank* ranks, uint32_t count, void* stream) {
    if (!ep_ranks_fit(ranks, count, EP_NEEDS_OWNER)) return EP_INVALID;
    if (!ep_any_owner(ranks, count)) return EP_OK;
    const ep_shape& shape = ranks[0].shape;
    const uint32_t units = static_cast<uint32_t>(ep_row_bytes(&shape) / sizeof(ep_unit));
    if (shape.wire == EP_VALUES) return run<Form::kCopy>(ranks, count, units, stream);
    if (shape.value == EP_FLOAT32) return run<Form::kFloat32>(ranks, count, units, stream);
    return run<Form::kBfloat16>(ranks, count, units, stream);
}
