// One layer of routed experts: down(silu(gate(x)) * up(x)) per (token, chosen expert), then the weighted sum per token.
// Both halves can be had alone, for experts in other processes: the bytes are those of the whole.
//
// A "pair" is one (token, place in its top-k). Pairs are sorted by expert, so that an expert's weights are read once
// for all of its rows. Three rounds of tasks: gate and up, down, combine.

#include <limits>

#include "barista_kernels.h"
#include "dispatch.h"
#include "dot.h"
#include "thread_pool.h"

namespace bk {
namespace {

// The rows [begin, end) of the sorted pairs, all of one expert.
struct Group {
    int64_t expert, begin, end;
};

struct Pairs {
    int64_t* order;  // sorted position -> pair (token * k + place)
    int64_t* ranks;  // sorted position -> how many pairs come before that pair, ids of -1 not counted
    Group* groups;
    int64_t num_groups;
    int64_t count;
};

// Sorts the pairs by expert and cuts them into groups of at most kRowsPerTask rows. Pairs with id -1 are left out.
// num_groups is -1 if an id is out of range.
Pairs group_by_expert(const int32_t* topk_ids, int64_t num_pairs, int64_t num_experts) {
    thread_local Buffer starts_buffer, order_buffer, ranks_buffer, groups_buffer;
    int64_t* start = starts_buffer.get<int64_t>(num_experts + 2);
    Pairs pairs{order_buffer.get<int64_t>(num_pairs), ranks_buffer.get<int64_t>(num_pairs), nullptr, 0, 0};
    for (int64_t e = 0; e < num_experts + 2; ++e) start[e] = 0;
    for (int64_t p = 0; p < num_pairs; ++p) {
        if (topk_ids[p] < -1 || topk_ids[p] >= num_experts) return {nullptr, nullptr, nullptr, -1, 0};
        if (topk_ids[p] >= 0) ++start[topk_ids[p] + 2];
    }
    for (int64_t e = 0; e < num_experts; ++e) start[e + 2] += start[e + 1];
    pairs.count = start[num_experts + 1];
    for (int64_t p = 0, rank = 0; p < num_pairs; ++p) {
        if (topk_ids[p] < 0) continue;
        const int64_t at = start[topk_ids[p] + 1]++;
        pairs.order[at] = p;
        pairs.ranks[at] = rank++;
    }
    pairs.groups = groups_buffer.get<Group>(num_experts + pairs.count / kRowsPerTask + 1);
    for (int64_t e = 0; e < num_experts; ++e)
        for (int64_t at = start[e]; at < start[e + 1]; at += kRowsPerTask)
            pairs.groups[pairs.num_groups++] = {e, at,
                                                at + kRowsPerTask < start[e + 1] ? at + kRowsPerTask : start[e + 1]};
    return pairs;
}

// The layer's weights, as the C interface has them.
struct Weights {
    const void* const* gate;
    const void* const* up;
    const void* const* down;
    int64_t num_experts, hidden, intermediate;
};

template <class T>
struct Layer {
    using Packed = typename Dot<T>::Packed;
    using A = typename Dot<T>::Activation;

    Weights w;
    int64_t topk;
    Packed* inputs;         // [num_tokens] packed rows of `hidden`
    Packed* activations;    // [pairs.count] packed rows of `intermediate`
    A* rows;                // [pairs.count or more, hidden]
    const int64_t* places;  // sorted position -> where its row goes in `rows`
    Pairs pairs;

    // silu(gate) * up for intermediate values [first, last) of one group, rounded as the separate operations would be.
    void gate_up(const Group& group, int64_t first, int64_t last) const {
        alignas(64) float gate_sums[kRowsPerTask * kTile], up_sums[kRowsPerTask * kTile];
        const int64_t count = last - first;
        const auto gate = Matrix<T>::at(w.gate[group.expert], w.intermediate, w.hidden, w.hidden);
        const auto up = Matrix<T>::at(w.up[group.expert], w.intermediate, w.hidden, w.hidden);
        const int64_t in_stride = packed_stride<T>(w.hidden), out_stride = packed_stride<T>(w.intermediate);
        const int64_t num_rows = group.end - group.begin;
        const Packed* x[kRowsPerTask];
        for (int64_t r = 0; r < num_rows; ++r) x[r] = inputs + pairs.order[group.begin + r] / topk * in_stride;
        multiply(x, num_rows, gate, first, last, gate_sums, kTile);
        multiply(x, num_rows, up, first, last, up_sums, kTile);
        for (int64_t r = 0; r < num_rows; ++r) {
            A values[kTile];
            for (int64_t i = 0; i < count; i += kLanes) {
                f32v activated = rounded_to<A>(silu(rounded_to<A>(load(gate_sums + r * kTile + i))));
                store(values + i, activated * rounded_to<A>(load(up_sums + r * kTile + i)));
            }
            Packed* to = activations + (group.begin + r) * out_stride;
            pack_row<T>(to + first / Dot<T>::kStep * Dot<T>::kPackedStep, values, count);
        }
    }

    void down_rows(const Group& group, int64_t first, int64_t last) const {
        alignas(64) float sums[kRowsPerTask * kTile];
        const int64_t count = last - first;
        const auto down = Matrix<T>::at(w.down[group.expert], w.hidden, w.intermediate, w.intermediate);
        const int64_t stride = packed_stride<T>(w.intermediate);
        const int64_t num_rows = group.end - group.begin;
        const Packed* x[kRowsPerTask];
        for (int64_t r = 0; r < num_rows; ++r) x[r] = activations + (group.begin + r) * stride;
        multiply(x, num_rows, down, first, last, sums, kTile);
        for (int64_t r = 0; r < num_rows; ++r) {
            A* to = rows + places[group.begin + r] * w.hidden + first;
            for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(sums + r * kTile + i), count - i);
        }
    }
};

// body(group, first, last) for every group and tile of num_w weight rows.
template <class Body>
void for_each_tile(const Pairs& pairs, int64_t num_w, int64_t row_bytes, int64_t quantum, Body&& body) {
    if (pairs.num_groups == 0) return;
    const int64_t tile = tile_size(num_w, row_bytes, ceil_div(4 * num_threads(), pairs.num_groups), quantum);
    const int64_t tiles = ceil_div(num_w, tile);
    parallel_for(pairs.num_groups * tiles, [&](int64_t task) {
        const int64_t first = task % tiles * tile;
        body(pairs.groups[task / tiles], first, first + tile < num_w ? first + tile : num_w);
    });
}

// Writes every pair's expert row to `rows`: at the pair's own place, or, if compact, right behind the row of the pair
// before it. Returns the number of pairs; -1, with nothing written, if an expert is not held.
template <class T>
int64_t expert_rows(const typename Dot<T>::Activation* x, int64_t x_stride, const int32_t* topk_ids, int64_t n,
                    int64_t topk, const Weights& w, typename Dot<T>::Activation* rows, bool compact) {
    using Packed = typename Dot<T>::Packed;
    const Pairs pairs = group_by_expert(topk_ids, n * topk, w.num_experts);
    if (pairs.num_groups < 0) return -1;
    for (int64_t g = 0; g < pairs.num_groups; ++g)
        if (!w.gate[pairs.groups[g].expert]) return -1;

    thread_local Buffer inputs, activations;
    const int64_t in_stride = packed_stride<T>(w.hidden), act_stride = packed_stride<T>(w.intermediate);
    const Layer<T> layer{w,
                         topk,
                         inputs.get<Packed>(n * in_stride),
                         activations.get<Packed>(pairs.count * act_stride),
                         rows,
                         compact ? pairs.ranks : pairs.order,
                         pairs};
    const int64_t pack_rows = 1 + 65536 / w.hidden;
    parallel_for(ceil_div(n, pack_rows), [&](int64_t task) {
        for (int64_t t = task * pack_rows; t < n && t < (task + 1) * pack_rows; ++t)
            pack_row<T>(layer.inputs + t * in_stride, x + t * x_stride, w.hidden);
    });
    static_assert(Dot<T>::kStep <= kTile && Matrix<T>::kQuantum <= kTile);
    constexpr int64_t kWhole = Dot<T>::kStep > Matrix<T>::kQuantum ? Dot<T>::kStep : Matrix<T>::kQuantum;
    // Tasks write whole packed steps.
    for_each_tile(pairs, w.intermediate, 2 * Matrix<T>::row_bytes(w.hidden), kWhole,
                  [&](const Group& group, int64_t first, int64_t last) { layer.gate_up(group, first, last); });
    for_each_tile(pairs, w.hidden, Matrix<T>::row_bytes(w.intermediate), Matrix<T>::kQuantum,
                  [&](const Group& group, int64_t first, int64_t last) { layer.down_rows(group, first, last); });
    return pairs.count;
}

// All ones where a lane is finite.
BK_INLINE u32v finite_lanes(f32v v) {
    const f32v limit = splat(std::numeric_limits<float>::max());
    return (u32v)(v <= limit) & (u32v)(v >= -limit);
}

BK_INLINE bool all_lanes(u32v mask) {
    bool all = true;
    for (int lane = 0; lane < kLanes; ++lane) all &= mask[lane] != 0;
    return all;
}

// One token's expert rows row_of(place), NULL where there is none, weighted and added in float32 in top-k order, and
// rounded once. Returns whether the sum is not finite, which it is not if any of the rows is not; then it is zeros.
template <class A, class RowOf>
BK_INLINE bool combine_token(RowOf&& row_of, const float* weights, int64_t topk, int64_t hidden, A* y) {
    u32v finite = ~u32v{};
    for (int64_t i = 0; i < hidden; i += kLanes) {
        f32v total = {};
        for (int64_t place = 0; place < topk; ++place) {
            const A* row = row_of(place);
            if (row) total = total + load(row + i, hidden - i) * weights[place];
        }
        total = rounded_to<A>(total);
        finite &= finite_lanes(total);
        store(y + i, total, hidden - i);
    }
    const bool failed = !all_lanes(finite);
    if (failed) std::memset(static_cast<void*>(y), 0, static_cast<size_t>(hidden) * sizeof(A));
    return failed;
}

// row_of(pair): the pair's row, or NULL.
template <class A, class RowOf>
void combine(RowOf&& row_of, const float* topk_weights, A* y, uint8_t* failed, int64_t n, int64_t topk,
             int64_t hidden) {
    const int64_t rows_per_task = 1 + 32768 / (hidden * topk + 1);
    parallel_for(ceil_div(n, rows_per_task), [&](int64_t task) {
        for (int64_t t = task * rows_per_task; t < n && t < (task + 1) * rows_per_task; ++t)
            failed[t] = combine_token<A>([&](int64_t place) { return row_of(t * topk + place); },
                                         topk_weights + t * topk, topk, hidden, y + t * hidden);
    });
}

}  // namespace
}  // namespace bk

extern "C" int32_t bk_moe(const void* x, int64_t x_stride, const int32_t* topk_ids, const float* topk_weights,
                          const void* const* gate, const void* const* up, const void* const* down, void* y,
                          uint8_t* failed, int64_t n, int64_t topk, int64_t num_experts, int64_t hidden,
                          int64_t intermediate, int32_t weights, int32_t dtype) {
    bool held = true;
    bk::dispatch_weights(weights, dtype, [&](auto t) {
        using T = decltype(t);
        using A = typename bk::Dot<T>::Activation;
        thread_local bk::Buffer buffer;
        A* rows = buffer.get<A>(n * topk * hidden);
        const bk::Weights w{gate, up, down, num_experts, hidden, intermediate};
        held = bk::expert_rows<T>(static_cast<const A*>(x), x_stride, topk_ids, n, topk, w, rows, false) >= 0;
        if (!held) return;
        bk::combine<A>([&](int64_t pair) { return topk_ids[pair] < 0 ? nullptr : rows + pair * hidden; }, topk_weights,
                       static_cast<A*>(y), failed, n, topk, hidden);
    });
    return held ? 0 : -1;
}

extern "C" int64_t bk_expert_rows(const void* x, int64_t x_stride, const int32_t* topk_ids, const void* const* gate,
                                  const void* const* up, const void* const* down, void* rows, int64_t n, int64_t topk,
                                  int64_t num_experts, int64_t hidden, int64_t intermediate, int32_t weights,
                                  int32_t dtype) {
    int64_t count = 0;
    bk::dispatch_weights(weights, dtype, [&](auto t) {
        using T = decltype(t);
        using A = typename bk::Dot<T>::Activation;
        count = bk::expert_rows<T>(static_cast<const A*>(x), x_stride, topk_ids, n, topk,
                                   {gate, up, down, num_experts, hidden, intermediate}, static_cast<A*>(rows), true);
    });
    return count;
}

extern "C" void bk_combine_rows(const int64_t* addresses, const float* topk_weights, void* y, uint8_t* failed,
                                int64_t n, int64_t topk, int64_t hidden, int32_t dtype) {
    bk::dispatch(dtype, [&](auto a) {
        using A = decltype(a);
        bk::combine<A>([&](int64_t pair) { return reinterpret_cast<const A*>(addresses[pair]); }, topk_weights,
                       static_cast<A*>(y), failed, n, topk, hidden);
    });
}

extern "C" void bk_find_nonfinite(const void* rows, uint8_t* nonfinite, int64_t n, int64_t hidden, int32_t dtype) {
    bk::dispatch(dtype, [&](auto a) {
        using A = decltype(a);
        for (int64_t r = 0; r < n; ++r) {
            const A* row = static_cast<const A*>(rows) + r * hidden;
            bk::u32v finite = ~bk::u32v{};
            for (int64_t i = 0; i < hidden; i += bk::kLanes) finite &= bk::finite_lanes(bk::load(row + i, hidden - i));
            nonfinite[r] = !bk::all_lanes(finite);
        }
    });
}
