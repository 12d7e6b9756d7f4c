/* Attention inside documents, forward and backward; attention.py says what it computes.

   Work is cut into items: some queries of one document and one head of keys, with all query heads that share it. What
   an item does depends on nothing but the documents, so results are the same for any number of threads. Gradients of
   keys that several items see are summed at the end, in the order of the items. Functions return 0, 1 where memory ran
   out, 2 where a span leaves its rows or two spans have queries in common. */
#include <math.h>
#include <stdlib.h>

#include "attention_blocks.h"

#define CHUNK 8        /* blocks of keys whose scores are there at once in the forward pass */
#define LONG 1024      /* queries of a span from which on it is cut into up to PARTS items a head */
#define PARTS 4
#define SOME 64        /* blocks of scores that are there at once in the backward pass */
#define LOG2E 1.44269504f

typedef struct { /* [tokens, heads, width]: elements from token to token and from head to head */
    char *at;
    int64_t row, head;
} Rows;

typedef struct { /* attention.py has the same */
    Rows q, k, v, o, grad, dq, dk, dv;
    float *lse; /* [heads, queries]: the logarithm to base 2 of the sum of 2^(score log2(e)) */
    const int32_t *spans;
    int64_t count, queries, keys, heads, kv_heads, width, window;
    float scale, cap; /* 0: scores are not capped */
    int32_t dtype, causal, threads, tiles;
} Attention;

typedef struct { /* queries `from` to `to` of a span, with `own` keys of its own and `prefix` before these */
    long number, span, head, from, to, own, prefix;
    double work;
    float *shared[2]; /* gradients of the prefix and of its own keys where other items see them too, else NULL */
} Item;

typedef struct { /* an item, cut into blocks: first those of the prefix, then its own */
    const Attention *call;
    const Item *item;
    long first, start, before, prefix_blocks, blocks;
    long wide;    /* width, up to a multiple of 32 */
    long queries; /* blocks of queries that are handled together in the backward pass */
} View;

typedef struct {
    long from, to;
} Run;

static long least(long a, long b) { return a < b ? a : b; }
static long blocks_of(long n) { return (n + SIDE - 1) / SIDE; }
static size_t size_of(const Attention *call) { return call->dtype ? 2 : 4; }

static char *row_of(const Attention *call, const Rows *rows, long row, long head) {
    return rows->at + (row * rows->row + head * rows->head) * size_of(call);
}

static long first_seen(const View *v, long from) { /* the block of own keys with which those of a window begin */
    const long first = v->call->window ? from - v->call->window + 1 : 0;
    return first > 0 ? first / SIDE : 0;
}

static long end_of_seen(const View *v, long from) {
    return v->call->causal ? from / SIDE + 1 : v->blocks - v->prefix_blocks;
}

static int sees(const View *v, long from, long block) {
    const long own = block - v->prefix_blocks;
    return own < 0 || (own >= first_seen(v, from) && own < end_of_seen(v, from));
}

/* The blocks of keys that a block of queries sees. */
static int runs_of(const View *v, long from, Run runs[2]) {
    const long low = first_seen(v, from), high = v->prefix_blocks + end_of_seen(v, from);
    if (!low || !v->prefix_blocks) return runs[0] = (Run){v->prefix_blocks ? 0 : low, high}, 1;
    runs[0] = (Run){0, v->prefix_blocks}, runs[1] = (Run){v->prefix_blocks + low, high};
    return 2;
}

/* Where a block's keys begin, and how many are there. */
static long key_of(const View *v, long block, long *rows) {
    const long own = (block - v->prefix_blocks) * SIDE, at = block * SIDE;
    *rows = own < 0 ? least(SIDE, v->item->prefix - at) : least(SIDE, v->item->own - own);
    return own < 0 ? v->before + at : v->start + own;
}

static void hide_block(const View *v, float *scores, long from, long block) {
    const long own = (block - v->prefix_blocks) * SIDE, window = v->call->window;
    long rows;
    key_of(v, block, &rows);
    for (long r = rows; r < SIDE; r++) hide(scores + r * SIDE, ~0u);
    if (own < 0 || !v->call->causal) return;
    for (long r = own > from ? 0 : from - own + 1; r < rows; r++)
        hide(scores + r * SIDE, (1u << least(own + r - from, SIDE - 1)) - 1);
    for (long r = 0; window && r < rows && own + r + window < from + SIDE; r++) {
        const long left = own + r + window - from;
        hide(scores + r * SIDE, left <= 0 ? ~0u : ~0u << left);
    }
}

/* Scores s of a block to cap tanh(scale s / cap) / scale, and where they are wanted the slopes of that. */
static void cap_block(const Attention *call, float *scores, float *bends) {
    const float inner = call->scale / call->cap, outer = call->cap / call->scale;
    for (long i = 0; i < BLOCK; i += LANES) {
        const floats t = tanh_of(load(scores, i, LANES, 0) * inner);
        store(scores, i, LANES, t * outer, 0);
        if (bends) store(bends, i, LANES, 1.0f - t * t, 0);
    }
}

INLINE void write_as(char *to, long row, const float *from, long wide, long rows, long width, float times,
                     const int dtype) {
    for (long r = 0; r < rows; r++) EACH(width, store(to, r * row + i, n, load(from, r * wide + i, n, 0) * times, dtype););
}

static void write_rows(char *to, long row, const float *from, long wide, long rows, const Attention *call, float times) {
    if (call->dtype) write_as(to, row, from, wide, rows, call->width, times, 1);
    else write_as(to, row, from, wide, rows, call->width, times, 0);
}

/* Sums of weights to what makes them one: the logarithm was rounded, and a large one moves all weights of its query. */
static void settle(float *totals, float *deltas, long count) {
    for (long i = 0; i < count; i++) {
        totals[i] = totals[i] == 0.0f ? 0.0f : 1.0f / totals[i]; /* 0: beyond the last query */
        deltas[i] *= totals[i];
    }
}

/* Gradients of a block of keys and values: where they belong if nobody else sees these, else where they are summed. */
static void deliver(const View *v, long block, const float *keys, const float *values) {
    const Attention *call = v->call;
    long rows;
    const long key = key_of(v, block, &rows), head = v->item->head, width = call->width;
    const long own = (block - v->prefix_blocks) * SIDE;
    float *to = v->item->shared[own >= 0];
    if (!to) {
        write_rows(row_of(call, &call->dk, key, head), call->dk.row, keys, v->wide, rows, call, call->scale);
        write_rows(row_of(call, &call->dv, key, head), call->dv.row, values, v->wide, rows, call, 1.0f);
        return;
    }
    to += (own < 0 ? block * SIDE : own) * 2 * width;
    for (long r = 0; r < rows; r++, to += 2 * width) {
        memcpy(to, keys + r * v->wide, width * 4);
        memcpy(to + width, values + r * v->wide, width * 4);
    }
}

#define PADDED(type, count) ((sizeof(type) * (count) + 63) / 64 * 64)
#define TAKE(at, type, count) ((type *)((at += PADDED(type, count)) - PADDED(type, count)))
#define E float
#define ON(name) wide_##name
#include "attention_floats.h"
#include "attention_passes.h"
#undef E
#undef ON

#ifdef TUNESMITH_TILES
#define E uint16_t
#define ON(name) tiled_##name
#include "attention_tiles.h"
#include "attention_passes.h"
#undef E
#undef ON
#endif

static View view_of(const Attention *call, const Item *item) {
    const int32_t *span = call->spans + 5 * item->span;
    View v = {.call = call, .item = item, .first = span[0], .start = span[2], .before = span[3]};
    v.prefix_blocks = blocks_of(item->prefix);
    v.blocks = v.prefix_blocks + blocks_of(item->own);
    v.wide = blocks_of(call->width) * SIDE;
    v.queries = SOME / v.blocks;
    v.queries = least(v.queries < 1 ? 1 : v.queries > CHUNK ? CHUNK : v.queries, blocks_of(item->to - item->from));
    return v;
}

static int run_item(const Attention *call, const Item *item, int backward) {
    const View v = view_of(call, item);
#ifdef TUNESMITH_TILES
    if (call->dtype && call->tiles && ts_has_tiles()) return backward ? tiled_backward(&v) : tiled_forward(&v);
#endif
    return backward ? wide_backward(&v) : wide_forward(&v);
}

static int by_work(const void *a, const void *b) { /* the largest first; one after the other where equal */
    const Item *x = *(Item *const *)a, *y = *(Item *const *)b;
    return x->work != y->work ? (x->work < y->work ? 1 : -1) : x->number < y->number ? -1 : 1;
}

static long parts_of(const int32_t *span) { return least(PARTS, 1 + (span[1] - span[0] - 1) / LONG); }

/* Where part `i` of a span of n queries begins: with equal work in each. */
static long part_at(long n, long i, long parts, int causal) {
    const double share = (double)i / parts;
    return i == parts ? n : (long)(n * (causal ? sqrt(share) : share)) / SIDE * SIDE;
}

static int valid(const Attention *call, uint8_t *held) { /* held: queries that are in a span */
    for (long i = 0; i < call->count; i++) {
        const int32_t *s = call->spans + 5 * i;
        if (s[0] < 0 || s[1] < s[0] || s[1] > call->queries || s[2] < 0 || s[3] < 0 || s[4] < s[3]) return 0;
        if (s[4] > call->keys || (int64_t)s[2] + s[1] - s[0] > call->keys) return 0;
        for (long q = s[0]; q < s[1]; q++)
            if (held[q]++) return 0;
    }
    return 1;
}

static void clear_rows(const Attention *call, const Rows *rows, long row, long heads) {
    for (long h = 0; h < heads; h++) memset(row_of(call, rows, row, h), 0, call->width * size_of(call));
}

static long list_items(const Attention *call, Item *items) {
    long count = 0;
    for (long i = 0; i < call->count; i++) {
        const int32_t *s = call->spans + 5 * i;
        const long n = s[1] - s[0], parts = n ? parts_of(s) : 0;
        for (long head = 0; head < call->kv_heads; head++)
            for (long p = 0; p < parts; p++) {
                Item *item = items + count;
                *item = (Item){.number = count, .span = i, .head = head, .prefix = s[4] - s[3]};
                item->from = part_at(n, p, parts, call->causal), item->to = part_at(n, p + 1, parts, call->causal);
                item->own = call->causal ? item->to : n;
                const double seen = call->causal ? (item->from + item->to + SIDE) / 2.0 : n;
                item->work = (item->to - item->from) * (seen + item->prefix);
                count += item->to > item->from;
            }
    }
    return count;
}

/* How many items of one head see each key, and room for what these find of keys that are not theirs alone. */
static int share_keys(const Attention *call, Item *items, long count, int32_t *seen_by, float **room) {
    size_t floats_needed = 0;
    for (long i = 0; i < count; i++) {
        const int32_t *s = call->spans + 5 * items[i].span;
        if (items[i].head) continue;
        for (long k = 0; k < items[i].prefix; k++) seen_by[s[3] + k]++;
        for (long k = 0; k < items[i].own; k++) seen_by[s[2] + k]++;
    }
    for (int pass = 0; pass < 2; pass++) {
        float *at = *room;
        for (long i = 0; i < count; i++) {
            const int32_t *s = call->spans + 5 * items[i].span;
            for (int own = 0; own < 2; own++) {
                const long n = own ? items[i].own : items[i].prefix, first = s[own ? 2 : 3];
                int apart = 0;
                for (long k = 0; k < n; k++) apart |= seen_by[first + k] > 1;
                if (!apart) continue;
                for (long k = 0; k < n; k++) seen_by[first + k] = 2; /* to be summed, and if it is of one */
                if (pass) items[i].shared[own] = at, at += n * 2 * call->width;
                else floats_needed += n * 2 * call->width;
            }
        }
        if (!pass && floats_needed && !(*room = malloc(floats_needed * sizeof(float)))) return 0;
    }
    return 1;
}

/* Sums what several items found of one key, in their order. */
static void sum_key(const Attention *call, const Item *items, long count, long key, long head, float *sums) {
    const long width = 2 * call->width;
    memset(sums, 0, width * sizeof(float));
    for (long i = 0; i < count; i++) {
        const int32_t *s = call->spans + 5 * items[i].span;
        for (int own = 0; own < 2 && items[i].head == head; own++) {
            const long at = key - s[own ? 2 : 3];
            if (at < 0 || at >= (own ? items[i].own : items[i].prefix)) continue;
            const float *found = items[i].shared[own] + at * width;
            for (long j = 0; j < width; j++) sums[j] += found[j];
        }
    }
    write_rows(row_of(call, &call->dk, key, head), 0, sums, 0, 1, call, call->scale);
    write_rows(row_of(call, &call->dv, key, head), 0, sums + call->width, 0, 1, call, 1.0f);
}

static int run(const Attention *call, int backward) {
    long most = 0, failed = 0;
    for (long i = 0; i < call->count; i++) most += PARTS * call->kv_heads;
    uint8_t *held = calloc(call->queries + 1, 1);
    int32_t *seen_by = calloc(call->keys + 1, sizeof *seen_by);
    Item *items = malloc((most + 1) * sizeof *items), **order = malloc((most + 1) * sizeof *order);
    float *room = NULL;
    failed = !held || !seen_by || !items || !order ? 1 : valid(call, held) ? 0 : 2;
    const long count = failed ? 0 : list_items(call, items);
    for (long i = 0; i < count; i++) order[i] = items + i;
    if (count) qsort(order, count, sizeof *order, by_work);
    if (backward && !failed && !share_keys(call, items, count, seen_by, &room)) failed = 1;
    if (!failed) {
#pragma omp parallel for num_threads(call->threads) schedule(dynamic, 1) reduction(| : failed)
        for (long i = 0; i < count; i++) failed |= run_item(call, order[i], backward);
    }
    for (long q = 0; q < call->queries && !failed; q++)
        if (!held[q]) clear_rows(call, backward ? &call->dq : &call->o, q, call->heads);
    if (backward && !failed) {
#pragma omp parallel for num_threads(call->threads) schedule(static)
        for (long key = 0; key < call->keys; key++) {
            float sums[2 * 256];
            if (!seen_by[key]) clear_rows(call, &call->dk, key, call->kv_heads);
            if (!seen_by[key]) clear_rows(call, &call->dv, key, call->kv_heads);
            for (long head = 0; head < call->kv_heads && seen_by[key] > 1; head++)
                sum_key(call, items, count, key, head, sums);
        }
    }
    free(held), free(seen_by), free(items), free(order), free(room);
    return (int)failed;
}

int ts_attention(const Attention *call) { return run(call, 0); }
int ts_attention_backward(const Attention *call) { return run(call, 1); }
