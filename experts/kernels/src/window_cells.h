// What both ends of a window, and the calls that look after several windows at once, do with its cells.
#pragma once

#include <cstring>
#include <ctime>

#include "window.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// One end's own knowledge of a window; private memory. spin_nanoseconds: how long to poll before going to sleep.
struct bk_window_end {
    uint8_t* base;
    bk_window_shape shape;
    uint32_t source;
    uint32_t reserved;
    int64_t spin_nanoseconds;
};

enum bk_window_result {
    BK_WINDOW_LATE = 0,
    BK_WINDOW_READY = 1,
    BK_WINDOW_CLOSED = -1,
    BK_WINDOW_MALFORMED = -2,  // the caller's arguments, or what the other end wrote, contradict the shape
};

namespace bk_window {

constexpr int64_t kSecond = 1000000000;

inline int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * kSecond + time.tv_nsec;
}

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Not FUTEX_PRIVATE: the two ends are two processes. Wakes early at times; the caller looks again.
inline void sleep_while_set(uint32_t* word, int64_t deadline) {
#if defined(__linux__)
    timespec until = {static_cast<time_t>(deadline / kSecond), static_cast<long>(deadline % kSecond)};
    syscall(SYS_futex, word, FUTEX_WAIT_BITSET, 1, &until, nullptr, FUTEX_BITSET_MATCH_ANY);
#else
    (void)word, (void)deadline;
#endif
}

// All accesses around falling asleep are sequentially consistent: the waiter says that it sleeps and then looks, the
// other publishes and then asks whether it sleeps; so one of the two sees the other. Clearing the word before the wake
// makes a sleep that begins late return at once.
inline void wake(bk_window_cell* cell) {
    if (!__atomic_load_n(&cell->sleeping, __ATOMIC_SEQ_CST)) return;
    __atomic_store_n(&cell->sleeping, 0, __ATOMIC_SEQ_CST);
#if defined(__linux__)
    syscall(SYS_futex, &cell->sleeping, FUTEX_WAKE, 1, nullptr, nullptr, 0);
#endif
}

inline void publish(bk_window_cell* cell, uint32_t number, uint32_t value) {
    __atomic_store_n(&cell->number_and_value, static_cast<uint64_t>(number) << 32 | value, __ATOMIC_SEQ_CST);
    wake(cell);
}

// Waits for request `number` in the cell until `deadline` (CLOCK_MONOTONIC): first polls, then sleeps.
inline int32_t wait_for(bk_window_cell* cell, uint32_t number, int64_t spin, int64_t deadline, uint32_t* value) {
    auto look = [&]() -> int32_t {
        const uint64_t word = __atomic_load_n(&cell->number_and_value, __ATOMIC_SEQ_CST);
        *value = static_cast<uint32_t>(word);
        if (static_cast<uint32_t>(word >> 32) == number) return BK_WINDOW_READY;
        return __atomic_load_n(&cell->closed, __ATOMIC_SEQ_CST) ? BK_WINDOW_CLOSED : BK_WINDOW_LATE;
    };
    const int64_t start = now();
    int64_t time = start;
    do {
        for (int i = 0; i < 16; ++i) {
            if (const int32_t seen = look(); seen != BK_WINDOW_LATE) return seen;
            pause();
        }
        time = now();
    } while (time < deadline && time - start < spin);
    int32_t seen = BK_WINDOW_LATE;
    while (seen == BK_WINDOW_LATE && time < deadline) {
        __atomic_store_n(&cell->sleeping, 1, __ATOMIC_SEQ_CST);
        seen = look();
        if (seen == BK_WINDOW_LATE) sleep_while_set(&cell->sleeping, deadline);
        time = now();
    }
    __atomic_store_n(&cell->sleeping, 0, __ATOMIC_SEQ_CST);
    return seen == BK_WINDOW_LATE ? look() : seen;
}

inline bk_window_cell* cell_at(const bk_window_end* end, uint64_t offset) {
    return reinterpret_cast<bk_window_cell*>(end->base + offset);
}

}  // namespace bk_window
