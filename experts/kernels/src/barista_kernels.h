// The C interface of the CPU kernels. Rows are contiguous; strides count elements; pointers need the alignment of their
// element only. No function allocates what it returns, throws or keeps a pointer.
//
// Every function is row-invariant: a row of the result depends on that row's inputs alone, to the byte, and not on the
// other rows, their number, the number of threads or alignment.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum bk_dtype { BK_FLOAT32 = 0, BK_BFLOAT16 = 1 };

// Threads to use, the caller's included; 0 or less: as many as this process may run on.
void bk_set_threads(int32_t threads);
int32_t bk_num_threads(void);

// y [n, out] = x [n, in] weight [out, in]^T + bias [out] (or NULL). Summed in float32, rounded once to out_dtype.
void bk_linear(const void* x, int64_t x_stride, const void* weight, int64_t weight_stride, const void* bias, void* y,
               int64_t y_stride, int64_t n, int64_t in, int64_t out, int32_t dtype, int32_t out_dtype);

#ifdef __cplusplus
}
#endif
