/* x W^T + b on a CPU, bfloat16, for the few rows of a decode step and the many of a prompt; sums are float32.

   W is packed beforehand as in linear.c, but in pairs of columns, as the instructions for bfloat16 multiply them:

       W [N, K]    rows 0..31  ->  panel 0:  W[0,0] W[0,1]  W[1,0] W[1,1] .. W[31,0] W[31,1]   W[0,2] W[0,3]  ..
                   rows 32..   ->  panel 1:  ..              K is padded with zeros to a multiple of DEEP, N of WIDE

   The machine decides how a tile is multiplied, whatever the number of rows:

       AMX            blocks of up to 16 rows of x, 16 x 16 sums in each of four tile registers, 32 columns at a time
       AVX512-BF16    blocks of ROWS rows, a pair of columns at a time
       otherwise      the same, with both elements of a pair converted to float32 (a shift)

   One thread computes each sum in the order of k, so the bits of a row depend neither on the other rows nor on the
   number of threads. They do depend on the machine: the three ways round differently. */

#include <stdint.h>
#include <string.h>

#define WIDE 32              /* rows of W in a panel */
#define DEEP 32              /* columns of W in a step of AMX */
#define TALL 256             /* the most rows of x that a panel is multiplied by: they stay in a core's cache */
#define SOON 4096            /* elements to prefetch ahead */
#define LARGE (1 << 20)      /* elements of an output that is too large to be kept in the cache */
#define WORTH_A_THREAD 65536 /* multiplications */
#define INLINE static inline __attribute__((always_inline))

/* x [M, depth] with row stride x_stride, depth padded; start: the bias in float32, padded to whole panels. */
typedef struct {
    uint16_t *out;
    const uint16_t *x, *panels;
    const float *start;
    int64_t depth, width, x_stride;
    int past_cache; /* whether to write `out` past the cache (non-temporal stores) */
} product;

INLINE void put(uint16_t *out, const float *sums, int64_t cols) { /* to the nearest, ties to even; NaN stays NaN */
    uint16_t row[WIDE];
    for (int i = 0; i < WIDE; i++) {
        union { float value; uint32_t bits; } wide = {sums[i]};
        row[i] = sums[i] == sums[i] ? (wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16 : 0x7fc0;
    }
    memcpy(out, row, cols * sizeof *row);
}

#ifdef __AVX512BF16__
#include <immintrin.h>
#define LANES 16
#define ROWS 12
typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef __m512i pairs;
INLINE pairs read_pairs(const uint16_t *at) { return _mm512_loadu_si512(at); }
INLINE pairs same_pair(const uint16_t *at) {
    int32_t pair;
    memcpy(&pair, at, sizeof pair);
    return _mm512_set1_epi32(pair);
}
INLINE void add_products(vec *sum, const pairs *a, const pairs *b) {
    *sum = (vec)_mm512_dpbf16_ps((__m512)*sum, (__m512bh)*a, (__m512bh)*b);
}
#else
#ifdef __AVX512F__
#define LANES 16
#define ROWS 10
#else
#define LANES 8
#define ROWS 4
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef struct { vec even, odd; } pairs;
typedef uint32_t bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
INLINE pairs widened(bits both) { return (pairs){(vec)(both << 16), (vec)(both & 0xffff0000)}; }
INLINE pairs read_pairs(const uint16_t *at) { return widened(*(const bits *)at); }
INLINE pairs same_pair(const uint16_t *at) {
    uint32_t pair;
    memcpy(&pair, at, sizeof pair);
    return widened((bits){0} + pair);
}
INLINE void add_products(vec *sum, const pairs *a, const pairs *b) { *sum += a->even * b->even, *sum += a->odd * b->odd; }
#endif

/* `rows` rows of x times 2 LANES rows of W, beginning at row `first` of the panel */
INLINE void tile(const product *p, int64_t row, int64_t at, int64_t first, int64_t cols, const int rows) {
    const uint16_t *x = p->x + row * p->x_stride, *panel = p->panels + at * p->depth + 2 * first;
    const float *start = p->start + at + first;
    vec left[ROWS], right[ROWS];
    for (int r = 0; r < rows; r++) left[r] = *(const vec *)start, right[r] = *(const vec *)(start + LANES);
    for (int64_t k = 0; k < p->depth; k += 2) {
        pairs a = read_pairs(panel + k * WIDE), b = read_pairs(panel + k * WIDE + 2 * LANES);
        for (int r = 0; r < rows; r++) {
            pairs both = same_pair(x + r * p->x_stride + k);
            add_products(&left[r], &a, &both), add_products(&right[r], &b, &both);
        }
    }
    for (int r = 0; r < rows; r++) {
        float sums[WIDE] = {0};
        *(vec *)sums = left[r], *(vec *)(sums + LANES) = right[r];
        put(p->out + (row + r) * p->width + at + first, sums, cols - first < 2 * LANES ? cols - first : 2 * LANES);
    }
}

/* rows [top, end) of x times the panel of rows [at, at + WIDE) of W */
INLINE void strip(const product *p, int64_t top, int64_t end, int64_t at) {
    int64_t cols = p->width - at < WIDE ? p->width - at : WIDE;
    for (int64_t first = 0; first < cols; first += 2 * LANES) {
        int64_t row = top;
        for (; row + ROWS <= end; row += ROWS) tile(p, row, at, first, cols, ROWS);
        switch (end - row) { /* with a constant number of rows the sums stay in registers */
#define TILE(n) case n: tile(p, row, at, first, cols, n); break;
            TILE(1) TILE(2) TILE(3)
#if ROWS > 4
            TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9)
#endif
#if ROWS > 10
            TILE(10) TILE(11)
#endif
        }
    }
}

#include "amx.h"

#if defined __AMX_BF16__ && defined __linux__
static void amx_put(const product *p, int64_t row, int64_t at, int height, const float *sums) {
    uint16_t *out = p->out + row * p->width + at;
    uint32_t cols = p->width - at < WIDE ? p->width - at : WIDE;
    for (int r = 0; r < height; r++, out += p->width) {
        __m512 left = _mm512_loadu_ps(sums + r * WIDE), right = _mm512_loadu_ps(sums + r * WIDE + 16);
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(right, left);
        if (p->past_cache) _mm512_stream_si512((void *)out, both);
        else if (cols == WIDE) _mm512_storeu_si512(out, both);
        else _mm512_mask_storeu_epi16(out, (1u << cols) - 1, both);
    }
}

/* One or two blocks of x, which begin at `row` and `next`, times a panel. Meanwhile each step prefetches `lines` cache
   lines, beginning at `ahead`. */
INLINE void amx_tile(const product *p, int64_t row, int64_t next, int64_t at, int height, const uint16_t *ahead, int lines,
                     const int two) {
    float sums[2][16 * WIDE];
    const float *start = p->start + at;
    const uint16_t *x = p->x + row * p->x_stride, *y = p->x + next * p->x_stride, *w = p->panels + at * p->depth;
    int64_t x_bytes = 2 * p->x_stride;
    _tile_loadd(0, start, 0); /* a stride of 0: the bias in each row */
    _tile_loadd(1, start + 16, 0);
    if (two) _tile_loadd(2, start, 0);
    if (two) _tile_loadd(3, start + 16, 0);
    for (int64_t k = 0; k < p->depth; k += DEEP, w += DEEP * WIDE, ahead += DEEP * WIDE) {
        _tile_loadd(6, w, 4 * WIDE);
        _tile_loadd(7, w + 32, 4 * WIDE);
        _tile_loadd(4, x + k, x_bytes);
        if (two) _tile_loadd(5, y + k, x_bytes);
        for (int i = 0; i < lines; i++) _mm_prefetch(ahead + i * 32, _MM_HINT_T1);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) _tile_dpbf16ps(2, 5, 6);
        if (two) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 4 * WIDE);
    _tile_stored(1, sums[0] + 16, 4 * WIDE);
    if (two) _tile_stored(2, sums[1], 4 * WIDE);
    if (two) _tile_stored(3, sums[1] + 16, 4 * WIDE);
    amx_put(p, row, at, height, sums[0]);
    if (two) amx_put(p, next, at, height, sums[1]);
}

/* Like strip. All blocks have the same height: the last may overlap the one before; its rows get the same bits again. */
static void amx_strip(const product *p, int64_t top, int64_t end, int64_t at, int height) {
    int64_t last = end - height;
    int tiles = (end - top + 2 * height - 1) / (2 * height), lines = (DEEP * WIDE / 32 + tiles - 1) / tiles;
    /* where to prefetch: with one tile, what it reads next; with more, the next panel, divided among them */
    const uint16_t *ahead = p->panels + at * p->depth + (tiles == 1 ? SOON : WIDE * p->depth);
    for (int64_t row = top; row < end; row += 2 * height, ahead += lines * 32) {
        int64_t first = row < last ? row : last, second = row + height < last ? row + height : last;
        if (row + height < end) amx_tile(p, first, second, at, height, ahead, lines, 1);
        else amx_tile(p, first, first, at, height, ahead, lines, 0);
    }
    if (p->past_cache) _mm_sfence();
}
#else
#define has_amx() 0
static void amx_strip(const product *p, int64_t top, int64_t end, int64_t at, int height) {
    (void)height, strip(p, top, end, at);
}
#endif

/* out [num_rows, width] */
void linear_bfloat16(uint16_t *out, const uint16_t *x, const uint16_t *panels, const float *start, int64_t num_rows,
                     int64_t depth, int64_t width, int64_t x_stride, int threads) {
    if (num_rows == 0) return;
    int aligned = (uintptr_t)out % 64 == 0 && width % WIDE == 0, amx = has_amx();
    const product p = {out, x, panels, start, depth, width, x_stride, aligned && num_rows * width > LARGE};
    int64_t blocks = (num_rows + 15) / 16, height = (num_rows + blocks - 1) / blocks;       /* AMX's blocks */
    int64_t pieces = (num_rows + TALL - 1) / TALL, part = (num_rows + pieces - 1) / pieces; /* equal parts of x */
    part = (part + 2 * height - 1) / (2 * height) * 2 * height;
#pragma omp parallel num_threads(threads) if (num_rows * depth * width > WORTH_A_THREAD)
    {
        if (amx) amx_begin(height, 64);
#pragma omp for collapse(2) schedule(static)
        for (int64_t top = 0; top < num_rows; top += part)
            for (int64_t at = 0; at < width; at += WIDE) {
                int64_t end = num_rows - top < part ? num_rows : top + part;
                if (amx) amx_strip(&p, top, end, at, height);
                else strip(&p, top, end, at);
            }
        if (amx) amx_end();
    }
}
