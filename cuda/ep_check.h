// What both implementations ask of their arguments before anything runs.
#pragma once

#include <string.h>

#include "ep_index.h"

// Needs of a call, beside a valid shape and windows.
enum ep_needs { EP_NEEDS_SOURCE = 1, EP_NEEDS_OWNER = 2, EP_NEEDS_PARTIAL = 4, EP_NEEDS_RESULTS = 8 };

inline bool ep_same_shape(const struct ep_shape* a, const struct ep_shape* b) { return memcmp(a, b, sizeof *a) == 0; }

inline bool ep_rank_fits(const ep_rank& rank, uint32_t needs) {
    const ep_shape& shape = rank.shape;
    if (rank.size != sizeof rank || !ep_valid(&shape) || rank.rank >= shape.num_ranks) return false;
    if (rank.state == nullptr || rank.num_tokens > shape.max_tokens) return false;
    if (rank.num_local_experts > shape.max_local_experts) return false;
    if (rank.num_tokens && rank.rank >= shape.num_sources) return false;
    for (uint32_t r = 0; r < shape.num_ranks; ++r) {
        if (rank.windows[r] == nullptr || reinterpret_cast<uintptr_t>(rank.windows[r]) % 128) return false;
    }
    if (needs & EP_NEEDS_PARTIAL && shape.combine != EP_PARTIAL) return false;
    if (needs & EP_NEEDS_SOURCE) {
        if (!rank.expert_rank || !rank.expert_index || !rank.slots || !rank.ordinals) return false;
        const bool tensors = rank.hidden_states && rank.topk_ids && rank.topk_weights && rank.output && rank.failed;
        if (rank.num_tokens && !tensors) return false;
        if (reinterpret_cast<uintptr_t>(rank.hidden_states) % 16 || reinterpret_cast<uintptr_t>(rank.output) % 16) {
            return false;
        }
    }
    if (needs & EP_NEEDS_OWNER && rank.num_local_experts) {
        if (!rank.expert_rows || !rank.expert_ends || reinterpret_cast<uintptr_t>(rank.expert_rows) % 16) return false;
    }
    if (needs & EP_NEEDS_RESULTS && rank.num_local_experts) {
        if (!rank.expert_results || !rank.expert_ends || reinterpret_cast<uintptr_t>(rank.expert_results) % 16) {
            return false;
        }
    }
    return true;
}

// Whether any of the ranks holds an expert.
inline bool ep_any_owner(const ep_rank* ranks, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) {
        if (ranks[i].num_local_experts) return true;
    }
    return false;
}

// Bytes of a window's memory: all of it, or the first part, of a rank that nobody sends to.
inline bool ep_window_size_fits(const ep_shape& shape, uint64_t bytes) {
    const ep_offsets at = ep_offsets_of(&shape);
    return bytes == at.total || (bytes == at.experts && shape.routing == EP_TO_OWNERS);
}

inline bool ep_ranks_fit(const ep_rank* ranks, uint32_t count, uint32_t needs) {
    if (ranks == nullptr || count < 1 || count > EP_MAX_LOCAL_RANKS) return false;
    for (uint32_t i = 0; i < count; ++i) {
        if (!ep_rank_fits(ranks[i], needs) || !ep_same_shape(&ranks[i].shape, &ranks[0].shape)) return false;
    }
    return true;
}
