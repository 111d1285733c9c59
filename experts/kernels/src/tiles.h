// Weights of few bits, in tiles of 16 output rows by 64 inputs, and how rows are multiplied with them.
//
// A vector's lanes are output rows, so no sum crosses lanes. Within a tile the products are integers and their sum is
// exact; tiles are added in float32 in ascending order of their inputs. So the bytes of a result depend neither on the
// width of the vectors nor on how rows are blocked. A tile's layout is that of a packed file (experts/formats).
#pragma once

#include "barista_kernels.h"
#include "dot.h"

namespace bk {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileInputs = 64;
constexpr int kLaneBlocks = static_cast<int>(kTileRows) / kLanes;  // vectors that hold a tile's output rows
constexpr int kRunsOfFour = static_cast<int>(kTileInputs) / 4;

// Integers of 8 bits, symmetric. values[i][r]: inputs 4i to 4i + 3 of output row r.
template <int Scales>
struct Int8Tile {
    static constexpr int kScales = Scales;  // along the 64 inputs
    int8_t values[kRunsOfFour][kTileRows][4];
    f16 scales[Scales][kTileRows];
};

// Integers of 4 bits, of which 8 is zero. nibbles[i][r]: in the low halves inputs 4i to 4i + 3 of output row r, in the
// high halves inputs 32 + 4i to 32 + 4i + 3. scales[h]: of each half.
template <class Scale>
struct NibbleTile {
    static constexpr int kScales = 2;
    uint8_t nibbles[kRunsOfFour / 2][kTileRows][4];
    Scale scales[kScales][kTileRows];
};

// A signed scale in 8 bits, 4 of exponent and 3 of mantissa, in the bits of e4m3 but without its NaN: 2^-8 times what
// e4m3 makes of them. It is relative to the matrix's own scale.
struct scale8 {
    uint8_t bits;
};

using Int4Tile = NibbleTile<scale8>;
using Q4_0Tile = NibbleTile<f16>;  // of ggml's block_q4_0, rearranged
using Q8_0Tile = Int8Tile<2>;      // of ggml's block_q8_0, rearranged

// E2M1 (OCP Microscaling Formats 1.0): nibbles as in NibbleTile, a scale of 2^(exponent - 127) for each 32 inputs.
struct Mxfp4Tile {
    static constexpr int kScales = 2;
    uint8_t nibbles[kRunsOfFour / 2][kTileRows][4];
    uint8_t exponents[kScales][kTileRows];
};

// Twice the values of E2M1 are these integers.
constexpr int8_t kE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The integers that activations become beside a tile: of 8 bits beside 4, of 16 beside 8, so that the error of the
// weights hides that of the activations.
template <class Tile>
struct RowInteger {
    using Type = int8_t;
};
template <int Scales>
struct RowInteger<Int8Tile<Scales>> {
    using Type = int16_t;
};

// What is added to a nibble's integer to make it unsigned.
template <class Tile>
constexpr int32_t kNibbleZero = 8;
template <>
inline constexpr int32_t kNibbleZero<Mxfp4Tile> = 12;

// 64 activations: integers and, for each half, what they were divided by. Integers of 8 bits have what corrects a sum
// of unsigned products, -kNibbleZero times the sum of those at 0 and 1, and at 2 and 3, of every four. Integers of 16
// bits have one scale for both halves, and within every four the order 0, 2, 1, 3, in which widened bytes come.
template <class Integer>
struct RowGroup {
    Integer values[kTileInputs];
    float scales[2];
    int16_t corrections[2][2];
};

// Weights in tiles beside rows of A. `in` must be a multiple of 64.
template <class Tile, class A>
struct Tiled {};

template <class Tile, class A>
struct Dot<Tiled<Tile, A>> {
    using Activation = A;
    using Packed = RowGroup<typename RowInteger<Tile>::Type>;
    static constexpr int64_t kStep = kTileInputs;
    static constexpr int64_t kPackedStep = 1;

    static void pack(Packed* to, const A* from, int64_t n);
};

// What stands before the tiles of a matrix. scale: a power of two that all of its scales are relative to.
struct MatrixHeader {
    float scale;
    uint32_t unused[15];
};
static_assert(sizeof(MatrixHeader) == 64);

// in / 64 tiles make a strip of 16 output rows; strips follow each other. Rows that fill up the last strip are zero.
template <class Tile, class A>
struct Matrix<Tiled<Tile, A>> {
    const Tile* tiles;
    int64_t out, in;
    float scale;

    static constexpr int64_t kQuantum = kTileRows;
    static Matrix at(const void* data, int64_t out, int64_t in, int64_t) {
        const auto* header = static_cast<const MatrixHeader*>(data);
        return {reinterpret_cast<const Tile*>(header + 1), out, in, header->scale};
    }
    static constexpr int64_t row_bytes(int64_t in) {
        return in / kTileInputs * static_cast<int64_t>(sizeof(Tile)) / kTileRows;
    }
};

template <class Tile, class A>
void multiply(const typename Dot<Tiled<Tile, A>>::Packed* const* x, int64_t num_rows,
              const Matrix<Tiled<Tile, A>>& weight, int64_t first, int64_t last, float* out, int64_t out_stride);

}  // namespace bk
