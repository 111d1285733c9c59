#include "tile_scales.h"
#include "tiles.h"

namespace bk {
namespace {

// kTilePanel: rows that share the unpacking of a tile.
#if defined(__AVX512F__)
constexpr int kTilePanel = 8;
#define BK_UNROLL _Pragma("GCC unroll 8")
#elif defined(__AVX2__)
constexpr int kTilePanel = 4;
#define BK_UNROLL _Pragma("GCC unroll 8")
#else
constexpr int kTilePanel = 1;  // there is little to share, and a compiler takes minutes to unroll emulated vectors
#define BK_UNROLL
#endif

// ---- sums of products of small integers, four inputs of kLanes output rows at a time

#if defined(__AVX512BW__)
using Bytes = __m512i;
using Words = __m512i;

BK_INLINE Bytes splat_four(const int8_t* a) { return _mm512_set1_epi32(load_raw<int32_t>(a)); }
BK_INLINE Words splat_pair(const int16_t* a) { return _mm512_set1_epi32(load_raw<int32_t>(a)); }
BK_INLINE Bytes low_nibbles(Bytes w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
BK_INLINE Bytes high_nibbles(Bytes w) { return low_nibbles(_mm512_srli_epi16(w, 4)); }
BK_INLINE Bytes look_up(__m128i table, Bytes i) { return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), i); }
BK_INLINE Words even_bytes(Bytes w) { return _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8); }
BK_INLINE Words odd_bytes(Bytes w) { return _mm512_srai_epi16(w, 8); }
#if defined(__AVX512VNNI__)
struct UnsignedSum {
    __m512i sum = _mm512_setzero_si512();
    BK_INLINE void add(Bytes w, Bytes a) { sum = _mm512_dpbusd_epi32(sum, w, a); }
    BK_INLINE i32v total() const { return (i32v)sum; }
};
BK_INLINE i32v add_pairs(i32v sum, Words w, Words a) { return (i32v)_mm512_dpwssd_epi32((__m512i)sum, w, a); }
#else
struct UnsignedSum {
    __m512i sum = _mm512_setzero_si512();
    BK_INLINE void add(Bytes w, Bytes a) { sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, a)); }
    BK_INLINE i32v total() const { return (i32v)_mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
};
BK_INLINE i32v add_pairs(i32v sum, Words w, Words a) { return sum + (i32v)_mm512_madd_epi16(w, a); }
#endif
#elif defined(__AVX2__)
using Bytes = __m256i;
using Words = __m256i;

BK_INLINE Bytes splat_four(const int8_t* a) { return _mm256_set1_epi32(load_raw<int32_t>(a)); }
BK_INLINE Words splat_pair(const int16_t* a) { return _mm256_set1_epi32(load_raw<int32_t>(a)); }
BK_INLINE Bytes low_nibbles(Bytes w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
BK_INLINE Bytes high_nibbles(Bytes w) { return low_nibbles(_mm256_srli_epi16(w, 4)); }
BK_INLINE Bytes look_up(__m128i table, Bytes i) { return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), i); }
BK_INLINE Words even_bytes(Bytes w) { return _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8); }
BK_INLINE Words odd_bytes(Bytes w) { return _mm256_srai_epi16(w, 8); }
// Sums of 16 bits: 8 products of 15 * 127 * 2, or 4 of 24 * 127 * 2, are the most that they hold.
struct UnsignedSum {
    __m256i sum = _mm256_setzero_si256();
    BK_INLINE void add(Bytes w, Bytes a) { sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, a)); }
    BK_INLINE i32v total() const { return (i32v)_mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};
BK_INLINE i32v add_pairs(i32v sum, Words w, Words a) { return sum + (i32v)_mm256_madd_epi16(w, a); }
#else
// Each 32-bit lane holds four bytes, or two words, of one output row.
struct Words {
    i32v first, second;
};
using Bytes = i32v;

BK_INLINE i32v splat_int(int32_t a) { return a - i32v{}; }
BK_INLINE i32v byte_of(i32v v, int i) { return (v << (24 - 8 * i)) >> 24; }
BK_INLINE Bytes splat_four(const int8_t* a) { return splat_int(load_raw<int32_t>(a)); }
BK_INLINE Words splat_pair(const int16_t* a) { return {splat_int(a[0]), splat_int(a[1])}; }
BK_INLINE Bytes low_nibbles(Bytes w) { return w & 0x0f0f0f0f; }
BK_INLINE Bytes high_nibbles(Bytes w) { return low_nibbles(w >> 4); }
BK_INLINE Words even_bytes(Bytes w) { return {byte_of(w, 0), byte_of(w, 2)}; }
BK_INLINE Words odd_bytes(Bytes w) { return {byte_of(w, 1), byte_of(w, 3)}; }
struct UnsignedSum {
    i32v sum = {};
    BK_INLINE void add(Bytes w, Bytes a) {
        for (int i = 0; i < 4; ++i) sum = sum + byte_of(w, i) * byte_of(a, i);
    }
    BK_INLINE i32v total() const { return sum; }
};
BK_INLINE i32v add_pairs(i32v sum, Words w, Words a) { return sum + w.first * a.first + w.second * a.second; }
BK_INLINE Bytes look_up(const int8_t* table, Bytes i) {
    Bytes found;
    for (int b = 0; b < static_cast<int>(sizeof found); ++b)
        reinterpret_cast<int8_t*>(&found)[b] = table[reinterpret_cast<const int8_t*>(&i)[b]];
    return found;
}
#endif

template <int Rows, class Integer>
using Groups = const RowGroup<Integer>* const (&)[Rows];

// sums[r][h] = what half h of a tile's inputs adds for row r and the output rows of one vector.
template <int Rows, int Scales>
BK_INLINE void integer_sums(const Int8Tile<Scales>& tile, int block, Groups<Rows, int16_t> x, i32v (&sums)[Rows][2]) {
    BK_UNROLL
    for (int half = 0; half < 2; ++half) {
        BK_UNROLL
        for (int r = 0; r < Rows; ++r) sums[r][half] = i32v{};
        BK_UNROLL
        for (int i = 8 * half; i < 8 * half + 8; ++i) {
            const Bytes w = load_raw<Bytes>(tile.values[i][block * kLanes]);
            const Words even = even_bytes(w), odd = odd_bytes(w);
            BK_UNROLL
            for (int r = 0; r < Rows; ++r) {
                sums[r][half] = add_pairs(sums[r][half], even, splat_pair(x[r]->values + 4 * i));
                sums[r][half] = add_pairs(sums[r][half], odd, splat_pair(x[r]->values + 4 * i + 2));
            }
        }
    }
}

// widen: nibbles to unsigned bytes, of which `zero` is zero; kHeld of their products with activations can be added.
template <int Rows, int kHeld, class Widen>
BK_INLINE void nibble_sums(const uint8_t (&nibbles)[8][kTileRows][4], int block, Groups<Rows, int8_t> x,
                           i32v (&sums)[Rows][2], int32_t zero, Widen&& widen) {
    BK_UNROLL
    for (int r = 0; r < Rows; ++r) {
        sums[r][0] = -zero * x[r]->sums[0] - i32v{};
        sums[r][1] = -zero * x[r]->sums[1] - i32v{};
    }
    BK_UNROLL
    for (int start = 0; start < 8; start += kHeld) {
        UnsignedSum low[Rows], high[Rows];
        BK_UNROLL
        for (int i = start; i < start + kHeld; ++i) {
            const Bytes w = load_raw<Bytes>(nibbles[i][block * kLanes]);
            const Bytes w_low = widen(low_nibbles(w)), w_high = widen(high_nibbles(w));
            BK_UNROLL
            for (int r = 0; r < Rows; ++r) {
                low[r].add(w_low, splat_four(x[r]->values + 4 * i));
                high[r].add(w_high, splat_four(x[r]->values + 32 + 4 * i));
            }
        }
        BK_UNROLL
        for (int r = 0; r < Rows; ++r) {
            sums[r][0] = sums[r][0] + low[r].total();
            sums[r][1] = sums[r][1] + high[r].total();
        }
    }
}

template <int Rows, class Scale>
BK_INLINE void integer_sums(const NibbleTile<Scale>& tile, int block, Groups<Rows, int8_t> x, i32v (&sums)[Rows][2]) {
    nibble_sums<Rows, 8>(tile.nibbles, block, x, sums, 8, [](Bytes w) { return w; });
}

template <int Rows>
BK_INLINE void integer_sums(const Mxfp4Tile& tile, int block, Groups<Rows, int8_t> x, i32v (&sums)[Rows][2]) {
    constexpr int8_t zero = 12;
    int8_t unsigned_values[16];
    for (int i = 0; i < 16; ++i) unsigned_values[i] = static_cast<int8_t>(kE2M1[i] + zero);
#if defined(__AVX2__)
    const __m128i table = load_raw<__m128i>(unsigned_values);
#else
    const int8_t* table = unsigned_values;
#endif
    nibble_sums<Rows, 4>(tile.nibbles, block, x, sums, zero, [&](Bytes w) { return look_up(table, w); });
}

template <class Tile, int Rows>
BK_INLINE void add_tile(const Tile& tile, Groups<Rows, typename RowInteger<Tile>::Type> x,
                        f32v (&acc)[kLaneBlocks][Rows]) {
    BK_UNROLL
    for (int block = 0; block < kLaneBlocks; ++block) {
        i32v sums[Rows][2];
        integer_sums<Rows>(tile, block, x, sums);
        const f32v scale = scales_of(tile, block, 0);
        const f32v second = Tile::kScales == 2 ? scales_of(tile, block, Tile::kScales - 1) : scale;
        BK_UNROLL
        for (int r = 0; r < Rows; ++r) {
            if constexpr (Tile::kScales == 1) {
                const f32v total = __builtin_convertvector(sums[r][0] + sums[r][1], f32v);
                acc[block][r] = fma(total, scale * x[r]->scales[0], acc[block][r]);
            } else {
                const f32v first = __builtin_convertvector(sums[r][0], f32v);
                acc[block][r] = fma(first, scale * x[r]->scales[0], acc[block][r]);
                const f32v last = __builtin_convertvector(sums[r][1], f32v);
                acc[block][r] = fma(last, second * x[r]->scales[1], acc[block][r]);
            }
        }
    }
}

// ahead: tiles from the one that is multiplied to the one that is fetched.
template <class Tile, int Rows>
void multiply_strip(const RowGroup<typename RowInteger<Tile>::Type>* const* x, const Tile* tiles, int64_t num_tiles,
                    int64_t ahead, float matrix_scale, float* out, int64_t out_stride) {
    f32v acc[kLaneBlocks][Rows] = {};
    for (int64_t t = 0; t < num_tiles; ++t) {
        const char* next = reinterpret_cast<const char*>(tiles + t + ahead);
        for (size_t line = 0; line < sizeof(Tile); line += 64) __builtin_prefetch(next + line);
        const RowGroup<typename RowInteger<Tile>::Type>* groups[Rows];
        for (int r = 0; r < Rows; ++r) groups[r] = x[r] + t;
        add_tile<Tile, Rows>(tiles[t], groups, acc);
    }
    for (int r = 0; r < Rows; ++r)
        for (int block = 0; block < kLaneBlocks; ++block)
            store(out + r * out_stride + block * kLanes, acc[block][r] * matrix_scale);
}

template <class Tile>
void multiply_tiles(const RowGroup<typename RowInteger<Tile>::Type>* const* x, int64_t num_rows, const Tile* tiles,
                    int64_t num_tiles, int64_t num_strips, float matrix_scale, float* out, int64_t out_stride) {
    constexpr int64_t kAhead = 4096 / static_cast<int64_t>(sizeof(Tile)) + 1;
    for (int64_t strip = 0; strip < num_strips; ++strip, tiles += num_tiles, out += kTileRows)
        for_each_panel<kTilePanel>(num_rows, [&](int64_t begin, int64_t count) {
            with_panel_rows<kTilePanel>(count, [&](auto rows) {
                multiply_strip<Tile, decltype(rows)::value>(x + begin, tiles, num_tiles, begin == 0 ? kAhead : 0,
                                                            matrix_scale, out + begin * out_stride, out_stride);
            });
        });
}

}  // namespace

// Rounds count <= 64 values to integers of at most `most`; returns what they were divided by, NaN if one of them is not
// finite, and writes their sum.
template <class A>
float quantise(const A* from, int64_t count, float most, int32_t* integers, int32_t* sum_of_integers) {
    f32v largest = {}, poison = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const f32v v = load(from + i);
        largest = max(max(v, -v), largest);
        poison = poison + v * 0.0f;
    }
    const float top = max_lane(largest);
    const f32v inverse = splat(top > 0 ? most / top : 0.0f);
    const f32v shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    i32v total = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const i32v v = (i32v)(load(from + i) * inverse + shift) - 0x4b400000;
        total = total + v;
        std::memcpy(integers + i, &v, sizeof v);
    }
    *sum_of_integers = 0;
    for (int lane = 0; lane < kLanes; ++lane) *sum_of_integers += total[lane];
    return top / most + sum(poison);
}

template <class A>
void pack_group(RowGroup<int8_t>* to, const A* from) {
    constexpr int64_t kHalf = kTileInputs / 2;
    int32_t integers[kTileInputs];
    for (int half = 0; half < 2; ++half)
        to->scales[half] = quantise(from + half * kHalf, kHalf, 127.0f, integers + half * kHalf, &to->sums[half]);
    for (int64_t i = 0; i < kTileInputs; ++i) to->values[i] = static_cast<int8_t>(integers[i]);
}

template <class A>
void pack_group(RowGroup<int16_t>* to, const A* from) {
    int32_t integers[kTileInputs];
    to->scales[0] = to->scales[1] = quantise(from, kTileInputs, 32767.0f, integers, &to->sums[0]);
    to->sums[1] = 0;
    for (int64_t i = 0; i < kTileInputs; i += 4) {
        to->values[i] = static_cast<int16_t>(integers[i]);
        to->values[i + 1] = static_cast<int16_t>(integers[i + 2]);
        to->values[i + 2] = static_cast<int16_t>(integers[i + 1]);
        to->values[i + 3] = static_cast<int16_t>(integers[i + 3]);
    }
}

template <class Tile, class A>
void Dot<Tiled<Tile, A>>::pack(Packed* to, const A* from, int64_t) {
    pack_group(to, from);
}

template <class Tile, class A>
void multiply(const typename Dot<Tiled<Tile, A>>::Packed* const* x, int64_t num_rows,
              const Matrix<Tiled<Tile, A>>& weight, int64_t first, int64_t last, float* out, int64_t out_stride) {
    const int64_t num_tiles = weight.in / kTileInputs;
    multiply_tiles(x, num_rows, weight.tiles + first / kTileRows * num_tiles, num_tiles,
                   ceil_div(last - first, kTileRows), weight.scale, out, out_stride);
}

#define BK_TILED_BESIDE(TILE, A)                                                                                       \
    template void Dot<Tiled<TILE, A>>::pack(Packed*, const A*, int64_t);                                               \
    template void multiply<TILE, A>(const Dot<Tiled<TILE, A>>::Packed* const*, int64_t, const Matrix<Tiled<TILE, A>>&, \
                                    int64_t, int64_t, float*, int64_t);
#define BK_TILED(TILE) BK_TILED_BESIDE(TILE, float) BK_TILED_BESIDE(TILE, bf16)
BK_TILED(Int8Tile<1>)
BK_TILED(Q8_0Tile)
BK_TILED(Int4Tile)
BK_TILED(Q4_0Tile)
BK_TILED(Mxfp4Tile)

}  // namespace bk
