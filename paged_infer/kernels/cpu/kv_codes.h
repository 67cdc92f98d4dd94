/* Quantised keys and values (kernels/kv_quant.py): codes [num_slots, H_kv, D] and float16 scales [num_slots, H_kv].
   Include elements.h first. */

enum { AS_COMPUTED, INT8, E4M3, E5M2 }; /* as FORMATS of kv_quant.py; AS_COMPUTED: not quantised, of type `stored` */

INLINE float float_of(int32_t bits) {
    union { int32_t bits; float value; } as = {bits};
    return as.value;
}
INLINE int32_t bits_of(float x) {
    union { float value; int32_t bits; } as = {x};
    return as.bits;
}

/* A scale, float16 >= 0 or NaN -> float. */
INLINE float scale_of(uint16_t half) {
    if (half >= 0x7c00) return NAN;
    return half < 0x400 ? half * 0x1p-24f : float_of((half << 13) + (112 << 23));
}
INLINE uint16_t half_above(float x) { /* the smallest float16 >= x, for x within 0 .. 65504 */
    return x < 0x1p-14f ? (uint16_t)ceilf(x * 0x1p24f) : (uint16_t)((bits_of(x) + 0x1fff - (112 << 23)) >> 13);
}

INLINE int32_t size_of(const int format) { return format == AS_COMPUTED ? sizeof(stored) : 1; }

/* out [n] = codes [n]. float8 bits are shifted to a float's sign, exponent and mantissa; a factor corrects the bias. */
INLINE void widen(float *out, const uint8_t *codes, int64_t n, const int format) {
    if (format == INT8)
        for (int64_t i = 0; i < n; i++) out[i] = (int8_t)codes[i];
    else if (format == E4M3)
        for (int64_t i = 0; i < n; i++)
            out[i] = float_of((codes[i] & 0x80) << 24 | (codes[i] & 0x7f) << 20) * 0x1p120f;
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = float_of((codes[i] & 0x80) << 24 | (codes[i] & 0x7f) << 21) * 0x1p112f;
}

/* float8 with `mantissa` bits nearest to x, ties to even; |x| <= the largest code. bias: a float's minus float8's. */
INLINE uint8_t narrow(float x, const int mantissa, const int bias) {
    int32_t bits = bits_of(x), size = bits & INT32_MAX, drop = 23 - mantissa, smallest = (bias + 1) << 23;
    int32_t normal = (size + (1 << (drop - 1)) - 1 + ((size >> drop) & 1) - (bias << 23)) >> drop;
    int32_t below = (int32_t)rintf(float_of(size) * float_of((127 + 127 - bias - 1 + mantissa) << 23));
    return (uint8_t)((bits >> 24 & 0x80) | (size < smallest ? below : normal));
}

/* Quantise a vector x [n]: codes [n] and its scale. */
INLINE void store_vector(uint8_t *codes, uint16_t *scale, const stored *x, int64_t n, const int format) {
    const float limit = format == INT8 ? 127.0f : format == E4M3 ? 448.0f : 57344.0f;
    int32_t largest = 0; /* bits of |x|: as integers they have the order of |x|, with NaN above all */
    for (int64_t i = 0; i < n; i++) {
        int32_t size = bits_of(load(x[i])) & INT32_MAX;
        largest = size > largest ? size : largest;
    }
    if (largest >= 0x7f800000) {
        *scale = 0x7e00;
        memset(codes, 0, n);
        return;
    }
    float exact = float_of(largest) / limit;
    *scale = half_above(exact < 65504.0f ? exact : 65504.0f);
    float inverse = *scale ? 1.0f / scale_of(*scale) : 0.0f;
    for (int64_t i = 0; i < n; i++) {
        float y = load(x[i]) * inverse;
        y = y > limit ? limit : y < -limit ? -limit : y;
        codes[i] = format == INT8 ? (uint8_t)(int8_t)rintf(y) : format == E4M3 ? narrow(y, 3, 120) : narrow(y, 2, 112);
    }
}
