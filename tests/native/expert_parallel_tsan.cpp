// A group of ranks as threads, each with its own window, through many cycles of the CPU twin. ThreadSanitizer must find
// nothing, and every row must be the one that its source is owed. `unsynchronised` leaves the second wait out.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../../cuda/ep_host.cpp"

namespace {

constexpr uint32_t kRanks = 4, kExperts = 6, kTopK = 2, kTokens = 3, kHidden = 8;

struct Member {
    ep_rank rank = {};
    ep_state state = {};
    std::vector<int32_t> slots = std::vector<int32_t>(kTokens * kRanks),
                         ordinals = std::vector<int32_t>(kTokens * kTopK);
    std::vector<int32_t> ids = std::vector<int32_t>(kTokens * kTopK), ends = std::vector<int32_t>(kExperts);
    std::vector<float> weights = std::vector<float>(kTokens * kTopK, 1.0f);
    std::vector<uint8_t> failed = std::vector<uint8_t>(kTokens);
    alignas(16) float hidden[kTokens][kHidden];
    alignas(16) float output[kTokens][kHidden];
    std::vector<ep_unit> expert_rows;
};

ep_shape shape_of_group() {
    ep_shape shape = {};
    shape.size = sizeof shape;
    shape.num_ranks = kRanks;
    shape.num_experts = kExperts;
    shape.max_local_experts = kExperts;
    shape.top_k = kTopK;
    shape.max_tokens = kTokens;
    shape.max_rows = kRanks * kTokens * kTopK;
    shape.hidden = kHidden;
    shape.value = EP_FLOAT32;
    shape.alignment = 1;
    shape.num_sources = kRanks;
    return shape;
}

// Expert e adds e to a row.
void compute(Member& member, const int32_t* ranks) {
    const ep_offsets at = ep_offsets_of(&member.rank.shape);
    auto* out = reinterpret_cast<float*>(member.rank.windows[member.rank.rank] + at.out);
    const auto* rows = reinterpret_cast<const float*>(member.expert_rows.data());
    int32_t row = 0;
    uint32_t local = 0;
    for (uint32_t expert = 0; expert < kExperts; ++expert) {
        if (ranks[expert] != static_cast<int32_t>(member.rank.rank)) continue;
        for (; row < member.ends[local]; ++row) {
            for (uint32_t i = 0; i < kHidden; ++i)
                out[row * kHidden + i] = rows[row * kHidden + i] + static_cast<float>(expert);
        }
        ++local;
    }
}

bool cycle(Member& member, const int32_t* ranks, uint32_t number, bool synchronised) {
    for (uint32_t t = 0; t < kTokens; ++t) {
        for (uint32_t k = 0; k < kTopK; ++k) {
            member.ids[t * kTopK + k] = static_cast<int32_t>((number + 3 * t + member.rank.rank + k) % kExperts);
        }
        for (float& value : member.hidden[t]) value = static_cast<float>(number % 1000 + 10 * t + member.rank.rank);
    }
    ep_route(&member.rank, 1, nullptr);
    ep_dispatch(&member.rank, 1, nullptr);
    ep_sync(&member.rank, 1, EP_DISPATCH, nullptr);
    ep_expand(&member.rank, 1, nullptr);
    compute(member, ranks);
    if (synchronised) ep_sync(&member.rank, 1, EP_COMBINE, nullptr);
    ep_combine(&member.rank, 1, nullptr);
    for (uint32_t t = 0; t < kTokens; ++t) {
        const int32_t* ids = &member.ids[t * kTopK];
        const float wanted = 2 * member.hidden[t][0] + static_cast<float>(ids[0] + ids[1]);
        for (float value : member.output[t]) {
            if (member.failed[t] || value != wanted) return false;
        }
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const uint32_t cycles = static_cast<uint32_t>(std::atoi(argv[1]));
    const bool synchronised = argc < 3;
    const ep_shape shape = shape_of_group();
    const int32_t ranks[kExperts] = {0, 1, 2, 3, 1, 0}, indices[kExperts] = {0, 0, 0, 0, 1, 1};
    const uint64_t bytes = ep_offsets_of(&shape).total;
    std::vector<uint8_t*> windows;
    for (uint32_t r = 0; r < kRanks; ++r) {
        windows.push_back(static_cast<uint8_t*>(std::aligned_alloc(128, ep_align(bytes))));
        ep_window_format(windows[r], bytes, &shape);
    }
    std::vector<Member> members(kRanks);
    for (uint32_t r = 0; r < kRanks; ++r) {
        Member& member = members[r];
        member.state = {sizeof(ep_state), 0, (1u << kRanks) - 1, 0, {}, {}};
        member.expert_rows.resize(shape.max_rows * kHidden * sizeof(float) / sizeof(ep_unit));
        ep_rank& rank = member.rank;
        rank.size = sizeof rank;
        rank.rank = r;
        rank.shape = shape;
        rank.timeout_ns = synchronised ? 60u * 1000000000ull : 1000000u;
        for (uint32_t peer = 0; peer < kRanks; ++peer) rank.windows[peer] = windows[peer];
        rank.state = &member.state;
        rank.expert_rank = ranks;
        rank.expert_index = indices;
        rank.num_tokens = kTokens;
        rank.num_local_experts = r < 2 ? 2 : 1;
        rank.hidden_states = member.hidden;
        rank.topk_ids = member.ids.data();
        rank.topk_weights = member.weights.data();
        rank.slots = member.slots.data();
        rank.ordinals = member.ordinals.data();
        rank.output = member.output;
        rank.failed = member.failed.data();
        rank.expert_rows = member.expert_rows.data();
        rank.expert_ends = member.ends.data();
    }
    std::vector<uint32_t> wrong(kRanks);
    std::vector<std::thread> threads;
    for (uint32_t r = 0; r < kRanks; ++r) {
        threads.emplace_back([&, r] {
            for (uint32_t n = 0; n < cycles; ++n) wrong[r] += !cycle(members[r], ranks, n, synchronised);
        });
    }
    for (std::thread& thread : threads) thread.join();
    uint32_t total = 0;
    for (uint32_t count : wrong) total += count;
    std::printf("%u cycles, %u wrong\n", cycles, total);
    for (uint8_t* window : windows) std::free(window);
    return 0;
}
