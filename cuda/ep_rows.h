// The arithmetic of rows, the same on both machines: 16-byte units, e4m3, weighted sums. No product is contracted with
// a sum, so that a GPU and a CPU give the same bytes (g++ is given -ffp-contract=off).
#pragma once

#include <math.h>
#include <string.h>

#include "ep_index.h"

#if defined(__CUDACC__)
#include <cuda_fp8.h>
#endif

struct ep_bf16 {
    uint16_t bits;
};

template <class V>
struct ep_unit_of;
template <>
struct ep_unit_of<float> {
    static constexpr uint32_t kValues = 4;
};
template <>
struct ep_unit_of<ep_bf16> {
    static constexpr uint32_t kValues = 8;
};

EP_FUNCTION uint32_t ep_bits(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

EP_FUNCTION float ep_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

EP_FUNCTION float ep_multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

EP_FUNCTION float ep_add(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

EP_FUNCTION float ep_divide(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

EP_FUNCTION bool ep_finite(float value) { return (ep_bits(value) & 0x7f800000u) != 0x7f800000u; }

// Round to nearest, ties to even; every NaN becomes the quiet one, as torch has it.
EP_FUNCTION uint32_t ep_to_bf16(float value) {
    const uint32_t bits = ep_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

EP_FUNCTION void ep_unpack(const ep_unit& unit, float (&values)[4]) {
    for (uint32_t i = 0; i < 4; ++i) values[i] = ep_float(unit.words[i]);
}

EP_FUNCTION void ep_unpack(const ep_unit& unit, float (&values)[8]) {
    for (uint32_t i = 0; i < 4; ++i) {
        values[2 * i] = ep_float(unit.words[i] << 16);
        values[2 * i + 1] = ep_float(unit.words[i] & 0xffff0000u);
    }
}

// Rounds once. `values` become what was stored.
EP_FUNCTION ep_unit ep_pack(float (&values)[4]) {
    ep_unit unit;
    for (uint32_t i = 0; i < 4; ++i) unit.words[i] = ep_bits(values[i]);
    return unit;
}

EP_FUNCTION ep_unit ep_pack(float (&values)[8]) {
    ep_unit unit;
    for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t low = ep_to_bf16(values[2 * i]), high = ep_to_bf16(values[2 * i + 1]);
        unit.words[i] = low | high << 16;
        values[2 * i] = ep_float(low << 16);
        values[2 * i + 1] = ep_float(high << 16);
    }
    return unit;
}

// total += row * weight
template <uint32_t N>
EP_FUNCTION void ep_add_weighted(float (&total)[N], const ep_unit& unit, float weight) {
    float values[N];
    ep_unpack(unit, values);
    for (uint32_t i = 0; i < N; ++i) total[i] = ep_add(total[i], ep_multiply(values[i], weight));
}

template <uint32_t N>
EP_FUNCTION bool ep_all_finite(const float (&values)[N]) {
    bool finite = true;
    for (uint32_t i = 0; i < N; ++i) finite = finite && ep_finite(values[i]);
    return finite;
}

// ---- e4m3 with one scale for EP_GROUP channels (DeepSeek-V3, arXiv 2412.19437, section 3.3; DeepEP's kernels)

#define EP_E4M3_MAX 448.0f
#define EP_LEAST_AMAX 1e-4f

// scale: what the encoded values are multiplied by to get the row back. inverse: what the row is multiplied by first.
struct ep_scale {
    float scale;
    float inverse;
};

EP_FUNCTION ep_scale ep_scale_of(float amax) {
    const float bounded = amax > EP_LEAST_AMAX ? amax : EP_LEAST_AMAX;
    return {ep_divide(bounded, EP_E4M3_MAX), ep_divide(EP_E4M3_MAX, bounded)};
}

// The larger magnitude. A NaN does not count: it is encoded as one, whatever the scale is.
EP_FUNCTION float ep_larger(float amax, float value) { return fmaxf(amax, fabsf(value)); }

// Round to nearest, ties to even; what is too large becomes 448, as cvt.rn.satfinite.e4m3x2.f32 has it.
EP_FUNCTION uint32_t ep_to_e4m3(float value) {
    const uint32_t bits = ep_bits(value), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fu;
    if (magnitude >= 0x43e00000u) return sign | 0x7eu;  // 448
    if (magnitude < 0x3c800000u) {                      // 2^-6: below, values are multiples of 2^-9, as near 2^14
        return sign | (ep_bits(ep_add(ep_float(magnitude), 16384.0f)) - 0x46800000u);
    }
    const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
    return sign | ((rounded >> 20) - ((127u - 7u) << 3));
}

EP_FUNCTION float ep_from_e4m3(uint32_t code) {
    const uint32_t sign = (code & 0x80u) << 24, magnitude = code & 0x7fu;
    if (magnitude == 0x7fu) return ep_float(sign | 0x7fc00000u);
    if (magnitude < 8u) return ep_float(sign | ep_bits(ep_multiply((float)magnitude, 0.001953125f)));  // x 2^-9
    return ep_float(sign | (magnitude + ((127u - 7u) << 3)) << 20);
}

EP_FUNCTION uint32_t ep_to_e4m3x2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    // The instruction turns a NaN of either sign into 0x7f, as ep_to_e4m3 does.
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
#else
    return ep_to_e4m3(low) | ep_to_e4m3(high) << 8;
#endif
}

// 16 channels, scaled: one unit of the encoded row.
EP_FUNCTION ep_unit ep_encode(const float (&values)[16], float inverse) {
    ep_unit unit;
    for (uint32_t i = 0; i < 4; ++i) {
        const float* from = values + 4 * i;
        unit.words[i] = ep_to_e4m3x2(ep_multiply(from[0], inverse), ep_multiply(from[1], inverse)) |
                        ep_to_e4m3x2(ep_multiply(from[2], inverse), ep_multiply(from[3], inverse)) << 16;
    }
    return unit;
}

EP_FUNCTION void ep_decode(const ep_unit& unit, float scale, float (&values)[16]) {
    for (uint32_t i = 0; i < 16; ++i) {
        values[i] = ep_multiply(ep_from_e4m3(unit.words[i / 4] >> (8 * (i % 4)) & 0xffu), scale);
    }
}

// 16 channels of a row of values: kUnits units, from or to `at`.
template <class V>
struct ep_channels {
    static constexpr uint32_t kUnits = 16 / ep_unit_of<V>::kValues;
};

template <class V>
EP_FUNCTION void ep_load16(const ep_unit* at, float (&values)[16]) {
    constexpr uint32_t kValues = ep_unit_of<V>::kValues;
    ep_unit units[ep_channels<V>::kUnits];
    for (uint32_t i = 0; i < ep_channels<V>::kUnits; ++i) units[i] = at[i];
    for (uint32_t i = 0; i < ep_channels<V>::kUnits; ++i) {
        float some[kValues];
        ep_unpack(units[i], some);
        for (uint32_t j = 0; j < kValues; ++j) values[i * kValues + j] = some[j];
    }
}

template <class V>
EP_FUNCTION void ep_store16(const float (&values)[16], ep_unit* at) {
    constexpr uint32_t kValues = ep_unit_of<V>::kValues;
    for (uint32_t i = 0; i < ep_channels<V>::kUnits; ++i) {
        float some[kValues];
        for (uint32_t j = 0; j < kValues; ++j) some[j] = values[i * kValues + j];
        at[i] = ep_pack(some);
    }
}
