// How a call becomes a launch: one kernel for all ranks that this process drives, blockIdx.y of them.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>

#include "ep_check.h"

// By value, and __grid_constant__ where it arrives: an index into it then stays in constant memory.
struct ep_launch {
    ep_offsets at;
    ep_rank ranks[EP_MAX_LOCAL_RANKS];
};

// Blocks for each rank. Threads are whole warps.
struct ep_grid {
    uint32_t blocks;
    uint32_t threads;
};

constexpr uint32_t kMaxThreads = 512;

inline uint32_t ep_most_tokens(const ep_rank* ranks, uint32_t count) {
    uint32_t most = 0;
    for (uint32_t i = 0; i < count; ++i) most = ranks[i].num_tokens > most ? ranks[i].num_tokens : most;
    return most;
}

// Threads of a block that moves a row of so many pieces: no more than there are, and as few idle in the last turn as
// can be.
inline uint32_t ep_threads_for(uint32_t pieces) {
    const uint32_t turns = (pieces + kMaxThreads - 1) / kMaxThreads;
    return ((pieces + turns - 1) / turns + 31) / 32 * 32;
}

// Blocks of a kernel that finds out on the device how many rows there are: enough to fill the GPU, no more.
inline int32_t ep_resident_blocks(uint32_t threads, uint32_t* blocks) {
    int device = 0, processors = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return -error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) {
        return -error;
    }
    *blocks = static_cast<uint32_t>(processors) * (2048 / threads < 8 ? 2048 / threads : 8);
    return EP_OK;
}

template <class... More>
int32_t ep_run(void (*kernel)(ep_launch, More...), const ep_rank* ranks, uint32_t count, const ep_grid& grid,
               void* stream, More... more) {
    ep_launch launch;
    launch.at = ep_offsets_of(&ranks[0].shape);
    for (uint32_t i = 0; i < count; ++i) launch.ranks[i] = ranks[i];
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid.blocks, count);
    config.blockDim = dim3(grid.threads);
    config.stream = static_cast<cudaStream_t>(stream);
    return -static_cast<int32_t>(cudaLaunchKernelEx(&config, kernel, launch, more...));
}
