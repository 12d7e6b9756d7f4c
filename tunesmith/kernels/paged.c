/* Attention of tokens that are being written to keys and values that lie in pages, row by row.

   A page holds `page` tokens, a multiple of 32. Keys lie [pages, kv heads, page / 16, width, 16]: what sixteen tokens
   have at one place of a head is side by side, so that sixteen scores are summed at once; values lie [pages, kv heads,
   page, width]. A row's result depends on that row alone. `dtype` as in vectors.h. */
#include <math.h>
#include <omp.h>

#include "vectors.h"

#define SIZE(dtype) ((dtype) ? 2 : 4)
#define TOGETHER 4 /* heads that share what is read */
#define PAIR (2 * LANES)

typedef struct {
    const char *keys, *values;
    const int32_t *table; /* page numbers of the row */
    long head, kv, width, page, first, seen;
    float cap; /* of scores; 0 for none */
} Row;

static const char *key_block(const Row *r, long token, int dtype) {
    const long page = r->table[token / r->page];
    return r->keys + ((page * r->kv + r->head) * r->page + token % r->page) * r->width * SIZE(dtype);
}

static const char *value_page(const Row *r, long token, int dtype) {
    const long page = r->table[token / r->page];
    return r->values + (page * r->kv + r->head) * r->page * r->width * SIZE(dtype);
}

/* Scores of `heads` queries [heads, width], each in its own [seen] of scores; answers the largest of each. Two blocks
   at a time, so that sums do not wait for each other. */
INLINE void score(const Row *r, const float *q, float *scores, long room, float *most, const int heads, int dtype) {
    floats highest[TOGETHER];
    for (int h = 0; h < heads; h++) highest[h] = all(-INFINITY);
    const ints counted = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (long token = r->first / PAIR * PAIR; token < r->seen; token += PAIR) {
        const char *block = key_block(r, token, dtype);
        const char *next = token + PAIR < r->seen ? key_block(r, token + PAIR, dtype) : block;
        const char *values = value_page(r, token, dtype) + token % r->page * r->width * SIZE(dtype);
        floats sums[TOGETHER][2] = {};
        for (long i = 0; i < r->width; i++) {
            if (i % 2 == 0 || !dtype) { /* pages lie anywhere: nobody else knows what comes next */
                __builtin_prefetch(next + i * LANES * SIZE(dtype));
                __builtin_prefetch(next + (r->width + i) * LANES * SIZE(dtype));
                __builtin_prefetch(values + i * LANES * SIZE(dtype));
                __builtin_prefetch(values + (r->width + i) * LANES * SIZE(dtype));
            }
            const floats low = load(block, i * LANES, LANES, dtype);
            const floats high = load(block, (r->width + i) * LANES, LANES, dtype);
            for (int h = 0; h < heads; h++) {
                const float one = q[h * r->width + i];
                sums[h][0] += one * low;
                sums[h][1] += one * high;
            }
        }
        for (int h = 0; h < heads && r->cap > 0; h++)
            for (int half = 0; half < 2; half++) sums[h][half] = r->cap * tanh_of(sums[h][half] / r->cap);
        for (int half = 0; half < 2; half++) {
            const long start = token + half * LANES;
            const ints at = counted + (int32_t)start;
            const ints there = (at >= (int32_t)r->first) & (at < (int32_t)r->seen);
            for (int h = 0; h < heads; h++) {
                const floats s = pick(there, sums[h][half], all(-INFINITY));
                highest[h] = larger(s, highest[h]);
                store(scores, h * room + start, LANES, s, 0);
            }
        }
    }
    for (int h = 0; h < heads; h++) most[h] = largest_of(highest[h]);
}

/* Scores to weights, not yet divided by their sum, which it answers. */
static float weigh(const Row *r, float *scores, float most) {
    floats sum = {};
    for (long token = r->first / PAIR * PAIR; token < r->seen; token += LANES)
        sum += store(scores, token, LANES, exp_of(load(scores, token, LANES, 0) - most), 0);
    return sum_of(sum);
}

/* `columns` x 16 columns of the weighted values, from column `from`; the last `lanes` of them. */
INLINE void mix(const Row *r, const float *weights, long room, const float *sums, char *out, long from, long lanes,
                const int columns, const int heads, const int dtype) {
    floats found[TOGETHER][4] = {};
    for (long token = r->first; token < r->seen;) {
        const char *values = value_page(r, token, dtype);
        const long start = token - token % r->page, end = start + r->page < r->seen ? start + r->page : r->seen;
        for (; token < end; token++)
            for (int c = 0; c < columns; c++) {
                const floats v = load(values, (token - start) * r->width + from + c * LANES, lanes, dtype);
                for (int h = 0; h < heads; h++) found[h][c] += weights[h * room + token] * v;
            }
    }
    for (int h = 0; h < heads; h++)
        for (int c = 0; c < columns; c++)
            store(out, h * r->width + from + c * LANES, lanes, found[h][c] / sums[h], dtype);
}

INLINE void together(const Row *r, const char *q, char *out, float *spare, long room, float scale, const int heads,
                     const int dtype) {
    float most[TOGETHER], sums[TOGETHER], *wide = spare + heads * room;
    for (long i = 0; i < heads * r->width; i++) wide[i] = load(q, i, 1, dtype)[0] * scale;
    score(r, wide, spare, room, most, heads, dtype);
    for (int h = 0; h < heads; h++) sums[h] = weigh(r, spare + h * room, most[h]);
    long from = 0;
    for (; from + 4 * LANES <= r->width; from += 4 * LANES)
        mix(r, spare, room, sums, out, from, LANES, 4, heads, dtype);
    for (; from + LANES <= r->width; from += LANES) mix(r, spare, room, sums, out, from, LANES, 1, heads, dtype);
    if (from < r->width) mix(r, spare, room, sums, out, from, r->width - from, 1, heads, dtype);
}

INLINE void by_heads(const Row *r, const char *q, char *out, float *spare, long room, float scale, long heads,
                     const int dtype) {
    for (long h = 0; h < heads; h += TOGETHER) {
        const char *from = q + h * r->width * SIZE(dtype);
        char *to = out + h * r->width * SIZE(dtype);
        switch (heads - h) {
        case 1: together(r, from, to, spare, room, scale, 1, dtype); break;
        case 2: together(r, from, to, spare, room, scale, 2, dtype); break;
        case 3: together(r, from, to, spare, room, scale, 3, dtype); break;
        default: together(r, from, to, spare, room, scale, 4, dtype);
        }
    }
}

/* q, out [rows, kv x group, width]; table [rows, pages]; seen [rows]: tokens that each row has; spare [threads, 4 x
   (longest rounded up to 32 + width)]. */
void ts_paged_attention(const void *q, const void *keys, const void *values, const int32_t *table, const int32_t *seen,
                        void *out, float *spare, long rows, long kv, long group, long width, long page, long pages,
                        long window, long longest, float scale, float cap, int dtype, int threads) {
    const long room = (longest + PAIR - 1) / PAIR * PAIR;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long item = 0; item < rows * kv; item++) {
        const long row = item / kv, at = item * group * width * SIZE(dtype);
        const long first = window > 0 && seen[row] > window ? seen[row] - window : 0;
        const Row r = {keys, values, table + row * pages, item % kv, kv, width, page, first, seen[row], cap};
        float *mine = spare + omp_get_thread_num() * TOGETHER * (room + width);
        if (dtype) by_heads(&r, (const char *)q + at, (char *)out + at, mine, room, scale, group, 1);
        else by_heads(&r, (const char *)q + at, (char *)out + at, mine, room, scale, group, 0);
    }
}

/* Puts k and v [tokens, kv, width] at places (page number x page + token in it) of the pages. */
void ts_paged_keep(const void *k, const void *v, void *keys, void *values, const int64_t *places, long tokens, long kv,
                   long width, long page, int dtype, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long item = 0; item < tokens * kv; item++) {
        const long place = places[item / kv], token = place % page;
        const long start = (place / page * kv + item % kv) * page * width, from = item * width;
        const long column = start + token / LANES * LANES * width + token % LANES;
        memcpy((char *)values + (start + token * width) * SIZE(dtype), (const char *)v + from * SIZE(dtype),
               width * SIZE(dtype));
        for (long i = 0; i < width; i++) {
            if (dtype) ((uint16_t *)keys)[column + i * LANES] = ((const uint16_t *)k)[from + i];
            else ((float *)keys)[column + i * LANES] = ((const float *)k)[from + i];
        }
    }
}
