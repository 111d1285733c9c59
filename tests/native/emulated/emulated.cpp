// The scheduler of the GPU in software.
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

namespace emulated {

Where where;

namespace {

constexpr size_t kStackBytes = 1 << 16;

enum class State { kReady, kMeeting, kWaiting, kDone };

// Stacks are used again: a launch has thousands of threads.
class Stack {
  public:
    Stack() {
        if (unused().empty()) unused().emplace_back(new char[kStackBytes]);
        bytes_ = std::move(unused().back());
        unused().pop_back();
    }
    Stack(Stack&&) = default;
    Stack& operator=(Stack&&) = default;
    ~Stack() {
        if (bytes_) unused().push_back(std::move(bytes_));
    }
    char* bytes() { return bytes_.get(); }

  private:
    static std::vector<std::unique_ptr<char[]>>& unused() {
        static std::vector<std::unique_ptr<char[]>> stacks;
        return stacks;
    }
    std::unique_ptr<char[]> bytes_;
};

// Begun by setcontext, then switched by _longjmp, which unlike swapcontext asks nothing of the system.
struct Fiber {
    ucontext_t context;
    jmp_buf at;
    bool begun = false;
    Stack stack;
    State state = State::kReady;
    dim3 thread;
    Scope scope = Scope::kBlock;
    const char* what = "";
    uint32_t value = 0;
    const uint32_t* values = nullptr;  // of all that met, which stay until this fiber meets again
};

struct Block {
    dim3 index;
    std::vector<Fiber> fibers;
    std::vector<std::vector<uint32_t>> warp_values;
    std::vector<uint32_t> block_values;
    bool done() const {
        for (const Fiber& fiber : fibers) {
            if (fiber.state != State::kDone) return false;
        }
        return true;
    }
};

jmp_buf scheduler;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
std::minstd_rand draw;

[[noreturn]] void fail(const char* what, const char* which) {
    fprintf(stderr, "the emulated GPU: %s (%s)\n", what, which);
    abort();
}

void leave(State state) {
    current->state = state;
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

void enter() {
    (*body)();
    leave(State::kDone);
}

// Until it leaves.
void resume(Fiber* fiber) {
    current = fiber;
    if (_setjmp(scheduler)) return;
    if (fiber->begun) _longjmp(fiber->at, 1);
    fiber->begun = true;
    setcontext(&fiber->context);
}

// Let those go on who have all come to the same call.
void release(std::vector<Fiber>& fibers, size_t begin, size_t end, Scope scope, std::vector<uint32_t>& values) {
    const char* what = nullptr;
    for (size_t i = begin; i < end; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.state != State::kMeeting || fiber.scope != scope) return;
        if (what && what != fiber.what) fail("threads that should meet call different functions", fiber.what);
        what = fiber.what;
    }
    values.resize(end - begin);
    for (size_t i = begin; i < end; ++i) values[i - begin] = fibers[i].value;
    for (size_t i = begin; i < end; ++i) {
        fibers[i].values = values.data();
        fibers[i].state = State::kReady;
    }
}

// The next thread to run. Often one of the warp that ran last, so that warps get far ahead of one another; in any order
// otherwise. What only works in one order is found out.
Fiber* next(Block& block, size_t* last) {
    const size_t count = block.fibers.size();
    if (draw() % 4) {
        const size_t warp = *last / 32 * 32, lane = draw() % 32;
        for (size_t i = 0; i < 32; ++i) {
            const size_t candidate = warp + (lane + i) % 32;
            if (block.fibers[candidate].state == State::kReady) return &block.fibers[*last = candidate];
        }
    }
    const size_t first = draw() % count;
    for (size_t i = 0; i < count; ++i) {
        const size_t candidate = (first + i) % count;
        if (block.fibers[candidate].state == State::kReady) return &block.fibers[*last = candidate];
    }
    return nullptr;
}

// Run the block until nobody in it can go on without another block.
void run_block(Block& block) {
    where.block = block.index;
    size_t last = 0;
    while (Fiber* fiber = next(block, &last)) {
        where.thread = fiber->thread;
        resume(fiber);
        if (fiber->state != State::kMeeting) continue;
        const size_t warp = last / 32;
        if (fiber->scope == Scope::kWarp) {
            release(block.fibers, 32 * warp, 32 * warp + 32, Scope::kWarp, block.warp_values[warp]);
        } else {
            release(block.fibers, 0, block.fibers.size(), Scope::kBlock, block.block_values);
        }
    }
    size_t meeting = 0, waiting = 0;
    const char* what = "";
    for (Fiber& fiber : block.fibers) {
        if (fiber.state == State::kMeeting) ++meeting, what = fiber.what;
        if (fiber.state == State::kWaiting) ++waiting, fiber.state = State::kReady;
    }
    if (meeting && !waiting) fail("not all threads come to the same function", what);
}

}  // namespace

const uint32_t* meet(Scope scope, const char* what, uint32_t value) {
    current->scope = scope, current->what = what, current->value = value;
    leave(State::kMeeting);
    return current->values;
}

void wait_for_others() { leave(State::kWaiting); }

void run(dim3 grid, dim3 block_size, const std::function<void()>& of_thread) {
    if (block_size.x % 32) fail("a block is not made of whole warps", "launch");
    body = &of_thread;
    where.grid = grid, where.block_size = block_size;
    std::vector<std::unique_ptr<Block>> waiting;
    for (uint32_t y = 0; y < grid.y; ++y) {
        for (uint32_t x = 0; x < grid.x; ++x) {
            auto block = std::make_unique<Block>();
            block->index = dim3(x, y);
            block->fibers = std::vector<Fiber>(block_size.x);
            block->warp_values.resize(block_size.x / 32);
            for (uint32_t i = 0; i < block_size.x; ++i) {
                Fiber& fiber = block->fibers[i];
                fiber.thread = dim3(i);
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.bytes();
                fiber.context.uc_stack.ss_size = kStackBytes;
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, enter, 0);
            }
            run_block(*block);
            if (!block->done()) waiting.push_back(std::move(block));
        }
    }
    while (!waiting.empty()) {
        for (auto block = waiting.begin(); block != waiting.end();) {
            run_block(**block);
            block = (*block)->done() ? waiting.erase(block) : block + 1;
        }
    }
}

}  // namespace emulated
