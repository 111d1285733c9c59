// RMSNorm, SiLU gating, rotary embedding and the scatter into the KV cache.

#include "barista_kernels.h"
#include "dispatch.h"
#include "simd.h"
#include "thread_pool.h"

namespace bk {
namespace {

// body(row) for every row, in blocks large enough to be worth another thread.
template <class Body>
void for_each_row(int64_t n, int64_t row_elements, Body&& body) {
    const int64_t rows_per_task = 1 + 16384 / (row_elements + 1);
    parallel_for((n + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
        const int64_t begin = task * rows_per_task;
        const int64_t end = begin + rows_per_task < n ? begin + rows_per_task : n;
        for (int64_t row = begin; row < end; ++row) body(row);
    });
}

template <class T>
void rms_norm_row(const T* x, T* residual, const T* weight, float eps, T* y, int64_t width) {
    f32v squares = {};
    for (int64_t i = 0; i < width; i += kLanes) {
        f32v v = load(x + i, width - i);
        if (residual) {
            v = rounded_to<T>(v + load(residual + i, width - i));
            store(residual + i, v, width - i);
        }
        squares = fma(v, v, squares);
    }
    const float mean = sum(squares) / static_cast<float>(width);
    const float scale = 1.0f / __builtin_sqrtf(mean + eps);
    const T* source = residual ? residual : x;
    for (int64_t i = 0; i < width; i += kLanes) {
        f32v normal = rounded_to<T>(load(source + i, width - i) * scale);
        store(y + i, load(weight + i, width - i) * normal, width - i);
    }
}

template <class T>
void silu_mul_row(const T* gate, const T* up, T* y, int64_t width) {
    for (int64_t i = 0; i < width; i += kLanes) {
        f32v activated = rounded_to<T>(silu(load(gate + i, width - i)));
        store(y + i, activated * load(up + i, width - i), width - i);
    }
}

// Pair (i, i + half) of one head turns by the angle whose cosine and sine are given.
template <class T>
void rope_half_split(T* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i += kLanes) {
        const f32v a = load(head + i, half - i), b = load(head + half + i, half - i);
        const f32v c = load(cos + i, half - i), s = load(sin + i, half - i);
        store(head + i, a * c - b * s, half - i);
        store(head + half + i, b * c + a * s, half - i);
    }
}

// The same for pairs (2i, 2i + 1).
template <class T>
void rope_interleaved(T* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = load(head + 2 * i, 1)[0], b = load(head + 2 * i + 1, 1)[0];
        store(head + 2 * i, splat(a * cos[i] - b * sin[i]), 1);
        store(head + 2 * i + 1, splat(b * cos[i] + a * sin[i]), 1);
    }
}

}  // namespace
}  // namespace bk

extern "C" void bk_rms_norm(const void* x, int64_t x_stride, void* residual, int64_t residual_stride,
                            const void* weight, float eps, void* y, int64_t n, int64_t width, int32_t dtype) {
    bk::dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        bk::for_each_row(n, width, [&](int64_t row) {
            bk::rms_norm_row(static_cast<const T*>(x) + row * x_stride,
                             residual ? static_cast<T*>(residual) + row * residual_stride : nullptr,
                             static_cast<const T*>(weight), eps, static_cast<T*>(y) + row * width, width);
        });
    });
}

extern "C" void bk_silu_mul(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* y,
                            int64_t n, int64_t width, int32_t dtype) {
    bk::dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        bk::for_each_row(n, 4 * width, [&](int64_t row) {
            bk::silu_mul_row(static_cast<const T*>(gate) + row * gate_stride,
                             static_cast<const T*>(up) + row * up_stride, static_cast<T*>(y) + row * width, width);
        });
    });
}

extern "C" void bk_rope(void* x, int64_t x_stride, int64_t head_stride, const float* cos, const float* sin, int64_t n,
                        int64_t heads, int64_t half, int32_t interleaved, int32_t dtype) {
    bk::dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        bk::for_each_row(n, heads * half, [&](int64_t row) {
            for (int64_t head = 0; head < heads; ++head) {
                T* at = static_cast<T*>(x) + row * x_stride + head * head_stride;
                if (interleaved)
                    bk::rope_interleaved(at, cos + row * half, sin + row * half, half);
                else
                    bk::rope_half_split(at, cos + row * half, sin + row * half, half);
            }
        });
    });
}

extern "C" void bk_store_kv(void* cache, int64_t block_stride, int64_t slot_stride, int64_t block_size,
                            const void* rows, int64_t row_stride, const int32_t* slots, int64_t n, int64_t row_bytes) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t block = slots[i] / block_size, offset = slots[i] % block_size;
        std::memcpy(static_cast<char*>(cache) + block * block_stride + offset * slot_stride,
                    static_cast<const char*>(rows) + i * row_stride, static_cast<size_t>(row_bytes));
    }
}
