// A small pool of threads that share one queue of numbered tasks.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <type_traits>

namespace bk {

int num_threads();
void set_num_threads(int threads);

using Task = void (*)(void* context, int64_t index);
void run_tasks(int64_t num_tasks, Task task, void* context);

// Calls body(i) once for every i below num_tasks, on the calling thread and the pool's, and returns when all are done.
template <class Body>
void parallel_for(int64_t num_tasks, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_tasks(
        num_tasks, [](void* context, int64_t index) { (*static_cast<Plain*>(context))(index); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// Scratch memory that grows and is kept for the next call. Aligned to a cache line; contents are not kept.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    template <class T>
    T* get(int64_t count) {
        size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) & ~size_t{63};
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(64, bytes);
            size_ = data_ ? bytes : 0;
            if (!data_) std::abort();
        }
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace bk
