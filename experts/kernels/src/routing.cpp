// Which worker computes which expert of a batch, and the lists that go to each worker and come back.

#include <algorithm>

#include "barista_kernels.h"
#include "thread_pool.h"

namespace {

struct Asked {
    int32_t expert;
    int64_t rows;
    bool one_holder;
};

// No choice first, because it is a given for the others; then the heaviest, as in scheduling by longest processing
// time.
bool goes_before(const Asked& a, const Asked& b) {
    if (a.one_holder != b.one_holder) return a.one_holder;
    return a.rows != b.rows ? a.rows > b.rows : a.expert < b.expert;
}

// counts [num_experts]: how often each is asked for. False if an id is out of range.
bool count_rows(const int32_t* topk_ids, int64_t num_pairs, int64_t num_experts, int64_t* counts) {
    std::fill(counts, counts + num_experts, 0);
    for (int64_t p = 0; p < num_pairs; ++p) {
        if (topk_ids[p] < -1 || topk_ids[p] >= num_experts) return false;
        if (topk_ids[p] >= 0) ++counts[topk_ids[p]];
    }
    return true;
}

}  // namespace

extern "C" int32_t bk_route(const int32_t* topk_ids, int64_t num_pairs, const int32_t* replicas, int64_t num_experts,
                            int64_t num_replicas, const float* cost, int64_t num_workers, double expert_cost,
                            int32_t* owner) {
    thread_local bk::Buffer counts_buffer, asked_buffer, finish_buffer;
    int64_t* counts = counts_buffer.get<int64_t>(num_experts);
    if (!count_rows(topk_ids, num_pairs, num_experts, counts)) return -1;

    Asked* asked = asked_buffer.get<Asked>(num_experts);
    int64_t num_asked = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
        owner[e] = -1;
        if (counts[e] == 0) continue;
        int64_t holders = 0;
        for (int64_t i = 0; i < num_replicas; ++i) {
            const int32_t worker = replicas[e * num_replicas + i];
            if (worker < -1 || worker >= num_workers) return -1;
            holders += worker >= 0;
        }
        owner[e] = -2;
        if (holders > 0) asked[num_asked++] = {static_cast<int32_t>(e), counts[e], holders == 1};
    }
    std::sort(asked, asked + num_asked, goes_before);

    double* finish = finish_buffer.get<double>(num_workers);
    std::fill(finish, finish + num_workers, 0.0);
    for (int64_t a = 0; a < num_asked; ++a) {
        const double work = expert_cost + static_cast<double>(asked[a].rows);
        int32_t best = -1;
        double best_finish = 0;
        for (int64_t i = 0; i < num_replicas; ++i) {
            const int32_t worker = replicas[asked[a].expert * num_replicas + i];
            if (worker < 0) continue;
            const double at = finish[worker] + work * static_cast<double>(cost[worker]);
            if (best < 0 || at < best_finish || (at == best_finish && worker < best)) {
                best = worker;
                best_finish = at;
            }
        }
        finish[best] = best_finish;
        owner[asked[a].expert] = best;
    }
    return 0;
}

extern "C" int64_t bk_split(const int32_t* topk_ids, int64_t n, int64_t topk, const int32_t* owner, int64_t num_experts,
                            int32_t worker, int32_t* tokens, int32_t* ids, int64_t* num_pairs) {
    int64_t m = 0, pairs = 0;
    for (int64_t t = 0; t < n; ++t) {
        const int64_t pairs_before = pairs;
        for (int64_t place = 0; place < topk; ++place) {
            const int32_t id = topk_ids[t * topk + place];
            if (id < -1 || id >= num_experts) return -1;
            const bool mine = id >= 0 && owner[id] == worker;
            ids[m * topk + place] = mine ? id : -1;
            pairs += mine;
        }
        tokens[m] = static_cast<int32_t>(t);
        m += pairs > pairs_before;  // else the next token takes this one's place
    }
    *num_pairs = pairs;
    return m;
}

extern "C" int64_t bk_place_rows(int64_t* addresses, int64_t n, int64_t topk, const int32_t* tokens, const int32_t* ids,
                                 int64_t m, int64_t base, int64_t row_bytes) {
    for (int64_t r = 0; r < m; ++r)
        if (tokens[r] < 0 || tokens[r] >= n) return -1;
    int64_t pairs = 0;
    for (int64_t r = 0; r < m; ++r)
        for (int64_t place = 0; place < topk; ++place)
            if (ids[r * topk + place] >= 0) addresses[tokens[r] * topk + place] = base + pairs++ * row_bytes;
    return pairs;
}
