#include <type_traits>

#include "tile_scales.h"
#include "tiles.h"

namespace bk {
namespace {

// Hides a sum from GCC, which would reassociate the integer sums of an unrolled loop until they fit no registers.
#if defined(__x86_64__)
#define BK_PIN(vector) asm("" : "+x"(vector))
#else
#define BK_PIN(vector)
#endif

#define BK_KEEP_LOOP _Pragma("GCC unroll 2")

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
constexpr int64_t kWideRows = 3 * kTilePanel;  // from so many on it pays to store what is unpacked

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
struct NibbleSum {
    __m512i sum;
    BK_INLINE void start(const int16_t* pair) { sum = _mm512_madd_epi16(splat_pair(pair), _mm512_set1_epi16(1)); }
    BK_INLINE void add(Bytes w, Bytes a) { sum = _mm512_dpbusd_epi32(sum, w, a); }
    BK_INLINE i32v total() const { return (i32v)sum; }
};
BK_INLINE i32v add_pairs(i32v sum, Words w, Words a) { return (i32v)_mm512_dpwssd_epi32((__m512i)sum, w, a); }
#else
struct NibbleSum {
    __m512i sum;
    BK_INLINE void start(const int16_t* pair) { sum = splat_pair(pair); }
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
struct NibbleSum {
    __m256i sum;
    BK_INLINE void start(const int16_t* pair) { sum = splat_pair(pair); }
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
struct NibbleSum {
    i32v sum;
    BK_INLINE void start(const int16_t* pair) { sum = splat_int(pair[0] + pair[1]); }
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

struct Bytes16 {
    int8_t values[16];
};

constexpr Bytes16 unsigned_e2m1() {
    Bytes16 table{};
    for (int i = 0; i < 16; ++i) table.values[i] = static_cast<int8_t>(kE2M1[i] + kNibbleZero<Mxfp4Tile>);
    return table;
}

template <class Tile>
using PackedOf = RowGroup<typename RowInteger<Tile>::Type>;

template <int Rows, class Integer>
using Groups = const RowGroup<Integer>* const (&)[Rows];

// ---- nibbles as they are multiplied

// Of half Part of the inputs, as unsigned bytes.
template <int Part, class Tile>
BK_INLINE Bytes nibbles_of(const Tile& tile, int i, int block) {
    const Bytes both = load_raw<Bytes>(tile.nibbles[i][block * kLanes]);
    return Part == 0 ? low_nibbles(both) : high_nibbles(both);
}

template <int Part, class Scale>
BK_INLINE Bytes bytes_of(const NibbleTile<Scale>& tile, int i, int block) {
    return nibbles_of<Part>(tile, i, block);
}

template <int Part>
BK_INLINE Bytes bytes_of(const Mxfp4Tile& tile, int i, int block) {
    alignas(16) static constexpr auto kUnsigned = unsigned_e2m1();
#if defined(__AVX2__)
    const __m128i table = load_raw<__m128i>(kUnsigned.values);
#else
    const int8_t* table = kUnsigned.values;
#endif
    return look_up(table, nibbles_of<Part>(tile, i, block));
}

// The bytes and scales of nibbles, made once for many rows.
template <class Tile>
struct WideTile {
    static constexpr int kScales = Tile::kScales;
    Bytes bytes[2][kRunsOfFour / 2][kLaneBlocks];
    f32v scales[kScales][kLaneBlocks];
};

template <int Part, class Tile>
BK_INLINE Bytes bytes_of(const WideTile<Tile>& tile, int i, int block) {
    return tile.bytes[Part][i][block];
}

template <class Tile>
BK_INLINE f32v scales_of(const WideTile<Tile>& tile, int block, int which) {
    return tile.scales[which][block];
}

template <class Tile>
void widen_tile(const Tile& tile, WideTile<Tile>& to) {
    for (int block = 0; block < kLaneBlocks; ++block) {
        for (int i = 0; i < kRunsOfFour / 2; ++i) {
            to.bytes[0][i][block] = bytes_of<0>(tile, i, block);
            to.bytes[1][i][block] = bytes_of<1>(tile, i, block);
        }
        for (int part = 0; part < Tile::kScales; ++part) to.scales[part][block] = scales_of(tile, block, part);
    }
}

// ---- products. Source: a tile or a WideTile.

// What the inputs that share scale `Part` add, for each row and each vector of output rows.
template <int Rows>
using IntegerSums = i32v[kLaneBlocks][Rows];

template <int Part, int Rows, int Scales>
BK_INLINE void integer_sums(const Int8Tile<Scales>& tile, Groups<Rows, int16_t> x, IntegerSums<Rows>& sums) {
    constexpr int kRuns = kRunsOfFour / Scales;
    i32v total[kLaneBlocks][Rows] = {};
    BK_KEEP_LOOP
    for (int i = Part * kRuns; i < (Part + 1) * kRuns; ++i) {
        Words even[kLaneBlocks], odd[kLaneBlocks];
        BK_UNROLL
        for (int block = 0; block < kLaneBlocks; ++block) {
            const Bytes w = load_raw<Bytes>(tile.values[i][block * kLanes]);
            even[block] = even_bytes(w);
            odd[block] = odd_bytes(w);
        }
        BK_UNROLL
        for (int r = 0; r < Rows; ++r) {
            const Words first = splat_pair(x[r]->values + 4 * i), second = splat_pair(x[r]->values + 4 * i + 2);
            BK_UNROLL
            for (int block = 0; block < kLaneBlocks; ++block) {
                total[block][r] = add_pairs(total[block][r], even[block], first);
                total[block][r] = add_pairs(total[block][r], odd[block], second);
            }
        }
    }
    BK_UNROLL
    for (int block = 0; block < kLaneBlocks; ++block)
        for (int r = 0; r < Rows; ++r) sums[block][r] = total[block][r];
}

// Sums start at the correction for the zero of their nibbles, so that 16 bits hold them all the way: what has been
// added by then is a sum of true products, and what has not is small.
template <int Part, int Rows, class Source>
BK_INLINE void integer_sums(const Source& source, Groups<Rows, int8_t> x, IntegerSums<Rows>& sums) {
    NibbleSum total[kLaneBlocks][Rows];
    BK_UNROLL
    for (int r = 0; r < Rows; ++r)
        for (int block = 0; block < kLaneBlocks; ++block) total[block][r].start(x[r]->corrections[Part]);
    BK_UNROLL
    for (int i = 0; i < kRunsOfFour / 2; ++i) {
        Bytes w[kLaneBlocks];
        BK_UNROLL
        for (int block = 0; block < kLaneBlocks; ++block) w[block] = bytes_of<Part>(source, i, block);
        BK_UNROLL
        for (int r = 0; r < Rows; ++r) {
            const Bytes a = splat_four(x[r]->values + 32 * Part + 4 * i);
            BK_UNROLL
            for (int block = 0; block < kLaneBlocks; ++block) {
                total[block][r].add(w[block], a);
                BK_PIN(total[block][r].sum);
            }
        }
    }
    BK_UNROLL
    for (int block = 0; block < kLaneBlocks; ++block)
        for (int r = 0; r < Rows; ++r) sums[block][r] = total[block][r].total();
}

template <int Part, class Source, int Rows, class Integer>
BK_INLINE void add_part(const Source& source, Groups<Rows, Integer> x, f32v (&acc)[kLaneBlocks][Rows]) {
    i32v sums[kLaneBlocks][Rows];
    integer_sums<Part, Rows>(source, x, sums);
    BK_UNROLL
    for (int block = 0; block < kLaneBlocks; ++block) {
        const f32v scale = scales_of(source, block, Part);
        BK_UNROLL
        for (int r = 0; r < Rows; ++r)
            acc[block][r] =
                fma(__builtin_convertvector(sums[block][r], f32v), scale * x[r]->scales[Part], acc[block][r]);
    }
}

template <class Source, int Rows, class Integer>
BK_INLINE void add_tile(const Source& source, Groups<Rows, Integer> x, f32v (&acc)[kLaneBlocks][Rows]) {
    add_part<0, Source, Rows>(source, x, acc);
    if constexpr (Source::kScales == 2) add_part<1, Source, Rows>(source, x, acc);
}

template <class Tile>
BK_INLINE void fetch(const Tile* tile) {
    const char* from = reinterpret_cast<const char*>(tile);
    for (size_t line = 0; line < sizeof(Tile); line += 64) __builtin_prefetch(from + line);
}

// Adds num_tiles tiles of a strip to the sums in `out`, or starts them. ahead: tiles from the one that is multiplied to
// the one that is fetched; 0 if they are in the cache. Not inlined: it needs all registers.
template <int Rows, class Source, class Integer>
__attribute__((noinline)) void multiply_strip(const RowGroup<Integer>* const* x, const Source* tiles, int64_t num_tiles,
                                              bool start, int64_t ahead, float* out, int64_t out_stride) {
    f32v acc[kLaneBlocks][Rows] = {};
    for (int r = 0; !start && r < Rows; ++r)
        for (int block = 0; block < kLaneBlocks; ++block) acc[block][r] = load(out + r * out_stride + block * kLanes);
    for (int64_t t = 0; t < num_tiles; ++t) {
        if (ahead) fetch(tiles + t + ahead);
        const RowGroup<Integer>* groups[Rows];
        for (int r = 0; r < Rows; ++r) groups[r] = x[r] + t;
        add_tile<Source, Rows, Integer>(tiles[t], groups, acc);
    }
    for (int r = 0; r < Rows; ++r)
        for (int block = 0; block < kLaneBlocks; ++block) store(out + r * out_stride + block * kLanes, acc[block][r]);
}

// All rows with tiles [first, first + num_tiles) of a strip. ahead: for the first rows; the others find them fetched.
template <class Source, class Integer>
void multiply_panels(const RowGroup<Integer>* const* x, int64_t num_rows, const Source* tiles, int64_t first,
                     int64_t num_tiles, int64_t ahead, float* out, int64_t out_stride) {
    for_each_panel<kTilePanel>(num_rows, [&](int64_t begin, int64_t panel) {
        const RowGroup<Integer>* rows_from[kTilePanel];
        for (int64_t r = 0; r < panel; ++r) rows_from[r] = x[begin + r] + first;
        with_panel_rows<kTilePanel>(panel, [&](auto rows) {
            multiply_strip<decltype(rows)::value>(rows_from, tiles, num_tiles, first == 0, begin == 0 ? ahead : 0,
                                                  out + begin * out_stride, out_stride);
        });
    });
}

// A strip is taken in parts that stay in the second-level cache while rows stream past.
template <class Tile>
void multiply_tiles(const PackedOf<Tile>* const* x, int64_t num_rows, const Tile* tiles, int64_t num_tiles,
                    int64_t num_strips, float matrix_scale, float* out, int64_t out_stride) {
    constexpr int64_t kAhead = 1024 / static_cast<int64_t>(sizeof(Tile)) + 1;
    constexpr int64_t kPart = 40960 / static_cast<int64_t>(sizeof(Tile));
    constexpr bool kNibbles = std::is_same_v<typename RowInteger<Tile>::Type, int8_t>;
    const int64_t part = num_rows > kTilePanel ? kPart : num_tiles;
    for (int64_t strip = 0; strip < num_strips; ++strip, tiles += num_tiles, out += kTileRows) {
        for (int64_t first = 0; first < num_tiles; first += part) {
            const int64_t count = num_tiles - first < part ? num_tiles - first : part;
            if constexpr (kNibbles) {
                if (num_rows >= kWideRows) {
                    WideTile<Tile> wide[kPart];
                    for (int64_t t = 0; t < count; ++t) {
                        fetch(tiles + first + t + kAhead);
                        widen_tile(tiles[first + t], wide[t]);
                    }
                    multiply_panels(x, num_rows, wide, first, count, 0, out, out_stride);
                    continue;
                }
            }
            multiply_panels(x, num_rows, tiles + first, first, count, kAhead, out, out_stride);
        }
        if (matrix_scale == 1.0f) continue;
        for (int64_t r = 0; r < num_rows; ++r)
            for (int64_t i = 0; i < kTileRows; i += kLanes)
                store(out + r * out_stride + i, load(out + r * out_stride + i) * matrix_scale);
    }
}

}  // namespace

typedef int8_t i8v __attribute__((vector_size(kLanes)));
typedef int16_t i16v __attribute__((vector_size(kLanes * 2)));

// Rounds Count values to integers of at most `most`. Returns what they were divided by: NaN if one of them is not
// finite.
template <int Count, class A>
BK_INLINE float quantise(const A* from, float most, i32v (&integers)[Count / kLanes]) {
    f32v values[Count / kLanes], largest = {}, poison = {};
    for (int i = 0; i < Count / kLanes; ++i) {
        values[i] = load(from + i * kLanes);
        largest = max(max(values[i], -values[i]), largest);
        poison = poison + values[i] * 0.0f;
    }
    const float top = max_lane(largest);
    const f32v inverse = splat(top > 0 ? most / top : 0.0f);
    const f32v shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    for (int i = 0; i < Count / kLanes; ++i) integers[i] = (i32v)(values[i] * inverse + shift) - 0x4b400000;
    return top / most + sum(poison);
}

template <class A>
void pack_group(RowGroup<int8_t>* to, const A* from, int32_t zero) {
    constexpr int kHalf = static_cast<int>(kTileInputs) / 2;
    for (int half = 0; half < 2; ++half) {
        i32v integers[kHalf / kLanes], total = {};
        to->scales[half] = quantise<kHalf>(from + half * kHalf, 127.0f, integers);
        for (int i = 0; i < kHalf / kLanes; ++i) {
            const i8v bytes = __builtin_convertvector(integers[i], i8v);
            std::memcpy(to->values + half * kHalf + i * kLanes, &bytes, sizeof bytes);
            total = total + integers[i];
        }
        int32_t sums[2] = {};
        for (int lane = 0; lane < kLanes; ++lane) sums[lane / 2 % 2] += total[lane];
        for (int i = 0; i < 2; ++i) to->corrections[half][i] = static_cast<int16_t>(-zero * sums[i]);
    }
}

template <class A>
void pack_group(RowGroup<int16_t>* to, const A* from, int32_t) {
    i32v integers[kTileInputs / kLanes];
    to->scales[0] = to->scales[1] = quantise<kTileInputs>(from, 32767.0f, integers);
    for (int i = 0; i < kTileInputs / kLanes; ++i) {
        const i32v in_order = BK_SHUFFLE(integers[i], integers[i], 0, 2, 1, 3);
        const i16v words = __builtin_convertvector(in_order, i16v);
        std::memcpy(to->values + i * kLanes, &words, sizeof words);
    }
}

template <class Tile, class A>
void Dot<Tiled<Tile, A>>::pack(Packed* to, const A* from, int64_t) {
    pack_group(to, from, kNibbleZero<Tile>);
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
