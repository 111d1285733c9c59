// Weights in FP8 (e4m3) with a float32 scale for each block of 128x128, as DeepSeek publishes them, beside rows of A.
#pragma once

#include "barista_kernels.h"
#include "dot.h"

namespace bk {

constexpr int64_t kFp8Block = 128;

template <class A>
struct Fp8 {};

// Rows are widened to float32.
template <class A>
struct Dot<Fp8<A>> {
    using Activation = A;
    using Packed = float;
    static constexpr int64_t kStep = kLanes;
    static constexpr int64_t kPackedStep = kLanes;

    static BK_INLINE void pack(float* to, const A* from, int64_t n) { store(to, load(from, n)); }
};

template <class A>
struct Matrix<Fp8<A>> {
    bk_fp8 data;
    int64_t out, in;

    static constexpr int64_t kQuantum = kQuad;
    static Matrix at(const void* data, int64_t out, int64_t in, int64_t) {
        return {*static_cast<const bk_fp8*>(data), out, in};
    }
    static constexpr int64_t row_bytes(int64_t in) { return in; }
};

template <class A>
void multiply(const float* const* x, int64_t num_rows, const Matrix<Fp8<A>>& weight, int64_t first, int64_t last,
              float* out, int64_t out_stride);

// One row, with its scales applied.
void decode_fp8(const bk_fp8& weight, int64_t in, int64_t row, float* to);

}  // namespace bk
