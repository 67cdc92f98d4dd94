/* The pieces of a decode step around its matrix products, on a CPU: one pass over memory each, float32.

   Built by c_runtime.py with the machine's own compiler, called by c_ops.py and paged_attention_c.py. Each function
   means what the torch twin of its name means; the tests hold the two together. Loops over the last dimension are
   written plainly, for the compiler to vectorise. T tokens, H query heads, H_kv key heads, D their dimension. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define WORTH_A_THREAD 16384 /* elements; below, waking a thread costs more than it helps */

/* e^x for x <= 0, to 2 ulps, in a form that vectorises: 2^n * 2^f with |f| <= 1/2. NaN stays NaN. */
INLINE float fast_exp(float x) {
    float y = x * 1.44269504088896f;
    y = y < -126.0f ? -126.0f : y;
    int32_t n = (int32_t)(y + (y < 0.0f ? -0.5f : 0.5f));
    float f = y - (float)n;
    float p = 1.52527338e-5f;
    p = p * f + 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    int32_t bits = (n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.3f ? 0.0f : p * power;
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* total = x + residual; normed = total / rms(total) * weight. Without a residual the total is x, and is not written. */
void add_rms_norm(float *normed, float *total, const float *x, const float *residual, const float *weight,
                  int64_t num_tokens, int64_t width, int64_t x_stride, int64_t residual_stride, float eps,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (num_tokens * width > WORTH_A_THREAD)
    for (int64_t t = 0; t < num_tokens; t++) {
        const float *row = x + t * x_stride;
        if (residual) {
            const float *other = residual + t * residual_stride;
            float *sum = total + t * width;
            for (int64_t i = 0; i < width; i++) sum[i] = row[i] + other[i];
            row = sum;
        }
        float scale = 1.0f / sqrtf(dot(row, row, width) / (float)width + eps);
        for (int64_t i = 0; i < width; i++) normed[t * width + i] = row[i] * scale * weight[i];
    }
}

/* out [T, I] = silu(gate) * up, from rows [gate | up]. */
void silu_mul(float *out, const float *gate_up, int64_t num_tokens, int64_t width, int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads) if (num_tokens * width > WORTH_A_THREAD)
    for (int64_t t = 0; t < num_tokens; t++) {
        const float *gate = gate_up + t * stride, *up = gate + width;
        for (int64_t i = 0; i < width; i++) {
            float small = fast_exp(gate[i] < 0.0f ? gate[i] : -gate[i]); /* within [0, 1], however large the gate */
            out[t * width + i] = gate[i] * (gate[i] < 0.0f ? small : 1.0f) / (1.0f + small) * up[i];
        }
    }
}

/* qk [T, num_qk, D]: heads of qkv, each normalised (where there is a weight) and turned to its token's position.
   The first half of sin is negated, as model.layers.RotaryEmbedding makes it. */
void qk_norm_rope(float *qk, const float *qkv, const float *cos, const float *sin, const float *weight,
                  int64_t num_tokens, int64_t num_qk, int64_t dim, int64_t stride, float eps, int threads) {
    int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) if (num_tokens * num_qk * dim > WORTH_A_THREAD)
    for (int64_t t = 0; t < num_tokens; t++) {
        const float *c = cos + t * dim, *s = sin + t * dim;
        for (int64_t h = 0; h < num_qk; h++) {
            const float *in = qkv + t * stride + h * dim;
            float *x = qk + (t * num_qk + h) * dim;
            float scale = weight ? 1.0f / sqrtf(dot(in, in, dim) / (float)dim + eps) : 1.0f;
            for (int64_t i = 0; i < dim; i++) x[i] = weight ? in[i] * scale * weight[h * dim + i] : in[i];
            for (int64_t i = 0; i < half; i++) {
                float first = x[i], second = x[i + half];
                x[i] = first * c[i] + second * s[i];
                x[i + half] = second * c[i + half] + first * s[i + half];
            }
        }
    }
}

/* Rows of k and v [T, H_kv * D] to their slots; a slot of -1 writes nothing. */
void store_kv(float *k_cache, float *v_cache, const float *k, const float *v, const int64_t *slots, int64_t num_tokens,
              int64_t width, int64_t k_stride, int64_t v_stride) {
    for (int64_t t = 0; t < num_tokens; t++) {
        if (slots[t] < 0) continue;
        memcpy(k_cache + slots[t] * width, k + t * k_stride, width * sizeof(float));
        memcpy(v_cache + slots[t] * width, v + t * v_stride, width * sizeof(float));
    }
}

#define TILE 32      /* keys looked at together */
#define MAX_GROUP 16 /* query heads that read a key together */
#define MAX_DIM 256

/* One sequence's query heads of one group, over its keys first..length-1: online softmax (Milakov 2018), tile by tile,
   reading keys and values where they lie. */
INLINE void attend_group(float *out, const float *q, const float *keys, const float *values, const int32_t *table,
                         int64_t first, int64_t length, int64_t group, int64_t dim, int64_t block_size,
                         int64_t slot_stride, float scale) {
    float acc[MAX_GROUP * MAX_DIM], score[MAX_GROUP][TILE], largest[MAX_GROUP], total[MAX_GROUP];
    int64_t place[TILE];
    for (int64_t g = 0; g < group; g++) largest[g] = -INFINITY, total[g] = 0.0f;
    memset(acc, 0, group * dim * sizeof(float));
    int64_t block = first / block_size, offset = first % block_size;
    for (int64_t start = first; start < length; start += TILE) {
        int64_t n = length - start < TILE ? length - start : TILE;
        for (int64_t i = 0; i < n; i++) {
            place[i] = ((int64_t)table[block] * block_size + offset) * slot_stride;
            if (++offset == block_size) offset = 0, block++;
        }
        for (int64_t i = 0; i < n; i++)
            for (int64_t g = 0; g < group; g++) score[g][i] = dot(q + g * dim, keys + place[i], dim) * scale;
        for (int64_t g = 0; g < group; g++) {
            float top = largest[g], sum = 0.0f;
            for (int64_t i = 0; i < n; i++) top = score[g][i] > top ? score[g][i] : top;
            for (int64_t i = 0; i < n; i++) score[g][i] = fast_exp(score[g][i] - top);
            for (int64_t i = 0; i < n; i++) sum += score[g][i];
            float shrink = start == first ? 0.0f : fast_exp(largest[g] - top);
            for (int64_t d = 0; d < dim; d++) acc[g * dim + d] *= shrink;
            total[g] = total[g] * shrink + sum;
            largest[g] = top;
        }
        for (int64_t i = 0; i < n; i++)
            for (int64_t g = 0; g < group; g++)
                for (int64_t d = 0; d < dim; d++) acc[g * dim + d] += score[g][i] * values[place[i] + d];
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t d = 0; d < dim; d++) out[g * dim + d] = acc[g * dim + d] / total[g];
}

/* One query a sequence: q and out [B, H, D], rows of q apart by q_stride; caches [num_slots, H_kv, D]. */
void paged_decode(float *out, const float *q, const float *k_cache, const float *v_cache, const int32_t *tables,
                  const int32_t *lengths, int64_t num_rows, int64_t num_heads, int64_t num_kv_heads, int64_t dim,
                  int64_t block_size, int64_t table_stride, int64_t q_stride, int64_t window, float scale,
                  int threads) {
    int64_t group = num_heads / num_kv_heads, slot_stride = num_kv_heads * dim;
#pragma omp parallel for collapse(2) schedule(dynamic, 2) num_threads(threads)
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t head = 0; head < num_kv_heads; head++) {
            int64_t length = lengths[row], first = length > window ? length - window : 0;
            const int32_t *table = tables + row * table_stride;
            const float *keys = k_cache + head * dim, *values = v_cache + head * dim;
            for (int64_t g = 0; g < group; g += MAX_GROUP) {
                int64_t members = group - g < MAX_GROUP ? group - g : MAX_GROUP, at = (head * group + g) * dim;
                const float *queries = q + row * q_stride + at;
                float *result = out + row * num_heads * dim + at;
#define ATTEND(D) \
    attend_group(result, queries, keys, values, table, first, length, members, D, block_size, slot_stride, scale)
                switch (dim) { /* a dimension that the compiler knows is unrolled */
                    case 32: ATTEND(32); break;
                    case 64: ATTEND(64); break;
                    case 128: ATTEND(128); break;
                    default: ATTEND(dim);
                }
            }
        }
}
