/* x W^T + b on a CPU, float32, for the few rows of a decode step and the many of a prompt.

   A library's product is made for large matrices, and packs W in every call or looks up a plan for it. Here W is packed
   beforehand, in panels of WIDE of its rows, column by column, so that it is read once and in order:

       W [N, K]    rows 0..WIDE-1  ->  panel 0:  W[0,0] W[1,0] .. W[WIDE-1,0]  W[0,1] W[1,1] ..      K * WIDE numbers
                   rows WIDE..     ->  panel 1:  ..                                the last is padded with zeros

   A tile is ROWS rows of x times a panel; its sums stay in registers while k runs (Goto and van de Geijn 2008,
   "Anatomy of high-performance matrix multiplication", without packing x, which is small). One thread takes each sum in
   the order of k, so the bits of a row depend neither on the other rows nor on the number of threads. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__ /* 32 registers of 16 numbers: 24 sums, 2 of W, and room */
#define LANES 16
#define ROWS 12
#else /* 16 registers of 8, as in AVX2, or the compiler's emulation: 12 sums */
#define LANES 8
#define ROWS 6
#endif
#define WIDE (2 * LANES)
#define DEEP 1024            /* columns of W per pass, and ... */
#define TALL (20 * ROWS)     /* ... the most rows of x: both parts stay in a core's cache */
#define AHEAD 1024           /* numbers: a core's own prefetcher keeps fewer lines of memory in flight than it could */
#define WORTH_A_THREAD 65536 /* multiplications */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

/* out [rows, cols] = (start, or what out holds) + x [rows, depth] panel^T */
INLINE void tile(float *out, const float *x, const float *panel, const float *start, int64_t depth, int64_t x_stride,
                 int64_t out_stride, int64_t cols, const int rows) {
    float edge[WIDE];
    vec left[ROWS], right[ROWS];
    for (int r = 0; r < rows; r++) {
        const float *from = start ? start : out + r * out_stride;
        if (!start && cols < WIDE) from = memcpy(edge, from, cols * sizeof(float));
        left[r] = *(const vec *)from, right[r] = *(const vec *)(from + LANES);
    }
    for (int64_t k = 0; k < depth; k++) {
        vec a = *(const vec *)(panel + k * WIDE), b = *(const vec *)(panel + k * WIDE + LANES);
        for (int i = 0; i < WIDE; i += 16) __builtin_prefetch(panel + k * WIDE + AHEAD + i, 0, 2); /* to its second cache */
        for (int r = 0; r < rows; r++) left[r] += a * x[r * x_stride + k], right[r] += b * x[r * x_stride + k];
    }
    for (int r = 0; r < rows; r++) {
        float *to = cols < WIDE ? edge : out + r * out_stride;
        *(vec *)to = left[r], *(vec *)(to + LANES) = right[r];
        if (cols < WIDE) memcpy(out + r * out_stride, edge, cols * sizeof(float));
    }
}

int64_t panel_width(void) { return WIDE; }

/* out [M, N]; x [M, K] with row stride x_stride; start: the bias, padded with zeros to whole panels. */
void linear(float *out, const float *x, const float *panels, const float *start, int64_t num_rows, int64_t depth,
            int64_t width, int64_t x_stride, int threads) {
    int64_t pieces = (num_rows + TALL - 1) / TALL; /* of x, of equal height, so that threads have equal shares */
    int64_t height = pieces ? (num_rows + pieces * ROWS - 1) / (pieces * ROWS) * ROWS : 1;
#pragma omp parallel for collapse(2) num_threads(threads) if (num_rows * depth * width > WORTH_A_THREAD)
    for (int64_t top = 0; top < num_rows; top += height)
        for (int64_t at = 0; at < width; at += WIDE) {
            const float *panel = panels + at * depth;
            int64_t end = num_rows - top < height ? num_rows : top + height, cols = width - at < WIDE ? width - at : WIDE;
            for (int64_t k = 0; k < depth; k += DEEP) {
                int64_t some = depth - k < DEEP ? depth - k : DEEP, row = top;
                const float *first = k == 0 ? start + at : 0;
#define TILE(rows) \
    tile(out + row * width + at, x + row * x_stride + k, panel + k * WIDE, first, some, x_stride, width, cols, rows)
                for (; row + ROWS <= end; row += ROWS) TILE(ROWS);
                switch (end - row) { /* with a constant number of rows the sums stay in registers */
                    case 1: TILE(1); break;
                    case 2: TILE(2); break;
                    case 3: TILE(3); break;
                    case 4: TILE(4); break;
                    case 5: TILE(5); break;
#if ROWS > 6
                    case 6: TILE(6); break;
                    case 7: TILE(7); break;
                    case 8: TILE(8); break;
                    case 9: TILE(9); break;
                    case 10: TILE(10); break;
                    case 11: TILE(11); break;
#endif
                }
            }
        }
}
