/* Attention of single queries over the paged cache, on a CPU: keys and values are read in place, through block tables.
   Tensors are float32, or with -DBFLOAT16 bfloat16; all arithmetic is in float32. Called by paged_attention.py. T tokens,
   H query heads, H_kv key heads, D their dimension. */

#include "elements.h"
#include "kv_codes.h"

INLINE float dot(const float *a, const stored *b, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += a[i] * load(b[i]);
    return sum;
}

INLINE float dot_wide(const float *a, const float *b, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

#define TILE 32             /* keys per iteration */
#define MAX_TASK_WIDTH 4096 /* elements of the query heads of one task */

/* The slots, in heads, of a tile's keys from start on; how many there are. */
INLINE int64_t locate(int64_t *slot, const int32_t *table, int64_t start, int64_t length, int64_t block_size,
                      int64_t slot_heads) {
    int64_t n = length - start < TILE ? length - start : TILE, block = start / block_size, offset = start % block_size;
    for (int64_t i = 0; i < n; i++) {
        slot[i] = ((int64_t)table[block] * block_size + offset) * slot_heads;
        if (++offset == block_size) offset = 0, block++;
    }
    return n;
}

/* Blocks may be anywhere, and a core's own prefetcher does not foresee where the next one is. */
INLINE void fetch(const char *cache, const int64_t *slot, int64_t n, int64_t head_bytes, int64_t token_bytes) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t at = 0; at < token_bytes; at += 64) __builtin_prefetch(cache + slot[i] * head_bytes + at, 0, 2);
}

/* One sequence and some adjacent key heads of it: online softmax (Milakov 2018) over keys first..length-1, tile by
   tile. Keys and values are read in place, all heads of a token together. Quantised ones are converted to float, and
   their scale multiplies the score (keys) or the softmax weight (values). With a softcap > 0, a score becomes softcap *
   tanh(score / softcap). A head's sink, if there are sinks, is a key of that score and of value zero. */
INLINE void attend_row(stored *out, const stored *q, const char *keys, const char *values, const uint16_t *k_scales,
                       const uint16_t *v_scales, const int32_t *table, int64_t first, int64_t length, int64_t num_kv,
                       int64_t group, int64_t dim, int64_t block_size, int64_t slot_heads, float scale, float softcap,
                       const float *sinks, const int format) {
    int64_t num_heads = num_kv * group, slot[TILE], size = size_of(format);
    if (softcap > 0.0f) scale /= softcap;
    float acc[MAX_TASK_WIDTH], query[MAX_TASK_WIDTH], score[num_heads][TILE], largest[num_heads], total[num_heads];
    for (int64_t h = 0; h < num_heads; h++) largest[h] = sinks ? sinks[h] : -INFINITY, total[h] = sinks ? 1.0f : 0.0f;
    float wide[dim];
    for (int64_t i = 0; i < num_heads * dim; i++) acc[i] = 0.0f;
    for (int64_t i = 0; i < num_heads * dim; i++) query[i] = load(q[i]) * scale;
    int64_t token_bytes = num_kv * dim * size, head_bytes = dim * size, ahead[TILE];
    locate(ahead, table, first, length, block_size, slot_heads);
    for (int64_t start = first; start < length; start += TILE) {
        int64_t n = length - start < TILE ? length - start : TILE;
        memcpy(slot, ahead, sizeof slot);
        fetch(values, slot, n, head_bytes, token_bytes);
        for (int64_t i = 0; i < n; i++)
            for (int64_t kv = 0, h = 0; kv < num_kv; kv++) {
                const char *key = keys + (slot[i] + kv) * dim * size;
                if (format) {
                    float factor = scale_of(k_scales[slot[i] + kv]);
                    widen(wide, (const uint8_t *)key, dim, format);
                    for (int64_t g = 0; g < group; g++, h++) score[h][i] = dot_wide(query + h * dim, wide, dim) * factor;
                } else
                    for (int64_t g = 0; g < group; g++, h++)
                        score[h][i] = dot(query + h * dim, (const stored *)key, dim);
            }
        for (int64_t h = 0; h < num_heads; h++) {
            float top = largest[h], sum = 0.0f;
            if (softcap > 0.0f)
                for (int64_t i = 0; i < n; i++) score[h][i] = softcap * fast_tanh(score[h][i]);
            for (int64_t i = 0; i < n; i++) top = score[h][i] > top ? score[h][i] : top;
            for (int64_t i = 0; i < n; i++) score[h][i] = fast_exp(score[h][i] - top);
            for (int64_t i = 0; i < n; i++) sum += score[h][i];
            float shrink = start == first && !sinks ? 0.0f : fast_exp(largest[h] - top);
            for (int64_t d = 0; d < dim; d++) acc[h * dim + d] *= shrink;
            total[h] = total[h] * shrink + sum;
            largest[h] = top;
        }
        fetch(keys, ahead, locate(ahead, table, start + TILE, length, block_size, slot_heads), head_bytes, token_bytes);
        for (int64_t i = 0; i < n; i++)
            for (int64_t kv = 0, h = 0; kv < num_kv; kv++) {
                const char *value = values + (slot[i] + kv) * dim * size;
                if (format) {
                    float factor = scale_of(v_scales[slot[i] + kv]);
                    widen(wide, (const uint8_t *)value, dim, format);
                    for (int64_t g = 0; g < group; g++, h++)
                        for (int64_t d = 0; d < dim; d++) acc[h * dim + d] += score[h][i] * factor * wide[d];
                } else
                    for (int64_t g = 0; g < group; g++, h++)
                        for (int64_t d = 0; d < dim; d++)
                            acc[h * dim + d] += score[h][i] * load(((const stored *)value)[d]);
            }
    }
    for (int64_t h = 0; h < num_heads; h++)
        for (int64_t d = 0; d < dim; d++) out[h * dim + d] = store(acc[h * dim + d] / total[h]);
}

/* Single queries: q and out [T, H, D], q with row stride q_stride; row r of the tables and lengths belongs to query
   places[r], without places to query r; caches [num_slots, H_kv, D], quantised ones with scales [num_slots, H_kv];
   sinks [H]. The query heads of a group, H / H_kv * D elements, must fit MAX_TASK_WIDTH. */
void paged_decode(stored *out, const stored *q, const char *k_cache, const char *v_cache, const uint16_t *k_scale,
                  const uint16_t *v_scale, const int32_t *tables, const int32_t *lengths, const int32_t *places,
                  const float *sinks, int64_t format, int64_t num_rows, int64_t num_heads, int64_t num_kv_heads,
                  int64_t dim, int64_t block_size, int64_t table_stride, int64_t q_stride, int64_t window, float scale,
                  float softcap, int threads) {
    int64_t group = num_heads / num_kv_heads, size = size_of(format);
    int64_t together = MAX_TASK_WIDTH / (group * dim); /* key heads per task: all, if that leaves enough tasks */
    if (together > num_kv_heads) together = num_kv_heads;
    while (together > 1 && num_rows * ((num_kv_heads + together - 1) / together) < 4 * threads) together--;
    int64_t tasks = (num_kv_heads + together - 1) / together;
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
    for (int64_t row = 0; row < num_rows; row++) /* the runner sends the longest first, so they start first */
        for (int64_t task = 0; task < tasks; task++) {
            int64_t head = task * together, left = num_kv_heads - head, num_kv = left < together ? left : together;
            int64_t length = lengths[row], first = length > window ? length - window : 0;
            const int32_t *table = tables + row * table_stride;
            int64_t place = places ? places[row] : row;
            const stored *queries = q + place * q_stride + head * group * dim;
            const char *keys = k_cache + head * dim * size, *values = v_cache + head * dim * size;
            const uint16_t *k_scales = k_scale + head, *v_scales = v_scale + head;
            const float *own = sinks ? sinks + head * group : 0;
            stored *result = out + (place * num_heads + head * group) * dim;
#define ATTEND(D, FORMAT) \
    attend_row(result, queries, keys, values, k_scales, v_scales, table, first, length, num_kv, group, D, block_size, \
               num_kv_heads, scale, softcap, own, FORMAT)
            switch (format ? -format : dim) { /* loops over a constant dimension are unrolled */
                case 32: ATTEND(32, AS_COMPUTED); break;
                case 64: ATTEND(64, AS_COMPUTED); break;
                case 128: ATTEND(128, AS_COMPUTED); break;
                case -INT8: ATTEND(dim, INT8); break;
                case -E4M3: ATTEND(dim, E4M3); break;
                case -E5M2: ATTEND(dim, E5M2); break;
                default: ATTEND(dim, AS_COMPUTED);
            }
        }
}

/* Decodes over latents (MLA): all heads read the one key of a token, whose first v_dim elements are its value. So there
   is a matrix product for each tile of KEYS latents, which is copied to floats; sums of HEADS heads stay in registers.
   Quantised latents have two scales: one for the first v_dim elements, one for the others. */

#ifdef __AVX512F__ /* HEADS: whose sums are in registers together, two vectors of each */
#define LANES 16
#define HEADS 8
#else
#define LANES 8
#define HEADS 4
#endif
#define KEYS 16 /* of a tile */
#define TASK_HEADS 16
typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

INLINE float sum_of(vec x) {
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

/* num_heads heads of one row, at most TASK_HEADS. Rows of the local arrays are padded with zeros to pairs of vectors. */
INLINE void attend_latents(stored *out, const stored *q, const char *cache, const uint16_t *latent_scale,
                           const uint16_t *rest_scale, const int32_t *table, int64_t length, int64_t num_heads,
                           int64_t dim, int64_t v_dim, int64_t block_size, float scale, const int format) {
    int64_t wide = (dim + 2 * LANES - 1) / (2 * LANES) * 2, v_wide = (v_dim + 2 * LANES - 1) / (2 * LANES) * 2;
    vec query[TASK_HEADS * wide], acc[TASK_HEADS * v_wide], tile[KEYS * wide];
    float score[TASK_HEADS][KEYS], largest[TASK_HEADS], total[TASK_HEADS] = {0}, shrink[TASK_HEADS] = {0};
    memset(query, 0, sizeof query), memset(acc, 0, sizeof acc), memset(tile, 0, sizeof tile);
    for (int64_t h = 0; h < TASK_HEADS; h++) largest[h] = -INFINITY;
    for (int64_t h = 0; h < num_heads; h++)
        for (int64_t d = 0; d < dim; d++) ((float *)(query + h * wide))[d] = load(q[h * dim + d]) * scale;
    for (int64_t start = 0; start < length; start += KEYS) {
        int64_t n = length - start < KEYS ? length - start : KEYS;
        for (int64_t i = 0; i < n; i++) {
            int64_t token = start + i, slot = table[token / block_size] * block_size + token % block_size;
            const char *latent = cache + slot * dim * size_of(format);
            float *row = (float *)(tile + i * wide);
            if (format) {
                float first = scale_of(latent_scale[slot]), last = scale_of(rest_scale[slot]);
                widen(row, (const uint8_t *)latent, dim, format);
                for (int64_t d = 0; d < v_dim; d++) row[d] *= first;
                for (int64_t d = v_dim; d < dim; d++) row[d] *= last;
            } else
                for (int64_t d = 0; d < dim; d++) row[d] = load(((const stored *)latent)[d]);
        }
        for (int64_t h = 0; h < num_heads; h += HEADS)
            for (int64_t i = 0; i < KEYS; i += 2) {
                vec sum[HEADS][2] = {0};
                for (int64_t w = 0; w < wide; w++)
                    for (int g = 0; g < HEADS; g++)
                        for (int b = 0; b < 2; b++) sum[g][b] += query[(h + g) * wide + w] * tile[(i + b) * wide + w];
                for (int g = 0; g < HEADS; g++)
                    for (int b = 0; b < 2; b++) score[h + g][i + b] = sum_of(sum[g][b]);
            }
        for (int64_t h = 0; h < num_heads; h++) {
            float top = largest[h], sum = 0.0f;
            for (int64_t i = 0; i < n; i++) top = score[h][i] > top ? score[h][i] : top;
            for (int64_t i = 0; i < KEYS; i++) score[h][i] = i < n ? fast_exp(score[h][i] - top) : 0.0f;
            for (int64_t i = 0; i < KEYS; i++) sum += score[h][i];
            shrink[h] = start ? fast_exp(largest[h] - top) : 0.0f;
            total[h] = total[h] * shrink[h] + sum;
            largest[h] = top;
        }
        for (int64_t h = 0; h < num_heads; h += HEADS)
            for (int64_t w = 0; w < v_wide; w += 2) {
                vec sum[HEADS][2];
                for (int g = 0; g < HEADS; g++)
                    for (int b = 0; b < 2; b++) sum[g][b] = acc[(h + g) * v_wide + w + b] * shrink[h + g];
                for (int64_t i = 0; i < KEYS; i++)
                    for (int g = 0; g < HEADS; g++)
                        for (int b = 0; b < 2; b++) sum[g][b] += score[h + g][i] * tile[i * wide + w + b];
                for (int g = 0; g < HEADS; g++)
                    for (int b = 0; b < 2; b++) acc[(h + g) * v_wide + w + b] = sum[g][b];
            }
    }
    for (int64_t h = 0; h < num_heads; h++)
        for (int64_t d = 0; d < v_dim; d++) out[h * v_dim + d] = store(((float *)(acc + h * v_wide))[d] / total[h]);
}

/* q [B, H, dim], out [B, H, v_dim]; cache [num_slots, dim], if quantised with two scales [num_slots]; dim must fit
   MAX_TASK_WIDTH. A task is some heads of a row,
   whose result depends neither on the other heads nor on the other rows. */
void latent_decode(stored *out, const stored *q, const char *cache, const uint16_t *latent_scale,
                   const uint16_t *rest_scale, const int32_t *tables, const int32_t *lengths, int64_t format,
                   int64_t num_rows, int64_t num_heads, int64_t dim, int64_t v_dim, int64_t block_size,
                   int64_t table_stride, float scale, int threads) {
    int64_t tasks = (num_heads + TASK_HEADS - 1) / TASK_HEADS;
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t head = task * TASK_HEADS, left = num_heads - head, heads = left < TASK_HEADS ? left : TASK_HEADS;
            const stored *queries = q + (row * num_heads + head) * dim;
            stored *result = out + (row * num_heads + head) * v_dim;
            const int32_t *table = tables + row * table_stride;
#define ATTEND_LATENTS(FORMAT) \
    attend_latents(result, queries, cache, latent_scale, rest_scale, table, lengths[row], heads, dim, v_dim, block_size, \
                   scale, FORMAT)
            switch (format) {
                case INT8: ATTEND_LATENTS(INT8); break;
                case E4M3: ATTEND_LATENTS(E4M3); break;
                case E5M2: ATTEND_LATENTS(E5M2); break;
                default: ATTEND_LATENTS(AS_COMPUTED);
            }
        }
}
