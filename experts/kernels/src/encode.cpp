// From a matrix of floats to tiles and back. Encoding chooses, group by group, the scale of those it tries that leaves
// the smallest sum of squared errors; its bytes are the same on every machine. experts/formats holds the same in numpy.

#include <cmath>

#include "barista_kernels.h"
#include "dispatch.h"
#include "thread_pool.h"
#include "tile_scales.h"

namespace bk {
namespace {

// One tile's weights, input by input; a lane is an output row.
using TileValues = f32v[kTileInputs];

BK_INLINE f32v round_to_integer(f32v v, float least, float most) {
    const f32v shift = splat(12582912.0f);  // 1.5 * 2^23
    v = v < least ? splat(least) : v;
    v = v > most ? splat(most) : v;
    return (v + shift) - shift;
}

// Round to nearest even; what is too large becomes infinite.
uint16_t to_half(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude >= 0x38800000u)
        return static_cast<uint16_t>(sign | (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13);
    float small;
    std::memcpy(&small, &magnitude, sizeof small);
    small += 0.5f;  // its last bit is a float16's smallest step
    std::memcpy(&bits, &small, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
}

// How each kind of tile rounds: the integers that stand for a group's weights, and the scales to try.
template <class Tile>
struct Coding;

template <>
struct Coding<Int8Tile<1>> {
    using Code = uint16_t;
    static constexpr int kCandidates = 4;
    static BK_INLINE f32v integer(f32v v) { return round_to_integer(v, -127.0f, 127.0f); }
    static constexpr float kLargestScale = 1.0f / 127.0f;  // of the matrix's largest weight
    static Code code(float largest, float matrix_scale, int candidate) {
        return to_half(largest / matrix_scale / (127.0f + 0.5f * static_cast<float>(candidate)));
    }
    static BK_INLINE f32v value(const Code* codes) { return widen_half(load_raw<u16v>(codes)); }
};

template <>
struct Coding<Int4Tile> {
    using Code = uint8_t;
    static constexpr int kCandidates = 14;  // of either sign
    static constexpr float kLargestScale = 1.0f / 8.0f * 1.25f / 1.875f;
    static BK_INLINE f32v integer(f32v v) { return round_to_integer(v, -8.0f, 7.0f); }
    // Neighbours of largest / 8, which is relative to the matrix's scale.
    static Code code(float largest, float matrix_scale, int candidate) {
        const int half = to_half(largest / (8.0f * matrix_scale));
        int magnitude = ((half + 0x3f + (half >> 7 & 1)) >> 7) + candidate / 2 - 4;
        magnitude = magnitude < 0 ? 0 : magnitude > 127 ? 127 : magnitude;
        return static_cast<Code>(magnitude | (candidate % 2) << 7);
    }
    static BK_INLINE f32v value(const Code* codes) { return widen_scale8(load_raw<u8v>(codes)); }
};

template <>
struct Coding<Mxfp4Tile> {
    using Code = uint8_t;
    static constexpr int kCandidates = 2;
    // Twice the nearest value of E2M1, ties to the even mantissa.
    static BK_INLINE f32v integer(f32v v) {
        const f32v a = v < 0.0f ? -v : v;
        f32v whole = a < 4.5f ? round_to_integer(a, 0.0f, 4.0f) : splat(4.0f);
        whole = a > 5.0f ? splat(6.0f) : whole;
        whole = a >= 7.0f ? splat(8.0f) : whole;
        whole = a > 10.0f ? splat(12.0f) : whole;
        return v < 0.0f ? -whole : whole;
    }
    // The exponent that brings the largest to 4..8 (OCP MX 1.0, 6.3), and the one above, which never clips.
    static Code code(float largest, float, int candidate) {
        int exponent = 0;
        std::frexp(largest, &exponent);
        exponent += 127 - 3 + candidate;  // below 2 the inverse is no float any more
        if (largest == 0.0f) return 127;
        return static_cast<Code>(exponent < 2 ? 2 : exponent > 254 ? 254 : exponent);
    }
    static BK_INLINE f32v value(const Code* codes) { return widen_exponent(load_raw<u8v>(codes)); }
};

BK_INLINE f32v inverse(f32v scale) {
    const f32v zero = {};
    return scale == 0.0f ? zero : 1.0f / scale;
}

// Chooses the scales of inputs [begin, end) for one vector of output rows and writes their codes.
template <class Tile>
void choose_scales(const TileValues& w, int begin, int end, float matrix_scale, typename Coding<Tile>::Code* codes) {
    using C = Coding<Tile>;
    f32v largest = {};
    for (int i = begin; i < end; ++i) largest = max(max(w[i], -w[i]), largest);
    const float unit = 1.0f / matrix_scale;  // a power of two
    f32v best = splat(__builtin_inff());
    for (int candidate = 0; candidate < C::kCandidates; ++candidate) {
        typename C::Code tried[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) tried[lane] = C::code(largest[lane], matrix_scale, candidate);
        const f32v scale = C::value(tried), inverse_scale = inverse(scale);
        f32v total = {};
        for (int i = begin; i < end; ++i) {
            const f32v v = w[i] * unit;
            const f32v error = v - C::integer(v * inverse_scale) * scale;
            total = total + error * error;
        }
        for (int lane = 0; lane < kLanes; ++lane)
            if (candidate == 0 || total[lane] < best[lane]) {
                best[lane] = total[lane];
                codes[lane] = tried[lane];
            }
    }
}

template <int Scales>
void put_integer(Int8Tile<Scales>& tile, int input, int row, int integer) {
    tile.values[input / 4][row][input % 4] = static_cast<int8_t>(integer);
}

void put_nibble(uint8_t (&nibbles)[8][kTileRows][4], int input, int row, int code) {
    nibbles[input % 32 / 4][row][input % 4] |= static_cast<uint8_t>(input < 32 ? code : code << 4);
}

void put_integer(Int4Tile& tile, int input, int row, int integer) { put_nibble(tile.nibbles, input, row, integer + 8); }

void put_integer(Mxfp4Tile& tile, int input, int row, int integer) {
    int code = 0;
    while (kE2M1[code] != (integer < 0 ? -integer : integer)) ++code;
    put_nibble(tile.nibbles, input, row, integer < 0 ? code | 8 : code);
}

uint16_t* codes_of(Int8Tile<1>& tile, int which) { return &tile.scales[which]->bits; }
uint8_t* codes_of(Int4Tile& tile, int which) { return &tile.scales[which]->bits; }
uint8_t* codes_of(Mxfp4Tile& tile, int which) { return tile.exponents[which]; }

// The tile of output rows [row, row + 16) and inputs [column, column + 64); rows from `out` on are zero.
template <class Tile, class A>
void encode_tile(const A* from, int64_t out, int64_t in, int64_t row, int64_t column, float matrix_scale, Tile& tile) {
    using C = Coding<Tile>;
    std::memset(static_cast<void*>(&tile), 0, sizeof tile);
    constexpr int kPerScale = static_cast<int>(kTileInputs) / Tile::kScales;
    const float unit = 1.0f / matrix_scale;
    for (int block = 0; block < kLaneBlocks; ++block) {
        TileValues w;
        for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t r = row + block * kLanes + lane;
            alignas(64) float values[kTileInputs] = {};
            for (int64_t i = 0; r < out && i < kTileInputs; i += kLanes)
                store(values + i, load(from + r * in + column + i));
            for (int i = 0; i < kTileInputs; ++i) w[i][lane] = values[i];
        }
        for (int which = 0; which < Tile::kScales; ++which) {
            typename C::Code* codes = codes_of(tile, which) + block * kLanes;
            choose_scales<Tile>(w, which * kPerScale, (which + 1) * kPerScale, matrix_scale, codes);
            const f32v inverse_scale = inverse(C::value(codes));
            for (int i = which * kPerScale; i < (which + 1) * kPerScale; ++i) {
                const f32v integers = C::integer(w[i] * unit * inverse_scale);
                for (int lane = 0; lane < kLanes; ++lane)
                    put_integer(tile, i, block * kLanes + lane, static_cast<int>(integers[lane]));
            }
        }
    }
}

// The power of two that brings the largest scale of the matrix below what its codes can be.
template <class Tile, class A>
float matrix_scale_of(const A* from, int64_t count) {
    if constexpr (std::is_same<Tile, Mxfp4Tile>::value) {
        return 1.0f;
    } else {
        f32v largest = {};
        for (int64_t i = 0; i < count; i += kLanes) {
            const f32v v = load(from + i, count - i);
            largest = max(max(v, -v), largest);
        }
        const float top = max_lane(largest);
        if (top == 0.0f) return 1.0f;
        int exponent;
        std::frexp(top * Coding<Tile>::kLargestScale, &exponent);
        return std::ldexp(1.0f, exponent);
    }
}

template <class Tile, class A>
void encode(const A* from, int64_t out, int64_t in, void* to) {
    const int64_t num_tiles = in / kTileInputs;
    auto* header = static_cast<MatrixHeader*>(to);
    std::memset(header, 0, sizeof *header);
    header->scale = matrix_scale_of<Tile>(from, out * in);
    Tile* tiles = reinterpret_cast<Tile*>(header + 1);
    parallel_for(ceil_div(out, kTileRows), [&](int64_t strip) {
        for (int64_t t = 0; t < num_tiles; ++t)
            encode_tile(from, out, in, strip * kTileRows, t * kTileInputs, header->scale, tiles[strip * num_tiles + t]);
    });
}

template <int Scales>
float integer_at(const Int8Tile<Scales>& tile, int64_t input, int64_t row) {
    return tile.values[input / 4][row][input % 4];
}

int nibble_at(const uint8_t (&nibbles)[8][kTileRows][4], int64_t input, int64_t row) {
    return nibbles[input % 32 / 4][row][input % 4] >> (input < 32 ? 0 : 4) & 15;
}

template <class Scale>
float integer_at(const NibbleTile<Scale>& tile, int64_t input, int64_t row) {
    return static_cast<float>(nibble_at(tile.nibbles, input, row) - 8);
}

float integer_at(const Mxfp4Tile& tile, int64_t input, int64_t row) {
    return kE2M1[nibble_at(tile.nibbles, input, row)];
}

template <class Tile>
void decode_row(const Tile* strip, int64_t in, int64_t row, float matrix_scale, float* to) {
    constexpr int64_t kPerScale = kTileInputs / Tile::kScales;
    for (int64_t group = 0; group < in / kPerScale; ++group) {
        const Tile& tile = strip[group / Tile::kScales];
        const int which = static_cast<int>(group % Tile::kScales);
        const float scale = scales_of(tile, static_cast<int>(row) / kLanes, which)[row % kLanes] * matrix_scale;
        for (int64_t i = 0; i < kPerScale; ++i)
            to[group * kPerScale + i] = integer_at(tile, which * kPerScale + i, row) * scale;
    }
}

template <class Tile>
void decode(const void* from, int64_t in, const int64_t* rows, int64_t n, float* to) {
    const auto* header = static_cast<const MatrixHeader*>(from);
    const Tile* tiles = reinterpret_cast<const Tile*>(header + 1);
    parallel_for(n, [&](int64_t i) {
        const Tile* strip = tiles + rows[i] / kTileRows * (in / kTileInputs);
        decode_row(strip, in, rows[i] % kTileRows, header->scale, to + i * in);
    });
}

}  // namespace
}  // namespace bk

extern "C" int32_t bk_encode(int32_t weights, const void* from, int32_t dtype, int64_t out, int64_t in, void* to) {
    bool known = true;
    bk::dispatch(dtype, [&](auto a) {
        const auto* matrix = static_cast<const decltype(a)*>(from);
        switch (weights) {
            case BK_WEIGHTS_INT8:
                return bk::encode<bk::Int8Tile<1>>(matrix, out, in, to);
            case BK_WEIGHTS_INT4:
                return bk::encode<bk::Int4Tile>(matrix, out, in, to);
            case BK_WEIGHTS_MXFP4:
                return bk::encode<bk::Mxfp4Tile>(matrix, out, in, to);
            default:
                known = false;
        }
    });
    return known ? 0 : -1;
}

extern "C" int32_t bk_decode(int32_t weights, const void* from, int64_t in, const int64_t* rows, int64_t n, float* to) {
    switch (weights) {
        case BK_WEIGHTS_INT8:
            bk::decode<bk::Int8Tile<1>>(from, in, rows, n, to);
            return 0;
        case BK_WEIGHTS_INT4:
            bk::decode<bk::Int4Tile>(from, in, rows, n, to);
            return 0;
        case BK_WEIGHTS_MXFP4:
            bk::decode<bk::Mxfp4Tile>(from, in, rows, n, to);
            return 0;
        case BK_WEIGHTS_Q8_0:
            bk::decode<bk::Q8_0Tile>(from, in, rows, n, to);
            return 0;
        case BK_WEIGHTS_Q4_0:
            bk::decode<bk::Q4_0Tile>(from, in, rows, n, to);
            return 0;
        case BK_WEIGHTS_FP8:
            for (int64_t i = 0; i < n; ++i) bk::decode_fp8(*static_cast<const bk_fp8*>(from), in, rows[i], to + i * in);
            return 0;
        default:
            return -1;
    }
}
