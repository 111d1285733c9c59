// The C interface of the CPU kernels. Rows are contiguous; strides count elements; pointers need the alignment of their
// element only. No function allocates what it returns, throws or keeps a pointer.
//
// Every function is row-invariant: a row of the result depends on that row's inputs alone, to the byte, and not on the
// other rows, their number, the number of threads or alignment.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Of rows.
enum bk_dtype { BK_FLOAT32 = 0, BK_BFLOAT16 = 1 };

// How a weight [out, in] is stored. The first three are plain matrices: float32 and float16 beside float32 rows,
// bfloat16 beside bfloat16 rows. FP8: a pointer to a bk_fp8. The others are tiles (tiles.h) and stand beside rows of
// any dtype.
enum bk_weights {
    BK_WEIGHTS_FLOAT32 = 0,
    BK_WEIGHTS_BFLOAT16 = 1,
    BK_WEIGHTS_FLOAT16 = 2,
    BK_WEIGHTS_FP8 = 3,
    BK_WEIGHTS_INT8 = 4,
    BK_WEIGHTS_INT4 = 5,
    BK_WEIGHTS_MXFP4 = 6,
    BK_WEIGHTS_Q8_0 = 7,
    BK_WEIGHTS_Q4_0 = 8
};

// values: e4m3 [out, in]; scales: [ceil(out / 128), ceil(in / 128)], by which the values are multiplied.
struct bk_fp8 {
    const uint8_t* values;
    const float* scales;
};

// Threads to use, the caller's included; one until it is told. How many may be kept busy is the caller's to know.
void bk_set_threads(int32_t threads);
int32_t bk_num_threads(void);

// y [n, out] = x [n, in] weight [out, in]^T + bias [out] (or NULL). Summed in float32, rounded once to out_dtype.
// weights: enum bk_weights; weight_stride: of plain matrices.
void bk_linear(const void* x, int64_t x_stride, const void* weight, int64_t weight_stride, const void* bias, void* y,
               int64_t y_stride, int64_t n, int64_t in, int64_t out, int32_t weights, int32_t dtype, int32_t out_dtype);

// Tiles from a matrix [out, in] of dtype, in a multiple of 64; finite values only. INT8, INT4 and MXFP4; -1 for others.
int32_t bk_encode(int32_t weights, const void* from, int32_t dtype, int64_t out, int64_t in, void* to);

// Rows of a matrix of few bits: to [n, in]. -1 if it is a plain one.
int32_t bk_decode(int32_t weights, const void* from, int64_t in, const int64_t* rows, int64_t n, float* to);

// y [n, width] = weight [width] * round(x / rms(x)), as transformers' LlamaRMSNorm. With a residual (or NULL):
// first residual += x, rounded, and that is normalised.
void bk_rms_norm(const void* x, int64_t x_stride, void* residual, int64_t residual_stride, const void* weight,
                 float eps, void* y, int64_t n, int64_t width, int32_t dtype);

// y [n, width] = round(silu(gate)) * up.
void bk_silu_mul(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* y, int64_t n,
                 int64_t width, int32_t dtype);

// Rotates the first 2 * half values of each head of x [n, heads, ...] in place. cos, sin: [n, half].
// Pairs are (i, i + half), or (2i, 2i + 1) if interleaved.
void bk_rope(void* x, int64_t x_stride, int64_t head_stride, const float* cos, const float* sin, int64_t n,
             int64_t heads, int64_t half, int32_t interleaved, int32_t dtype);

// Copies rows [n] of row_bytes bytes to slots (block * block_size + offset) of a cache. Strides here count bytes.
void bk_store_kv(void* cache, int64_t block_stride, int64_t slot_stride, int64_t block_size, const void* rows,
                 int64_t row_stride, const int32_t* slots, int64_t n, int64_t row_bytes);

// How a gate chooses: experts.spec.GateSpec says what each field means.
struct bk_gate_spec {
    int64_t num_experts, top_k, num_groups, topk_groups;
    int32_t sigmoid, top2sum, normalise;
    float masked_value, norm_eps, scale;
};

// 1 where bk_gate resolves ties as torch does: its standard library, libstdc++, built this.
int32_t bk_ties_as_torch(void);

// logits: [n, num_experts]; select_bias: [num_experts] or NULL; topk_ids, topk_weights: [n, top_k], best first.
void bk_gate(const float* logits, const float* select_bias, const struct bk_gate_spec* spec, int32_t* topk_ids,
             float* topk_weights, int64_t n);

// One layer of routed experts. x, y: [n, hidden]; topk_ids, topk_weights: [n, topk], id -1 is skipped.
// gate, up: num_experts pointers to [intermediate, hidden]; down: to [hidden, intermediate]; NULL where not held.
// An expert's row is rounded to dtype, weighted and added in float32 in top-k order, and the sum is rounded once.
// failed [n]: 1 where a row was not finite; such a row of y is zeros. Returns -1, with nothing written, if an id is out
// of range or names an expert that is not held; else 0.
int32_t bk_moe(const void* x, int64_t x_stride, const int32_t* topk_ids, const float* topk_weights,
               const void* const* gate, const void* const* up, const void* const* down, void* y, uint8_t* failed,
               int64_t n, int64_t topk, int64_t num_experts, int64_t hidden, int64_t intermediate, int32_t weights,
               int32_t dtype);

// The first half of bk_moe: the expert rows themselves, rounded to dtype and not weighted, one behind the other in
// order of (token, place in the top-k). rows: [n * topk or fewer, hidden]. Returns their number, or -1 as bk_moe.
int64_t bk_expert_rows(const void* x, int64_t x_stride, const int32_t* topk_ids, const void* const* gate,
                       const void* const* up, const void* const* down, void* rows, int64_t n, int64_t topk,
                       int64_t num_experts, int64_t hidden, int64_t intermediate, int32_t weights, int32_t dtype);

// The second half of bk_moe. addresses [n, topk]: where each expert row [hidden] is, 0 is skipped.
void bk_combine_rows(const int64_t* addresses, const float* topk_weights, void* y, uint8_t* failed, int64_t n,
                     int64_t topk, int64_t hidden, int32_t dtype);

// nonfinite [n]: 1 where a row of rows [n, hidden] holds an infinity or a NaN.
void bk_find_nonfinite(const void* rows, uint8_t* nonfinite, int64_t n, int64_t hidden, int32_t dtype);

// Which worker computes each expert of a batch. topk_ids: num_pairs of them, id -1 is skipped; replicas: [num_experts,
// num_replicas] workers, -1 is skipped; cost: [num_workers] time per unit of work.
// owner [num_experts]: a worker, -1 where nobody asks, -2 where nobody holds. An expert with one holder goes there;
// then the others go, most rows first, to the holder that would finish first with it: (expert_cost + rows) * cost on
// top of what it has already. Ties go to the lower expert and the lower worker. Returns -1, owner undefined, if an id
// or a worker is out of range; else 0.
int32_t bk_route(const int32_t* topk_ids, int64_t num_pairs, const int32_t* replicas, int64_t num_experts,
                 int64_t num_replicas, const float* cost, int64_t num_workers, double expert_cost, int32_t* owner);

// The pairs of one worker. tokens [n or fewer]: which of the n tokens have any, ascending; ids [n or fewer, topk]:
// theirs, -1 elsewhere. Returns the number of tokens; -1 if an id is out of range.
int64_t bk_split(const int32_t* topk_ids, int64_t n, int64_t topk, const int32_t* owner, int64_t num_experts,
                 int32_t worker, int32_t* tokens, int32_t* ids, int64_t* num_pairs);

// The way back of bk_split: addresses [n, topk] of the rows that lie one behind the other from `base` on, row_bytes
// each. Returns their number; -1, with nothing written, if a token is out of range.
int64_t bk_place_rows(int64_t* addresses, int64_t n, int64_t topk, const int32_t* tokens, const int32_t* ids, int64_t m,
                      int64_t base, int64_t row_bytes);

// Paged causal attention. q: [n, query_heads, key_dim], y: [n, query_heads, value_dim], both contiguous.
// Caches: [block][slot][kv head][dim] with the given strides. block_tables: [num_seqs, max_blocks].
// Row t attends to positions 0..positions[t] of sequence seq_ids[t]; query head h reads kv head
// h / (query_heads / kv_heads). Softmax in float32, 32 positions at a time, aligned at position 0.
void bk_attention(const void* q, const void* keys, int64_t key_block_stride, int64_t key_slot_stride,
                  int64_t key_head_stride, const void* values, int64_t value_block_stride, int64_t value_slot_stride,
                  int64_t value_head_stride, const int32_t* block_tables, int64_t max_blocks, const int32_t* seq_ids,
                  const int32_t* positions, float scale, void* y, int64_t n, int64_t query_heads, int64_t kv_heads,
                  int64_t key_dim, int64_t value_dim, int64_t block_size, int32_t dtype);

// ---- whole halves of a decoder layer, with the bytes of the functions above called one after another
//
// Structs are filled once, when a model is loaded, and begin with their own size; the functions answer -1, with nothing
// done, to a size that is not theirs.

// A weight [out, in]. stride: of a plain one, elements from one row to the next.
struct bk_weight {
    const void* data;
    int64_t out, in, stride;
    int32_t weights;  // enum bk_weights
};

// What all layers take of one step. residual: [num_rows, hidden]; cos, sin: [num_rows, half]; slots, seq_ids,
// positions: [num_rows]; block_tables: [num_seqs, max_blocks]. cache: [layers][planes][blocks][block_size][heads][dim]
// without gaps; strides of the first two in elements.
struct bk_step {
    int64_t size;
    int64_t num_rows, half, max_blocks, block_size, layer_stride, plane_stride;
    void* residual;
    void* cache;
    const float* cos;
    const float* sin;
    const int32_t* slots;
    const int32_t* seq_ids;
    const int32_t* positions;
    const int32_t* block_tables;
};

// The norms before the attention and before the FFN. Weights: [hidden].
struct bk_norms {
    const void* attention;
    const void* ffn;
    int64_t hidden;
    float eps;
    int32_t dtype;  // of all rows of the layer
};

enum bk_qk_norm { BK_NORM_NONE = 0, BK_NORM_PER_HEAD = 1, BK_NORM_FULL = 2 };

// Grouped-query attention of layer `index`: keys are the cache's first plane, values its second. Biases may be NULL.
// clip: q, k and v lie within +-clip; 0 for no limit.
struct bk_gqa {
    int64_t size;
    struct bk_norms norms;
    struct bk_weight q, k, v, o;
    const void* q_bias;
    const void* k_bias;
    const void* v_bias;
    const void* o_bias;
    const void* q_norm;
    const void* k_norm;
    int64_t index, num_heads, num_kv_heads, head_dim;
    float scale, clip;
    int32_t qk_norm, interleaved;
};

// Multi-head latent attention in the absorbed form. q_a.data is NULL where q_b takes x itself. uk: a weight
// [kv_lora_rank, nope_head_dim] for each head; uv: [v_head_dim, kv_lora_rank]. Biases may be NULL.
struct bk_mla {
    int64_t size;
    struct bk_norms norms;
    struct bk_weight q_a, q_b, kv_a, o;
    const struct bk_weight* uk;
    const struct bk_weight* uv;
    const void* q_a_norm;
    const void* kv_a_norm;
    const void* q_a_bias;
    const void* kv_a_bias;
    const void* o_bias;
    int64_t index, num_heads, kv_lora_rank, nope_head_dim, rope_head_dim, v_head_dim;
    float scale, latent_eps;
    int32_t interleaved;
};

// residual += update (or NULL); residual += attention(norm(residual)); x = norm(residual). update, x: [num_rows,
// hidden].
int32_t bk_gqa_layer(const struct bk_gqa* layer, const struct bk_step* step, const void* update, void* x);
int32_t bk_mla_layer(const struct bk_mla* layer, const struct bk_step* step, const void* update, void* x);

// A gate with its weight. float32_logits: x becomes float32 first; float32_weights: else they are rounded to the dtype
// of the logits.
struct bk_gate_layer {
    int64_t size;
    struct bk_weight weight;
    const float* select_bias;
    struct bk_gate_spec spec;
    int32_t dtype, float32_logits, float32_weights;
};

// x: [n, hidden] of dtype; the rest as in bk_gate.
int32_t bk_choose(const struct bk_gate_layer* gate, const void* x, int32_t* topk_ids, float* topk_weights, int64_t n);

// The experts of one layer, as bk_moe and bk_expert_rows take them. gate: NULL where there are none.
struct bk_experts {
    const void* const* gate;
    const void* const* up;
    const void* const* down;
    int64_t num_experts, hidden, intermediate;
    int32_t weights;  // enum bk_weights
    int32_t dtype;
};

// One decoder layer: either gqa or mla, and the other NULL. gate: NULL where the FFN is dense, else with its experts.
// shared: one expert that every token takes, the dense FFN or the shared experts, whose rows are added to the routed
// ones and rounded. expert_tokens [routed.num_experts]: the tokens of each expert, which are counted up.
struct bk_decoder_layer {
    int64_t size;
    const struct bk_gqa* gqa;
    const struct bk_mla* mla;
    const struct bk_gate_layer* gate;
    struct bk_experts routed, shared;
    int64_t* expert_tokens;
};

// A model whose experts are all in this process. embedding, head: [vocab, hidden]; final_norm: [hidden] of dtype, which
// all rows have; cos, sin: [max_len, half].
struct bk_model {
    int64_t size;
    struct bk_weight embedding, head;
    const void* final_norm;
    const float* cos;
    const float* sin;
    int64_t half, max_len, num_layers;
    const struct bk_decoder_layer* const* layers;
    float eps;
    int32_t dtype;
};

// A step's rows. step: its residual, cos and sin are bk_forward's to fill. token_ids: [num_rows]; sample_rows:
// [num_samples], the rows whose logits are wanted.
struct bk_batch {
    int64_t size, num_samples;
    const int32_t* token_ids;
    const int64_t* sample_rows;
    struct bk_step step;
};

// A step, from tokens to logits [num_samples, vocab]. failed [num_rows]: 1 where a row of any layer was not finite.
// Returns -1 if a struct's size is wrong, a token or a position is out of range, or an expert is not held, with rows of
// the cache spoilt perhaps; else 0.
int32_t bk_forward(const struct bk_model* model, const struct bk_batch* batch, float* logits, uint8_t* failed);

#ifdef __cplusplus
}
#endif
