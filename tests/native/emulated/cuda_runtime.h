// A GPU in software, as much of one as cuda/*.cu needs: g++ compiles the kernels themselves against this header, and
// every thread of a block is a fiber. What a GPU would leave undefined is an error here: a barrier that not all threads
// of a block reach, a warp function that not all lanes call.
//
// Blocks run one after the other, until each is done or waits for another one (emulated::wait_for_others).
#pragma once

#include <stdint.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    uint32_t x, y, z;
    dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
inline cudaError_t operator-(cudaError_t error) { return error; }
typedef void* cudaStream_t;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace emulated {

struct Where {
    dim3 thread, block, block_size, grid;
};
extern Where where;

// Runs `body` once for each thread of the grid.
void run(dim3 grid, dim3 block, const std::function<void()>& body);

// A block's or a warp's threads meet, each with a value; gives the values of all.
enum class Scope { kBlock, kWarp };
const uint32_t* meet(Scope scope, const char* what, uint32_t value);

// This thread waits for what threads of other blocks do.
void wait_for_others();

}  // namespace emulated

inline dim3& threadIdx = emulated::where.thread;
inline dim3& blockIdx = emulated::where.block;
inline dim3& blockDim = emulated::where.block_size;
inline dim3& gridDim = emulated::where.grid;

inline void __syncthreads() { (void)emulated::meet(emulated::Scope::kBlock, "__syncthreads", 0); }

inline int __syncthreads_or(int value) {
    const uint32_t* all = emulated::meet(emulated::Scope::kBlock, "__syncthreads_or", value != 0);
    int any = 0;
    for (uint32_t i = 0; i < blockDim.x; ++i) any |= static_cast<int>(all[i]);
    return any;
}

inline uint32_t __ballot_sync(uint32_t, bool value) {
    const uint32_t* lanes = emulated::meet(emulated::Scope::kWarp, "__ballot_sync", value);
    uint32_t mask = 0;
    for (uint32_t i = 0; i < 32; ++i) mask |= lanes[i] << i;
    return mask;
}

inline uint32_t __reduce_or_sync(uint32_t, uint32_t value) {
    const uint32_t* lanes = emulated::meet(emulated::Scope::kWarp, "__reduce_or_sync", value);
    uint32_t any = 0;
    for (uint32_t i = 0; i < 32; ++i) any |= lanes[i];
    return any;
}

namespace emulated {

template <class T>
T shuffle(const char* what, T value, uint32_t from) {
    static_assert(sizeof(T) == 4, "a register");
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t* lanes = meet(Scope::kWarp, what, bits);
    T result;
    memcpy(&result, &lanes[from % 32], 4);
    return result;
}

inline uint32_t lane() { return where.thread.x % 32; }

}  // namespace emulated

template <class T>
T __shfl_sync(uint32_t, T value, int from) {
    return emulated::shuffle("__shfl_sync", value, static_cast<uint32_t>(from));
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
    return emulated::shuffle("__shfl_xor_sync", value, emulated::lane() ^ static_cast<uint32_t>(mask));
}
template <class T>
T __shfl_up_sync(uint32_t, T value, uint32_t by) {
    return emulated::shuffle("__shfl_up_sync", value, emulated::lane() < by ? emulated::lane() : emulated::lane() - by);
}

inline uint32_t __popc(uint32_t value) { return static_cast<uint32_t>(__builtin_popcount(value)); }
inline uint32_t atomicOr(uint32_t* at, uint32_t value) { return __atomic_fetch_or(at, value, __ATOMIC_RELAXED); }

template <class Kernel, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Arguments&... arguments) {
    emulated::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
    return cudaSuccess;
}

// Two multiprocessors, so that there are more rows than blocks.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }

enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum { cudaStreamNonBlocking };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaMemset(void* at, int value, size_t bytes) { return memset(at, value, bytes), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    return memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, int) { return *stream = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated GPU"; }
