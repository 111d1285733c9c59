// One layer's multi-head latent attention, absorbed, with the norms around it: a sequence of the other kernels, in one
// call. Every head attends to one shared key, the latent and the rotated part, whose latent is the value too.

#include <cstring>

#include "layer.h"
#include "products.h"

namespace bk {
namespace {

// Every head of x [n, heads, in] by its own weight, to y [n, heads, out]; strides from head to head and row to row.
void multiply_heads(const void* x, int64_t x_stride, const bk_weight* weights, void* y, int64_t y_stride, int64_t heads,
                    int64_t n, int32_t dtype) {
    thread_local Buffer buffer;
    Product* products = buffer.get<Product>(heads);
    for (int64_t h = 0; h < heads; ++h)
        products[h] = {behind(x, h * x_stride, dtype), heads * x_stride, weights + h, nullptr,
                       behind(y, h * y_stride, dtype), heads * y_stride};
    multiply_all(products, heads, n, dtype, dtype);
}

// The first `width` values of each row of x [n, stride], in place.
void normalise(void* x, int64_t stride, const void* weight, float eps, int64_t n, int64_t width, int32_t dtype) {
    parallel_for((n + 31) / 32, [&](int64_t task) {
        for (int64_t r = 32 * task; r < n && r < 32 * task + 32; ++r) {
            void* row = behind(x, r * stride, dtype);
            bk_rms_norm(row, stride, nullptr, 0, weight, eps, row, 1, width, dtype);
        }
    });
}

void attend(const bk_mla& layer, const bk_step& step, const void* x, void* attended) {
    thread_local Buffer low_buffer, q_buffer, latent_buffer, query_buffer, out_buffer, values_buffer;
    const int64_t n = step.num_rows, heads = layer.num_heads, hidden = layer.norms.hidden;
    const int64_t rank = layer.kv_lora_rank, nope = layer.nope_head_dim, rope = layer.rope_head_dim;
    const int64_t key_dim = rank + rope, q_dim = nope + rope;
    const int32_t dtype = layer.norms.dtype;
    void* q = q_buffer.get<float>(n * heads * q_dim);
    void* latent = latent_buffer.get<float>(n * key_dim);
    const Product latents = {x, hidden, &layer.kv_a, layer.kv_a_bias, latent, key_dim};
    if (layer.q_a.data) {
        const int64_t low_rank = layer.q_a.out;
        void* low = low_buffer.get<float>(n * low_rank);
        const Product down[] = {{x, hidden, &layer.q_a, layer.q_a_bias, low, low_rank}, latents};
        multiply_all(down, 2, n, dtype, dtype);
        normalise(low, low_rank, layer.q_a_norm, layer.latent_eps, n, low_rank, dtype);
        multiply_one({low, low_rank, &layer.q_b, nullptr, q, heads * q_dim}, n, dtype);
    } else {
        const Product both[] = {{x, hidden, &layer.q_b, nullptr, q, heads * q_dim}, latents};
        multiply_all(both, 2, n, dtype, dtype);
    }

    normalise(latent, key_dim, layer.kv_a_norm, layer.latent_eps, n, rank, dtype);
    bk_rope(behind(latent, rank, dtype), key_dim, rope, step.cos, step.sin, n, 1, step.half, layer.interleaved, dtype);
    bk_rope(behind(q, nope, dtype), heads * q_dim, q_dim, step.cos, step.sin, n, heads, step.half, layer.interleaved,
            dtype);
    void* cache = behind(step.cache, layer.index * step.layer_stride, dtype);
    const int64_t row_bytes = key_dim * size_of(dtype);
    bk_store_kv(cache, step.block_size * row_bytes, row_bytes, step.block_size, latent, row_bytes, step.slots, n,
                row_bytes);

    void* query = query_buffer.get<float>(n * heads * key_dim);
    multiply_heads(q, q_dim, layer.uk, query, key_dim, heads, n, dtype);
    parallel_for((n * heads + 255) / 256, [&](int64_t task) {
        for (int64_t i = 256 * task; i < n * heads && i < 256 * task + 256; ++i)
            std::memcpy(behind(query, i * key_dim + rank, dtype), behind(q, i * q_dim + nope, dtype),
                        static_cast<size_t>(rope * size_of(dtype)));
    });
    void* out = out_buffer.get<float>(n * heads * rank);
    bk_attention(query, cache, step.block_size * key_dim, key_dim, key_dim, cache, step.block_size * key_dim, key_dim,
                 key_dim, step.block_tables, step.max_blocks, step.seq_ids, step.positions, layer.scale, out, n, heads,
                 1, key_dim, rank, step.block_size, dtype);
    void* values = values_buffer.get<float>(n * heads * layer.v_head_dim);
    multiply_heads(out, rank, layer.uv, values, layer.v_head_dim, heads, n, dtype);
    multiply_one({values, heads * layer.v_head_dim, &layer.o, layer.o_bias, attended, hidden}, n, dtype);
}

}  // namespace
}  // namespace bk

extern "C" int32_t bk_mla_layer(const bk_mla* layer, const bk_step* step, const void* update, void* x) {
    if (layer->size != sizeof(bk_mla) || step->size != sizeof(bk_step)) return -1;
    bk::between_norms(layer->norms, *step, update, x,
                      [&](const void* from, void* to) { bk::attend(*layer, *step, from, to); });
    return 0;
}
