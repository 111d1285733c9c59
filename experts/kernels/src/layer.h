// What the attention halves of all families share: the norms around the attention, and rows in scratch memory.
#pragma once

#include "barista_kernels.h"
#include "thread_pool.h"

namespace bk {

inline int64_t size_of(int32_t dtype) { return dtype == BK_FLOAT32 ? 4 : 2; }

// The address `elements` behind one.
inline char* behind(void* from, int64_t elements, int32_t dtype) {
    return static_cast<char*>(from) + elements * size_of(dtype);
}
inline const char* behind(const void* from, int64_t elements, int32_t dtype) {
    return static_cast<const char*>(from) + elements * size_of(dtype);
}

// residual += update (or NULL); x = norm(residual); residual += attend(x); x = norm(residual).
// attend(x, attended): both [num_rows, hidden].
template <class Attend>
void between_norms(const bk_norms& norms, const bk_step& step, const void* update, void* x, Attend&& attend) {
    thread_local Buffer buffer;
    const int64_t n = step.num_rows, hidden = norms.hidden;
    if (update)
        bk_rms_norm(update, hidden, step.residual, hidden, norms.attention, norms.eps, x, n, hidden, norms.dtype);
    else
        bk_rms_norm(step.residual, hidden, nullptr, 0, norms.attention, norms.eps, x, n, hidden, norms.dtype);
    void* attended = buffer.get<float>(n * hidden);
    attend(x, attended);
    bk_rms_norm(attended, hidden, step.residual, hidden, norms.ffn, norms.eps, x, n, hidden, norms.dtype);
}

}  // namespace bk
