// A step of a model in one call, where its experts are in this process: what stands between two kernels is then neither
// an interpreter, whose own code the weights have driven out of the cache, nor time enough for a thread to fall asleep.

#include <cstring>
#include <type_traits>

#include "layer.h"
#include "dispatch.h"
#include "products.h"
#include "simd.h"

namespace bk {
namespace {

// y [n, hidden], and which rows failed, of the experts that each token chose.
int32_t run_experts(const bk_experts& experts, const void* x, const int32_t* topk_ids, const float* topk_weights,
                    int64_t topk, int64_t n, void* y, uint8_t* failed) {
    return bk_moe(x, experts.hidden, topk_ids, topk_weights, experts.gate, experts.up, experts.down, y, failed, n, topk,
                  experts.num_experts, experts.hidden, experts.intermediate, experts.weights, experts.dtype);
}

// The expert that every token takes.
int32_t run_shared(const bk_experts& experts, const void* x, int64_t n, void* y, uint8_t* failed) {
    thread_local Buffer ids_buffer, weights_buffer;
    int32_t* ids = ids_buffer.get<int32_t>(n);
    float* weights = weights_buffer.get<float>(n);
    for (int64_t t = 0; t < n; ++t) {
        ids[t] = 0;
        weights[t] = 1.0f;
    }
    return run_experts(experts, x, ids, weights, 1, n, y, failed);
}

// Adds rows [n, width].
template <class T>
void add_rows(T* to, const T* from, int64_t n, int64_t width) {
    constexpr int64_t kRows = 32;
    parallel_for((n + kRows - 1) / kRows, [&](int64_t task) {
        const int64_t begin = task * kRows * width,
                      end = (task + 1) * kRows < n ? (task + 1) * kRows * width : n * width;
        for (int64_t i = begin; i < end; i += kLanes)
            store(to + i, load(to + i, end - i) + load(from + i, end - i), end - i);
    });
}

int32_t run_routed(const bk_decoder_layer& layer, const void* x, int64_t n, void* y, uint8_t* failed) {
    thread_local Buffer ids_buffer, weights_buffer;
    const int64_t topk = layer.gate->spec.top_k;
    int32_t* topk_ids = ids_buffer.get<int32_t>(n * topk);
    float* topk_weights = weights_buffer.get<float>(n * topk);
    if (bk_choose(layer.gate, x, topk_ids, topk_weights, n)) return -1;
    for (int64_t pair = 0; pair < n * topk; ++pair)
        if (topk_ids[pair] >= 0) ++layer.expert_tokens[topk_ids[pair]];
    return run_experts(layer.routed, x, topk_ids, topk_weights, topk, n, y, failed);
}

// y = ffn(x); failed |= its failed rows.
int32_t run_ffn(const bk_decoder_layer& layer, const void* x, int64_t n, int32_t dtype, void* y, uint8_t* failed) {
    thread_local Buffer rows_buffer, failed_buffer;
    const bool routed = layer.gate, shared = layer.shared.gate;
    uint8_t* here = failed_buffer.get<uint8_t>(2 * n);
    if (routed && run_routed(layer, x, n, y, here)) return -1;
    if (shared) {
        const int64_t hidden = layer.shared.hidden;
        void* rows = routed ? rows_buffer.get<float>(n * hidden) : y;
        if (run_shared(layer.shared, x, n, rows, here + n)) return -1;
        if (routed)
            dispatch(dtype, [&](auto t) {
                using T = decltype(t);
                add_rows(static_cast<T*>(y), static_cast<const T*>(rows), n, hidden);
            });
    }
    for (int64_t t = 0; t < n; ++t) failed[t] |= (routed && here[t]) || (shared && here[n + t]);
    return 0;
}

// The rows of an embedding, rounded to dtype.
void take_rows(const bk_weight& weight, const int32_t* ids, int64_t n, int32_t dtype, void* to) {
    const int64_t width = weight.in;
    parallel_for(n, [&](int64_t r) {
        thread_local Buffer buffer;
        float* row = buffer.get<float>(width);
        const int64_t id = ids[r];
        if (bk_decode(weight.weights, weight.data, width, &id, 1, row))
            dispatch_weights(weight.weights, dtype, [&](auto t) {
                using T = decltype(t);
                if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16> || std::is_same_v<T, f16>)
                    convert(row, static_cast<const T*>(weight.data) + id * weight.stride, width);
            });
        dispatch(dtype, [&](auto t) { convert(static_cast<decltype(t)*>(to) + r * width, row, width); });
    });
}

// The rows of x [any, width] that `rows` names.
template <class Index>
void gather(const void* x, int64_t width, int32_t dtype, const Index* rows, int64_t n, void* to) {
    for (int64_t i = 0; i < n; ++i)
        std::memcpy(behind(to, i * width, dtype), behind(x, rows[i] * width, dtype),
                    static_cast<size_t>(width * size_of(dtype)));
}

// update: the last FFN's rows, not yet added to the residual.
int32_t run_layers(const bk_model& model, const bk_step& step, void* update, uint8_t* failed) {
    thread_local Buffer buffer;
    const int64_t n = step.num_rows;
    void* x = buffer.get<float>(n * model.embedding.in);
    std::memset(failed, 0, static_cast<size_t>(n));
    for (int64_t i = 0; i < model.num_layers; ++i) {
        const bk_decoder_layer& layer = *model.layers[i];
        if (layer.size != sizeof(bk_decoder_layer)) return -1;
        const void* added = i ? update : nullptr;
        const int32_t status =
            layer.gqa ? bk_gqa_layer(layer.gqa, &step, added, x) : bk_mla_layer(layer.mla, &step, added, x);
        if (status || run_ffn(layer, x, n, model.dtype, update, failed)) return -1;
    }
    return 0;
}

bool within(const int32_t* numbers, int64_t n, int64_t limit) {
    bool all = true;
    for (int64_t i = 0; i < n; ++i) all &= numbers[i] >= 0 && numbers[i] < limit;
    return all;
}

int32_t forward(const bk_model& model, const bk_batch& batch, float* logits, uint8_t* failed) {
    thread_local Buffer residual_buffer, update_buffer, cos_buffer, sin_buffer, sampled_buffer;
    const int64_t n = batch.step.num_rows, hidden = model.embedding.in;
    bk_step step = batch.step;
    if (!within(batch.token_ids, n, model.embedding.out) || !within(step.positions, n, model.max_len)) return -1;
    void* residual = residual_buffer.get<float>(n * hidden);
    void* update = update_buffer.get<float>(n * hidden);
    float* cos = cos_buffer.get<float>(n * model.half);
    float* sin = sin_buffer.get<float>(n * model.half);
    take_rows(model.embedding, batch.token_ids, n, model.dtype, residual);
    gather(model.cos, model.half, BK_FLOAT32, step.positions, n, cos);
    gather(model.sin, model.half, BK_FLOAT32, step.positions, n, sin);
    step.half = model.half;
    step.residual = residual;
    step.cos = cos;
    step.sin = sin;
    if (run_layers(model, step, update, failed)) return -1;

    const int64_t samples = batch.num_samples;
    char* sampled = sampled_buffer.get<char>(2 * samples * hidden * size_of(model.dtype));
    char* last = behind(sampled, samples * hidden, model.dtype);
    gather(residual, hidden, model.dtype, batch.sample_rows, samples, sampled);
    gather(update, hidden, model.dtype, batch.sample_rows, samples, last);
    bk_rms_norm(last, hidden, sampled, hidden, model.final_norm, model.eps, last, samples, hidden, model.dtype);
    const Product head{last, hidden, &model.head, nullptr, logits, model.head.out};
    multiply_all(&head, 1, samples, model.dtype, BK_FLOAT32);
    return 0;
}

}  // namespace
}  // namespace bk

extern "C" int32_t bk_forward(const bk_model* model, const bk_batch* batch, float* logits, uint8_t* failed) {
    if (model->size != sizeof(bk_model) || batch->size != sizeof(bk_batch)) return -1;
    return bk::forward(*model, *batch, logits, failed);
}
