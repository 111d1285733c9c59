// One layer's grouped-query attention with the norms around it: a sequence of the other kernels, in one call.

#include "layer.h"
#include "dispatch.h"
#include "products.h"
#include "simd.h"

namespace bk {
namespace {

template <class T>
void clip(T* x, int64_t count, float limit) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const f32v v = load(x + i, count - i);
        const f32v low = v < -limit ? splat(-limit) : v;  // a NaN stays one
        store(x + i, low > limit ? splat(limit) : low, count - i);
    }
}

void attend(const bk_gqa& layer, const bk_step& step, const void* x, void* attended) {
    thread_local Buffer q_buffer, k_buffer, v_buffer, out_buffer;
    const int64_t n = step.num_rows, dim = layer.head_dim;
    const int64_t q_size = layer.num_heads * dim, kv_size = layer.num_kv_heads * dim, hidden = layer.norms.hidden;
    const int32_t dtype = layer.norms.dtype;
    void* q = q_buffer.get<float>(n * q_size);
    void* k = k_buffer.get<float>(n * kv_size);
    void* v = v_buffer.get<float>(n * kv_size);
    const Product projections[] = {{x, hidden, &layer.q, layer.q_bias, q, q_size},
                                   {x, hidden, &layer.k, layer.k_bias, k, kv_size},
                                   {x, hidden, &layer.v, layer.v_bias, v, kv_size}};
    multiply_all(projections, 3, n, dtype, dtype);

    auto normalise = [&](void* rows, const void* weight, int64_t size) {
        const int64_t width = layer.qk_norm == BK_NORM_PER_HEAD ? dim : size;
        bk_rms_norm(rows, width, nullptr, 0, weight, layer.norms.eps, rows, n * size / width, width, dtype);
    };
    if (layer.qk_norm != BK_NORM_NONE) {
        normalise(q, layer.q_norm, q_size);
        normalise(k, layer.k_norm, kv_size);
    }
    if (layer.clip > 0) {
        dispatch(dtype, [&](auto t) {
            using T = decltype(t);
            clip(static_cast<T*>(q), n * q_size, layer.clip);
            clip(static_cast<T*>(k), n * kv_size, layer.clip);
            clip(static_cast<T*>(v), n * kv_size, layer.clip);
        });
    }
    bk_rope(q, q_size, dim, step.cos, step.sin, n, layer.num_heads, step.half, layer.interleaved, dtype);
    bk_rope(k, kv_size, dim, step.cos, step.sin, n, layer.num_kv_heads, step.half, layer.interleaved, dtype);

    const int64_t row_bytes = kv_size * size_of(dtype);
    void* keys = behind(step.cache, layer.index * step.layer_stride, dtype);
    void* values = behind(keys, step.plane_stride, dtype);
    bk_store_kv(keys, step.block_size * row_bytes, row_bytes, step.block_size, k, row_bytes, step.slots, n, row_bytes);
    bk_store_kv(values, step.block_size * row_bytes, row_bytes, step.block_size, v, row_bytes, step.slots, n,
                row_bytes);
    void* out = out_buffer.get<float>(n * q_size);
    bk_attention(q, keys, step.block_size * kv_size, kv_size, dim, values, step.block_size * kv_size, kv_size, dim,
                 step.block_tables, step.max_blocks, step.seq_ids, step.positions, layer.scale, out, n, layer.num_heads,
                 layer.num_kv_heads, dim, dim, step.block_size, dtype);
    multiply_one({out, q_size, &layer.o, layer.o_bias, attended, hidden}, n, dtype);
}

}  // namespace
}  // namespace bk

extern "C" int32_t bk_gqa_layer(const bk_gqa* layer, const bk_step* step, const void* update, void* x) {
    if (layer->size != sizeof(bk_gqa) || step->size != sizeof(bk_step)) return -1;
    bk::between_norms(layer->norms, *step, update, x,
                      [&](const void* from, void* to) { bk::attend(*layer, *step, from, to); });
    return 0;
}
