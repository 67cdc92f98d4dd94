/* What the C files that serve both dtypes share: a tensor's elements as float32, and e^x and tanh without branches. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef BFLOAT16
typedef uint16_t stored;
INLINE float load(stored x) {
    union { uint32_t bits; float value; } wide = {(uint32_t)x << 16};
    return wide.value;
}
INLINE stored store(float x) { /* to the nearest, ties to even; NaN stays NaN */
    union { float value; uint32_t bits; } wide = {x};
    uint32_t rounded = (wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16;
    return x == x ? rounded : 0x7fc0;
}
#else
typedef float stored;
INLINE float load(stored x) { return x; }
INLINE stored store(float x) { return x; }
#endif

/* e^x for x <= 0, to 2 ulps, without a branch, so that it vectorises: 2^n * 2^f, |f| <= 1/2. NaN stays NaN. */
INLINE float fast_exp(float x) {
    float y = x * 1.44269504088896f, clipped = y < -126.0f ? -126.0f : y, whole = rintf(clipped), f = clipped - whole;
    float p = 1.52527338e-5f;
    p = p * f + 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)whole + 127) << 23};
    return y < -126.0f ? 0.0f : p * power.value; /* p is NaN where y is */
}

/* To 2e-7 of its value, without a branch. Near 0, where the formula cancels, it is a polynomial. NaN stays NaN. */
INLINE float fast_tanh(float x) {
    float square = x * x, power = fast_exp(-2.0f * fabsf(x)), far = (1.0f - power) / (1.0f + power);
    float near = 0.01728459f;
    near = near * square - 0.05313979f;
    near = near * square + 0.13328335f;
    near = near * square - 0.3333328f;
    return square < 0.3f ? x + x * square * near : (x < 0.0f ? -far : far);
}
