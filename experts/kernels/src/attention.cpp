// Paged causal attention for prefill and decode, with an online softmax.
//
// A row is one (token, query head). Its positions are taken in chunks of kChunk, aligned at position 0, and each chunk
// in ascending order. Rows of one sequence and kv head share the loads of keys and values; that changes no row's order.

#include <limits>

#include "barista_kernels.h"
#include "dispatch.h"
#include "dot.h"
#include "thread_pool.h"

namespace bk {
namespace {

constexpr int64_t kChunk = 32;
constexpr int kSecondLevel = 2;   // of cache, as __builtin_prefetch counts
constexpr int kValueVectors = 4;  // vectors of the value dimension that are summed at once

// sums[r] = sums[r] * scale[r] + probabilities[r][j] * values[j] for each j in ascending order, in kValueVectors
// vectors from element `first` of the value dimension.
template <class T, int Rows>
BK_INLINE void add_values(const float* probabilities, const float* scale, const T* const* values, int64_t count,
                          int64_t first, int64_t dim, float* sums, int64_t sums_stride) {
    f32v acc[Rows][kValueVectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kValueVectors; ++v)
            acc[r][v] = load_raw<f32v>(sums + r * sums_stride + first + v * kLanes) * scale[r];
    // One vector of values at a time, which leaves registers for the sums and for a probability of each row.
    auto add = [&](int64_t j, auto&& value) __attribute__((always_inline)) {
        f32v p[Rows];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) p[r] = splat(probabilities[r * kChunk + j]);
#pragma GCC unroll 4
        for (int v = 0; v < kValueVectors; ++v) {
            const f32v here = value(v);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) acc[r][v] = fma(p[r], here, acc[r][v]);
        }
    };
    if (first + kValueVectors * kLanes <= dim) {
        for (int64_t j = 0; j < count; ++j) add(j, [&](int v) { return load(values[j] + first + v * kLanes); });
    } else {
        for (int64_t j = 0; j < count; ++j)
            add(j, [&](int v) {
                const int64_t at = first + v * kLanes;
                return at < dim ? load(values[j] + at, dim - at) : f32v{};
            });
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kValueVectors; ++v) store(sums + r * sums_stride + first + v * kLanes, acc[r][v]);
}

// One row's softmax over its chunk: scores become probabilities relative to the new maximum.
// Returns what the sums of earlier chunks must be multiplied with.
BK_INLINE float softmax_chunk(float* scores, int64_t count, float scale, float& max_score, float& total) {
    f32v s[kChunk / kLanes];
    f32v top = splat(max_score);
    for (int64_t i = 0; i < kChunk; i += kLanes) {
        f32v& v = s[i / kLanes];
        v = load(scores + i) * scale;
        for (int lane = 0; lane < kLanes && count < i + kLanes; ++lane)
            if (i + lane >= count) v[lane] = -std::numeric_limits<float>::infinity();
        top = max(v, top);
    }
    const float new_max = max_lane(top);
    f32v chunk_total = {};
    for (int64_t i = 0; i < kChunk; i += kLanes) {
        const f32v p = exp(s[i / kLanes] - new_max);
        store(scores + i, p);
        chunk_total = chunk_total + p;
    }
    const float correction = exp(splat(max_score - new_max))[0];
    total = total * correction + sum(chunk_total);
    max_score = new_max;
    return correction;
}

// Rows that one task computes: tokens [token_begin, token_end) of one sequence and, of the query heads of one kv head,
// those from head_begin to head_end.
struct HeadGroup {
    int64_t token_begin, token_end, kv_head, head_begin, head_end;
};

template <class T>
struct Attention {
    using Packed = typename Dot<T>::Packed;

    const T* q;
    const T* keys;
    int64_t key_block_stride, key_slot_stride, key_head_stride;
    const T* values;
    int64_t value_block_stride, value_slot_stride, value_head_stride;
    const int32_t* block_tables;
    int64_t max_blocks;
    const int32_t* seq_ids;
    const int32_t* positions;
    float scale;
    T* y;
    int64_t query_heads, kv_heads, key_dim, value_dim, block_size;

    int64_t group_size() const { return query_heads / kv_heads; }

    struct Row {
        int64_t index;     // token * query_heads + head
        int64_t num_keys;  // positions that it attends to
        float max_score, total;
    };

    void run(const HeadGroup& task) const {
        const int64_t num_rows = (task.token_end - task.token_begin) * (task.head_end - task.head_begin);
        for (int64_t at = 0; at < num_rows; at += kRowsPerTask)
            run_rows(task, at, at + kRowsPerTask < num_rows ? at + kRowsPerTask : num_rows);
    }

    void run_rows(const HeadGroup& task, int64_t begin, int64_t end) const {
        thread_local Buffer packed_buffer, sums_buffer;
        const int64_t num_rows = end - begin, stride = packed_stride<T>(key_dim);
        const int64_t sums_stride = round_up(value_dim, kValueVectors * kLanes);
        Packed* packed = packed_buffer.get<Packed>(num_rows * stride);
        float* sums = sums_buffer.get<float>(num_rows * sums_stride);
        std::memset(sums, 0, static_cast<size_t>(num_rows * sums_stride) * sizeof(float));
        Row rows[kRowsPerTask];
        const int64_t heads = task.head_end - task.head_begin;
        int64_t num_keys = 0;
        for (int64_t r = 0; r < num_rows; ++r) {
            const int64_t token = task.token_begin + (begin + r) / heads;
            const int64_t head = task.kv_head * group_size() + task.head_begin + (begin + r) % heads;
            rows[r] = {token * query_heads + head, positions[token] + 1, -std::numeric_limits<float>::infinity(), 0.0f};
            pack_row<T>(packed + r * stride, q + rows[r].index * key_dim, key_dim);
            if (rows[r].num_keys > num_keys) num_keys = rows[r].num_keys;
        }
        Chunk chunks[2];
        locate(task, 0, num_keys, chunks[0]);
        for (int64_t i = 0; i * kChunk < num_keys; ++i) {
            if ((i + 1) * kChunk < num_keys) locate(task, (i + 1) * kChunk, num_keys, chunks[(i + 1) % 2]);
            for_each_panel(num_rows, [&](int64_t panel, int64_t n) {
                add_chunk(rows + panel, n, packed + panel * stride, chunks[i % 2], sums + panel * sums_stride,
                          sums_stride);
            });
        }
        for (int64_t r = 0; r < num_rows; ++r)
            for (int64_t i = 0; i < value_dim; i += kLanes)
                store(y + rows[r].index * value_dim + i, load(sums + r * sums_stride + i) / rows[r].total,
                      value_dim - i);
    }

    // Where the keys and values of positions [start, start + count) are; the last one repeats up to kChunk.
    struct Chunk {
        int64_t start, count;
        const T *keys[kChunk], *values[kChunk];
    };

    // The chunk from `start` on, asked of the memory before it is needed.
    void locate(const HeadGroup& task, int64_t start, int64_t num_keys, Chunk& chunk) const {
        const int32_t* table = block_tables + seq_ids[task.token_begin] * max_blocks;
        chunk.start = start;
        chunk.count = num_keys - start < kChunk ? num_keys - start : kChunk;
        for (int64_t j = 0; j < kChunk; ++j) {
            const int64_t position = start + (j < chunk.count ? j : chunk.count - 1);
            const int64_t block = table[position / block_size], slot = position % block_size;
            chunk.keys[j] = keys + block * key_block_stride + slot * key_slot_stride + task.kv_head * key_head_stride;
            chunk.values[j] =
                values + block * value_block_stride + slot * value_slot_stride + task.kv_head * value_head_stride;
        }
        fetch(chunk.keys, chunk.count, key_dim);
        fetch(chunk.values, chunk.count, value_dim);
    }

    // Each row is a short piece of memory far from the next, which the processor would ask for one after another.
    static void fetch(const T* const* rows, int64_t count, int64_t dim) {
        for (int64_t j = 0; j < count; ++j)
            for (int64_t i = 0; i < dim; i += 64 / static_cast<int64_t>(sizeof(T)))
                __builtin_prefetch(rows[j] + i, 0, kSecondLevel);
    }

    // Adds one chunk to a panel of rows. Keys that a row may not see are not touched for it, not even times zero.
    void add_chunk(Row* rows, int64_t num_rows, const Packed* packed, const Chunk& chunk, float* sums,
                   int64_t sums_stride) const {
        const int64_t start = chunk.start, count = chunk.count;
        alignas(64) float scores[kPanelRows * kChunk];
        float correction[kPanelRows];
        const Packed* x[kPanelRows];
        bool same = true;
        for (int64_t r = 0; r < num_rows; ++r) {
            x[r] = packed + r * packed_stride<T>(key_dim);
            same = same && rows[r].num_keys >= start + count;
        }
        dot_rows<T>(x, num_rows, chunk.keys, count, key_dim, scores, kChunk);
        if (same) {
            for (int64_t r = 0; r < num_rows; ++r)
                correction[r] = softmax_chunk(scores + r * kChunk, count, scale, rows[r].max_score, rows[r].total);
            add_panel_values(num_rows, scores, correction, chunk.values, count, sums, sums_stride);
            return;
        }
        for (int64_t r = 0; r < num_rows; ++r) {
            const int64_t seen = rows[r].num_keys - start < count ? rows[r].num_keys - start : count;
            if (seen <= 0) continue;
            correction[r] = softmax_chunk(scores + r * kChunk, seen, scale, rows[r].max_score, rows[r].total);
            add_panel_values(1, scores + r * kChunk, correction + r, chunk.values, seen, sums + r * sums_stride,
                             sums_stride);
        }
    }

    template <int Rows>
    void add_rows_values(const float* p, const float* correction, const T* const* value_rows, int64_t count,
                         float* sums, int64_t sums_stride) const {
        for (int64_t i = 0; i < value_dim; i += kValueVectors * kLanes)
            add_values<T, Rows>(p, correction, value_rows, count, i, value_dim, sums, sums_stride);
    }

    void add_panel_values(int64_t num_rows, const float* p, const float* correction, const T* const* value_rows,
                          int64_t count, float* sums, int64_t sums_stride) const {
        with_panel_rows(num_rows, [&](auto rows) {
            add_rows_values<decltype(rows)::value>(p, correction, value_rows, count, sums, sums_stride);
        });
    }
};

// Consecutive tokens of one sequence make a task per kv head, as many as fill kRowsPerTask rows. Where that leaves
// threads idle (one sequence of latent attention has one kv head) the query heads are cut, too.
int64_t make_tasks(const int32_t* seq_ids, int64_t n, int64_t kv_heads, int64_t group_size, Buffer& buffer) {
    const int64_t max_tokens = group_size < kRowsPerTask ? kRowsPerTask / group_size : 1;
    int64_t parts = n ? ceil_div(2 * num_threads(), ceil_div(n, max_tokens) * kv_heads) : 1;
    if (parts > ceil_div(group_size, kPanelRows)) parts = ceil_div(group_size, kPanelRows);
    HeadGroup* tasks = buffer.get<HeadGroup>(n * kv_heads * parts);
    int64_t num_tasks = 0;
    for (int64_t begin = 0, end; begin < n; begin = end) {
        for (end = begin + 1; end < n && end - begin < max_tokens && seq_ids[end] == seq_ids[begin];) ++end;
        for (int64_t head = 0; head < kv_heads; ++head)
            for (int64_t part = 0; part < parts; ++part)
                tasks[num_tasks++] = {begin, end, head, group_size * part / parts, group_size * (part + 1) / parts};
    }
    return num_tasks;
}

}  // namespace
}  // namespace bk

extern "C" void bk_attention(const void* q, const void* keys, int64_t key_block_stride, int64_t key_slot_stride,
                             int64_t key_head_stride, const void* values, int64_t value_block_stride,
                             int64_t value_slot_stride, int64_t value_head_stride, const int32_t* block_tables,
                             int64_t max_blocks, const int32_t* seq_ids, const int32_t* positions, float scale, void* y,
                             int64_t n, int64_t query_heads, int64_t kv_heads, int64_t key_dim, int64_t value_dim,
                             int64_t block_size, int32_t dtype) {
    thread_local bk::Buffer buffer;
    const int64_t num_tasks = bk::make_tasks(seq_ids, n, kv_heads, query_heads / kv_heads, buffer);
    const bk::HeadGroup* tasks = buffer.get<bk::HeadGroup>(0);
    bk::dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        const bk::Attention<T> attention{static_cast<const T*>(q),
                                         static_cast<const T*>(keys),
                                         key_block_stride,
                                         key_slot_stride,
                                         key_head_stride,
                                         static_cast<const T*>(values),
                                         value_block_stride,
                                         value_slot_stride,
                                         value_head_stride,
                                         block_tables,
                                         max_blocks,
                                         seq_ids,
                                         positions,
                                         scale,
                                         static_cast<T*>(y),
                                         query_heads,
                                         kv_heads,
                                         key_dim,
                                         value_dim,
                                         block_size};
        // The last tokens of a prompt see most; starting with them leaves the threads little to wait for.
        bk::parallel_for(num_tasks, [&](int64_t i) { attention.run(tasks[num_tasks - 1 - i]); });
    });
}
