// The gate: scores, groups, top-k and weights of each token, in the order of operations of the families' routers.

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "barista_kernels.h"
#include "dispatch.h"
#include "products.h"
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

using Candidate = std::pair<float, int64_t>;  // value, index

// Moves the k best of n candidates to the front, best first. Which of equal ones are taken is what torch.topk takes:
// its algorithm, of the same standard library. Gates of carved models make scores that are often equal.
void select_best(Candidate* from, int64_t n, int64_t k) {
    auto better = [](const Candidate& x, const Candidate& y) {
        return (std::isnan(x.first) && !std::isnan(y.first)) || x.first > y.first;
    };
    if (k * 64 <= n)
        std::partial_sort(from, from + k, from + n, better);
    else
        std::nth_element(from, from + k - 1, from + n, better);
    std::sort(from, from + k, [&](const Candidate& x, const Candidate& y) {
        return better(x, y) || (!better(y, x) && x.second < y.second);
    });
}

// The best value of a group, or the sum of its best two.
float group_score(const float* choice, int64_t size, bool top2sum) {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t i = 0; i < size; ++i) {
        if (choice[i] > first || std::isnan(choice[i])) {
            second = first;
            first = choice[i];
        } else if (choice[i] > second) {
            second = choice[i];
        }
    }
    return top2sum ? first + second : first;
}

struct Scratch {
    std::vector<float> scores, choice;
    std::vector<Candidate> candidates;
    std::vector<char> kept;
};

void mask_groups(const bk_gate_spec& spec, Scratch& s) {
    const int64_t size = spec.num_experts / spec.num_groups;
    s.candidates.resize(static_cast<size_t>(spec.num_groups));
    s.kept.assign(static_cast<size_t>(spec.num_groups), 0);
    for (int64_t g = 0; g < spec.num_groups; ++g)
        s.candidates[g] = {group_score(s.choice.data() + g * size, size, spec.top2sum), g};
    select_best(s.candidates.data(), spec.num_groups, spec.topk_groups);
    for (int64_t i = 0; i < spec.topk_groups; ++i) s.kept[s.candidates[i].second] = 1;
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
    s.candidates.resize(static_cast<size_t>(count));
    for (int64_t e = 0; e < count; ++e) s.candidates[e] = {s.choice[e], e};
    select_best(s.candidates.data(), count, spec.top_k);
    float total = 0.0f;
    for (int64_t k = 0; k < spec.top_k; ++k) {
        const int64_t e = s.candidates[k].second;
        topk_ids[k] = static_cast<int32_t>(e);
        topk_weights[k] = s.scores[e];
        total += s.scores[e];
    }
    for (int64_t k = 0; k < spec.top_k; ++k) {
        if (spec.normalise) topk_weights[k] /= total + spec.norm_eps;
        topk_weights[k] *= spec.scale;
    }
}

// The logits [n, num_experts] in float32, with the rounding of the dtype that they are computed in.
const float* logits_of(const bk_gate_layer& gate, const void* x, int64_t n) {
    thread_local Buffer rows_buffer, narrow_buffer, logits_buffer;
    const int64_t hidden = gate.weight.in, experts = gate.spec.num_experts;
    float* logits = logits_buffer.get<float>(n * experts);
    if (gate.dtype == BK_FLOAT32) {
        multiply_one({x, hidden, &gate.weight, nullptr, logits, experts}, n, BK_FLOAT32);
    } else if (gate.float32_logits) {
        float* rows = rows_buffer.get<float>(n * hidden);
        convert(rows, static_cast<const bf16*>(x), n * hidden);
        multiply_one({rows, hidden, &gate.weight, nullptr, logits, experts}, n, BK_FLOAT32);
    } else {
        bf16* rounded = narrow_buffer.get<bf16>(n * experts);
        multiply_one({x, hidden, &gate.weight, nullptr, rounded, experts}, n, BK_BFLOAT16);
        convert(logits, rounded, n * experts);
    }
    return logits;
}

}  // namespace
}  // namespace bk

extern "C" int32_t bk_choose(const bk_gate_layer* gate, const void* x, int32_t* topk_ids, float* topk_weights,
                             int64_t n) {
    if (gate->size != sizeof(bk_gate_layer)) return -1;
    bk_gate(bk::logits_of(*gate, x, n), gate->select_bias, &gate->spec, topk_ids, topk_weights, n);
    if (gate->dtype == BK_BFLOAT16 && !gate->float32_logits && !gate->float32_weights)
        for (int64_t i = 0, count = n * gate->spec.top_k; i < count; i += bk::kLanes)
            bk::store(topk_weights + i, bk::rounded_to<bk::bf16>(bk::load(topk_weights + i, count - i)), count - i);
    return 0;
}

extern "C" int32_t bk_ties_as_torch(void) {
#if defined(__GLIBCXX__)
    return 1;
#else
    return 0;
#endif
}

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
