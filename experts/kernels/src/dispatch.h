// From the numbers of the C interface to C++ types.
#pragma once

#include "barista_kernels.h"
#include "fp8.h"
#include "tiles.h"

namespace bk {

// body(value of the kind of weights, as dot.h, tiles.h and fp8.h have them). weights: enum bk_weights; dtype: of the
// rows beside them, which float kinds decide by themselves.
template <class Body>
void dispatch_weights(int32_t weights, int32_t dtype, Body&& body) {
    auto beside = [&](auto a) {
        using A = decltype(a);
        switch (weights) {
            case BK_WEIGHTS_FP8:
                return body(Fp8<A>{});
            case BK_WEIGHTS_INT8:
                return body(Tiled<Int8Tile<1>, A>{});
            case BK_WEIGHTS_INT4:
                return body(Tiled<Int4Tile, A>{});
            case BK_WEIGHTS_MXFP4:
                return body(Tiled<Mxfp4Tile, A>{});
            case BK_WEIGHTS_Q8_0:
                return body(Tiled<Q8_0Tile, A>{});
            default:
                return body(Tiled<Q4_0Tile, A>{});
        }
    };
    switch (weights) {
        case BK_WEIGHTS_FLOAT32:
            return body(float{});
        case BK_WEIGHTS_BFLOAT16:
            return body(bf16{});
        case BK_WEIGHTS_FLOAT16:
            return body(f16{});
        default:
            return dtype == BK_FLOAT32 ? beside(float{}) : beside(bf16{});
    }
}

// body(value of the element type).
template <class Body>
void dispatch(int32_t dtype, Body&& body) {
    if (dtype == BK_FLOAT32)
        body(float{});
    else
        body(bf16{});
}

}  // namespace bk
