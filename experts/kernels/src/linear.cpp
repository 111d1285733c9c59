// y = x W^T + b, row by row.

#include "products.h"
#include "thread_pool.h"

extern "C" void bk_linear(const void* x, int64_t x_stride, const void* weight, int64_t weight_stride, const void* bias,
                          void* y, int64_t y_stride, int64_t n, int64_t in, int64_t out, int32_t weights, int32_t dtype,
                          int32_t out_dtype) {
    const bk_weight w{weight, out, in, weight_stride, weights};
    const bk::Product product{x, x_stride, &w, bias, y, y_stride};
    bk::multiply_all(&product, 1, n, dtype, out_dtype);
}

extern "C" void bk_set_threads(int32_t threads) { bk::set_num_threads(threads); }

extern "C" int32_t bk_num_threads(void) { return bk::num_threads(); }
