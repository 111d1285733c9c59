// What flags need and C++ has no words for: loads, stores and a fence at system scope, and a clock.
#pragma once

#include <stdint.h>

__device__ inline uint64_t ep_load_acquire(const uint64_t* at) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
}

__device__ inline uint32_t ep_load_relaxed(const uint32_t* at) {
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

__device__ inline void ep_store_release(uint64_t* at, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

// With a release after it: whatever earlier kernels of this stream wrote comes before that store, on every GPU.
__device__ inline void ep_fence_system() { __threadfence_system(); }

__device__ inline uint64_t ep_now_ns() {
    uint64_t time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
    return time;
}
