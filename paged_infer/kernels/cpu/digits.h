/* A row of x in fixed point, as digits to the base 256 that multiply codes of 8 bits:

       x[k] ~ x_scale (digit 0 + 256 digit 1 + 65536 digit 2),    -128 <= digit <= 127

   One digit is W8A8's rounding of x, to the bit as in quant/product.py: x_scale = max |x| / 127.5, and x / x_scale to
   nearest. A factor of 127.5 / max |x| would be faster, but x = -max |x| is between two codes there, and its last bit
   would change the code in 27 of 100 rows; by this rule in 1. Otherwise x is to keep its precision, and the digits lose
   less than its dtype's rounding of the largest number: two for bfloat16, three for float32. */

#include <float.h>
#include "elements.h"

/* digits [num_digits, stride] of x [depth] -> x_scale. That of a row with NaN or infinity is NaN or infinity, too, and so
   are its results. */
INLINE float to_digits(int8_t *digits, int64_t stride, const stored *x, int64_t depth, const int num_digits) {
    const float highest = num_digits == 1 ? 127 : num_digits == 2 ? 127 * 257 : 127 * 65793, lowest = -highest - 1;
    const float limit = num_digits == 1 ? 127.5f : highest;
    int32_t largest = 0; /* of the bits of |x|, whose order is that of the numbers, with NaN above all */
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

/* totals [groups] = the sum of deep digits each, times middle */
INLINE void add_groups(int32_t *totals, const int8_t *digits, int64_t groups, int64_t deep, int32_t middle) {
    for (int64_t g = 0; g < groups; g++, digits += deep) {
        int32_t total = 0;
        for (int64_t k = 0; k < deep; k++) total += digits[k];
        totals[g] = total * middle;
    }
}
