#include "thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace bk {
namespace {

constexpr auto kSpin = std::chrono::microseconds(40);  // longer than the gap between two kernels of one step
constexpr uint32_t kRuns = 2;  // runs for each thread into which the tasks not yet taken are cut

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until ready() holds; false when kSpin has passed.
template <class Ready>
bool spin_until(Ready&& ready) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return ready();
}

// A job is a number of tasks. `ticket_` holds the job's number in its high half and the tasks not yet taken in its low
// half, so that taking tasks and checking that the job is still the same one is a single compare-and-swap. A worker
// that wakes late finds another number or no tasks, and touches nothing else.
//
// A thread takes a run of neighbouring tasks, long at first and shorter towards the end (guided self-scheduling,
// Polychronopoulos and Kuck, 1987): tasks that follow each other read memory that does, and what one of them has
// fetched ahead is where the next begins.
class Pool {
  public:
    explicit Pool(int threads) : runs_(kRuns * static_cast<uint32_t>(threads)) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_.store(true);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int size() const { return static_cast<int>(workers_.size()) + 1; }

    void run(int64_t num_tasks, Task task, void* context) {
        task_ = task;
        context_ = context;
        num_tasks_ = num_tasks;
        unfinished_.store(num_tasks, std::memory_order_relaxed);
        const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
        ticket_.store(job << 32 | static_cast<uint64_t>(num_tasks));
        if (sleepers_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        take_tasks(static_cast<uint32_t>(job));
        auto finished = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
        while (!spin_until(finished)) std::this_thread::yield();
    }

  private:
    void take_tasks(uint32_t job) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (static_cast<uint32_t>(ticket >> 32) == job && static_cast<uint32_t>(ticket) != 0) {
            const uint32_t left = static_cast<uint32_t>(ticket), count = left > runs_ ? left / runs_ : 1;
            if (!ticket_.compare_exchange_weak(ticket, ticket - count, std::memory_order_acq_rel)) continue;
            const int64_t first = num_tasks_ - static_cast<int64_t>(left);
            for (int64_t index = first; index < first + count; ++index) task_(context_, index);
            unfinished_.fetch_sub(count, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void work() {
        uint32_t seen = 0;
        auto changed = [&] { return static_cast<uint32_t>(ticket_.load() >> 32) != seen || stopping_.load(); };
        while (true) {
            if (!spin_until(changed)) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleepers_.fetch_add(1);
                wake_.wait(lock, changed);
                sleepers_.fetch_sub(1);
            }
            if (stopping_.load()) return;
            seen = static_cast<uint32_t>(ticket_.load() >> 32);
            take_tasks(seen);
        }
    }

    const uint32_t runs_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<bool> stopping_{false};
    std::atomic<int> sleepers_{0};
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> unfinished_{0};
    Task task_ = nullptr;
    void* context_ = nullptr;
    int64_t num_tasks_ = 0;
};

std::mutex pool_mutex;  // one job at a time, whichever thread calls
std::unique_ptr<Pool> pool;
std::atomic<int> wanted_threads{1};

}  // namespace

int num_threads() { return wanted_threads.load(std::memory_order_relaxed); }

void set_num_threads(int threads) {
    std::lock_guard<std::mutex> lock(pool_mutex);
    wanted_threads.store(threads > 1 ? threads : 1);
    pool.reset();
}

void run_tasks(int64_t num_tasks, Task task, void* context) {
    if (num_tasks <= 1 || num_threads() == 1) {
        for (int64_t i = 0; i < num_tasks; ++i) task(context, i);
        return;
    }
    std::lock_guard<std::mutex> lock(pool_mutex);
    if (!pool) pool = std::make_unique<Pool>(num_threads());
    pool->run(num_tasks, task, context);
}

}  // namespace bk
