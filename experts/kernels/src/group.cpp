// A layer's way to several workers and back when all of them have a window that is free and all answer in time: what
// experts/group.py does step by step otherwise, in two calls. Nothing here changes what Python knows of a link, so that
// it can go on from wherever this stops.

#include <cstring>

#include "barista_kernels.h"
#include "window_cells.h"

// One worker of the group. The first part is Python's, the second is written by bk_group_dispatch, the third by
// bk_group_combine. end: NULL without a free window. number: of the last request. deadline, answered: CLOCK_MONOTONIC.
struct bk_group_member {
    const bk_window_end* end;
    int64_t deadline;
    uint32_t number;
    uint32_t reserved;

    int32_t num_experts;
    int32_t num_rows;
    int32_t num_pairs;
    int32_t seen;  // enum bk_window_result

    int64_t answered;
    uint64_t epoch;
    uint64_t compute_nanoseconds;
    uint64_t waited;  // 1: the answer was not there at the first look, so `answered` is when it came
};

enum bk_group_result {
    BK_GROUP_DONE = 0,
    BK_GROUP_DECLINED = 1,   // nothing was sent
    BK_GROUP_NONFINITE = 2,  // all has come in, and some sum is not finite
    BK_GROUP_LACKING = 3,    // somebody is late, gone or gave another answer than rows
    BK_GROUP_INVALID = -1,   // an id or a worker is out of range
};

namespace {

// Counts each member's share. False if one of them cannot be sent to, or an expert has no owner.
bool share_out(bk_group_member* members, int64_t num_members, const int32_t* topk_ids, int64_t n, int64_t topk,
               const int32_t* owner, int64_t num_experts) {
    for (int64_t m = 0; m < num_members; ++m)
        members[m].num_experts = members[m].num_rows = members[m].num_pairs = members[m].seen = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
        if (owner[e] == -2) return false;
        if (owner[e] >= 0) ++members[owner[e]].num_experts;
    }
    for (int64_t m = 0; m < num_members; ++m) {
        bk_group_member& member = members[m];
        if (member.num_experts == 0) continue;
        for (int64_t t = 0; t < n; ++t) {
            int32_t pairs = 0;
            for (int64_t place = 0; place < topk; ++place) {
                const int32_t expert = topk_ids[t * topk + place];
                pairs += expert >= 0 && owner[expert] == m;
            }
            member.num_pairs += pairs;
            member.num_rows += pairs > 0;
        }
        if (!member.end || static_cast<uint32_t>(member.num_rows) > member.end->shape.max_rows) return false;
        if (member.end->shape.top_k != static_cast<uint64_t>(topk)) return false;
    }
    return true;
}

// Writes one member's rows and ids into its window and publishes them.
void send(const bk_group_member& member, int64_t m, const uint8_t* x, int64_t row_stride, const int32_t* topk_ids,
          int64_t n, int64_t topk, const int32_t* owner, bk_window_dispatch dispatch) {
    const bk_window_end* end = member.end;
    const bk_window_offsets at = bk_window_offsets_of(&end->shape, end->source);
    const uint64_t row_bytes = end->shape.row_bytes;
    auto* ids = reinterpret_cast<int32_t*>(end->base + at.ids);
    uint8_t* rows = end->base + at.rows;
    for (int64_t t = 0; t < n; ++t) {
        bool any = false;
        for (int64_t place = 0; place < topk; ++place) {
            const int32_t expert = topk_ids[t * topk + place];
            const bool ours = expert >= 0 && owner[expert] == m;
            ids[place] = ours ? expert : -1;
            any |= ours;
        }
        if (!any) continue;
        std::memcpy(rows, x + t * row_stride, row_bytes);
        ids += topk;
        rows += row_bytes;
    }
    dispatch.num_rows = static_cast<uint32_t>(member.num_rows);
    dispatch.num_pairs = static_cast<uint32_t>(member.num_pairs);
    std::memcpy(end->base + at.dispatch, &dispatch, sizeof dispatch);
    bk_window::publish(bk_window::cell_at(end, at.dispatch_cell), member.number, dispatch.num_rows);
}

// Waits for one member and notes what it says beside its rows. True if these are there.
bool receive(bk_group_member& member) {
    constexpr uint32_t kOk = 1;  // Rows.STATUS_OK
    const bk_window_end* end = member.end;
    const bk_window_offsets at = bk_window_offsets_of(&end->shape, end->source);
    uint32_t status = 0;
    bk_window_cell* cell = bk_window::cell_at(end, at.combine_cell);
    member.waited =
        static_cast<uint32_t>(__atomic_load_n(&cell->number_and_value, __ATOMIC_ACQUIRE) >> 32) != member.number;
    member.seen = bk_window::wait_for(cell, member.number, end->spin_nanoseconds, member.deadline, &status);
    if (member.seen != BK_WINDOW_READY || status != kOk) return false;
    bk_window_combine combine;
    std::memcpy(&combine, end->base + at.combine, sizeof combine - sizeof combine.not_held);
    if (combine.size != sizeof combine || combine.status != status) return false;
    member.answered = bk_window::now();
    member.epoch = combine.epoch;
    member.compute_nanoseconds = combine.compute_nanoseconds;
    return true;
}

}  // namespace

extern "C" {

// Chooses the owners as bk_route does and sends each its share, with number + 1, which is kept in the member.
// dispatch: what all requests share. owner: [num_experts], written.
int32_t bk_group_dispatch(bk_group_member* members, int64_t num_members, const uint8_t* hidden_states,
                          int64_t row_stride, const int32_t* topk_ids, int64_t n, int64_t topk, const int32_t* replicas,
                          int64_t num_experts, int64_t num_replicas, const float* cost, double expert_cost,
                          const bk_window_dispatch* dispatch, int32_t* owner) {
    if (bk_route(topk_ids, n * topk, replicas, num_experts, num_replicas, cost, num_members, expert_cost, owner) != 0)
        return BK_GROUP_INVALID;
    if (!share_out(members, num_members, topk_ids, n, topk, owner, num_experts)) return BK_GROUP_DECLINED;
    for (int64_t m = 0; m < num_members; ++m) {
        if (members[m].num_pairs == 0) continue;
        ++members[m].number;
        send(members[m], m, hidden_states, row_stride, topk_ids, n, topk, owner, *dispatch);
    }
    return BK_GROUP_DONE;
}

// Waits for every member's answer, each until its deadline, and combines the rows as bk_combine_rows does.
// addresses: [n, topk], written.
int32_t bk_group_combine(bk_group_member* members, int64_t num_members, const int32_t* topk_ids, int64_t n,
                         int64_t topk, const int32_t* owner, int64_t* addresses, const float* topk_weights, void* y,
                         uint8_t* failed, int64_t hidden, int32_t dtype) {
    bool all = true;
    for (int64_t p = 0; p < n * topk; ++p) addresses[p] = 0;
    for (int64_t m = 0; m < num_members; ++m) {
        bk_group_member& member = members[m];
        if (member.num_pairs == 0) continue;
        if (!receive(member)) {
            all = false;
            continue;
        }
        const bk_window_end* end = member.end;
        auto row = reinterpret_cast<int64_t>(end->base + bk_window_offsets_of(&end->shape, end->source).out);
        for (int64_t p = 0; p < n * topk; ++p) {
            if (topk_ids[p] < 0 || owner[topk_ids[p]] != m) continue;
            addresses[p] = row;
            row += end->shape.row_bytes;
        }
    }
    if (!all) return BK_GROUP_LACKING;
    bk_combine_rows(addresses, topk_weights, y, failed, n, topk, hidden, dtype);
    for (int64_t t = 0; t < n; ++t)
        if (failed[t]) return BK_GROUP_NONFINITE;
    return BK_GROUP_DONE;
}

}  // extern "C"
