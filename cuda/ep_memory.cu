#include "ep_memory.h"

#include <cuda_runtime.h>
#include <string.h>

extern "C" int32_t ep_memory_create(uint64_t bytes, uint8_t** at) {
    return -static_cast<int32_t>(cudaMalloc(reinterpret_cast<void**>(at), bytes));
}

extern "C" int32_t ep_memory_free(uint8_t* at) { return -static_cast<int32_t>(cudaFree(at)); }

extern "C" int32_t ep_memory_export(uint8_t* at, uint8_t handle[EP_HANDLE_BYTES]) {
    static_assert(sizeof(cudaIpcMemHandle_t) == EP_HANDLE_BYTES, "the size of CUDA's handle");
    cudaIpcMemHandle_t exported;
    const cudaError_t error = cudaIpcGetMemHandle(&exported, at);
    if (!error) memcpy(handle, &exported, sizeof exported);
    return -static_cast<int32_t>(error);
}

extern "C" int32_t ep_memory_open(const uint8_t handle[EP_HANDLE_BYTES], uint8_t** at) {
    cudaIpcMemHandle_t exported;
    memcpy(&exported, handle, sizeof exported);
    void* opened = nullptr;
    const cudaError_t error = cudaIpcOpenMemHandle(&opened, exported, cudaIpcMemLazyEnablePeerAccess);
    *at = static_cast<uint8_t*>(opened);
    return -static_cast<int32_t>(error);
}

extern "C" int32_t ep_memory_close(uint8_t* at) { return -static_cast<int32_t>(cudaIpcCloseMemHandle(at)); }

extern "C" int32_t ep_memory_reaches(int32_t device, int32_t peer, int32_t* can) {
    if (device == peer) {
        *can = 1;
        return 0;
    }
    return -static_cast<int32_t>(cudaDeviceCanAccessPeer(can, device, peer));
}

extern "C" int32_t ep_versions(int32_t* driver, int32_t* runtime) {
    if (const cudaError_t error = cudaDriverGetVersion(driver)) return -static_cast<int32_t>(error);
    return -static_cast<int32_t>(cudaRuntimeGetVersion(runtime));
}
