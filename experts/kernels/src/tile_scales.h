// The scales of a tile as floats.
#pragma once

#include "tiles.h"

namespace bk {

BK_INLINE f32v load_scales(const f16* scales) { return widen_half(load_raw<u16v>(scales)); }

BK_INLINE f32v widen_scale8(u8v bits) {
    return widen_half(widen_signed(bits) << 7 & 0xbfff);  // the sign stands in bits 14 and 15 by now
}

BK_INLINE f32v load_scales(const scale8* scales) { return widen_scale8(load_raw<u8v>(scales)); }

// 2^(e - 128): half of the scale, because kE2M1 holds twice the values. e = 0 and 1 are subnormal; 255 is NaN.
BK_INLINE f32v widen_exponent(u8v exponents) {
    const u32v e = __builtin_convertvector(exponents, u32v);
    const u32v power = e >= 2u ? (e - 1u) << 23 : 0x200000u << e;
    return (f32v)(e == 255u ? 0x7fc00000u - u32v{} : power);
}

// Of the output rows of one vector, and the inputs that share scale `which`.
template <class Tile>
BK_INLINE f32v scales_of(const Tile& tile, int block, int which) {
    return load_scales(&tile.scales[which][block * kLanes]);
}

BK_INLINE f32v scales_of(const Mxfp4Tile& tile, int block, int which) {
    return widen_exponent(load_raw<u8v>(&tile.exponents[which][block * kLanes]));
}

}  // namespace bk
