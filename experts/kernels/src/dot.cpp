#include "dot.h"

namespace bk {
namespace {

// out[r][0..3] = the dot products of packed row x[r] with w[0..3], for Rows rows. Meanwhile the rows `ahead` are
// fetched.
template <class T, int Rows>
BK_INLINE void dot_quad(const typename Dot<T>::Packed* const* x, const T* const* w, const T* const* ahead, int64_t k,
                        float* out, int64_t out_stride) {
    using D = Dot<T>;
    f32v acc[Rows][kQuad] = {};
    const T* const from[kQuad] = {w[0], w[1], w[2], w[3]};
    const T* const next[kQuad] = {ahead[0], ahead[1], ahead[2], ahead[3]};
    const typename D::Packed* rows[Rows];
    for (int r = 0; r < Rows; ++r) rows[r] = x[r];
    // One weight row at a time, which leaves the registers to the sums.
    auto add = [&](int j, const typename D::Weights& v, int64_t p) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) D::add(acc[r][j], rows[r] + p, v);
    };
    int64_t i = 0, p = 0;
    for (; i + D::kStep <= k; i += D::kStep, p += D::kPackedStep) {
#pragma GCC unroll 4
        for (int j = 0; j < kQuad; ++j) {
            __builtin_prefetch(next[j] + i);
            add(j, D::weights(from[j] + i), p);
        }
    }
    if (i < k) {
#pragma GCC unroll 4
        for (int j = 0; j < kQuad; ++j) add(j, D::weights_partial(from[j] + i, k - i), p);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
        f32x4 sums = sum_each(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
        std::memcpy(out + r * out_stride, &sums, sizeof sums);
    }
}

}  // namespace

template <class T>
void dot_rows(const typename Dot<T>::Packed* const* x, int64_t num_rows, const T* const* w, int64_t num_w, int64_t k,
              float* out, int64_t out_stride) {
    const int64_t panels = ceil_div(num_rows, kPanelRows);
    for (int64_t j = 0; j < num_w; j += kQuad) {
        const T* const* next = j + kQuad < num_w ? w + j + kQuad : w + j;
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t begin = num_rows * panel / panels, end = num_rows * (panel + 1) / panels;
            // Each panel fetches its share of the next quad, so that reading memory and multiplying overlap; the
            // others' share is replaced by what is in the cache already.
            const T* ahead[kQuad];
            for (int64_t r = 0; r < kQuad; ++r) ahead[r] = r * panels / kQuad == panel ? next[r] : w[j + r];
            with_panel_rows(end - begin, [&](auto rows) {
                dot_quad<T, decltype(rows)::value>(x + begin, w + j, ahead, k, out + begin * out_stride + j,
                                                   out_stride);
            });
        }
    }
}

template void dot_rows<float>(const Dot<float>::Packed* const*, int64_t, const float* const*, int64_t, int64_t, float*,
                              int64_t);
template void dot_rows<f16>(const Dot<f16>::Packed* const*, int64_t, const f16* const*, int64_t, int64_t, float*,
                            int64_t);
template void dot_rows<bf16>(const Dot<bf16>::Packed* const*, int64_t, const bf16* const*, int64_t, int64_t, float*,
                             int64_t);

}  // namespace bk
