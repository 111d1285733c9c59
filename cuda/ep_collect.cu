// collect: the experts' results into the owner's window, as many rows as there are, which is known on the device alone.
#include "ep_launch.cuh"

namespace {

__global__ void __launch_bounds__(kMaxThreads) collect(const __grid_constant__ ep_launch launch) {
    const ep_rank& rank = launch.ranks[blockIdx.y];
    if (rank.num_local_experts == 0) return;
    const uint32_t units = static_cast<uint32_t>(ep_value_row_bytes(&rank.shape) / sizeof(ep_unit));
    const uint64_t total = static_cast<uint64_t>(rank.expert_ends[rank.num_local_experts - 1]) * units;
    const ep_unit* results = static_cast<const ep_unit*>(rank.expert_results);
    ep_unit* out = ep_out_of(ep_view_of(rank, launch.at, rank.rank), 0);
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
         i += static_cast<uint64_t>(gridDim.x) * blockDim.x) {
        out[i] = results[i];
    }
}

}  // namespace

extern "C" int32_t ep_collect(const ep_rank* ranks, uint32_t count, void* stream) {
    if (!ep_ranks_fit(ranks, count, EP_NEEDS_RESULTS)) return EP_INVALID;
    if (!ep_any_owner(ranks, count)) return EP_OK;
    ep_grid grid = {0, kMaxThreads};
    if (const int32_t error = ep_resident_blocks(grid.threads, &grid.blocks)) return error;
    return ep_run(collect, ranks, count, grid, stream);
}
