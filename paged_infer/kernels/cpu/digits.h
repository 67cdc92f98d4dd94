/* A row of x in fixed point, as int8 digits in base 256, which are multiplied by the 8-bit codes of W:

       x[k] ~ x_scale (digit 0 + 256 digit 1 + 65536 digit 2),    -128 <= digit <= 127

   One digit is W8A8's rounding of x, with the bits of quant/product.py: x_scale = max |x| / 127.5, and x / x_scale is
   rounded to nearest. Multiplying by 127.5 / max |x| would be faster, but x = -max |x| lies halfway between two codes,
   and a different last bit of max |x| would change its code in 27 of 100 rows; with the division, in 1. Weight-only
   products keep x's precision: two digits for bfloat16 and three for float32 lose less than that dtype's rounding of
   max |x|. */

#include <float.h>
#include "elements.h"

/* Writes the digits [num_digits, stride] of x [depth]; returns x_scale. If x has NaN or infinity, x_scale is NaN or
   infinite, and so are the row's results. */
INLINE float to_digits(int8_t *digits, int64_t stride, const stored *x, int64_t depth, const int num_digits) {
    const float highest = num_digits == 1 ? 127 : num_digits == 2 ? 127 * 257 : 127 * 65793, lowest = -highest - 1;
    const float limit = num_digits == 1 ? 127.5f : highest;
    int32_t largest = 0; /* bits of |x|: as integers they have the order of |x|, with NaN above all */
    for (int64_t k = 0; k < depth; k++) {
        union { float value; int32_t bits; } number = {load(x[k])};
        int32_t bits = number.bits & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    union { int32_t bits; float value; } top = {largest};
    float scale = top.value / limit;
    scale = scale < FLT_MIN ? FLT_MIN : scale;
    for (int64_t k = 0; k < depth; k++) {
        float scaled = rintf(load(x[k]) / scale);
        scaled = scaled < highest ? scaled : highest, scaled = scaled > lowest ? scaled : lowest;
        int32_t rest = (int32_t)scaled;
        for (int d = 0; d < num_digits; d++) {
            int8_t digit = (int8_t)rest;
            digits[d * stride + k] = digit, rest = (rest - digit) >> 8;
        }
    }
    return scale;
}

/* totals [groups] = middle times the sum of each group's `deep` digits */
INLINE void add_groups(int32_t *totals, const int8_t *digits, int64_t groups, int64_t deep, int32_t middle) {
    for (int64_t g = 0; g < groups; g++, digits += deep) {
        int32_t total = 0;
        for (int64_t k = 0; k < deep; k++) total += digits[k];
        totals[g] = total * middle;
    }
}
