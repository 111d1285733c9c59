// Memory for windows on GPUs, and what a GPU and its driver can do: plain C. The CPU twin has no need of it.
#pragma once

#include <stdint.h>

#define EP_HANDLE_BYTES 64

#if defined(__cplusplus)
extern "C" {
#endif

// On the current device. Legacy memory, not the allocator's of any framework, so that other processes may open it.
int32_t ep_memory_create(uint64_t bytes, uint8_t** at);
int32_t ep_memory_free(uint8_t* at);

// CUDA IPC: a handle for another process of this machine. A process cannot open its own.
int32_t ep_memory_export(uint8_t* at, uint8_t handle[EP_HANDLE_BYTES]);
int32_t ep_memory_open(const uint8_t handle[EP_HANDLE_BYTES], uint8_t** at);
int32_t ep_memory_close(uint8_t* at);

// Whether one device can read and write another's memory.
int32_t ep_memory_reaches(int32_t device, int32_t peer, int32_t* can);

// CUDA versions as 1000 x major + 10 x minor: the newest that the driver serves, 0 without one, and this library's.
int32_t ep_versions(int32_t* driver, int32_t* runtime);

#if defined(__cplusplus)
}
#endif
