// y = x W^T + b, row by row.

#include "barista_kernels.h"
#include "dispatch.h"
#include "dot.h"
#include "thread_pool.h"

namespace bk {
namespace {

// to: of out_dtype, from element `at` on.
template <class A>
void store_tile_row(void* to, int64_t at, int32_t out_dtype, const float* sums, const A* bias, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
        f32v v = load(sums + i);
        if (bias) v = v + load(bias + i, count - i);
        if (out_dtype == BK_FLOAT32)
            store(static_cast<float*>(to) + at + i, v, count - i);
        else
            store(static_cast<bf16*>(to) + at + i, v, count - i);
    }
}

template <class T>
void linear(const typename Dot<T>::Activation* x, int64_t x_stride, const Matrix<T>& weight,
            const typename Dot<T>::Activation* bias, void* y, int64_t y_stride, int64_t n, int32_t out_dtype) {
    using Packed = typename Dot<T>::Packed;
    const int64_t in = weight.in, out = weight.out;
    thread_local Buffer packed_rows;
    const int64_t stride = packed_stride<T>(in);
    Packed* packed = packed_rows.get<Packed>(n * stride);
    const int64_t pack_rows = 1 + 65536 / in;
    parallel_for(ceil_div(n, pack_rows), [&](int64_t task) {
        for (int64_t r = task * pack_rows; r < n && r < (task + 1) * pack_rows; ++r)
            pack_row<T>(packed + r * stride, x + r * x_stride, in);
    });

    const int64_t wanted_tasks = 4 * num_threads();
    const int64_t tile = tile_size(out, weight.row_bytes(in), wanted_tasks, weight.kQuantum);
    const int64_t tiles = ceil_div(out, tile);
    int64_t row_blocks = ceil_div(wanted_tasks, tiles);
    if (row_blocks > ceil_div(n, 4 * kPanelRows)) row_blocks = ceil_div(n, 4 * kPanelRows);

    parallel_for(tiles * row_blocks, [&](int64_t task) {
        const int64_t first = task / row_blocks * tile, last = first + tile < out ? first + tile : out;
        const int64_t block = task % row_blocks;
        const int64_t row_begin = n * block / row_blocks, row_end = n * (block + 1) / row_blocks;
        alignas(64) float sums[kRowsPerTask * kTile];
        const int64_t count = last - first;
        for (int64_t at = row_begin; at < row_end; at += kRowsPerTask) {
            const int64_t rows = row_end - at < kRowsPerTask ? row_end - at : kRowsPerTask;
            const Packed* xs[kRowsPerTask];
            for (int64_t r = 0; r < rows; ++r) xs[r] = packed + (at + r) * stride;
            multiply(xs, rows, weight, first, last, sums, kTile);
            for (int64_t r = 0; r < rows; ++r)
                store_tile_row(y, (at + r) * y_stride + first, out_dtype, sums + r * kTile,
                               bias ? bias + first : nullptr, count);
        }
    });
}

}  // namespace
}  // namespace bk

extern "C" void bk_linear(const void* x, int64_t x_stride, const void* weight, int64_t weight_stride, const void* bias,
                          void* y, int64_t y_stride, int64_t n, int64_t in, int64_t out, int32_t weights, int32_t dtype,
                          int32_t out_dtype) {
    bk::dispatch_weights(weights, dtype, [&](auto t) {
        using T = decltype(t);
        using A = typename bk::Dot<T>::Activation;
        bk::linear(static_cast<const A*>(x), x_stride, bk::Matrix<T>::at(weight, out, in, weight_stride),
                   static_cast<const A*>(bias), y, y_stride, n, out_dtype);
    });
}

extern "C" void bk_set_threads(int32_t threads) { bk::set_num_threads(threads); }

extern "C" int32_t bk_num_threads(void) { return bk::num_threads(); }
