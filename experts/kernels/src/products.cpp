#include "products.h"

#include "dispatch.h"
#include "dot.h"
#include "thread_pool.h"

namespace bk {
namespace {

constexpr int64_t kFewMultiplyAdds = 32768;        // no more than it costs to wake the other threads
constexpr int64_t kPackedBytes = 8 * 1024 * 1024;  // of rows at once, where every head has its own

// The rows of one or several products, packed: `stride` from one to the next.
template <class T>
struct Input {
    const typename Dot<T>::Activation* x;
    int64_t x_stride, in, stride;
    typename Dot<T>::Packed* packed;
};

// Output rows [first, last) of one product.
template <class T>
struct Tile {
    const Product* product;
    const Input<T>* input;
    int64_t first, last;
};

// to: of out_dtype, from element `at` on.
template <class A>
void store_tile_row(void* to, int64_t at, int32_t out_dtype, const float* sums, const A* bias, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
        f32v v = load(sums + i);
        if (bias) v = v + load(bias + i, count - i);
        if (out_dtype == BK_FLOAT32)
            store(static_cast<float*>(to) + at + i, v, count - i);
        else
            store(static_cast<bf16*>(to) + at + i, v, count - i);
    }
}

// One of the blocks into which the n rows are cut, times one tile. The first of the n is row `begin` of the products.
template <class T>
void run_tile(const Tile<T>& tile, int64_t begin, int64_t n, int64_t block, int64_t num_blocks, int32_t out_dtype) {
    using A = typename Dot<T>::Activation;
    const Product& product = *tile.product;
    const bk_weight& w = *product.weight;
    const auto weight = Matrix<T>::at(w.data, w.out, w.in, w.stride);
    const A* bias = product.bias ? static_cast<const A*>(product.bias) + tile.first : nullptr;
    const int64_t end = n * (block + 1) / num_blocks;
    alignas(64) float sums[kRowsPerTask * kTile];
    for (int64_t at = n * block / num_blocks; at < end; at += kRowsPerTask) {
        const int64_t rows = end - at < kRowsPerTask ? end - at : kRowsPerTask;
        const typename Dot<T>::Packed* x[kRowsPerTask];
        for (int64_t r = 0; r < rows; ++r) x[r] = tile.input->packed + (at + r) * tile.input->stride;
        multiply(x, rows, weight, tile.first, tile.last, sums, kTile);
        for (int64_t r = 0; r < rows; ++r)
            store_tile_row(product.y, (begin + at + r) * product.y_stride + tile.first, out_dtype, sums + r * kTile,
                           bias, tile.last - tile.first);
    }
}

// Packs rows [begin, begin + n) of every product; inputs[i] is that of product i.
template <class T>
void pack_inputs(const Product* products, int64_t count, int64_t begin, int64_t n, Input<T>* inputs) {
    using A = typename Dot<T>::Activation;
    using Packed = typename Dot<T>::Packed;
    thread_local Buffer buffer, distinct_buffer;
    Input<T>* distinct = distinct_buffer.get<Input<T>>(count);
    int64_t num_distinct = 0, size = 0, widest = 1;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t in = products[i].weight->in, stride = packed_stride<T>(in);
        if (i > 0 && products[i].x == products[i - 1].x) continue;
        distinct[num_distinct++] = {static_cast<const A*>(products[i].x) + begin * products[i].x_stride,
                                    products[i].x_stride, in, stride, nullptr};
        size += n * stride;
        if (in > widest) widest = in;
    }
    Packed* packed = buffer.get<Packed>(size);
    for (int64_t d = 0; d < num_distinct; packed += n * distinct[d++].stride) distinct[d].packed = packed;
    for (int64_t i = 0, d = -1; i < count; ++i) {
        if (i == 0 || products[i].x != products[i - 1].x) ++d;
        inputs[i] = distinct[d];
    }
    const int64_t rows_per_task = 1 + 65536 / widest, num_rows = num_distinct * n;
    parallel_for(ceil_div(num_rows, rows_per_task), [&](int64_t task) {
        for (int64_t i = task * rows_per_task; i < num_rows && i < (task + 1) * rows_per_task; ++i) {
            const Input<T>& input = distinct[i / n];
            pack_row<T>(input.packed + i % n * input.stride, input.x + i % n * input.x_stride, input.in);
        }
    });
}

// Rows [begin, begin + n) of products whose weights are all of kind T.
template <class T>
void multiply_rows(const Product* products, int64_t count, int64_t begin, int64_t n, int32_t out_dtype) {
    constexpr int64_t kQuantum = Matrix<T>::kQuantum;
    thread_local Buffer inputs_buffer, tiles_buffer;
    Input<T>* inputs = inputs_buffer.get<Input<T>>(count);
    pack_inputs(products, count, begin, n, inputs);

    int64_t outputs = 0, multiply_adds = 0;
    for (int64_t i = 0; i < count; ++i) {
        outputs += products[i].weight->out;
        multiply_adds += n * products[i].weight->out * products[i].weight->in;
    }
    const bool alone = multiply_adds < kFewMultiplyAdds;
    const int64_t wanted_tasks = alone ? 1 : 4 * num_threads();
    Tile<T>* tiles = tiles_buffer.get<Tile<T>>(outputs / kQuantum + count);
    int64_t num_tiles = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t out = products[i].weight->out;
        const int64_t tile = tile_size(outputs, Matrix<T>::row_bytes(inputs[i].in), wanted_tasks, kQuantum);
        for (int64_t first = 0; first < out; first += tile)
            tiles[num_tiles++] = {products + i, inputs + i, first, first + tile < out ? first + tile : out};
    }
    int64_t row_blocks = ceil_div(wanted_tasks, num_tiles);
    if (row_blocks > ceil_div(n, 4 * kPanelRows)) row_blocks = ceil_div(n, 4 * kPanelRows);
    auto run = [&](int64_t task) {
        run_tile(tiles[task / row_blocks], begin, n, task % row_blocks, row_blocks, out_dtype);
    };
    if (alone)
        for (int64_t task = 0; task < num_tiles * row_blocks; ++task) run(task);
    else
        parallel_for(num_tiles * row_blocks, run);
}

template <class T>
void multiply_kind(const Product* products, int64_t count, int64_t n, int32_t out_dtype) {
    using Packed = typename Dot<T>::Packed;
    int64_t row_bytes = 0;
    for (int64_t i = 0; i < count; ++i)
        row_bytes += packed_stride<T>(products[i].weight->in) * static_cast<int64_t>(sizeof(Packed));
    // One x is packed as a whole, so that weights are read once. Where every head has its own it would be too much.
    const bool shared = products[0].x == products[count - 1].x;
    const int64_t block = shared || n * row_bytes <= kPackedBytes ? n : ceil_div(kPackedBytes, row_bytes);
    for (int64_t begin = 0; begin < n; begin += block)
        multiply_rows<T>(products, count, begin, begin + block < n ? block : n - begin, out_dtype);
}

}  // namespace

void multiply_all(const Product* products, int64_t count, int64_t n, int32_t dtype, int32_t out_dtype) {
    for (int64_t begin = 0, end; begin < count; begin = end) {
        const int32_t kind = products[begin].weight->weights;
        for (end = begin + 1; end < count && products[end].weight->weights == kind;) ++end;
        dispatch_weights(kind, dtype,
                         [&](auto t) { multiply_kind<decltype(t)>(products + begin, end - begin, n, out_dtype); });
    }
}

}  // namespace bk
