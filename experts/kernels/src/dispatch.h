// From a dtype of the C interface to a C++ type.
#pragma once

#include "barista_kernels.h"
#include "simd.h"

namespace bk {

// body(value of the weights' type): Dot<T>::Activation is the type of the rows beside them.
template <class Body>
void dispatch_weights(int32_t dtype, Body&& body) {
    if (dtype == BK_FLOAT16_WEIGHTS)
        body(f16{});
    else if (dtype == BK_FLOAT32)
        body(float{});
    else
        body(bf16{});
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
