// Dot products of many rows with many weight rows: the one way in which every kernel here multiplies.
//
// The sum over k runs in kLanes partial sums, k ascending, then across the lanes (simd.h). That order belongs to one
// (row, weight row) pair; blocking only decides which pairs share their loads.
#pragma once

#include <type_traits>

#include "simd.h"

namespace bk {

constexpr int kQuad = 4;  // weight rows that share the loads of a panel of rows

// How weights of kind T are multiplied. Activation: the type of the rows beside them and of all results. Packed: the
// form of an activation row, padded with zeros to whole steps of kStep elements, each kPackedStep values of Packed.
template <class T>
struct Dot;

template <>
struct Dot<float> {
    using Activation = float;
    using Packed = float;
    using Weights = f32v;
    static constexpr int kStep = kLanes;
    static constexpr int kPackedStep = kLanes;

    static BK_INLINE Weights weights(const float* w) { return load_raw<f32v>(w); }
    static BK_INLINE Weights weights_partial(const float* w, int64_t n) { return load_raw_partial<f32v>(w, n * 4); }
    static BK_INLINE void add(f32v& acc, const float* x, const Weights& w) { acc = fma(load_raw<f32v>(x), w, acc); }
    static BK_INLINE void pack(float* to, const float* from, int64_t n) { store(to, load(from, n)); }
};

template <>
struct Dot<f16> {
    using Activation = float;
    using Packed = float;
    using Weights = f32v;
    static constexpr int kStep = kLanes;
    static constexpr int kPackedStep = kLanes;

    static BK_INLINE Weights weights(const f16* w) { return load(w); }
    static BK_INLINE Weights weights_partial(const f16* w, int64_t n) { return load(w, n); }
    static BK_INLINE void add(f32v& acc, const float* x, const Weights& w) { acc = fma(load_raw<f32v>(x), w, acc); }
    static BK_INLINE void pack(float* to, const float* from, int64_t n) { store(to, load(from, n)); }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bf16> {
    using Activation = bf16;
    using Packed = bf16;
    using Weights = __m512i;
    static constexpr int kStep = 2 * kLanes;
    static constexpr int kPackedStep = 2 * kLanes;

    static BK_INLINE Weights weights(const bf16* w) { return load_raw<__m512i>(w); }
    static BK_INLINE Weights weights_partial(const bf16* w, int64_t n) { return load_raw_partial<__m512i>(w, n * 2); }
    static BK_INLINE void add(f32v& acc, const bf16* x, const Weights& w) {
        acc = (f32v)_mm512_dpbf16_ps((__m512)acc, (__m512bh)load_raw<__m512i>(x), (__m512bh)w);
    }
    static BK_INLINE void pack(bf16* to, const bf16* from, int64_t n) {
        __m512i v = n >= kStep ? weights(from) : weights_partial(from, n);
        std::memcpy(to, &v, sizeof v);
    }
};
#else
// Pairs of bfloat16 are read as 32-bit words: the even elements are their low halves, the odd ones their high halves.
template <>
struct Dot<bf16> {
    using Activation = bf16;
    using Packed = float;
    struct Weights {
        f32v even, odd;
    };
    static constexpr int kStep = 2 * kLanes;
    static constexpr int kPackedStep = 2 * kLanes;

    static BK_INLINE Weights split(u32v words) { return {(f32v)(words << 16), (f32v)(words & 0xffff0000u)}; }
    static BK_INLINE Weights weights(const bf16* w) { return split(load_raw<u32v>(w)); }
    static BK_INLINE Weights weights_partial(const bf16* w, int64_t n) {
        return split(load_raw_partial<u32v>(w, n * 2));
    }
    static BK_INLINE void add(f32v& acc, const float* x, const Weights& w) {
        acc = fma(load_raw<f32v>(x), w.even, acc);
        acc = fma(load_raw<f32v>(x + kLanes), w.odd, acc);
    }
    static BK_INLINE void pack(float* to, const bf16* from, int64_t n) {
        Weights v = n >= kStep ? weights(from) : weights_partial(from, n);
        store(to, v.even);
        store(to + kLanes, v.odd);
    }
};
#endif

// Elements from one packed row of k values to the next. One step more than needed, so that rows whose length is a power
// of two do not all fall into the same cache sets.
template <class T>
BK_INLINE int64_t packed_stride(int64_t k) {
    return ((k + Dot<T>::kStep - 1) / Dot<T>::kStep + 1) * Dot<T>::kPackedStep;
}

template <class T>
void pack_row(typename Dot<T>::Packed* to, const typename Dot<T>::Activation* from, int64_t k) {
    for (int64_t i = 0; i < k; i += Dot<T>::kStep, to += Dot<T>::kPackedStep) Dot<T>::pack(to, from + i, k - i);
}

// body(std::integral_constant<int, num_rows>) for 1 <= num_rows <= kPanelRows.
template <int Rows = kPanelRows, class Body>
BK_INLINE void with_panel_rows(int64_t num_rows, Body&& body) {
    if constexpr (Rows > 1) {
        if (num_rows < Rows) return with_panel_rows<Rows - 1>(num_rows, body);
    }
    body(std::integral_constant<int, Rows>{});
}

// A weight [out, in] of kind T, row by row; stride: elements from one row to the next.
template <class T>
struct Matrix {
    const T* data;
    int64_t out, in, stride;

    static constexpr int64_t kQuantum = kQuad;  // tasks begin at multiples of so many weight rows
    static Matrix at(const void* data, int64_t out, int64_t in, int64_t stride) {
        return {static_cast<const T*>(data), out, in, stride};
    }
    static constexpr int64_t row_bytes(int64_t in) { return in * static_cast<int64_t>(sizeof(T)); }
};

// out[r * out_stride + j] = x[r] . w[j] for num_rows packed rows, few enough to stay in cache, and num_w weight rows.
// num_w is rounded up to a multiple of kQuad: w and out must reach that far (pad w by repeating a pointer).
template <class T>
void dot_rows(const typename Dot<T>::Packed* const* x, int64_t num_rows, const T* const* w, int64_t num_w, int64_t k,
              float* out, int64_t out_stride);

// ---- how work is cut

constexpr int64_t kTile = 128;              // weight rows in one task, at most
constexpr int64_t kTileBytes = 384 * 1024;  // what a tile of weights may take of the second-level cache
constexpr int64_t kRowsPerTask = 48;        // rows that share one pass over a tile, at most

BK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BK_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Weight rows per task: it stays in cache while rows stream past, and there are tasks enough for all threads.
inline int64_t tile_size(int64_t num_w, int64_t row_bytes, int64_t wanted_tasks, int64_t quantum) {
    int64_t tile = kTileBytes / row_bytes;
    if (tile * wanted_tasks > num_w) tile = num_w / wanted_tasks;
    tile = round_up(tile, quantum);
    if (tile > kTile) tile = kTile;
    return tile < quantum ? quantum : tile;
}

// Pointers to weight rows [begin, end) of a matrix, padded to whole quads. `to` holds kTile pointers.
template <class T>
int64_t tile_pointers(const T** to, const T* weight, int64_t stride, int64_t begin, int64_t end) {
    const int64_t count = round_up(end - begin, kQuad);
    for (int64_t j = 0; j < count; ++j) {
        const int64_t row = begin + j < end ? begin + j : end - 1;
        to[j] = weight + row * stride;
    }
    return end - begin;
}

// out[r * out_stride + j - first] = x[r] . weight[j] for num_rows <= kRowsPerTask packed rows and weight rows
// [first, last), at most kTile of them. first is a multiple of the matrix's kQuantum, and so far `out` must reach.
template <class T>
void multiply(const typename Dot<T>::Packed* const* x, int64_t num_rows, const Matrix<T>& weight, int64_t first,
              int64_t last, float* out, int64_t out_stride) {
    const T* rows[kTile];
    tile_pointers(rows, weight.data, weight.stride, first, last);
    dot_rows<T>(x, num_rows, rows, last - first, weight.in, out, out_stride);
}

// Cuts [0, num_rows) into the fewest panels of at most Most rows, as even as can be, and calls
// body(first row, rows) for each.
template <int Most = kPanelRows, class Body>
BK_INLINE void for_each_panel(int64_t num_rows, Body&& body) {
    const int64_t panels = ceil_div(num_rows, Most);
    for (int64_t i = 0; i < panels; ++i) {
        const int64_t begin = num_rows * i / panels, end = num_rows * (i + 1) / panels;
        body(begin, end - begin);
    }
}

}  // namespace bk
