// Where things lie: the index arithmetic of a rank's cycle, the same on both machines.
#pragma once

#include "ep.h"

// What a thread loads and stores at once.
struct alignas(16) ep_unit {
    uint32_t words[4];
};

// A rank's own window and its peers', cut into regions. `at` is ep_offsets_of(shape), found once for a launch.
struct ep_view {
    uint8_t* base;
    const struct ep_shape* shape;
    const struct ep_offsets* at;
};

EP_FUNCTION ep_view ep_view_of(const ep_rank& rank, const ep_offsets& at, uint32_t owner) {
    return {rank.windows[owner], &rank.shape, &at};
}

EP_FUNCTION ep_header* ep_header_of(const ep_view& view) { return reinterpret_cast<ep_header*>(view.base); }

EP_FUNCTION ep_cell* ep_cell_of(const ep_view& view, uint32_t phase, uint32_t source) {
    return reinterpret_cast<ep_cell*>(view.base + view.at->cells) + phase * view.shape->num_ranks + source;
}

EP_FUNCTION int32_t* ep_counts_of(const ep_view& view, uint32_t source) {
    return reinterpret_cast<int32_t*>(view.base + view.at->counts) + (uint64_t)source * view.shape->max_local_experts;
}

EP_FUNCTION int32_t* ep_bases_of(const ep_view& view, uint32_t source) {
    return reinterpret_cast<int32_t*>(view.base + view.at->bases) + (uint64_t)source * view.shape->max_local_experts;
}

EP_FUNCTION uint64_t ep_slot_of(const ep_view& view, uint32_t source, uint32_t slot) {
    return (uint64_t)source * view.shape->max_tokens + slot;
}

// [K]; `slot` is ep_slot_of.
EP_FUNCTION int32_t* ep_experts_of(const ep_view& view, uint64_t slot) {
    return reinterpret_cast<int32_t*>(view.base + view.at->experts) + slot * view.shape->top_k;
}

EP_FUNCTION int32_t* ep_ordinals_of(const ep_view& view, uint64_t slot) {
    return reinterpret_cast<int32_t*>(view.base + view.at->ordinals) + slot * view.shape->top_k;
}

EP_FUNCTION float* ep_weights_of(const ep_view& view, uint64_t slot) {
    return reinterpret_cast<float*>(view.base + view.at->weights) + slot * view.shape->top_k;
}

EP_FUNCTION ep_unit* ep_row_of(const ep_view& view, uint64_t slot) {
    return reinterpret_cast<ep_unit*>(view.base + view.at->rows + slot * ep_row_bytes(view.shape));
}

EP_FUNCTION float* ep_scales_of(const ep_view& view, uint64_t slot) {
    return reinterpret_cast<float*>(view.base + view.at->scales) + slot * ep_num_groups(view.shape);
}

EP_FUNCTION uint64_t ep_value_row_bytes(const struct ep_shape* shape) {
    return (uint64_t)shape->hidden * ep_value_bytes(shape);
}

EP_FUNCTION ep_unit* ep_out_of(const ep_view& view, uint64_t row) {
    return reinterpret_cast<ep_unit*>(view.base + view.at->out + row * ep_value_row_bytes(view.shape));
}

EP_FUNCTION ep_unit* ep_sum_of(const ep_view& view, uint64_t slot) {
    return reinterpret_cast<ep_unit*>(view.base + view.at->sums + slot * ep_value_row_bytes(view.shape));
}

// Who owns the expert of a pair. kNobody: the id is -1, so that there is no pair. kLost: the id is no expert, or nobody
// who lives owns it, which *status then tells.
enum { kNobody = -1, kLost = -2 };

EP_FUNCTION int32_t ep_owner_of(const ep_rank& rank, uint32_t alive, int32_t id, uint32_t* status) {
    if (id == -1) return kNobody;
    if (id < 0 || (uint32_t)id >= rank.shape.num_experts) {
        *status |= EP_BAD_ID;
        return kLost;
    }
    const int32_t owner = rank.expert_rank[id];
    if (owner < 0 || (uint32_t)owner >= rank.shape.num_ranks || !(alive >> owner & 1u)) {
        *status |= EP_UNREACHABLE;
        return kLost;
    }
    return owner;
}

// Whether a token goes to a rank.
EP_FUNCTION bool ep_goes_to(const ep_rank& rank, uint32_t alive, uint32_t token, uint32_t owner) {
    if (rank.shape.routing == EP_TO_ALL) return alive >> owner & 1u;
    uint32_t ignored = 0;
    for (uint32_t k = 0; k < rank.shape.top_k; ++k) {
        const int32_t id = rank.topk_ids[(uint64_t)token * rank.shape.top_k + k];
        if (ep_owner_of(rank, alive, id, &ignored) == (int32_t)owner) return true;
    }
    return false;
}

// A local expert's rows from all sources, padding included.
EP_FUNCTION uint32_t ep_padded(uint32_t rows, uint32_t alignment) {
    return (rows + alignment - 1) / alignment * alignment;
}

// One row of a weighted sum: where it lies, null if it is not there.
struct ep_term {
    const ep_unit* row;
    float weight;
};

// EP_EXACT: the expert row of a source's pair, in its owner's window. Sets *lost if it is nowhere.
EP_FUNCTION ep_term ep_exact_term(const ep_rank& rank, const ep_offsets& at, uint32_t alive, uint32_t token, uint32_t k,
                                  bool* lost) {
    const uint64_t pair = (uint64_t)token * rank.shape.top_k + k;
    const int32_t id = rank.topk_ids[pair];
    uint32_t status = 0;
    const int32_t owner = ep_owner_of(rank, alive, id, &status);
    if (owner < 0) {
        *lost = *lost || owner == kLost;
        return {nullptr, 0.0f};
    }
    const ep_view window = ep_view_of(rank, at, (uint32_t)owner);
    const int32_t base = ep_bases_of(window, rank.rank)[rank.expert_index[id]];
    if (base < 0) {
        *lost = true;
        return {nullptr, 0.0f};
    }
    return {ep_out_of(window, (uint64_t)base + rank.ordinals[pair]), rank.topk_weights[pair]};
}

// EP_PARTIAL: the sum that one rank made for a source's token.
EP_FUNCTION ep_term ep_partial_term(const ep_rank& rank, const ep_offsets& at, uint32_t alive, uint32_t token,
                                    uint32_t owner, bool* lost) {
    const int32_t slot = rank.slots[(uint64_t)token * rank.shape.num_ranks + owner];
    if (slot < 0) return {nullptr, 0.0f};
    if (!(alive >> owner & 1u)) {
        *lost = true;
        return {nullptr, 0.0f};
    }
    const ep_view window = ep_view_of(rank, at, owner);
    return {ep_sum_of(window, ep_slot_of(window, rank.rank, (uint32_t)slot)), 1.0f};
}

// EP_PARTIAL, at the source: whether a pair of the token has nobody who computes it, which no sum would show.
EP_FUNCTION bool ep_pair_lost(const ep_rank& rank, const ep_offsets& at, uint32_t alive, uint32_t token, uint32_t k) {
    bool lost = false;
    (void)ep_exact_term(rank, at, alive, token, k, &lost);
    return lost;
}

// At the owner: the expert row that belongs to pair k of a received row.
EP_FUNCTION ep_term ep_local_term(const ep_view& own, uint32_t source, uint64_t slot, uint32_t k) {
    const int32_t expert = ep_experts_of(own, slot)[k];
    if (expert < 0) return {nullptr, 0.0f};
    const int32_t base = ep_bases_of(own, source)[expert];
    if (base < 0) return {nullptr, 0.0f};
    return {ep_out_of(own, (uint64_t)base + ep_ordinals_of(own, slot)[k]), ep_weights_of(own, slot)[k]};
}
