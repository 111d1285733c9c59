// One layer of routed experts: down(silu(gate(x)) * up(x)) per (token, chosen expert), then the weighted sum per token.
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
    Group* groups;
    int64_t num_groups;
    int64_t count;
};

// Sorts the pairs by expert and cuts them into groups of at most kRowsPerTask rows. Pairs with id -1 are left out.
// num_groups is -1 if an id is out of range.
Pairs group_by_expert(const int32_t* topk_ids, int64_t num_pairs, int64_t num_experts) {
    thread_local Buffer starts_buffer, order_buffer, groups_buffer;
    int64_t* start = starts_buffer.get<int64_t>(num_experts + 2);
    Pairs pairs{order_buffer.get<int64_t>(num_pairs), nullptr, 0, 0};
    for (int64_t e = 0; e < num_experts + 2; ++e) start[e] = 0;
    for (int64_t p = 0; p < num_pairs; ++p) {
        if (topk_ids[p] < -1 || topk_ids[p] >= num_experts) return {nullptr, nullptr, -1, 0};
        if (topk_ids[p] >= 0) ++start[topk_ids[p] + 2];
    }
    for (int64_t e = 0; e < num_experts; ++e) start[e + 2] += start[e + 1];
    pairs.count = start[num_experts + 1];
    for (int64_t p = 0; p < num_pairs; ++p)
        if (topk_ids[p] >= 0) pairs.order[start[topk_ids[p] + 1]++] = p;
    pairs.groups = groups_buffer.get<Group>(num_experts + pairs.count / kRowsPerTask + 1);
    for (int64_t e = 0; e < num_experts; ++e)
        for (int64_t at = start[e]; at < start[e + 1]; at += kRowsPerTask)
            pairs.groups[pairs.num_groups++] = {e, at,
                                                at + kRowsPerTask < start[e + 1] ? at + kRowsPerTask : start[e + 1]};
    return pairs;
}

template <class T>
struct Layer {
    using Packed = typename Dot<T>::Packed;
    using A = typename Dot<T>::Activation;

    const T* const* gate;
    const T* const* up;
    const T* const* down;
    int64_t hidden, intermediate;
    int64_t topk;
    Packed* inputs;       // [num_tokens] packed rows of `hidden`
    Packed* activations;  // [pairs.count] packed rows of `intermediate`
    A* rows;              // [num_tokens * topk, hidden], by pair
    Pairs pairs;

    // silu(gate) * up for intermediate values [first, last) of one group, rounded as the separate operations would be.
    void gate_up(const Group& group, int64_t first, int64_t last) const {
        const T *gate_rows[kTile], *up_rows[kTile];
        alignas(64) float gate_sums[kRowsPerTask * kTile], up_sums[kRowsPerTask * kTile];
        const int64_t count = tile_pointers(gate_rows, gate[group.expert], hidden, first, last);
        tile_pointers(up_rows, up[group.expert], hidden, first, last);
        const int64_t in_stride = packed_stride<T>(hidden), out_stride = packed_stride<T>(intermediate);
        const int64_t num_rows = group.end - group.begin;
        const Packed* x[kRowsPerTask];
        for (int64_t r = 0; r < num_rows; ++r) x[r] = inputs + pairs.order[group.begin + r] / topk * in_stride;
        dot_rows<T>(x, num_rows, gate_rows, count, hidden, gate_sums, kTile);
        dot_rows<T>(x, num_rows, up_rows, count, hidden, up_sums, kTile);
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
        const T* w[kTile];
        alignas(64) float sums[kRowsPerTask * kTile];
        const int64_t count = tile_pointers(w, down[group.expert], intermediate, first, last);
        const int64_t stride = packed_stride<T>(intermediate);
        const int64_t num_rows = group.end - group.begin;
        const Packed* x[kRowsPerTask];
        for (int64_t r = 0; r < num_rows; ++r) x[r] = activations + (group.begin + r) * stride;
        dot_rows<T>(x, num_rows, w, count, intermediate, sums, kTile);
        for (int64_t r = 0; r < num_rows; ++r) {
            A* to = rows + pairs.order[group.begin + r] * hidden + first;
            for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(sums + r * kTile + i), count - i);
        }
    }

    // The token's expert rows, weighted and added in float32 in top-k order, rounded once. Returns whether the sum is
    // not finite, which it is not if any of the rows is not; then the result is zeros.
    bool combine(const int32_t* ids, const float* weights, const A* token_rows, A* y) const {
        u32v finite = ~u32v{};
        const f32v limit = splat(std::numeric_limits<float>::max());
        for (int64_t i = 0; i < hidden; i += kLanes) {
            f32v total = {};
            for (int64_t place = 0; place < topk; ++place) {
                if (ids[place] < 0) continue;
                total = total + load(token_rows + place * hidden + i, hidden - i) * weights[place];
            }
            total = rounded_to<A>(total);
            finite &= (u32v)(total <= limit) & (u32v)(total >= -limit);
            store(y + i, total, hidden - i);
        }
        bool failed = false;
        for (int lane = 0; lane < kLanes; ++lane) failed |= finite[lane] == 0;
        if (failed) std::memset(static_cast<void*>(y), 0, static_cast<size_t>(hidden) * sizeof(A));
        return failed;
    }
};

// body(group, first, last) for every group and tile of num_w weight rows.
template <class Body>
void for_each_tile(const Pairs& pairs, int64_t num_w, int64_t row_bytes, int64_t multiple, Body&& body) {
    if (pairs.num_groups == 0) return;
    int64_t tile = tile_size(num_w, row_bytes, ceil_div(4 * num_threads(), pairs.num_groups));
    tile = tile >= kTile ? kTile : round_up(tile, multiple);
    const int64_t tiles = ceil_div(num_w, tile);
    parallel_for(pairs.num_groups * tiles, [&](int64_t task) {
        const int64_t first = task % tiles * tile;
        body(pairs.groups[task / tiles], first, first + tile < num_w ? first + tile : num_w);
    });
}

template <class T>
int32_t moe(const typename Dot<T>::Activation* x, int64_t x_stride, const int32_t* topk_ids, const float* topk_weights,
            const T* const* gate, const T* const* up, const T* const* down, typename Dot<T>::Activation* y,
            uint8_t* failed, int64_t n, int64_t topk, int64_t num_experts, int64_t hidden, int64_t intermediate) {
    using Packed = typename Dot<T>::Packed;
    using A = typename Dot<T>::Activation;
    const Pairs pairs = group_by_expert(topk_ids, n * topk, num_experts);
    if (pairs.num_groups < 0) return -1;
    for (int64_t g = 0; g < pairs.num_groups; ++g)
        if (!gate[pairs.groups[g].expert]) return -1;

    thread_local Buffer inputs, activations, rows;
    const int64_t in_stride = packed_stride<T>(hidden), act_stride = packed_stride<T>(intermediate);
    const Layer<T> layer{gate,
                         up,
                         down,
                         hidden,
                         intermediate,
                         topk,
                         inputs.get<Packed>(n * in_stride),
                         activations.get<Packed>(pairs.count * act_stride),
                         rows.get<A>(n * topk * hidden),
                         pairs};
    const int64_t pack_rows = 1 + 65536 / hidden;
    parallel_for(ceil_div(n, pack_rows), [&](int64_t task) {
        for (int64_t t = task * pack_rows; t < n && t < (task + 1) * pack_rows; ++t)
            pack_row<T>(layer.inputs + t * in_stride, x + t * x_stride, hidden);
    });
    constexpr int64_t kWhole = Dot<T>::kStep < kTile ? Dot<T>::kStep : kTile;  // tasks write whole packed steps
    for_each_tile(pairs, intermediate, 2 * hidden * static_cast<int64_t>(sizeof(T)), kWhole,
                  [&](const Group& group, int64_t first, int64_t last) { layer.gate_up(group, first, last); });
    for_each_tile(pairs, hidden, intermediate * static_cast<int64_t>(sizeof(T)), kQuad,
                  [&](const Group& group, int64_t first, int64_t last) { layer.down_rows(group, first, last); });
    const int64_t combine_rows = 1 + 32768 / (hidden * topk + 1);
    parallel_for(ceil_div(n, combine_rows), [&](int64_t task) {
        for (int64_t t = task * combine_rows; t < n && t < (task + 1) * combine_rows; ++t)
            failed[t] = layer.combine(topk_ids + t * topk, topk_weights + t * topk, layer.rows + t * topk * hidden,
                                      y + t * hidden);
    });
    return 0;
}

}  // namespace
}  // namespace bk

extern "C" int32_t bk_moe(const void* x, int64_t x_stride, const int32_t* topk_ids, const float* topk_weights,
                          const void* const* gate, const void* const* up, const void* const* down, void* y,
                          uint8_t* failed, int64_t n, int64_t topk, int64_t num_experts, int64_t hidden,
                          int64_t intermediate, int32_t dtype) {
    int32_t status = 0;
    bk::dispatch_weights(dtype, [&](auto t) {
        using T = decltype(t);
        using A = typename bk::Dot<T>::Activation;
        status =
            bk::moe(static_cast<const A*>(x), x_stride, topk_ids, topk_weights, reinterpret_cast<const T* const*>(gate),
                    reinterpret_cast<const T* const*>(up), reinterpret_cast<const T* const*>(down), static_cast<A*>(y),
                    failed, n, topk, num_experts, hidden, intermediate);
    });
    return status;
}
