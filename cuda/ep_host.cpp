// The CPU twin of the kernels: the same calls on ordinary memory, the same bytes. Windows may lie in memory that
// processes share. It is the reference that a GPU is held to, and what runs where there is none.
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#include "ep_check.h"
#include "ep_rows.h"

namespace {

uint64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_nsec);
}

uint32_t units_of(const ep_shape& shape) { return static_cast<uint32_t>(ep_value_row_bytes(&shape) / sizeof(ep_unit)); }

void route(const ep_rank& rank, const ep_offsets& at) {
    const ep_shape& shape = rank.shape;
    const uint32_t alive = rank.state->alive;
    for (uint32_t owner = 0; owner < shape.num_ranks; ++owner) {
        uint32_t sent = 0;
        for (uint32_t token = 0; token < rank.num_tokens; ++token) {
            const bool goes = ep_goes_to(rank, alive, token, owner);
            rank.slots[(uint64_t)token * shape.num_ranks + owner] = goes ? static_cast<int32_t>(sent++) : -1;
        }
        rank.state->sent[owner] = sent;
    }
    for (uint32_t expert = 0; expert < shape.num_experts; ++expert) {
        uint32_t ignored = 0;
        const int32_t owner = ep_owner_of(rank, alive, static_cast<int32_t>(expert), &ignored);
        if (owner < 0) continue;
        int32_t count = 0;
        for (uint32_t token = 0; token < rank.num_tokens; ++token) {
            bool chosen = false;
            for (uint32_t k = 0; k < shape.top_k; ++k) {
                const uint64_t pair = (uint64_t)token * shape.top_k + k;
                if (rank.topk_ids[pair] != static_cast<int32_t>(expert)) continue;
                rank.ordinals[pair] = count;
                chosen = true;
            }
            count += chosen;
        }
        ep_counts_of(ep_view_of(rank, at, static_cast<uint32_t>(owner)), rank.rank)[rank.expert_index[expert]] = count;
    }
    for (uint64_t pair = 0; pair < (uint64_t)rank.num_tokens * shape.top_k; ++pair) {
        (void)ep_owner_of(rank, alive, rank.topk_ids[pair], &rank.state->status);
    }
}

void send_pairs(const ep_rank& rank, const ep_view& window, uint32_t owner, uint32_t token, uint64_t slot) {
    for (uint32_t k = 0; k < rank.shape.top_k; ++k) {
        const uint64_t pair = (uint64_t)token * rank.shape.top_k + k;
        const int32_t id = rank.topk_ids[pair];
        uint32_t ignored = 0;
        const bool here = ep_owner_of(rank, ~0u, id, &ignored) == static_cast<int32_t>(owner);
        ep_experts_of(window, slot)[k] = here ? rank.expert_index[id] : -1;
        ep_ordinals_of(window, slot)[k] = here ? rank.ordinals[pair] : -1;
        if (rank.shape.combine == EP_PARTIAL) ep_weights_of(window, slot)[k] = here ? rank.topk_weights[pair] : 0.0f;
    }
}

template <class V>
void encode_row(const ep_shape& shape, const ep_unit* row, ep_unit* out, float* scales) {
    constexpr uint32_t kPieces = EP_GROUP / 16;
    for (uint32_t group = 0; group < ep_num_groups(&shape); ++group) {
        float values[kPieces][16], amax = 0.0f;
        for (uint32_t i = 0; i < kPieces; ++i) {
            ep_load16<V>(row + (group * kPieces + i) * ep_channels<V>::kUnits, values[i]);
            for (float value : values[i]) amax = ep_larger(amax, value);
        }
        const ep_scale scale = ep_scale_of(amax);
        for (uint32_t i = 0; i < kPieces; ++i) out[group * kPieces + i] = ep_encode(values[i], scale.inverse);
        scales[group] = scale.scale;
    }
}

void dispatch(const ep_rank& rank, const ep_offsets& at) {
    const ep_shape& shape = rank.shape;
    const uint32_t units = units_of(shape);
    for (uint32_t token = 0; token < rank.num_tokens; ++token) {
        const ep_unit* row = static_cast<const ep_unit*>(rank.hidden_states) + (uint64_t)token * units;
        for (uint32_t owner = 0; owner < shape.num_ranks; ++owner) {
            const int32_t sent = rank.slots[(uint64_t)token * shape.num_ranks + owner];
            if (sent < 0) continue;
            const ep_view window = ep_view_of(rank, at, owner);
            const uint64_t slot = ep_slot_of(window, rank.rank, static_cast<uint32_t>(sent));
            send_pairs(rank, window, owner, token, slot);
            if (shape.wire == EP_VALUES) {
                memcpy(ep_row_of(window, slot), row, ep_row_bytes(&shape));
            } else if (shape.value == EP_FLOAT32) {
                encode_row<float>(shape, row, ep_row_of(window, slot), ep_scales_of(window, slot));
            } else {
                encode_row<ep_bf16>(shape, row, ep_row_of(window, slot), ep_scales_of(window, slot));
            }
        }
    }
}

void publish(const ep_rank& rank, const ep_offsets& at, uint32_t phase) {
    ep_state& state = *rank.state;
    if (phase == EP_DISPATCH) ++state.epoch;
    for (uint32_t peer = 0; peer < rank.shape.num_ranks; ++peer) {
        if (peer == rank.rank || !(state.alive >> peer & 1u)) continue;
        const uint64_t word = static_cast<uint64_t>(state.epoch) << 32 | (phase == EP_DISPATCH ? state.sent[peer] : 0);
        ep_cell* cell = ep_cell_of(ep_view_of(rank, at, peer), phase, rank.rank);
        __atomic_store_n(&cell->epoch_and_value, word, __ATOMIC_RELEASE);
    }
}

uint32_t wait_for(const ep_view& own, uint32_t phase, uint32_t peer, uint32_t epoch, uint64_t deadline,
                  uint32_t* value) {
    const uint64_t* word = &ep_cell_of(own, phase, peer)->epoch_and_value;
    for (uint32_t turn = 1;; ++turn) {
        const uint64_t seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
        *value = static_cast<uint32_t>(seen);
        if (static_cast<uint32_t>(seen >> 32) == epoch) return 0;
        if (__atomic_load_n(&ep_header_of(own)->abort, __ATOMIC_RELAXED)) return EP_ABORTED;
        if (turn % 64 == 0) {
            if (now_ns() > deadline) return EP_TIMED_OUT;
            sched_yield();  // there may be fewer cores than ranks
        }
    }
}

void wait(const ep_rank& rank, const ep_offsets& at, uint32_t phase) {
    ep_state& state = *rank.state;
    const uint64_t deadline = now_ns() + rank.timeout_ns;
    const uint32_t alive = state.alive;
    for (uint32_t peer = 0; peer < rank.shape.num_ranks; ++peer) {
        const bool here = alive >> peer & 1u;
        uint32_t got = here && phase == EP_DISPATCH ? state.sent[peer] : 0, lost = 0;
        if (here && peer != rank.rank) {
            lost = wait_for(ep_view_of(rank, at, rank.rank), phase, peer, state.epoch, deadline, &got);
            // A count that no window has room for is no peer's of ours.
            if (!lost && got > rank.shape.max_tokens) lost = EP_TIMED_OUT;
        }
        if (phase == EP_DISPATCH) state.got[peer] = lost ? 0 : got;
        if (lost) state.alive &= ~(1u << peer);
        state.status |= lost;
    }
}

void find_bases(const ep_rank& rank, const ep_view& own) {
    const ep_shape& shape = rank.shape;
    uint32_t start = 0;
    for (uint32_t expert = 0; expert < rank.num_local_experts; ++expert) {
        uint32_t total = 0;
        for (uint32_t source = 0; source < shape.num_ranks; ++source) {
            if (rank.state->got[source]) total += static_cast<uint32_t>(ep_counts_of(own, source)[expert]);
        }
        const uint32_t end = start + ep_padded(total, shape.alignment);
        const bool fits = end <= shape.max_rows;
        uint32_t base = start;
        for (uint32_t source = 0; source < shape.num_ranks; ++source) {
            ep_bases_of(own, source)[expert] = fits ? static_cast<int32_t>(base) : -1;
            if (rank.state->got[source]) base += static_cast<uint32_t>(ep_counts_of(own, source)[expert]);
        }
        rank.expert_ends[expert] = static_cast<int32_t>(fits ? end : shape.max_rows);
        if (!fits) rank.state->status |= EP_OVERFLOW;
        start = end;
    }
}

template <class V>
void decode_row(const ep_unit* row, const float* scales, uint32_t hidden, ep_unit* out) {
    for (uint32_t i = 0; i < hidden / 16; ++i) {
        float values[16];
        ep_decode(row[i], scales[i / (EP_GROUP / 16)], values);
        ep_store16<V>(values, out + i * ep_channels<V>::kUnits);
    }
}

void expand_row(const ep_rank& rank, const ep_view& own, uint64_t slot, uint64_t place) {
    const ep_shape& shape = rank.shape;
    const ep_unit* row = ep_row_of(own, slot);
    ep_unit* out = static_cast<ep_unit*>(rank.expert_rows) + place * units_of(shape);
    if (shape.wire == EP_VALUES) {
        memcpy(static_cast<void*>(out), row, ep_row_bytes(&shape));
    } else if (shape.value == EP_FLOAT32) {
        decode_row<float>(row, ep_scales_of(own, slot), shape.hidden, out);
    } else {
        decode_row<ep_bf16>(row, ep_scales_of(own, slot), shape.hidden, out);
    }
}

void expand(const ep_rank& rank, const ep_offsets& at) {
    if (rank.num_local_experts == 0) return;
    const ep_view own = ep_view_of(rank, at, rank.rank);
    find_bases(rank, own);
    for (uint32_t source = 0; source < rank.shape.num_ranks; ++source) {
        for (uint32_t i = 0; i < rank.state->got[source]; ++i) {
            const uint64_t slot = ep_slot_of(own, source, i);
            for (uint32_t k = 0; k < rank.shape.top_k; ++k) {
                const int32_t expert = ep_experts_of(own, slot)[k];
                if (expert < 0 || static_cast<uint32_t>(expert) >= rank.num_local_experts) continue;
                const int32_t base = ep_bases_of(own, source)[expert];
                if (base < 0) continue;
                expand_row(rank, own, slot,
                           static_cast<uint64_t>(base) + static_cast<uint64_t>(ep_ordinals_of(own, slot)[k]));
            }
        }
    }
}

void collect(const ep_rank& rank, const ep_offsets& at) {
    if (rank.num_local_experts == 0) return;
    const uint64_t rows = static_cast<uint64_t>(rank.expert_ends[rank.num_local_experts - 1]);
    const ep_view own = ep_view_of(rank, at, rank.rank);
    memcpy(ep_out_of(own, 0), rank.expert_results, rows * ep_value_row_bytes(&rank.shape));
}

template <class V>
bool add_up(const ep_term* terms, uint32_t count, uint32_t units, ep_unit* out) {
    bool finite = true;
    for (uint32_t i = 0; i < units; ++i) {
        float total[ep_unit_of<V>::kValues] = {};
        for (uint32_t j = 0; j < count; ++j) {
            if (terms[j].row) ep_add_weighted(total, terms[j].row[i], terms[j].weight);
        }
        out[i] = ep_pack(total);
        finite = finite && ep_all_finite(total);
    }
    return finite;
}

template <class V>
void combine(const ep_rank& rank, const ep_offsets& at) {
    const ep_shape& shape = rank.shape;
    const uint32_t alive = rank.state->alive, units = units_of(shape);
    const bool exact = shape.combine == EP_EXACT;
    const uint32_t count = exact ? shape.top_k : shape.num_ranks;
    ep_term terms[EP_MAX_TOP_K > EP_MAX_RANKS ? EP_MAX_TOP_K : EP_MAX_RANKS];
    for (uint32_t token = 0; token < rank.num_tokens; ++token) {
        bool lost = false;
        for (uint32_t k = 0; k < count; ++k) {
            terms[k] = exact ? ep_exact_term(rank, at, alive, token, k, &lost)
                             : ep_partial_term(rank, at, alive, token, k, &lost);
        }
        for (uint32_t k = 0; !exact && k < shape.top_k; ++k) lost = lost || ep_pair_lost(rank, at, alive, token, k);
        ep_unit* out = static_cast<ep_unit*>(rank.output) + (uint64_t)token * units;
        const bool failed = lost || !add_up<V>(terms, count, units, out);
        if (failed) memset(static_cast<void*>(out), 0, units * sizeof(ep_unit));
        rank.failed[token] = failed;
    }
}

template <class V>
void reduce(const ep_rank& rank, const ep_offsets& at) {
    const ep_view own = ep_view_of(rank, at, rank.rank);
    ep_term terms[EP_MAX_TOP_K];
    for (uint32_t source = 0; source < rank.shape.num_ranks; ++source) {
        for (uint32_t i = 0; i < rank.state->got[source]; ++i) {
            const uint64_t slot = ep_slot_of(own, source, i);
            for (uint32_t k = 0; k < rank.shape.top_k; ++k) terms[k] = ep_local_term(own, source, slot, k);
            (void)add_up<V>(terms, rank.shape.top_k, units_of(rank.shape), ep_sum_of(own, slot));
        }
    }
}

template <class Work>
int32_t for_each(const ep_rank* ranks, uint32_t count, uint32_t needs, Work&& work) {
    if (!ep_ranks_fit(ranks, count, needs)) return EP_INVALID;
    const ep_offsets at = ep_offsets_of(&ranks[0].shape);
    for (uint32_t i = 0; i < count; ++i) work(ranks[i], at);
    return EP_OK;
}

}  // namespace

extern "C" {

void ep_struct_sizes(uint32_t* shape, uint32_t* state, uint32_t* rank) {
    *shape = sizeof(ep_shape);
    *state = sizeof(ep_state);
    *rank = sizeof(ep_rank);
}

uint64_t ep_window_bytes(const ep_shape* shape, ep_offsets* offsets) {
    if (!ep_valid(shape)) return 0;
    *offsets = ep_offsets_of(shape);
    return offsets->total;
}

int32_t ep_window_format(uint8_t* window, uint64_t bytes, const ep_shape* shape) {
    if (window == nullptr || !ep_valid(shape) || !ep_window_size_fits(*shape, bytes)) return EP_INVALID;
    memset(window, 0, bytes);
    return EP_OK;
}

int32_t ep_window_abort(uint8_t* window) {
    __atomic_store_n(&reinterpret_cast<ep_header*>(window)->abort, 1, __ATOMIC_RELAXED);
    return EP_OK;
}

int32_t ep_route(const ep_rank* ranks, uint32_t count, void*) { return for_each(ranks, count, EP_NEEDS_SOURCE, route); }

int32_t ep_dispatch(const ep_rank* ranks, uint32_t count, void*) {
    return for_each(ranks, count, EP_NEEDS_SOURCE, dispatch);
}

// All publish before one waits, so that ranks of one thread do not wait for themselves.
int32_t ep_sync(const ep_rank* ranks, uint32_t count, uint32_t phase, void*) {
    if (phase > EP_COMBINE) return EP_INVALID;
    const auto publish_phase = [=](const ep_rank& rank, const ep_offsets& at) { publish(rank, at, phase); };
    const auto wait_phase = [=](const ep_rank& rank, const ep_offsets& at) { wait(rank, at, phase); };
    const int32_t result = for_each(ranks, count, 0, publish_phase);
    return result == EP_OK ? for_each(ranks, count, 0, wait_phase) : result;
}

int32_t ep_expand(const ep_rank* ranks, uint32_t count, void*) {
    return for_each(ranks, count, EP_NEEDS_OWNER, expand);
}

int32_t ep_collect(const ep_rank* ranks, uint32_t count, void*) {
    return for_each(ranks, count, EP_NEEDS_RESULTS, collect);
}

int32_t ep_reduce(const ep_rank* ranks, uint32_t count, void*) {
    return for_each(ranks, count, EP_NEEDS_PARTIAL, [](const ep_rank& rank, const ep_offsets& at) {
        rank.shape.value == EP_FLOAT32 ? reduce<float>(rank, at) : reduce<ep_bf16>(rank, at);
    });
}

int32_t ep_combine(const ep_rank* ranks, uint32_t count, void*) {
    return for_each(ranks, count, EP_NEEDS_SOURCE, [](const ep_rank& rank, const ep_offsets& at) {
        rank.shape.value == EP_FLOAT32 ? combine<float>(rank, at) : combine<ep_bf16>(rank, at);
    });
}

const char* ep_result_text(int32_t result) {
    return result == EP_INVALID ? "the arguments contradict one another" : "unknown";
}

}  // extern "C"
