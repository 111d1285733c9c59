// From a dtype of the C interface to a C++ type.
#pragma once

#include "barista_kernels.h"
#include "simd.h"

namespace bk {

// body(value of the element type).
template <class Body>
void dispatch(int32_t dtype, Body&& body) {
    if (dtype == BK_FLOAT32)
        body(float{});
    else
        body(bf16{});
}

}  // namespace bk
