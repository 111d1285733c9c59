// A worker's end of a window, request after request, without Python in between: take, compute, answer. What is not the
// common case (an expert that is not held) is handed to Python, which answers that one and calls again.

#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "barista_kernels.h"
#include "window_cells.h"

// The layers that a worker holds, shared by all who serve a window. A table is replaced only while nobody computes with
// it, so whoever replaces it may free the old one at once.
struct bk_layer_tables {
    explicit bk_layer_tables(int64_t num_layers) : tables(static_cast<size_t>(num_layers)) {}
    std::shared_mutex mutex;
    std::vector<bk_experts> tables;
    std::atomic<uint64_t> epoch{0};
    std::atomic<uint64_t> served{0};
};

extern "C" {

int32_t bk_window_take(const bk_window_end* end, uint32_t number, int64_t deadline, bk_window_dispatch* dispatch);
int32_t bk_window_answer(const bk_window_end* end, uint32_t number, const bk_window_combine* combine);

bk_layer_tables* bk_layer_tables_new(int64_t num_layers) { return new bk_layer_tables(num_layers); }

void bk_layer_tables_free(bk_layer_tables* layers) { delete layers; }

// Replaces one layer's table, once no computation uses the old one.
void bk_layer_tables_set(bk_layer_tables* layers, int64_t layer, const bk_experts* table) {
    std::unique_lock<std::shared_mutex> lock(layers->mutex);
    layers->tables[static_cast<size_t>(layer)] = *table;
}

// epoch: the newest placement that the worker knows, for its answers.
void bk_layer_tables_set_epoch(bk_layer_tables* layers, uint64_t epoch) { layers->epoch.store(epoch); }

// Requests answered by bk_window_serve so far.
uint64_t bk_layer_tables_served(const bk_layer_tables* layers) { return layers->served.load(); }

// Answers requests from *number on until one cannot be answered here (BK_WINDOW_READY: it is in *dispatch and the
// caller's to answer), none has come by the deadline (BK_WINDOW_LATE), or the window is closed or malformed. *number is
// that of the next request, or of the one handed over.
int32_t bk_window_serve(const bk_window_end* end, uint32_t* number, int64_t deadline, bk_layer_tables* layers,
                        bk_window_dispatch* dispatch) {
    constexpr uint32_t kOk = 1;  // Rows.STATUS_OK
    const bk_window_offsets at = bk_window_offsets_of(&end->shape, end->source);
    while (true) {
        const int32_t seen = bk_window_take(end, *number, deadline, dispatch);
        if (seen != BK_WINDOW_READY) return seen;
        const int64_t start = bk_window::now();
        {
            std::shared_lock<std::shared_mutex> lock(layers->mutex);
            if (dispatch->layer >= layers->tables.size()) return BK_WINDOW_READY;
            const bk_experts& table = layers->tables[dispatch->layer];
            if (!table.gate) return BK_WINDOW_READY;
            const int64_t rows = bk_expert_rows(
                end->base + at.rows, table.hidden, reinterpret_cast<int32_t*>(end->base + at.ids), table.gate, table.up,
                table.down, end->base + at.out, dispatch->num_rows, end->shape.top_k, table.num_experts, table.hidden,
                table.intermediate, table.weights, table.dtype);
            if (rows < 0) return BK_WINDOW_READY;
        }
        bk_window_combine combine;
        combine.size = sizeof combine;
        combine.status = kOk;
        combine.step = dispatch->step;
        combine.layer = dispatch->layer;
        combine.attempt = dispatch->attempt;
        combine.epoch = layers->epoch.load();
        combine.num_not_held = 0;
        combine.reserved = 0;
        combine.compute_nanoseconds = static_cast<uint64_t>(bk_window::now() - start);
        bk_window_answer(end, *number, &combine);
        ++*number;
        layers->served.fetch_add(1);
    }
}

}  // extern "C"
