/* The experts of a mixture on a CPU, float32: the pairs (token, rank) sorted by expert, so that each expert multiplies one
   segment of adjacent rows, and the sum over the ranks of a token. The product of a segment is linear.c's. */

#include <stdint.h>

int64_t panel_width(void);
void linear(float *out, const float *x, const float *panels, const float *start, int64_t num_rows, int64_t depth,
            int64_t width, int64_t x_stride, int threads);

/* A stable counting sort. ids [num_pairs], -1: nowhere -> ends [num_experts] of the segments; place [num_pairs] of each
   pair among the sorted ones, or -1; token [num_pairs]: of each sorted pair the row of x, 0 after the last. */
void expert_segments(int64_t *ends, int64_t *place, int64_t *token, const int64_t *ids, int64_t num_pairs, int64_t top_k,
                     int64_t num_experts) {
    int64_t at = 0;
    for (int64_t e = 0; e < num_experts; e++) ends[e] = 0;
    for (int64_t p = 0; p < num_pairs; p++) token[p] = 0;
    for (int64_t p = 0; p < num_pairs; p++)
        if (ids[p] >= 0) ends[ids[p]]++;
    for (int64_t e = 0; e < num_experts; e++) { /* where the segment begins, until its pairs are placed */
        int64_t count = ends[e];
        ends[e] = at, at += count;
    }
    for (int64_t p = 0; p < num_pairs; p++) {
        place[p] = ids[p] < 0 ? -1 : ends[ids[p]]++;
        if (place[p] >= 0) token[place[p]] = p / top_k;
    }
}

/* out [P, width] = for each expert, the rows of x [P, depth] in its segment times its matrix. panels and start are those
   of linear.c, one after the other. */
void grouped_linear(float *out, const float *x, const float *panels, const float *start, const int64_t *ends,
                    int64_t num_experts, int64_t depth, int64_t width, int64_t x_stride, int threads) {
    int64_t padded = (width + panel_width() - 1) / panel_width() * panel_width(), row = 0;
    for (int64_t e = 0; e < num_experts; row = ends[e++])
        if (row < ends[e])
            linear(out + row * width, x + row * x_stride, panels + e * padded * depth, start + e * padded, ends[e] - row,
                   depth, width, x_stride, threads);
}

/* out [num_tokens, width] = sum over r, in order, of scores [num_tokens, top_k] times row place[t, r] of x */
void expert_sum(float *out, const float *x, const int64_t *place, const float *scores, int64_t num_tokens, int64_t top_k,
                int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (num_tokens * top_k * width > 65536)
    for (int64_t t = 0; t < num_tokens; t++) {
        float *to = out + t * width;
        for (int64_t i = 0; i < width; i++) to[i] = 0;
        for (int64_t pair = t * top_k; pair < (t + 1) * top_k; pair++)
            if (place[pair] >= 0) {
                const float *from = x + place[pair] * width, score = scores[pair];
                for (int64_t i = 0; i < width; i++) to[i] += score * from[i];
            }
    }
}
