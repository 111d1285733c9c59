// The vector types and the few operations that every kernel is written in.
//
// One vector holds kLanes floats, the width of the instruction set that this file is compiled for. The order of every
// sum is spelled out: multiply-adds are explicit (fma) and the compiler may not contract or reassociate
// (-ffp-contract=off, no -ffast-math). So a row's bytes do not depend on how rows are blocked.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BK_INLINE inline __attribute__((always_inline))

namespace bk {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kPanelRows = 6;  // 6 rows x 4 outputs: 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kPanelRows = 3;  // 3 x 4: 12 of 16
#else
constexpr int kLanes = 4;
constexpr int kPanelRows = 2;
#endif

typedef float f32v __attribute__((vector_size(kLanes * 4)));
typedef int32_t i32v __attribute__((vector_size(kLanes * 4)));
typedef uint32_t u32v __attribute__((vector_size(kLanes * 4)));
typedef uint16_t u16v __attribute__((vector_size(kLanes * 2)));
typedef uint8_t u8v __attribute__((vector_size(kLanes)));
typedef float f32x4 __attribute__((vector_size(16)));

// A bfloat16 in memory. Arithmetic is in float32.
struct bf16 {
    uint16_t bits;
};

// A float16 in memory: weights only. It is widened exactly, and activations beside it are float32.
struct f16 {
    uint16_t bits;
};

template <class V>
BK_INLINE V load_raw(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

// The first `bytes` of a vector from memory, the rest zero.
template <class V>
BK_INLINE V load_raw_partial(const void* p, int64_t bytes) {
    V v = {};
    std::memcpy(&v, p, static_cast<size_t>(bytes));
    return v;
}

BK_INLINE f32v splat(float x) { return x - f32v{}; }

BK_INLINE f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

BK_INLINE f32v max(f32v a, f32v b) { return a > b ? a : b; }

// ---- loads and stores of `count` <= kLanes elements; missing ones read as zero and are not written

// Here and below: GCC makes up to five times as many instructions of a plain conversion.
BK_INLINE f32v widen(u16v v) {
#if defined(__AVX512F__)
    return (f32v)((u32v)_mm512_cvtepu16_epi32((__m256i)v) << 16);
#elif defined(__AVX2__)
    return (f32v)((u32v)_mm256_cvtepu16_epi32((__m128i)v) << 16);
#else
    return (f32v)(__builtin_convertvector(v, u32v) << 16);
#endif
}

// Sign-extended.
BK_INLINE u16v widen_signed(u8v bits) {
#if defined(__AVX512BW__)
    return (u16v)_mm256_cvtepi8_epi16((__m128i)bits);
#elif defined(__AVX2__)
    return (u16v)_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bits)));
#else
    typedef int8_t i8v __attribute__((vector_size(kLanes)));
    typedef int16_t i16v __attribute__((vector_size(kLanes * 2)));
    return (u16v) __builtin_convertvector((i8v)bits, i16v);
#endif
}

BK_INLINE f32v widen_half(u16v v) {
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
    return (f32v)_mm256_cvtph_ps((__m128i)v);
#else
    // The magnitude's bits as a float's are too small by 2^112, subnormals included; infinities and NaNs are set apart.
    u32v bits = __builtin_convertvector(v, u32v), magnitude = (bits & 0x7fffu) << 13;
    u32v finite = (u32v)((f32v)magnitude * splat(0x1p112f));
    return (f32v)(((magnitude >= (0x7c00u << 13)) ? (magnitude | 0x7f800000u) : finite) | (bits & 0x8000u) << 16);
#endif
}

// The high halves: v as bfloat16, rounded to nearest even, as torch does. A NaN stays one.
BK_INLINE u32v round_high(f32v v) {
    u32v u = (u32v)v;
    u32v rounded = u + 0x7fffu + ((u >> 16) & 1u), quiet = u | 0x400000u;
    return (v == v) ? rounded : quiet;
}

BK_INLINE u16v narrow(f32v v) { return __builtin_convertvector(round_high(v) >> 16, u16v); }

BK_INLINE f32v load(const float* p, int64_t count = kLanes) {
    return count >= kLanes ? load_raw<f32v>(p) : load_raw_partial<f32v>(p, count * 4);
}

BK_INLINE f32v load(const bf16* p, int64_t count = kLanes) {
    return widen(count >= kLanes ? load_raw<u16v>(p) : load_raw_partial<u16v>(p, count * 2));
}

BK_INLINE f32v load(const f16* p, int64_t count = kLanes) {
    return widen_half(count >= kLanes ? load_raw<u16v>(p) : load_raw_partial<u16v>(p, count * 2));
}

BK_INLINE void store(float* p, f32v v, int64_t count = kLanes) {
    std::memcpy(p, &v, count >= kLanes ? sizeof v : static_cast<size_t>(count) * 4);
}

BK_INLINE void store(bf16* p, f32v v, int64_t count = kLanes) {
    u16v u = narrow(v);
    std::memcpy(p, &u, count >= kLanes ? sizeof u : static_cast<size_t>(count) * 2);
}

// What v becomes when it is stored as T and loaded again.
template <class T>
BK_INLINE f32v rounded_to(f32v v);
template <>
BK_INLINE f32v rounded_to<float>(f32v v) {
    return v;
}
template <>
BK_INLINE f32v rounded_to<bf16>(f32v v) {
    return (f32v)(round_high(v) & 0xffff0000u);
}

// ---- sums across lanes: in every four neighbours (0 + 2) + (1 + 3), then the fours, half with half

#if defined(__AVX512F__)
#define BK_SHUFFLE(a, b, i, j, k, l)                                                                                  \
    __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, \
                            k + 12, l + 12)
#elif defined(__AVX2__)
#define BK_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4)
#else
#define BK_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif

BK_INLINE f32x4 fold_to_four(f32v v) {
#if defined(__AVX512F__)
    auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif defined(__AVX2__)
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
    return v;
#endif
}

// The sums of four vectors at once, which costs little more than one.
BK_INLINE f32x4 sum_each(f32v a, f32v b, f32v c, f32v d) {
    constexpr int n = kLanes;
    f32v ab = BK_SHUFFLE(a, b, 0, n, 1, n + 1) + BK_SHUFFLE(a, b, 2, n + 2, 3, n + 3);
    f32v cd = BK_SHUFFLE(c, d, 0, n, 1, n + 1) + BK_SHUFFLE(c, d, 2, n + 2, 3, n + 3);
    return fold_to_four(BK_SHUFFLE(ab, cd, 0, 1, n, n + 1) + BK_SHUFFLE(ab, cd, 2, 3, n + 2, n + 3));
}

BK_INLINE float sum(f32v v) { return sum_each(v, v, v, v)[0]; }

BK_INLINE float max_lane(f32v v) {
#if defined(__AVX512F__)
    auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    const auto other = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    half = half > other ? half : other;
    f32x4 best = __builtin_shufflevector(half, half, 0, 1, 2, 3),
          rest = __builtin_shufflevector(half, half, 4, 5, 6, 7);
    best = best > rest ? best : rest;
#elif defined(__AVX2__)
    f32x4 best = __builtin_shufflevector(v, v, 0, 1, 2, 3), rest = __builtin_shufflevector(v, v, 4, 5, 6, 7);
    best = best > rest ? best : rest;
#else
    f32x4 best = v;
#endif
    const float a = best[0] > best[1] ? best[0] : best[1], b = best[2] > best[3] ? best[2] : best[3];
    return a > b ? a : b;
}

// exp to about 1 ulp; 0 below -87.3, infinity above 88.7, NaN for NaN. Cody-Waite reduction by ln 2 and the
// polynomial of Cephes' expf.
BK_INLINE f32v exp(f32v x) {
    const f32v shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    f32v clamped = x > 88.7f ? splat(88.7f) : x;
    f32v biased = fma(clamped, splat(1.44269504f), shift);
    f32v n = biased - shift;
    f32v r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    f32v p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    // 2^n in two factors, because n = 128 is no exponent of a float.
    i32v half = ((i32v)biased - 0x4b400000) >> 1;
    i32v rest = ((i32v)biased - 0x4b400000) - half;
    p = p * (f32v)((half + 127) << 23) * (f32v)((rest + 127) << 23);
    p = x < -87.3f ? splat(0.0f) : p;
    return x > 88.7f ? splat(__builtin_inff()) : p;
}

BK_INLINE f32v silu(f32v x) { return x / (1.0f + exp(-x)); }

// to = from in another dtype.
template <class To, class From>
void convert(To* to, const From* from, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(from + i, count - i), count - i);
}

}  // namespace bk
