// The two ends of a window (window.h), on a CPU. Each call handles one request of one source; all that is read from the
// window is checked against the shape that this end was given, never against the window's own header.
#include <initializer_list>

#include "window_cells.h"

static_assert(sizeof(bk_window_shape) == 24 && sizeof(bk_window_header) == 72, "a header with no holes");
static_assert(sizeof(bk_window_cell) == 64, "one cache line");
static_assert(sizeof(bk_window_dispatch) == 40, "no holes");
static_assert(sizeof(bk_window_combine) == 48 + 4 * BK_WINDOW_MAX_NOT_HELD, "no holes");

using namespace bk_window;

namespace {

bool pairs_agree(const int32_t* ids, uint64_t count, uint32_t num_pairs) {
    uint64_t pairs = 0;
    for (uint64_t i = 0; i < count; ++i) pairs += ids[i] >= 0;
    return pairs == num_pairs;
}

}  // namespace

extern "C" {

// Whether this machine can wait as windows need it.
int32_t bk_window_supported(void) {
#if defined(__linux__)
    return 1;
#else
    return 0;
#endif
}

// Bytes of a window, and where the regions of one source lie; 0 if the shape is not valid.
uint64_t bk_window_locate(const bk_window_shape* shape, uint32_t source, bk_window_offsets* offsets) {
    if (!bk_window_valid(shape) || source >= shape->num_sources) return 0;
    *offsets = bk_window_offsets_of(shape, source);
    return bk_window_total_bytes(shape);
}

// The source's half: copies the rows `tokens` [num_rows] of hidden_states [num_tokens] and topk_ids [num_rows, top_k]
// into the window and publishes them as request `number`. row_stride counts bytes.
int32_t bk_window_send(const bk_window_end* end, uint32_t number, const bk_window_dispatch* dispatch,
                       const uint8_t* hidden_states, int64_t num_tokens, int64_t row_stride, const int32_t* tokens,
                       const int32_t* topk_ids) {
    const bk_window_offsets at = bk_window_offsets_of(&end->shape, end->source);
    const uint64_t num_rows = dispatch->num_rows, row_bytes = end->shape.row_bytes;
    if (num_rows > end->shape.max_rows) return BK_WINDOW_MALFORMED;
    bk_window_cell* cell = cell_at(end, at.dispatch_cell);
    if (__atomic_load_n(&cell->closed, __ATOMIC_SEQ_CST)) return BK_WINDOW_CLOSED;
    for (uint64_t i = 0; i < num_rows; ++i) {
        if (tokens[i] < 0 || tokens[i] >= num_tokens) return BK_WINDOW_MALFORMED;
        std::memcpy(end->base + at.rows + i * row_bytes, hidden_states + tokens[i] * row_stride, row_bytes);
    }
    std::memcpy(end->base + at.ids, topk_ids, num_rows * end->shape.top_k * sizeof(int32_t));
    std::memcpy(end->base + at.dispatch, dispatch, sizeof *dispatch);
    publish(cell, number, dispatch->num_rows);
    return BK_WINDOW_READY;
}

// Waits for the answer to request `number` and copies what is known of it beside the rows, which stay in the window.
int32_t bk_window_receive(const bk_window_end* end, uint32_t number, int64_t deadline, bk_window_combine* combine) {
    const bk_window_offsets at = bk_window_offsets_of(&end->shape, end->source);
    uint32_t status = 0;
    const int32_t seen = wait_for(cell_at(end, at.combine_cell), number, end->spin_nanoseconds, deadline, &status);
    if (seen != BK_WINDOW_READY) return seen;
    constexpr size_t kFixed = sizeof *combine - sizeof combine->not_held;
    std::memcpy(combine, end->base + at.combine, kFixed);
    if (combine->size != sizeof *combine || combine->status != status) return BK_WINDOW_MALFORMED;
    if (combine->num_not_held > BK_WINDOW_MAX_NOT_HELD) return BK_WINDOW_MALFORMED;
    std::memcpy(combine->not_held, end->base + at.combine + kFixed, combine->num_not_held * sizeof(int32_t));
    return BK_WINDOW_READY;
}

// The owner's half: waits for request `number` and copies its description; rows and ids stay in the window.
int32_t bk_window_take(const bk_window_end* end, uint32_t number, int64_t deadline, bk_window_dispatch* dispatch) {
    const bk_window_offsets at = bk_window_offsets_of(&end->shape, end->source);
    uint32_t num_rows = 0;
    const int32_t seen = wait_for(cell_at(end, at.dispatch_cell), number, end->spin_nanoseconds, deadline, &num_rows);
    if (seen != BK_WINDOW_READY) return seen;
    std::memcpy(dispatch, end->base + at.dispatch, sizeof *dispatch);
    if (dispatch->size != sizeof *dispatch || dispatch->num_rows != num_rows) return BK_WINDOW_MALFORMED;
    if (num_rows > end->shape.max_rows) return BK_WINDOW_MALFORMED;
    const auto* ids = reinterpret_cast<const int32_t*>(end->base + at.ids);
    const bool agree = pairs_agree(ids, static_cast<uint64_t>(num_rows) * end->shape.top_k, dispatch->num_pairs);
    return agree ? BK_WINDOW_READY : BK_WINDOW_MALFORMED;
}

// Publishes the answer to request `number`; its expert rows are in the window already.
int32_t bk_window_answer(const bk_window_end* end, uint32_t number, const bk_window_combine* combine) {
    if (combine->num_not_held > BK_WINDOW_MAX_NOT_HELD) return BK_WINDOW_MALFORMED;
    const bk_window_offsets at = bk_window_offsets_of(&end->shape, end->source);
    const size_t unused = (BK_WINDOW_MAX_NOT_HELD - combine->num_not_held) * sizeof(int32_t);
    std::memcpy(end->base + at.combine, combine, sizeof *combine - unused);
    publish(cell_at(end, at.combine_cell), number, combine->status);
    return BK_WINDOW_READY;
}

// Ends every wait at both ends, now and from now on. Any thread of either end may call it, at any time.
void bk_window_close(const bk_window_end* end) {
    for (uint32_t source = 0; source < end->shape.num_sources; ++source) {
        const bk_window_offsets at = bk_window_offsets_of(&end->shape, source);
        for (uint64_t offset : {at.dispatch_cell, at.combine_cell}) {
            __atomic_store_n(&cell_at(end, offset)->closed, 1, __ATOMIC_SEQ_CST);
            wake(cell_at(end, offset));
        }
    }
}

int32_t bk_window_closed(const bk_window_end* end) {
    const bk_window_offsets at = bk_window_offsets_of(&end->shape, end->source);
    return __atomic_load_n(&cell_at(end, at.combine_cell)->closed, __ATOMIC_SEQ_CST) != 0;
}

}  // extern "C"
