/* The elementwise operations of a step, on a CPU: one pass over memory each. Tensors are float32, or with -DBFLOAT16
   bfloat16, which is the upper half of a float32. All arithmetic is in float32.

   Built by build.py with the machine's compiler, called by ops.py. Tests hold each function to the torch reference of its
   name. Loops over the last dimension are plain, for the compiler to vectorise. T tokens, H query heads, H_kv key heads,
   D their dimension. */

#include "elements.h"
#include "kv_codes.h"

#define WORTH_A_THREAD 16384 /* elements; below this, a thread costs more than it saves */

INLINE float mean_square(const stored *x, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += load(x[i]) * load(x[i]);
    return sum / (float)n;
}

/* total = x + residual; normed = total / rms(total) * (weight + offset). Without a residual, total is x and is not written. */
void add_rms_norm(stored *normed, stored *total, const stored *x, const stored *residual, const stored *weight,
                  int64_t num_tokens, int64_t width, int64_t x_stride, int64_t residual_stride, float eps,
                  float offset, int threads) {
#pragma omp parallel for num_threads(threads) if (num_tokens * width > WORTH_A_THREAD)
    for (int64_t t = 0; t < num_tokens; t++) {
        const stored *row = x + t * x_stride;
        if (residual) {
            const stored *other = residual + t * residual_stride;
            stored *sum = total + t * width;
            for (int64_t i = 0; i < width; i++) sum[i] = store(load(row[i]) + load(other[i]));
            row = sum;
        }
        float scale = 1.0f / sqrtf(mean_square(row, width) + eps);
        for (int64_t i = 0; i < width; i++)
            normed[t * width + i] = store(load(row[i]) * scale * (load(weight[i]) + offset));
    }
}

/* out [T, I] = silu(gate) * up, from rows [gate | up]. */
void silu_mul(stored *out, const stored *gate_up, int64_t num_tokens, int64_t width, int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads) if (num_tokens * width > WORTH_A_THREAD)
    for (int64_t t = 0; t < num_tokens; t++) {
        const stored *gate = gate_up + t * stride, *up = gate + width;
        for (int64_t i = 0; i < width; i++) {
            float g = load(gate[i]), small = fast_exp(-fabsf(g)); /* within [0, 1], however large the gate */
            out[t * width + i] = store(g * (g < 0.0f ? small : 1.0f) / (1.0f + small) * load(up[i]));
        }
    }
}

/* Half of a head, x, turned by the other half. Both halves in one loop would not be vectorised. */
INLINE void rotate(stored *restrict out, const stored *x, const stored *other, const stored *weight,
                   const stored *other_weight, const stored *cos, const stored *sin, int64_t half, float scale,
                   float offset) {
    for (int64_t i = 0; i < half; i++) {
        float own = load(x[i]) * scale * (weight ? load(weight[i]) + offset : 1.0f);
        float turned = load(other[i]) * scale * (weight ? load(other_weight[i]) + offset : 1.0f);
        out[i] = store(own * load(cos[i]) + turned * load(sin[i]));
    }
}

/* qk [T, num_qk, D]: heads of qkv, each normalised (if there is a weight) and rotated to the position of its token.
   The first half of sin is negated, as in model.layers.RotaryEmbedding. With slots, the last num_kv of these heads, the
   keys, and the num_kv after them, the values, are also stored. */
void qk_norm_rope(stored *qk, const stored *qkv, const stored *cos, const stored *sin, const stored *weight,
                  stored *k_cache, stored *v_cache, const int64_t *slots, int64_t num_kv,
                  int64_t num_tokens, int64_t num_qk, int64_t dim, int64_t stride, float eps, float offset,
                  int threads) {
    int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) if (num_tokens * num_qk * dim > WORTH_A_THREAD)
    for (int64_t t = 0; t < num_tokens; t++) {
        const stored *c = cos + t * dim, *s = sin + t * dim;
        for (int64_t h = 0; h < num_qk; h++) {
            const stored *in = qkv + t * stride + h * dim, *w = weight ? weight + h * dim : 0;
            stored *out = qk + (t * num_qk + h) * dim;
            float scale = weight ? 1.0f / sqrtf(mean_square(in, dim) + eps) : 1.0f;
            rotate(out, in, in + half, w, w ? w + half : 0, c, s, half, scale, offset);
            rotate(out + half, in + half, in, w ? w + half : 0, w, c + half, s + half, half, scale, offset);
        }
        if (slots && slots[t] >= 0) {
            int64_t width = num_kv * dim, slot = slots[t] * width;
            memcpy(k_cache + slot, qk + (t + 1) * num_qk * dim - width, width * sizeof(stored));
            memcpy(v_cache + slot, qkv + t * stride + num_qk * dim, width * sizeof(stored));
        }
    }
}

/* Store rows of k and, if there is one, v [T, H_kv * D] at their slots; a row with slot -1 is not stored. */
void store_kv(stored *k_cache, stored *v_cache, const stored *k, const stored *v, const int64_t *slots,
              int64_t num_tokens, int64_t width, int64_t k_stride, int64_t v_stride) {
    for (int64_t t = 0; t < num_tokens; t++) {
        if (slots[t] < 0) continue;
        memcpy(k_cache + slots[t] * width, k + t * k_stride, width * sizeof(stored));
        if (v) memcpy(v_cache + slots[t] * width, v + t * v_stride, width * sizeof(stored));
    }
}

/* The same for a quantised cache: each vector of a row [H_kv, D] is stored as codes and a scale (kv_codes.h). */
void store_kv_codes(uint8_t *k_cache, uint8_t *v_cache, uint16_t *k_scale, uint16_t *v_scale, const stored *k,
                    const stored *v, const int64_t *slots, int64_t num_tokens, int64_t num_kv, int64_t dim,
                    int64_t k_stride, int64_t v_stride, int64_t format, int threads) {
#pragma omp parallel for num_threads(threads) if (num_tokens * num_kv * dim > WORTH_A_THREAD)
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t h = 0; h < num_kv && slots[t] >= 0; h++) {
            int64_t at = slots[t] * num_kv + h;
#define STORE(FORMAT) \
    store_vector(k_cache + at * dim, k_scale + at, k + t * k_stride + h * dim, dim, FORMAT); \
    store_vector(v_cache + at * dim, v_scale + at, v + t * v_stride + h * dim, dim, FORMAT)
            switch (format) {
                case INT8: STORE(INT8); break;
                case E4M3: STORE(E4M3); break;
                default: STORE(E5M2);
            }
        }
}

/* The same for latents (MLA) [T, dim]: the first v_dim elements and the others are two vectors, with a scale each. */
void store_latent_codes(uint8_t *cache, uint16_t *latent_scale, uint16_t *rest_scale, const stored *x,
                        const int64_t *slots, int64_t num_tokens, int64_t dim, int64_t v_dim, int64_t stride,
                        int64_t format) {
    for (int64_t t = 0; t < num_tokens; t++) {
        const stored *row = x + t * stride;
        int64_t at = slots[t];
        if (at < 0) continue;
#define STORE_BOTH(FORMAT) \
    store_vector(cache + at * dim, latent_scale + at, row, v_dim, FORMAT); \
    store_vector(cache + at * dim + v_dim, rest_scale + at, row + v_dim, dim - v_dim, FORMAT)
        switch (format) {
            case INT8: STORE_BOTH(INT8); break;
            case E4M3: STORE_BOTH(E4M3); break;
            default: STORE_BOTH(E5M2);
        }
    }
}

/* Maps floats to integers of the same order, which a vector unit compares; NaN is above all, -0 equals 0. */
INLINE int32_t rank(float x) {
    union { float value; int32_t bits; } as = {x};
    int32_t size = as.bits & INT32_MAX, is_nan = -(size > 0x7f800000), is_zero = -(size == 0);
    int32_t ordered = as.bits ^ ((as.bits >> 31) & INT32_MAX);
    return (ordered & ~(is_nan | is_zero)) | (is_nan & INT32_MAX);
}

#define STRETCH 64 /* logits: the maximum is taken first, and only then its index searched */

/* The largest of each row of logits [R, V] and its index; of equals the first. NaN is the largest of all. */
void argmax(int64_t *places, stored *values, const stored *logits, int64_t num_rows, int64_t width, int64_t stride,
            int threads) {
#pragma omp parallel for num_threads(threads) if (num_rows * width > 4 * WORTH_A_THREAD)
    for (int64_t r = 0; r < num_rows; r++) {
        const stored *row = logits + r * stride;
        int32_t largest = INT32_MIN;
        int64_t place = 0;
        for (int64_t start = 0; start < width; start += STRETCH) {
            int64_t end = start + STRETCH < width ? start + STRETCH : width;
            int32_t top = INT32_MIN;
            for (int64_t i = start; i < end; i++) {
                int32_t one = rank(load(row[i]));
                top = one > top ? one : top;
            }
            if (top > largest) largest = top, place = start;
        }
        while (rank(load(row[place])) < largest) place++;
        places[r] = place;
        values[r] = row[place];
    }
}

/* out [R, V]: the logits of tokens whose bit is 1 (bit i % 32 of word i / 32), -inf for the others. */
void mask_logits(stored *out, const stored *logits, const uint32_t *masks, int64_t num_rows, int64_t width,
                 int64_t stride, int threads) {
    const stored never = store(-INFINITY);
#pragma omp parallel for num_threads(threads) if (num_rows * width > 4 * WORTH_A_THREAD)
    for (int64_t r = 0; r < num_rows; r++) {
        const stored *row = logits + r * stride;
        const uint32_t *words = masks + r * ((width + 31) / 32);
        stored *kept = out + r * width;
        for (int64_t i = 0; i < width - 31; i += 32) {
            uint32_t word = words[i / 32];
            for (int bit = 0; bit < 32; bit++) kept[i + bit] = word >> bit & 1 ? row[i + bit] : never;
        }
        for (int64_t i = width / 32 * 32; i < width; i++) kept[i] = words[i / 32] >> i % 32 & 1 ? row[i] : never;
    }
}
