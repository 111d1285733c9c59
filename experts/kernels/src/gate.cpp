// The gate: scores, groups, top-k and weights of each token, in the order of operations of the families' routers.

#include <cmath>
#include <vector>

#include "barista_kernels.h"
#include "simd.h"
#include "thread_pool.h"

namespace bk {
namespace {

// scores[0, count) = softmax(logits); the sum is taken in fixed lanes.
void softmax(const float* logits, float* scores, int64_t count) {
    f32v best = splat(-INFINITY), total = {};
    for (int64_t i = 0; i < count; ++i) best[i % kLanes] = logits[i] > best[i % kLanes] ? logits[i] : best[i % kLanes];
    const f32v shift = splat(max_lane(best));
    for (int64_t i = 0; i < count; i += kLanes) {
        const f32v e = exp(load(logits + i, count - i) - shift);
        store(scores + i, e, count - i);
        total = total + load(scores + i, count - i);
    }
    const float sum_of_row = sum(total);
    for (int64_t i = 0; i < count; ++i) scores[i] /= sum_of_row;
}

void sigmoid(const float* logits, float* scores, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes)
        store(scores + i, 1.0f / (1.0f + exp(-load(logits + i, count - i))), count - i);
}

// The index of the largest value; the lowest one on ties, and a NaN counts as the largest, as in torch.
int64_t argmax(const float* values, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (std::isnan(values[i])) return i;
        if (values[i] > values[best]) best = i;
    }
    return best;
}

// The best value of a group, or the sum of its best two.
float group_score(const float* choice, int64_t size, bool top2sum) {
    const int64_t first = argmax(choice, size);
    if (!top2sum) return choice[first];
    float second = -INFINITY;
    for (int64_t i = 0; i < size; ++i)
        if (i != first && choice[i] > second) second = choice[i];
    return choice[first] + second;
}

struct Scratch {
    std::vector<float> scores, choice, groups;
    std::vector<char> kept;
};

void mask_groups(const bk_gate_spec& spec, Scratch& s) {
    const int64_t size = spec.num_experts / spec.num_groups;
    s.groups.resize(static_cast<size_t>(spec.num_groups));
    s.kept.assign(static_cast<size_t>(spec.num_groups), 0);
    for (int64_t g = 0; g < spec.num_groups; ++g)
        s.groups[g] = group_score(s.choice.data() + g * size, size, spec.top2sum);
    for (int64_t i = 0; i < spec.topk_groups; ++i) {
        const int64_t g = argmax(s.groups.data(), spec.num_groups);
        s.kept[g] = 1;
        s.groups[g] = -INFINITY;
    }
    for (int64_t e = 0; e < spec.num_experts; ++e)
        if (!s.kept[e / size]) s.choice[e] = spec.masked_value;
}

void gate_row(const float* logits, const float* select_bias, const bk_gate_spec& spec, int32_t* topk_ids,
              float* topk_weights, Scratch& s) {
    const int64_t count = spec.num_experts;
    s.scores.resize(static_cast<size_t>(count));
    (spec.sigmoid ? sigmoid : softmax)(logits, s.scores.data(), count);
    s.choice = s.scores;
    if (select_bias)
        for (int64_t e = 0; e < count; ++e) s.choice[e] += select_bias[e];
    if (spec.topk_groups < spec.num_groups) mask_groups(spec, s);
    float total = 0.0f;
    for (int64_t k = 0; k < spec.top_k; ++k) {
        const int64_t e = argmax(s.choice.data(), count);
        topk_ids[k] = static_cast<int32_t>(e);
        topk_weights[k] = s.scores[e];
        total += s.scores[e];
        s.choice[e] = -INFINITY;
    }
    for (int64_t k = 0; k < spec.top_k; ++k) {
        if (spec.normalise) topk_weights[k] /= total + spec.norm_eps;
        topk_weights[k] *= spec.scale;
    }
}

}  // namespace
}  // namespace bk

extern "C" void bk_gate(const float* logits, const float* select_bias, const bk_gate_spec* spec, int32_t* topk_ids,
                        float* topk_weights, int64_t n) {
    const int64_t rows_per_task = 1 + 65536 / (spec->num_experts * (spec->top_k + 8));
    bk::parallel_for((n + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
        bk::Scratch scratch;
        const int64_t end = (task + 1) * rows_per_task < n ? (task + 1) * rows_per_task : n;
        for (int64_t row = task * rows_per_task; row < end; ++row)
            bk::gate_row(logits + row * spec->num_experts, select_bias, *spec, topk_ids + row * spec->top_k,
                         topk_weights + row * spec->top_k, scratch);
    });
}
