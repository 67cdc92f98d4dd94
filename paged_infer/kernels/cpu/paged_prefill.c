/* The attention of prompt chunks on a CPU, through block tables, tile by tile (FlashAttention-2, Dao 2023).

   A tile is up to WIDE rows of queries against KEYS keys, the query heads of one key head together:

                        keys 0 .. 63   64 .. 127   128 ..      A vector holds one number of each of LANES rows. So
       queries 64 .. 79 [    full    |  diagonal  |       ]    maxima, sums and rescaling are lane by lane, and keys
       of all heads     ----- one task, left to right ---->    need no transpose: an element of a key multiplies
                                                               vectors of queries. Their values are [D, rows], too.

   Tiles begin at multiples of KEYS and each lane computes its row alone and in the order of the keys. So the bits of a
   row depend neither on other rows nor on the chunk in which its prompt is computed. */

#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__)
#pragma GCC target("prefer-vector-width=512")
#endif
#include "elements.h"
#include "kv_codes.h"
#if defined(BFLOAT16) && defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define AMX /* a matrix unit, for pairs of bfloat16; vector units multiply them as floats */
#endif

#ifdef __AVX512F__ /* 32 registers of 16 numbers: 24 sums, 3 of queries, and room */
#define LANES 16
#define ROWS 8
#else /* 16 registers of 8: 12 sums */
#define LANES 8
#define ROWS 4
#endif
#define VECTORS 3
#define WIDE (VECTORS * LANES) /* rows of queries whose scores are computed together: a panel */
#define QUERIES (2 * WIDE)     /* of a task, for each of its heads */
#define KEYS 64                /* of a tile */
#define MAX_PANELS 24576       /* numbers in the panels of a task: they stay in a core's cache */
#define ALIGNED __attribute__((aligned(64)))
#define ROUND_UP(n, unit) (((n) + (unit) - 1) / (unit) * (unit))

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

/* product: sums [rows, WIDE] = sums * shrink (0 without) + x panel, where x [rows, depth] has strides and panel is
   [depth, WIDE]; rows and depth are multiples of ROWS and STEP. A word is a factor of it. */
#ifdef AMX
#undef ROWS
#define ROWS 16
#define STEP 16
#define KEY_STEP 32
#define PER_WORD 2
typedef uint32_t word;

INLINE int may_use_unit(void) { /* the system has to allow it, once for the process */
    return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
}

INLINE void configure(void) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {.palette = 1};
    for (int i = 0; i < 7; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(tiles));
}

#define THREE(act, at, stride) act(0, at, stride); act(1, (at) + 16, stride); act(2, (at) + 32, stride)
#define IN_MEMORY __asm__ volatile("" ::: "memory") /* what the unit reads, and what it has written */

INLINE void product(float *sums, const float *shrink, const word *x, int64_t rows, int64_t row_stride, int64_t stride,
                    const word *panel, int64_t depth) {
    (void)stride; /* 1 */
    if (shrink)
        for (int64_t r = 0; r < rows; r++)
            for (int l = 0; l < WIDE; l++) sums[r * WIDE + l] *= shrink[l];
    IN_MEMORY;
    for (; rows > 0; rows -= ROWS, sums += ROWS * WIDE, x += ROWS * row_stride) {
        if (shrink) { THREE(_tile_loadd, sums, WIDE * 4); }
        else { _tile_zero(0); _tile_zero(1); _tile_zero(2); }
        for (int64_t k = 0; k < depth; k += STEP) {
            const word *part = panel + k * WIDE;
            _tile_loadd(3, x + k, row_stride * 4);
            _tile_loadd(4, part, WIDE * 4);
            _tile_dpbf16ps(0, 3, 4);
            _tile_loadd(5, part + 16, WIDE * 4);
            _tile_dpbf16ps(1, 3, 5);
            _tile_loadd(6, part + 32, WIDE * 4);
            _tile_dpbf16ps(2, 3, 6);
        }
        THREE(_tile_stored, sums, WIDE * 4);
    }
    IN_MEMORY;
}

/* Two weights, rounded to nearest; a NaN reaches the output through their sum. */
INLINE word pair(float first, float second) {
    union { float value; word bits; } low = {first}, high = {second};
    return (low.bits + 0x8000) >> 16 | ((high.bits + 0x8000) & 0xffff0000);
}

/* out [dim, KEYS / 2]: the elements of 32 keys' values, transposed, each pair of keys in a word. */
INLINE void transpose(word *out, const stored *const *values, int64_t dim) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int64_t d = 0; d < dim; d += 16) {
        __mmask16 within = dim - d < 16 ? (1 << (dim - d)) - 1 : 0xffff;
        __m512i row[16];
        for (int i = 0; i < 16; i++) {
            __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(within, values[2 * i] + d));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(within, values[2 * i + 1] + d));
            row[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
#pragma GCC unroll 4
        for (int s = 8; s; s /= 2) { /* swap the upper right and the lower left of blocks of 2 s rows and columns */
            __m512i bit = _mm512_set1_epi32(s), other = _mm512_xor_si512(lane, bit);
            __mmask16 is_set = _mm512_test_epi32_mask(lane, bit);
            __m512i upper = _mm512_mask_add_epi32(lane, is_set, other, _mm512_set1_epi32(16));
            __m512i lower = _mm512_mask_add_epi32(other, is_set, lane, _mm512_set1_epi32(16));
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                if (!(i & s)) {
                    __m512i top = row[i];
                    row[i] = _mm512_permutex2var_epi32(top, upper, row[i + s]);
                    row[i + s] = _mm512_permutex2var_epi32(top, lower, row[i + s]);
                }
        }
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (d + i) * (KEYS / 2), row[i]);
    }
}
#else
#define STEP 1
#define KEY_STEP ROWS
#define PER_WORD 1
typedef float word;

INLINE int may_use_unit(void) { return 1; }
INLINE void configure(void) {}

INLINE void product(float *sums, const float *shrink, const word *x, int64_t rows, int64_t row_stride, int64_t stride,
                    const word *panel, int64_t depth) {
    for (; rows > 0; rows -= ROWS, sums += ROWS * WIDE, x += ROWS * row_stride) {
        vec sum[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) {
                const float *at = sums + r * WIDE + v * LANES;
                sum[r][v] = shrink ? *(const vec *)at * *(const vec *)(shrink + v * LANES) : (vec){0};
            }
        for (int64_t k = 0; k < depth; k++)
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++)
                    sum[r][v] += *(const vec *)(panel + k * WIDE + v * LANES) * x[r * row_stride + k * stride];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) *(vec *)(sums + r * WIDE + v * LANES) = sum[r][v];
    }
}
#endif

/* The state of a panel: for each of its rows the position of its token, the largest score so far, and the sum. */
typedef struct { float largest[WIDE], total[WIDE], shrink[WIDE]; int32_t position[WIDE]; } rows;

/* The weights [n, WIDE] of scores of the keys from place start on, relative to the largest of their row so far. */
INLINE void weigh(word *weight, float *score, rows *row, int64_t start, int64_t n, int64_t window, float scale, float softcap) {
    float base[WIDE], sum[WIDE];
    if (softcap > 0.0f) {
        for (int64_t i = 0; i < n * WIDE; i++) score[i] = softcap * fast_tanh(score[i] * (scale / softcap));
        scale = 1.0f;
    }
    if (start + n - 1 > row->position[0] || start <= row->position[WIDE - 1] - window)
        for (int64_t i = 0; i < n; i++)
            for (int l = 0; l < WIDE; l++) {
                int64_t back = row->position[l] - (start + i);
                score[i * WIDE + l] = back >= 0 && back < window ? score[i * WIDE + l] : -INFINITY;
            }
    memcpy(base, row->largest, sizeof base);
    for (const float *at = score; at < score + n * WIDE; at += 4 * WIDE)
        for (int l = 0; l < WIDE; l++) {
            float a = at[l], b = at[WIDE + l], c = at[2 * WIDE + l], d = at[3 * WIDE + l];
            a = a > b ? a : b, c = c > d ? c : d, a = (a > c ? a : c) * scale;
            base[l] = a > base[l] ? a : base[l];
        }
    for (int l = 0; l < WIDE; l++) {
        float largest = base[l];
        base[l] = largest > -INFINITY ? largest : 0.0f; /* a row that sees none of the keys so far */
        row->shrink[l] = fast_exp(row->largest[l] - base[l]);
        row->largest[l] = largest;
        sum[l] = row->total[l] * row->shrink[l];
    }
    for (int64_t i = 0; i < n; i += 2)
        for (int l = 0; l < WIDE; l++) {
            float a = fast_exp(score[i * WIDE + l] * scale - base[l]);
            float b = fast_exp(score[i * WIDE + WIDE + l] * scale - base[l]);
            sum[l] += a + b;
#ifdef AMX
            weight[i / 2 * WIDE + l] = pair(a, b);
#else
            weight[i * WIDE + l] = a, weight[i * WIDE + WIDE + l] = b;
#endif
        }
    memcpy(row->total, sum, sizeof sum);
}

#ifdef AMX
typedef stored fetched;
#define READ(x) store(x)
#else
typedef float fetched;
#define READ(x) (x)
#endif
/* out [n] = codes [n] * scale; the product is exact in float32. */
static void read_codes(fetched *out, const char *codes, uint16_t half, int64_t n, int64_t format) {
    float wide[n], scale = scale_of(half);
    if (format == INT8) widen(wide, (const uint8_t *)codes, n, INT8);
    else if (format == E4M3) widen(wide, (const uint8_t *)codes, n, E4M3);
    else widen(wide, (const uint8_t *)codes, n, E5M2);
    for (int64_t i = 0; i < n; i++) out[i] = READ(wide[i] * scale);
}

/* num_queries queries from `position` of a sequence on; of heads adjacent ones of the key head of keys and values. */
INLINE void attend_tile(stored *out, const stored *q, const char *keys, const char *values, const uint16_t *k_scales,
                        const uint16_t *v_scales, const int32_t *table, int64_t position, int64_t num_queries,
                        int64_t heads, int64_t dim, int64_t block_size, int64_t slot_heads, int64_t q_stride,
                        int64_t out_stride, int64_t window, float scale, float softcap, const float *sinks,
                        int64_t format) {
    int64_t num_rows = num_queries * heads, panels = (num_rows + WIDE - 1) / WIDE, end = position + num_queries;
    int64_t depth = ROUND_UP(dim / PER_WORD, STEP), height = ROUND_UP(dim, ROWS);
    word query[panels][depth][WIDE] ALIGNED, key[KEYS][depth] ALIGNED, value[KEYS / PER_WORD * height] ALIGNED;
    float score[KEYS][WIDE] ALIGNED, acc[panels][height][WIDE] ALIGNED;
    word weight[KEYS / PER_WORD][WIDE] ALIGNED;
    rows row[panels] ALIGNED;
    memset(query, 0, sizeof query), memset(key, 0, sizeof key), memset(value, 0, sizeof value);
    memset(acc, 0, sizeof acc);
    for (int64_t p = 0; p < panels; p++)
        for (int64_t l = 0; l < WIDE; l++) {
            int64_t r = p * WIDE + l < num_rows ? p * WIDE + l : num_rows - 1; /* surplus lanes repeat the last row */
            const stored *from = q + r / heads * q_stride + r % heads * dim;
            row[p].position[l] = position + r / heads;
            row[p].largest[l] = sinks ? sinks[r % heads] : -INFINITY;
            row[p].total[l] = sinks ? 1.0f : 0.0f;
#ifdef AMX
            for (int64_t d = 0; d < dim / 2; d++) memcpy(&query[p][d][l], from + 2 * d, sizeof(word));
#else
            for (int64_t d = 0; d < dim; d++) query[p][d][l] = load(from[d]);
#endif
        }
    int64_t oldest = position - window + 1 > 0 ? position - window + 1 : 0; /* keys before it may hold anything */
    stored zeros[dim];
    memset(zeros, 0, sizeof zeros);
#ifdef AMX
    stored wide[2][KEYS][dim]; /* keys and values, dequantised */
#endif
    configure();
    for (int64_t start = oldest / KEYS * KEYS; start < end; start += KEYS) {
        int64_t n = ROUND_UP(end - start < KEYS ? end - start : KEYS, KEY_STEP);
#ifdef AMX
        const stored *weighted[KEYS];
#endif
        for (int64_t i = 0, token = start; i < n; i++, token++) {
            int64_t at = -1;
            if (token >= oldest && token < end)
                at = ((int64_t)table[token / block_size] * block_size + token % block_size) * slot_heads;
            const stored *k = zeros, *v = zeros;
            if (at >= 0 && format) {
                const char *k_codes = keys + at * dim, *v_codes = values + at * dim;
#ifdef AMX
                read_codes(wide[0][i], k_codes, k_scales[at], dim, format), k = wide[0][i];
                read_codes(wide[1][i], v_codes, v_scales[at], dim, format), v = wide[1][i];
#else
                read_codes(key[i], k_codes, k_scales[at], dim, format);
                read_codes(value + i * height, v_codes, v_scales[at], dim, format);
                continue;
#endif
            } else if (at >= 0)
                k = (const stored *)keys + at * dim, v = (const stored *)values + at * dim;
#ifdef AMX
            weighted[i] = v;
            memcpy(key[i], k, dim * sizeof(stored));
#else
            for (int64_t d = 0; d < dim; d++) key[i][d] = load(k[d]);
            for (int64_t d = 0; d < dim; d++) value[i * height + d] = load(v[d]);
#endif
        }
#ifdef AMX
        for (int64_t i = 0; i < n; i += 32) transpose(value + i / 2, weighted + i, dim);
#endif
        for (int64_t p = 0; p < panels; p++) {
            if (start > row[p].position[WIDE - 1] || start + n <= row[p].position[0] - window + 1) continue;
            product(score[0], 0, key[0], n, depth, 1, query[p][0], depth);
            weigh(weight[0], score[0], row + p, start, n, window, scale, softcap);
#ifdef AMX
            product(acc[p][0], row[p].shrink, value, height, KEYS / 2, 1, weight[0], n / 2);
#else
            product(acc[p][0], row[p].shrink, value, height, 1, height, weight[0], n);
#endif
        }
    }
#ifdef AMX
    _tile_release();
#endif
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t d = 0, p = r / WIDE, l = r % WIDE; d < dim; d++)
            out[r / heads * out_stride + r % heads * dim + d] = store(acc[p][d][l] / row[p].total[l]);
}

/* The queries of a task; 0: this system does not let the process use the unit that these kernels are compiled for. */
int64_t prefill_queries(void) { return may_use_unit() ? QUERIES : 0; }

/* Tasks [num_tasks, 2] (sequence, place of the first of up to QUERIES queries in its chunk), longest first. q and out
   [T, H, D] are packed, those of sequence s from starts[s]; the queries are the last of its lengths[s] tokens. */
void paged_prefill(stored *out, const stored *q, const char *k_cache, const char *v_cache, const uint16_t *k_scale,
                   const uint16_t *v_scale, const int32_t *tables, const int32_t *lengths, const int32_t *starts,
                   const int32_t *tasks, const float *sinks, int64_t format, int64_t num_tasks, int64_t num_heads,
                   int64_t num_kv_heads, int64_t dim, int64_t block_size, int64_t table_stride, int64_t q_stride,
                   int64_t window, float scale, float softcap, int threads) {
    int64_t group = num_heads / num_kv_heads, most = MAX_PANELS / (QUERIES * dim) > 1 ? MAX_PANELS / (QUERIES * dim) : 1;
    int64_t parts = (group + most - 1) / most, together = (group + parts - 1) / parts; /* heads of a task */
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < num_tasks; task++)
        for (int64_t part = 0; part < num_kv_heads * parts; part++) {
            int64_t s = tasks[2 * task], first = tasks[2 * task + 1], count = starts[s + 1] - starts[s];
            int64_t kv = part / parts, own = part % parts * together, left = group - own;
            int64_t num_queries = count - first < QUERIES ? count - first : QUERIES, head = kv * group + own;
            if (left <= 0) continue;
            attend_tile(out + ((starts[s] + first) * num_heads + head) * dim,
                        q + (starts[s] + first) * q_stride + head * dim, k_cache + kv * dim * size_of(format),
                        v_cache + kv * dim * size_of(format), k_scale + kv, v_scale + kv, tables + s * table_stride,
                        lengths[s] - count + first, num_queries, left < together ? left : together, dim, block_size,
                        num_kv_heads, q_stride, num_heads * dim, window, scale, softcap, sinks ? sinks + head : 0,
                        format);
        }
}
