// cuda/ep_ptx.cuh for the GPU in software: a load that is repeated lets the other blocks run.
#pragma once

#include <time.h>

#include "cuda_runtime.h"

inline uint64_t ep_load_acquire(const uint64_t* at) {
    emulated::wait_for_others();
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
inline uint32_t ep_load_relaxed(const uint32_t* at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
inline void ep_store_release(uint64_t* at, uint64_t value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }
inline void ep_fence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline uint64_t ep_now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_nsec);
}
