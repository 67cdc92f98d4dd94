/* x W^T + b on a CPU for int8 or int4 W with a scale for each group of columns (quant/weight.py). All products are of
   integers: codes of W times digits of x (digits.h). So no code is converted to a float, and a sum has the same bits in
   any order and on any machine. Only the sum of a group is converted to a float, in finish(), group by group.

       panels  8 bits  [P, K/4, 32, 4]  of 32 rows of W, four columns of each row adjacent: code + 128
               4 bits  [P, K/4, 16, 4]  code + 8: rows 0..15 in the low half of a byte, rows 16..31 in the high half
       scales, zeros  [P, G, 32]        zeros: signed zero points / 128 (4 bits: / 8); a null pointer: symmetric
                                        K is padded to a multiple of 64, or the group size is a multiple of 32 */

#include "amx.h"
#include "digits.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define WIDE 32              /* rows of W in a panel */
#define TALL 256             /* the most rows of x that a panel is multiplied by: they stay in a core's cache */
#define LARGE (1 << 20)      /* elements of an output that is too large to be kept in the cache */
#define WORTH_A_THREAD 65536 /* multiplications */
#define MANY 8               /* from this many rows of x on, threads divide their rounding, which takes a barrier */
#define FEW 2                /* up to this many rows of digits are faster without AMX; with 4 bits, twice as many */
#define AHEAD 4096           /* bytes to prefetch ahead in a panel: the hardware prefetcher stops at each page */

#ifdef __AVX512F__
#define LANES 16
#define ROWS 12 /* of digits, in a tile; 12 is divisible by 1, 2 and 3 */
#else
#define LANES 8
#define ROWS 6
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t quads __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* four codes in each */

typedef struct {
    stored *out;
    const uint8_t *panels;
    const float *scales, *zeros, *start;
    int8_t *digits;   /* [T num_digits, stride] */
    int32_t *totals;  /* [T num_digits, groups] sums of digits, times the offset of the codes, 128 or 8 */
    float *x_scales;  /* [T] */
    uint8_t *widened; /* [threads, depth, WIDE] buffers to unpack a 4-bit panel into, one byte per code */
    int64_t depth, width, stride, groups;
    int num_digits, packed, past_cache; /* past_cache: whether to write `out` past the cache (non-temporal stores) */
} product;

/* Each lane of sum += its four codes (0..255) times the four digits of x. */
INLINE void add_products(ints *sum, quads codes, int32_t x) {
#if defined __AVX512VNNI__
    *sum = (ints)_mm512_dpbusd_epi32((__m512i)*sum, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined __AVXVNNI__ && !defined __AVX512F__
    *sum = (ints)_mm256_dpbusd_avx_epi32((__m256i)*sum, (__m256i)codes, _mm256_set1_epi32(x));
#elif defined __AVX2__ && !defined __AVX512F__
    __m256i all = _mm256_set1_epi32(x), even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8);
    *sum += (ints)_mm256_madd_epi16((__m256i)(codes & 0xff00ff), even);
    *sum += (ints)_mm256_madd_epi16((__m256i)(codes >> 8 & 0xff00ff), _mm256_srai_epi16(all, 8));
#else
    for (int i = 0; i < 4; i++) *sum += (ints)(codes >> 8 * i & 255) * (int32_t)(int8_t)(x >> 8 * i);
#endif
}

INLINE quads read_codes(const uint8_t *from, int64_t quad, int col, const int packed) {
    if (!packed) return *(const quads *)(from + (quad * WIDE + col) * 4);
    quads both = *(const quads *)(from + (quad * WIDE / 2 + col % 16) * 4);
    return (col < 16 ? both : both >> 4) & 0x0f0f0f0f;
}

/* sums [rows, WIDE] = rows of digits times num_quads quads (4 columns each) of a panel */
INLINE void tile(int32_t *sums, const int8_t *x, int64_t stride, const uint8_t *codes, int64_t num_quads, const int packed,
                 const int rows) {
    for (int col = 0; col < WIDE; col += 2 * LANES) {
        ints left[ROWS] = {0}, right[ROWS] = {0};
        for (int64_t q = 0; q < num_quads; q++) {
            for (int i = 0; i < 2 - packed; i++) __builtin_prefetch(codes + ((q << !packed) + i) * 64 + AHEAD, 0, 2);
            quads a = read_codes(codes, q, col, packed), b = read_codes(codes, q, col + LANES, packed);
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, x + r * stride + 4 * q, 4);
                add_products(&left[r], a, four), add_products(&right[r], b, four);
            }
        }
        for (int r = 0; r < rows; r++)
            *(ints *)(sums + r * WIDE + col) = left[r], *(ints *)(sums + r * WIDE + col + LANES) = right[r];
    }
}

INLINE void put(stored *out, const float *sums, int64_t cols, const int past_cache) {
    stored row[WIDE];
#if defined BFLOAT16 && defined __AVX512BF16__
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums));
    if (past_cache) return _mm512_stream_si512((void *)out, both);
    _mm512_storeu_si512(row, both);
#else
    (void)past_cache;
    for (int i = 0; i < WIDE; i++) row[i] = store(sums[i]);
#endif
    if (cols == WIDE) memcpy(out, row, sizeof row);
    else memcpy(out, row, cols * sizeof *row);
}

INLINE void finish_rows(const product *p, const int32_t *sums, float *so_far, int64_t row, int count, int64_t at, int64_t group,
                        const int num_digits) {
    const int last = group + 1 == p->groups;
    const float *scales = p->scales + at * p->groups + group * WIDE;
    const float *zeros = p->zeros ? p->zeros + (scales - p->scales) : 0;
    const int32_t *totals = p->totals + row * num_digits * p->groups + group;
    int64_t cols = p->width - at < WIDE ? p->width - at : WIDE;
    vec scale[WIDE / LANES], start[WIDE / LANES];
    for (int i = 0; i < WIDE / LANES; i++) scale[i] = *(const vec *)(scales + i * LANES);
    for (int i = 0; i < WIDE / LANES; i++) start[i] = *(const vec *)(p->start + at + i * LANES);
    for (int r = 0; r < count; r++, row++, totals += num_digits * p->groups) {
        float total = 0, wide[WIDE];
        if (zeros)
            for (int d = num_digits - 1; d >= 0; d--) total = total * 256 + totals[d * p->groups];
        for (int i = 0; i < WIDE / LANES; i++) {
            vec sum = {0};
            for (int d = num_digits - 1; d >= 0; d--) {
                ints exact = *(const ints *)(sums + (r * num_digits + d) * WIDE + i * LANES) - totals[d * p->groups];
                sum = sum * 256 + __builtin_convertvector(exact, vec);
            }
            if (zeros) sum -= *(const vec *)(zeros + i * LANES) * total;
            sum *= scale[i];
            if (group) sum += *(vec *)(so_far + r * WIDE + i * LANES);
            if (last) {
                sum *= p->x_scales[row];
                if (num_digits == 1) __asm__("" : "+m"(sum)); /* W8A8 must have the reference's bits: no FMA */
                *(vec *)(wide + i * LANES) = sum + start[i];
            } else *(vec *)(so_far + r * WIDE + i * LANES) = sum;
        }
        if (last) put(p->out + row * p->width + at, wide, cols, p->past_cache);
    }
}

/* Dequantise the sums of a group [count, num_digits, WIDE] and add them to so_far [count, WIDE]; after the last group,
   write out. It is not inlined, so that it rounds in the same way for sums from AMX and from vector units. */
__attribute__((noinline)) static void finish(const product *p, const int32_t *sums, float *so_far, int64_t row, int count,
                                             int64_t at, int64_t group) {
    if (p->num_digits == 1) finish_rows(p, sums, so_far, row, count, at, group, 1);
    else if (p->num_digits == 2) finish_rows(p, sums, so_far, row, count, at, group, 2);
    else finish_rows(p, sums, so_far, row, count, at, group, 3);
}

/* rows [top, end) of x times the panel of rows [at, at + WIDE) of W */
INLINE void strip(const product *p, int64_t top, int64_t end, int64_t at, const int packed) {
    int32_t sums[ROWS * WIDE];
    float so_far[ROWS * WIDE];
    int64_t deep = p->depth / p->groups, bytes = deep * WIDE >> packed;
    for (int64_t row = top, some = ROWS / p->num_digits; row < end; row += some) {
        const uint8_t *codes = p->panels + (at * p->depth >> packed);
        const int8_t *x = p->digits + row * p->num_digits * p->stride;
        if (some > end - row) some = end - row;
        for (int64_t group = 0; group < p->groups; group++, codes += bytes, x += deep) {
            switch (some * p->num_digits) { /* with a constant number of rows the sums stay in registers */
#define TILE(n) case n: tile(sums, x, p->stride, codes, deep / 4, packed, n); break;
                TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if ROWS > 6
                TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
            }
            finish(p, sums, so_far, row, some, at, group);
        }
    }
}

#if defined __AMX_INT8__ && defined __linux__
/* One or two blocks of `count` rows of x, which begin at `row` and `next`, times a panel. */
INLINE void amx_tile(const product *p, int64_t row, int64_t next, int64_t at, int count, int step, const uint8_t *codes,
                     const uint8_t *ahead, int lines, const int two) {
    int32_t sums[2][16 * WIDE];
    float so_far[2][16 * WIDE];
    const int8_t *x = p->digits + row * p->num_digits * p->stride, *y = p->digits + next * p->num_digits * p->stride;
    int64_t deep = p->depth / p->groups;
    for (int64_t group = 0; group < p->groups; group++) {
        _tile_zero(0);
        _tile_zero(1);
        if (two) _tile_zero(2);
        if (two) _tile_zero(3);
        for (int64_t k = 0; k < deep; k += step, codes += step * WIDE, x += step, y += step) {
            _tile_loadd(6, codes, 4 * WIDE);
            _tile_loadd(7, codes + 64, 4 * WIDE);
            _tile_loadd(4, x, p->stride);
            if (two) _tile_loadd(5, y, p->stride);
            for (int i = 0; i < lines; i++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            if (two) _tile_dpbsud(2, 5, 6);
            if (two) _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(0, sums[0], 4 * WIDE);
        _tile_stored(1, sums[0] + 16, 4 * WIDE);
        if (two) _tile_stored(2, sums[1], 4 * WIDE);
        if (two) _tile_stored(3, sums[1] + 16, 4 * WIDE);
        finish(p, sums[0], so_far[0], row, count, at, group);
        if (two) finish(p, sums[1], so_far[1], next, count, at, group);
    }
}

/* Like strip. All blocks have the same height: the last may overlap the one before; its rows get the same bits again. */
static void amx_strip(const product *p, int64_t top, int64_t end, int64_t at, int height, int step, int thread) {
    const uint8_t *codes = p->panels + (at * p->depth >> p->packed), *ahead = codes + (WIDE * p->depth >> p->packed);
    if (p->packed) {
        uint8_t *to = p->widened + thread * p->depth * WIDE;
        for (int64_t quad = 0; quad < p->depth / 4; quad++)
            for (int col = 0; col < WIDE; col += LANES)
                *(quads *)(to + (quad * WIDE + col) * 4) = read_codes(codes, quad, col, 1);
        codes = to;
    }
    int64_t last = end - height, tiles = (end - top + 2 * height - 1) / (2 * height);
    int all = (step * WIDE / 64) >> p->packed, lines = (all + tiles - 1) / tiles; /* of the next panel, for each tile */
    for (int64_t row = top; row < end; row += 2 * height, ahead += lines * 64 * (p->depth / step)) {
        int64_t first = row < last ? row : last, second = row + height < last ? row + height : last;
        if (row + height < end) amx_tile(p, first, second, at, height, step, codes, ahead, lines, 1);
        else amx_tile(p, first, first, at, height, step, codes, ahead, lines, 0);
    }
}
#else
#define has_amx() 0
static void amx_strip(const product *p, int64_t top, int64_t end, int64_t at, int height, int step, int thread) {
    (void)p, (void)top, (void)end, (void)at, (void)height, (void)step, (void)thread;
}
#endif

static void round_rows(const product *p, const stored *x, int64_t x_stride, int64_t depth, int64_t row, int64_t end) {
    const int n = p->num_digits, middle = p->packed ? 8 : 128;
    for (; row < end; row++) {
        int8_t *digits = p->digits + row * n * p->stride;
        int32_t *totals = p->totals + row * n * p->groups;
        p->x_scales[row] = n == 1 ? to_digits(digits, p->stride, x + row * x_stride, depth, 1)
                         : n == 2 ? to_digits(digits, p->stride, x + row * x_stride, depth, 2)
                                  : to_digits(digits, p->stride, x + row * x_stride, depth, 3);
        for (int d = 0; d < n; d++, digits += p->stride, totals += p->groups) {
            memset(digits + depth, 0, p->depth - depth);
            add_groups(totals, digits, p->groups, p->depth / p->groups, middle);
        }
    }
}

#ifdef _OPENMP
int omp_get_thread_num(void);
#else
static int omp_get_thread_num(void) { return 0; }
#endif

INLINE int64_t lines_of(int64_t bytes) { return (bytes + 63) / 64 * 64; }

typedef struct { /* what is the same in every call; quant.py fills it once */
    const uint8_t *panels;
    const float *scales, *zeros, *start; /* start: the bias, padded to whole panels */
    int64_t depth, padded, width, groups, packed;
} matrix;

/* out [num_rows, width]; x [num_rows, depth] with row stride x_stride; scratch: memory for the four buffers below. */
void quantised_linear(stored *out, const stored *x, const matrix *w, uint8_t *scratch, int64_t num_rows, int64_t x_stride,
                      int64_t num_digits, int threads) {
    if (num_rows == 0) return;
    int64_t depth = w->depth, width = w->width, rows = num_rows * num_digits;
    product p = {.out = out, .panels = w->panels, .scales = w->scales, .zeros = w->zeros, .start = w->start,
                 .depth = w->padded, .width = width, .stride = w->padded + 64, .groups = w->groups,
                 .num_digits = num_digits, .packed = w->packed}; /* rows of a multiple of 1024 bytes compete for cache sets */
    p.digits = (int8_t *)scratch, scratch += lines_of(rows * p.stride);
    p.totals = (int32_t *)scratch, scratch += lines_of(rows * p.groups * 4);
    p.x_scales = (float *)scratch, scratch += lines_of(num_rows * 4);
    p.widened = scratch;
    p.past_cache = (uintptr_t)out % 64 == 0 && width % WIDE == 0 && num_rows * width > LARGE;
    int amx = rows > FEW << w->packed && has_amx(), step = p.depth / p.groups % 64 ? 32 : 64;
    int64_t most = 16 / num_digits, blocks = (num_rows + most - 1) / most, height = (num_rows + blocks - 1) / blocks;
    int64_t pieces = (num_rows + TALL - 1) / TALL, part = (num_rows + pieces - 1) / pieces; /* equal parts of x */
    part = (part + 2 * height - 1) / (2 * height) * 2 * height;
    if (num_rows < MANY) round_rows(&p, x, x_stride, depth, 0, num_rows);
#pragma omp parallel num_threads(threads) if (num_rows * depth * width > WORTH_A_THREAD)
    {
        if (num_rows >= MANY) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < num_rows; row += 4)
                round_rows(&p, x, x_stride, depth, row, num_rows - row < 4 ? num_rows : row + 4);
        }
        if (amx) amx_begin(height * num_digits, step);
#pragma omp for collapse(2) schedule(static)
        for (int64_t top = 0; top < num_rows; top += part)
            for (int64_t at = 0; at < width; at += WIDE) {
                int64_t end = num_rows - top < part ? num_rows : top + part;
                if (amx) amx_strip(&p, top, end, at, height, step, omp_get_thread_num());
                else if (p.packed) strip(&p, top, end, at, 1);
                else strip(&p, top, end, at, 0);
            }
        if (amx) amx_end();
#ifdef __AVX2__
        if (p.past_cache) _mm_sfence();
#endif
    }
}
