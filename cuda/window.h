// A window: the memory through which a worker is given rows and gives expert rows back. One header for the CPU ops
// (experts/kernels/src/window.cpp), for Python through them, and for CUDA: plain C with no dependency.
//
// A window has `num_sources` sources, the routers that send, and one owner, the worker that computes. For each source:
//
//   cells     dispatch: written by the source, polled by the owner; combine: the other way round
//   dispatch  which request this is (struct bk_window_dispatch)
//   ids       int32 [max_rows, top_k], -1: not for this worker
//   rows      [max_rows] rows of row_bytes, the hidden states
//   combine   how it was answered (struct bk_window_combine)
//   out       [max_rows * top_k] rows of row_bytes: expert rows, unweighted, in order of (row, place in the top-k)
//
// Protocol. Request number n = 1, 2, ... (modulo 2^32) of a source:
//   1. the source writes dispatch, ids and rows, then stores n into the dispatch cell with release order;
//   2. the owner sees n there with acquire order, reads them, writes combine and out, and stores n into the combine
//   cell
//      with release order;
//   3. the source sees n there with acquire order and reads combine and out. Only then may it begin request n + 1.
// So each region has one writer at a time and needs no second copy, and an answer can never pass for a later one's.
// A waiter compares for equality, which wrapping around does not harm. Number 0 is the fresh window.
//
// Closing is for ever: either end sets `closed` in all cells, and every wait ends.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define BK_WINDOW_FUNCTION static inline __host__ __device__
#else
#define BK_WINDOW_FUNCTION static inline
#endif

#define BK_WINDOW_MAGIC 0x776f646e69576b62ULL  // "bkWindow"
#define BK_WINDOW_VERSION 1
#define BK_WINDOW_NONCE_BYTES 16
#define BK_WINDOW_MAX_NOT_HELD 1024

// How large a window is. `size` is sizeof the struct, here and below.
struct bk_window_shape {
    uint32_t size;
    uint32_t num_sources;
    uint32_t max_rows;
    uint32_t top_k;
    uint32_t row_bytes;
    uint32_t reserved;
};

// At offset 0. Written once, before the owner is told of the window. The nonce is secret between the two ends: who
// reads the right one here sees the same memory as who wrote it. value_dtype: enum bk_dtype.
struct bk_window_header {
    uint32_t size;
    uint32_t version;
    uint64_t magic;
    uint8_t nonce[BK_WINDOW_NONCE_BYTES];
    uint64_t total_bytes;
    uint32_t value_dtype;
    uint32_t reserved;
    struct bk_window_shape shape;
};

enum bk_window_phase { BK_WINDOW_DISPATCH = 0, BK_WINDOW_COMBINE = 1 };

// The one word that is polled is `number_and_value`: the request's number in the high half; in the low half num_rows
// (dispatch) or the status (combine), so that whoever needs no more has it by one load. The others belong to the end
// that waits for this cell: `sleeping` is 1 while it sleeps in the operating system on this very word, and who
// publishes or closes sets it to 0 and wakes it. `closed` lies here too so that a wait reads a single cache line.
struct bk_window_cell {
    uint64_t number_and_value;
    uint32_t sleeping;
    uint32_t closed;
    uint8_t padding[48];
};

// (step, layer, attempt) name a request to people and to late answers; epoch: the placement that the source knows.
struct bk_window_dispatch {
    uint32_t size;
    uint32_t num_rows;
    uint32_t num_pairs;
    uint32_t layer;
    uint64_t step;
    uint64_t epoch;
    uint32_t attempt;
    uint32_t reserved;
};

// step, layer, attempt: of the request. status: as Rows.Status of proto/barista/v1/experts.proto. epoch: the newest
// placement that the owner knows. not_held: what it lacks, the first BK_WINDOW_MAX_NOT_HELD of them.
struct bk_window_combine {
    uint32_t size;
    uint32_t status;
    uint64_t step;
    uint64_t epoch;
    uint64_t compute_nanoseconds;
    uint32_t layer;
    uint32_t attempt;
    uint32_t num_not_held;
    uint32_t reserved;
    int32_t not_held[BK_WINDOW_MAX_NOT_HELD];
};

// Where the regions of one source lie, in bytes from the window's start; each but the cells is aligned to 128.
struct bk_window_offsets {
    uint64_t dispatch_cell;
    uint64_t combine_cell;
    uint64_t dispatch;
    uint64_t ids;
    uint64_t rows;
    uint64_t combine;
    uint64_t out;
};

// Whether the numbers are such that no offset overflows.
BK_WINDOW_FUNCTION int32_t bk_window_valid(const struct bk_window_shape* shape) {
    return shape->size == sizeof *shape && shape->num_sources >= 1 && shape->num_sources <= 1u << 10 &&
           shape->max_rows >= 1 && shape->max_rows <= 1u << 20 && shape->top_k >= 1 && shape->top_k <= 1u << 6 &&
           shape->row_bytes >= 1 && shape->row_bytes <= 1u << 20;
}

BK_WINDOW_FUNCTION uint64_t bk_window_align(uint64_t bytes) { return (bytes + 127) & ~(uint64_t)127; }

// All sources' cells come first, phase by phase, so that the owner polls neighbouring lines.
BK_WINDOW_FUNCTION uint64_t bk_window_cell_offset(const struct bk_window_shape* shape, uint32_t phase,
                                                  uint32_t source) {
    const uint64_t cell = (uint64_t)phase * shape->num_sources + source;
    return bk_window_align(sizeof(struct bk_window_header)) + cell * sizeof(struct bk_window_cell);
}

BK_WINDOW_FUNCTION uint64_t bk_window_ids_bytes(const struct bk_window_shape* shape) {
    return bk_window_align((uint64_t)shape->max_rows * shape->top_k * sizeof(int32_t));
}

BK_WINDOW_FUNCTION uint64_t bk_window_rows_bytes(const struct bk_window_shape* shape) {
    return bk_window_align((uint64_t)shape->max_rows * shape->row_bytes);
}

BK_WINDOW_FUNCTION uint64_t bk_window_out_bytes(const struct bk_window_shape* shape) {
    return bk_window_align((uint64_t)shape->max_rows * shape->top_k * shape->row_bytes);
}

// Each region holds its part for source 0, then for source 1, ...
BK_WINDOW_FUNCTION struct bk_window_offsets bk_window_offsets_of(const struct bk_window_shape* shape, uint32_t source) {
    const uint64_t num_sources = shape->num_sources;
    const uint64_t dispatch_bytes = bk_window_align(sizeof(struct bk_window_dispatch));
    const uint64_t combine_bytes = bk_window_align(sizeof(struct bk_window_combine));
    struct bk_window_offsets at;
    uint64_t start = bk_window_align(bk_window_cell_offset(shape, BK_WINDOW_COMBINE, shape->num_sources));
    at.dispatch_cell = bk_window_cell_offset(shape, BK_WINDOW_DISPATCH, source);
    at.combine_cell = bk_window_cell_offset(shape, BK_WINDOW_COMBINE, source);
    at.dispatch = start + source * dispatch_bytes;
    start += num_sources * dispatch_bytes;
    at.ids = start + source * bk_window_ids_bytes(shape);
    start += num_sources * bk_window_ids_bytes(shape);
    at.rows = start + source * bk_window_rows_bytes(shape);
    start += num_sources * bk_window_rows_bytes(shape);
    at.combine = start + source * combine_bytes;
    start += num_sources * combine_bytes;
    at.out = start + source * bk_window_out_bytes(shape);
    return at;
}

// Bytes of a whole window.
BK_WINDOW_FUNCTION uint64_t bk_window_total_bytes(const struct bk_window_shape* shape) {
    return bk_window_offsets_of(shape, shape->num_sources).out;
}
