// The window protocol under ThreadSanitizer: a source and an owner, two threads over one window, many requests, some of
// them late enough for the other end to fall asleep. Every byte is checked.
//
//   window_tsan EPOCHS           through the functions that the server uses: silence, exit status 0
//   window_tsan EPOCHS relaxed   the source publishes without release order: a data race, which must be reported
#include "../../experts/kernels/src/window.cpp"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr uint32_t kRows = 4, kTopK = 2, kRowBytes = 64;
constexpr int64_t kForever = int64_t{1} << 62;

uint8_t row_byte(uint32_t number, uint32_t row, uint32_t i) { return static_cast<uint8_t>(number * 31 + row * 7 + i); }

uint8_t expert_byte(uint8_t byte, int32_t expert) { return static_cast<uint8_t>(byte * 3 + expert); }

// Now and then longer than the other end polls. Another rhythm for each end.
void dawdle(uint32_t number, uint32_t rhythm) {
    if (number % rhythm == 0) std::this_thread::sleep_for(std::chrono::microseconds(150));
}

void fail(const char* what, uint32_t number) {
    std::fprintf(stderr, "request %u: %s\n", number, what);
    std::exit(1);
}

void relaxed_send(const bk_window_end& end, uint32_t number, const bk_window_dispatch& dispatch, const uint8_t* rows,
                  const int32_t* ids) {
    const bk_window_offsets at = bk_window_offsets_of(&end.shape, 0);
    std::memcpy(end.base + at.rows, rows, kRows * kRowBytes);
    std::memcpy(end.base + at.ids, ids, kRows * kTopK * sizeof *ids);
    std::memcpy(end.base + at.dispatch, &dispatch, sizeof dispatch);
    bk_window_cell* cell = cell_at(&end, at.dispatch_cell);
    __atomic_store_n(&cell->number_and_value, static_cast<uint64_t>(number) << 32 | kRows, __ATOMIC_RELAXED);
    wake(cell);
}

void source(const bk_window_end& end, uint32_t epochs, bool relaxed) {
    const int32_t tokens[kRows] = {3, 2, 1, 0};
    const int32_t ids[kRows * kTopK] = {0, 1, 2, 3, 4, 5, 6, 7};
    std::vector<uint8_t> rows(kRows * kRowBytes);
    bk_window_combine combine;
    for (uint32_t number = 1; number <= epochs; ++number) {
        for (uint32_t i = 0; i < rows.size(); ++i) rows[i] = row_byte(number, i / kRowBytes, i % kRowBytes);
        bk_window_dispatch dispatch{sizeof dispatch, kRows, kRows * kTopK, number % 5, number, 1, 0, 0};
        if (relaxed)
            relaxed_send(end, number, dispatch, rows.data(), ids);
        else if (bk_window_send(&end, number, &dispatch, rows.data(), kRows, kRowBytes, tokens, ids) != 1)
            fail("not sent", number);
        dawdle(number, 61);
        if (bk_window_receive(&end, number, kForever, &combine) != 1) fail("no answer", number);
        if (combine.step != number || combine.layer != number % 5) fail("another request's answer", number);
        const uint8_t* out = end.base + bk_window_offsets_of(&end.shape, 0).out;
        for (uint32_t pair = 0; pair < kRows * kTopK && !relaxed; ++pair)
            for (uint32_t i = 0; i < kRowBytes; ++i) {
                const uint32_t token = static_cast<uint32_t>(tokens[pair / kTopK]);
                if (out[pair * kRowBytes + i] != expert_byte(row_byte(number, token, i), ids[pair]))
                    fail("a wrong byte", number);
            }
    }
    bk_window_close(&end);
}

void owner(const bk_window_end& end) {
    const bk_window_offsets at = bk_window_offsets_of(&end.shape, 0);
    bk_window_dispatch dispatch;
    for (uint32_t number = 1;; ++number) {
        const int32_t seen = bk_window_take(&end, number, kForever, &dispatch);
        if (seen == BK_WINDOW_CLOSED) return;
        if (seen != BK_WINDOW_READY) fail("not as sent", number);
        const auto* ids = reinterpret_cast<const int32_t*>(end.base + at.ids);
        for (uint32_t pair = 0; pair < dispatch.num_pairs; ++pair)
            for (uint32_t i = 0; i < kRowBytes; ++i)
                end.base[at.out + pair * kRowBytes + i] =
                    expert_byte(end.base[at.rows + pair / kTopK * kRowBytes + i], ids[pair]);
        dawdle(number, 53);
        bk_window_combine combine{};
        combine.size = sizeof combine;
        combine.status = 1;
        combine.step = dispatch.step;
        combine.layer = dispatch.layer;
        bk_window_answer(&end, number, &combine);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const uint32_t epochs = argc > 1 ? static_cast<uint32_t>(std::atoi(argv[1])) : 0;
    const bk_window_shape shape{sizeof shape, 1, kRows, kTopK, kRowBytes, 0};
    const uint64_t bytes = bk_window_total_bytes(&shape);
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) fail("no memory", 0);
    const bk_window_end end{static_cast<uint8_t*>(base), shape, 0, 0, 30000};
    std::thread other([&] { owner(end); });
    source(end, epochs, argc > 2);
    other.join();
    std::printf("%u requests\n", epochs);
    return 0;
}
