#include "fp8.h"

namespace bk {
namespace {

// The values of e4m3 divided by 256: its bits are those of a float16 with a smaller exponent. 0x7f and 0xff are NaN.
BK_INLINE f32v widen_fp8(u8v v) {
    const u16v bits = widen_signed(v);
    const u16v nan = (u16v)((bits & 0x7f) == 0x7f) & 0x7e00;
    return widen_half((bits << 7 & 0xbfff) | nan);  // the sign stands in bits 14 and 15 by then
}

// out[r][0..3] = the dot products of row x[r] with weight rows w[0..3]; scales: of their blocks, one behind the other.
template <int Rows>
BK_INLINE void dot_quad(const float* const* x, const uint8_t* const* w, const float* scales, int64_t in, float* out,
                        int64_t out_stride) {
    f32v total[Rows][kQuad] = {};
    for (int64_t begin = 0; begin < in; begin += kFp8Block, ++scales) {
        const int64_t end = begin + kFp8Block < in ? begin + kFp8Block : in;
        f32v acc[Rows][kQuad] = {};
        auto add = [&](int64_t i, int j, f32v v) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) acc[r][j] = fma(load_raw<f32v>(x[r] + i), v, acc[r][j]);
        };
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes)
#pragma GCC unroll 4
            for (int j = 0; j < kQuad; ++j) add(i, j, widen_fp8(load_raw<u8v>(w[j] + i)));
        if (i < end)
#pragma GCC unroll 4
            for (int j = 0; j < kQuad; ++j) add(i, j, widen_fp8(load_raw_partial<u8v>(w[j] + i, end - i)));
        const f32v scale = splat(*scales * 256.0f);  // what widen_fp8 leaves out
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < kQuad; ++j) total[r][j] = fma(acc[r][j], scale, total[r][j]);
    }
    for (int r = 0; r < Rows; ++r) {
        const f32x4 sums = sum_each(total[r][0], total[r][1], total[r][2], total[r][3]);
        std::memcpy(out + r * out_stride, &sums, sizeof sums);
    }
}

}  // namespace

template <class A>
void multiply(const float* const* x, int64_t num_rows, const Matrix<Fp8<A>>& weight, int64_t first, int64_t last,
              float* out, int64_t out_stride) {
    const int64_t scale_stride = ceil_div(weight.in, kFp8Block);
    for (int64_t j = first; j < last; j += kQuad) {
        const uint8_t* w[kQuad];
        for (int64_t i = 0; i < kQuad; ++i) w[i] = weight.data.values + (j + i < last ? j + i : last - 1) * weight.in;
        const float* scales = weight.data.scales + j / kFp8Block * scale_stride;
        for_each_panel(num_rows, [&](int64_t begin, int64_t count) {
            with_panel_rows(count, [&](auto rows) {
                dot_quad<decltype(rows)::value>(x + begin, w, scales, weight.in, out + begin * out_stride + j - first,
                                                out_stride);
            });
        });
    }
}

void decode_fp8(const bk_fp8& weight, int64_t in, int64_t row, float* to) {
    const uint8_t* values = weight.values + row * in;
    const float* scales = weight.scales + row / kFp8Block * ceil_div(in, kFp8Block);
    for (int64_t i = 0; i < in; i += kLanes) {  // lanes divide the blocks
        const u8v bits = i + kLanes <= in ? load_raw<u8v>(values + i) : load_raw_partial<u8v>(values + i, in - i);
        store(to + i, widen_fp8(bits) * (scales[i / kFp8Block] * 256.0f), in - i);
    }
}

template void multiply(const float* const*, int64_t, const Matrix<Fp8<float>>&, int64_t, int64_t, float*, int64_t);
template void multiply(const float* const*, int64_t, const Matrix<Fp8<bf16>>&, int64_t, int64_t, float*, int64_t);

}  // namespace bk
