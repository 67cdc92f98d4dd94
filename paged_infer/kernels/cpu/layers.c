/* All layers of a decoder in one call: it calls the functions of the other files in the order of
   model.decoder.DecoderLayer.

   A layer is nine calls. From Python, each takes as long as a small product, mostly to create tensors and pass their
   addresses. Here layers.py collects the addresses of weights and caches once, and the rows between the calls share
   one buffer. The results are the same to the bit. */

#include "elements.h"

void add_rms_norm(stored *, stored *, const stored *, const stored *, const stored *, int64_t, int64_t, int64_t, int64_t,
                  float, float, int);
void silu_mul(stored *, const stored *, int64_t, int64_t, int64_t, int);
void qk_norm_rope(stored *, const stored *, const stored *, const stored *, const stored *, stored *, stored *,
                  const int64_t *, int64_t, int64_t, int64_t, int64_t, int64_t, float, float, int);
void store_kv_codes(void *, void *, uint16_t *, uint16_t *, const stored *, const stored *, const int64_t *, int64_t,
                    int64_t, int64_t, int64_t, int64_t, int64_t, int);
void paged_decode(stored *, const stored *, const void *, const void *, const uint16_t *, const uint16_t *,
                  const int32_t *, const int32_t *, const int32_t *, const float *, int64_t, int64_t, int64_t, int64_t,
                  int64_t, int64_t, int64_t, int64_t, int64_t, float, float, int);
void paged_prefill(stored *, const stored *, const void *, const void *, const uint16_t *, const uint16_t *,
                   const int32_t *, const int32_t *, const int32_t *, const int32_t *, const float *, int64_t, int64_t,
                   int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float, int);

/* x [rows, depth] W^T + start -> out [rows, width], by linear or another function of its signature */
typedef struct {
    void (*multiply)(stored *out, const stored *x, const void *weights, const float *start, int64_t rows, int64_t depth,
                     int64_t width, int64_t x_stride, int threads);
    const void *weights;
    const float *start;
    int64_t depth, width, digits; /* digits: of quantised_linear, or 0 */
} product;

void quantised_linear(stored *, const stored *, const void *, uint8_t *, int64_t, int64_t, int64_t, int);

typedef struct {
    product qkv, output, up, down;
    const stored *attention_norm, *mlp_norm, *qk_norm; /* [hidden]; [hidden]; [H + H_kv, D], or 0 */
    void *k_cache, *v_cache;                           /* [num_slots, H_kv, D], in the format of `shape` */
    uint16_t *k_scale, *v_scale;                       /* [num_slots, H_kv], of quantised caches */
    int64_t window, rope;                              /* rope: index into cos and sin */
} layer;

typedef struct {
    int64_t num_heads, num_kv_heads, dim, hidden, block_size, format; /* format of the cache, as in kv_codes.h */
    float eps, offset, scale, softcap; /* of the norms; of the scores */
} shape;

typedef struct { /* a step's tokens, as paged_attention.py plans them: single queries, and tasks of prompt chunks */
    int64_t num_tokens, num_rows, num_tasks, row_stride, table_stride;
    const int64_t *slots;
    const int32_t *row_tables, *row_lengths, *places, *tables, *lengths, *starts, *tasks;
} tokens;

/* Rows whose length is a multiple of 4 KiB would compete for the same cache sets, so they are copied farther apart. */
INLINE void multiply(stored *out, const stored *x, const product *p, int64_t rows, stored *apart, uint8_t *scratch,
                     int threads) {
    int64_t stride = p->depth;
    if (p->digits) {
        quantised_linear(out, x, p->weights, scratch, rows, stride, p->digits, threads);
        return;
    }
    if (rows > 4 && stride % 1024 == 0) {
        for (int64_t r = 0; r < rows; r++) memcpy(apart + r * (stride + 32), x + r * stride, stride * sizeof(stored));
        x = apart, stride += 32;
    }
    p->multiply(out, x, p->weights, p->start, rows, p->depth, p->width, stride, threads);
}

/* x [T, hidden]: receives the last sublayer's output. residual [T, hidden]: the embeddings, replaced by the residual
   stream. room and scratch: buffers of the sizes that layers.py computes; wide: elements of the longest row. */
void decoder_layers(stored *x, stored *residual, stored *room, uint8_t *scratch, int64_t wide, const layer *layers, int64_t num_layers,
                    const shape *s, const tokens *t, const stored *const *cos, const stored *const *sin, int threads) {
    int64_t n = t->num_tokens, num_qk = s->num_heads + s->num_kv_heads, hidden = s->hidden, dim = s->dim;
    stored *normed = room, *fused = normed + n * hidden, *after = fused + n * wide, *apart = after + n * wide;
    for (const layer *l = layers; l < layers + num_layers; l++) {
        int first = l == layers;
        stored *qk = after, *out = fused; /* qkv is not needed once keys and values are stored */
        add_rms_norm(normed, residual, first ? residual : x, first ? 0 : residual, l->attention_norm, n, hidden, hidden,
                     hidden, s->eps, s->offset, threads);
        multiply(fused, normed, &l->qkv, n, apart, scratch, threads);
        qk_norm_rope(qk, fused, cos[l->rope], sin[l->rope], l->qk_norm, l->k_cache, l->v_cache,
                     s->format ? 0 : t->slots, s->num_kv_heads, n, num_qk, dim, l->qkv.width, s->eps, s->offset, threads);
        if (s->format)
            store_kv_codes(l->k_cache, l->v_cache, l->k_scale, l->v_scale, qk + s->num_heads * dim, fused + num_qk * dim,
                           t->slots, n, s->num_kv_heads, dim, num_qk * dim, l->qkv.width, s->format, threads);
        if (t->num_rows)
            paged_decode(out, qk, l->k_cache, l->v_cache, l->k_scale, l->v_scale, t->row_tables, t->row_lengths,
                         t->places, 0, s->format, t->num_rows, s->num_heads, s->num_kv_heads, dim, s->block_size,
                         t->row_stride, num_qk * dim, l->window, s->scale, s->softcap, threads);
        if (t->num_tasks)
            paged_prefill(out, qk, l->k_cache, l->v_cache, l->k_scale, l->v_scale, t->tables, t->lengths, t->starts,
                          t->tasks, 0, s->format, t->num_tasks, s->num_heads, s->num_kv_heads, dim, s->block_size,
                          t->table_stride, num_qk * dim, l->window, s->scale, s->softcap, threads);
        multiply(x, out, &l->output, n, apart, scratch, threads);
        add_rms_norm(normed, residual, x, residual, l->mlp_norm, n, hidden, hidden, hidden, s->eps, s->offset, threads);
        multiply(fused, normed, &l->up, n, apart, scratch, threads);
        silu_mul(after, fused, n, l->down.depth, l->up.width, threads);
        multiply(x, after, &l->down, n, apart, scratch, threads);
    }
}
