// Several products y = x W^T + b in one queue of tasks: a layer's q, k and v, or the matrices of its heads.
#pragma once

#include "barista_kernels.h"

namespace bk {

// x: [n, in] of dtype; bias: [out] of dtype, or NULL; y: [n, out] of out_dtype.
struct Product {
    const void* x;
    int64_t x_stride;
    const bk_weight* weight;
    const void* bias;
    void* y;
    int64_t y_stride;
};

// All of them, with the bytes that bk_linear gives each alone. Neighbours that share x should follow each other.
void multiply_all(const Product* products, int64_t count, int64_t n, int32_t dtype, int32_t out_dtype);

inline void multiply_one(const Product& product, int64_t n, int32_t dtype) {
    multiply_all(&product, 1, n, dtype, dtype);
}

}  // namespace bk
