/* One item's forward and backward pass over blocks of attention_blocks.h: included twice by attention.c, where E is what
   operands are made of and ON(name) the name of this way's functions.

   Flash attention (Dao 2023, arXiv 2307.08691): the weights are never whole in memory; the backward makes them again
   from scores and the logarithm of their sums. Unlike there, what the softmax takes off each query's gradients (the
   deltas) is summed from weights and their gradients, not from the rounded result: in bfloat16 that is what errs most.

   Each way has load_left, load_right, load_turned and load_queries to make operands of rows, put_left, put_right and
   put_both to make them of weights, and three products: `scores` of keys and queries, `across` keys with a sum for each
   query, `down` queries with a sum for each key. `rest` is where a way keeps what its operands cannot hold. */

typedef struct {
    E *keys, *values, *query, *weights;
    float *scores, *sums, *spare;
} ON(Forward);

typedef struct {
    E *keys, *values, *keys_turned, *query, *grad, *query_rows, *grad_rows, *weights, *slopes_left, *slopes_right;
    float *key_sums, *value_sums, *scores, *slopes, *bends, *sums, *spare, *logs, *totals, *deltas;
} ON(Backward);

static size_t ON(forward_bytes)(const View *v) {
    const long keys = v->blocks * SIDE * v->wide;
    return sizeof(E) * (2 * keys + SIDE * v->wide + 2 * CHUNK * BLOCK) + 4 * (CHUNK * BLOCK + 2 * SIDE * v->wide) + 1024;
}

/* One block of queries of one head. */
static void ON(forward_block)(const View *v, long head, long from, const ON(Forward) *f) {
    const Attention *call = v->call;
    const long rows = least(SIDE, v->item->to - from), wide = v->wide;
    const float unit = call->scale * LOG2E;
    floats most[2] = {all(HIDDEN), all(HIDDEN)}, total[2] = {{}, {}};
    Run runs[2];
    const int count = runs_of(v, from, runs);
    int add = 0;
    ON(load_queries)(f->query, f->spare, row_of(call, &call->q, v->first + from, head), call->q.row, rows, v);
    for (int run = 0; run < count; run++)
        for (long block = runs[run].from; block < runs[run].to; block += CHUNK) {
            const long blocks = least(CHUNK, runs[run].to - block);
            floats peak[2] = {all(HIDDEN), all(HIDDEN)}, sums[2][2] = {};
            for (long b = 0; b < blocks; b++) {
                float *scores = f->scores + b * BLOCK;
                ON(scores)(scores, f->keys + (block + b) * SIDE * wide, f->query, v);
                if (call->cap > 0) cap_block(call, scores, 0);
                hide_block(v, scores, from, block + b);
                for (long r = 0; r < SIDE; r++)
                    for (int h = 0; h < 2; h++)
                        peak[h] = larger(load(scores, r * SIDE + h * LANES, LANES, 0), peak[h]);
            }
            for (int h = 0; h < 2; h++) {
                const floats now = larger(peak[h] * unit, most[h]), less = power_of_two(most[h] - now);
                most[h] = now;
                total[h] *= less;
                for (long i = 0; add && i < wide; i++) {
                    const long at = i * SIDE + h * LANES;
                    store(f->sums, at, LANES, load(f->sums, at, LANES, 0) * less, 0);
                }
            }
            for (long r = 0; r < blocks * SIDE; r += 2) {
                floats p[2][2];
                for (int odd = 0; odd < 2; odd++)
                    for (int h = 0; h < 2; h++) {
                        const floats s = load(f->scores, (r + odd) * SIDE + h * LANES, LANES, 0);
                        p[odd][h] = power_of_two(s * unit - most[h]);
                        sums[odd][h] += p[odd][h];
                    }
                ON(put_right)(f->weights, f->weights + CHUNK * BLOCK, r, p);
            }
            for (int h = 0; h < 2; h++) total[h] += sums[0][h] + sums[1][h];
            ON(across)(f->sums, f->values, block, f->weights, f->weights + CHUNK * BLOCK, blocks, v, add);
            add = 1;
        }
    float *logs = call->lse + head * call->queries + v->first + from, spare[SIDE];
    for (int h = 0; h < 2; h++) {
        const floats share = 1.0f / total[h];
        for (long i = 0; i < wide; i++) {
            const long at = i * SIDE + h * LANES;
            store(f->sums, at, LANES, load(f->sums, at, LANES, 0) * share, 0);
        }
        store(spare, h * LANES, LANES, most[h] + log_of_two(total[h]), 0);
    }
    memcpy(logs, spare, rows * 4);
    turn(f->spare, wide, f->sums, SIDE, wide, SIDE);
    write_rows(row_of(call, &call->o, v->first + from, head), call->o.row, f->spare, wide, rows, call, 1.0f);
}

static int ON(forward)(const View *v) {
    const Attention *call = v->call;
    const long keys = v->blocks * SIDE * v->wide, group = call->heads / call->kv_heads;
    char *at = ts_scratch(ON(forward_bytes)(v));
    if (!at) return 1;
    ON(Forward) f;
    f.keys = TAKE(at, E, keys);
    f.values = TAKE(at, E, keys);
    f.query = TAKE(at, E, SIDE * v->wide);
    f.weights = TAKE(at, E, 2 * CHUNK * BLOCK);
    f.scores = TAKE(at, float, CHUNK *BLOCK);
    f.sums = TAKE(at, float, SIDE *v->wide);
    f.spare = TAKE(at, float, SIDE *v->wide);
    ON(begin)();
    for (long b = 0; b < v->blocks; b++) {
        long rows;
        const long key = key_of(v, b, &rows);
        ON(load_left)(f.keys + b * SIDE * v->wide, row_of(call, &call->k, key, v->item->head), call->k.row, rows, v);
        ON(load_turned)(f.values, b, row_of(call, &call->v, key, v->item->head), call->v.row, rows, v);
    }
    for (long g = 0; g < group; g++)
        for (long from = v->item->from; from < v->item->to; from += SIDE)
            ON(forward_block)(v, v->item->head * group + g, from, &f);
    ON(end)();
    return 0;
}

static size_t ON(backward_bytes)(const View *v) {
    const long keys = v->blocks * SIDE * v->wide, some = v->queries * SIDE * v->wide;
    return sizeof(E) * (3 * keys + 4 * some + (4 * v->queries + 2 * v->queries * v->blocks) * BLOCK) +
           4 * (2 * keys + (v->call->cap > 0 ? 3 : 2) * v->queries * v->blocks * BLOCK + 2 * SIDE * v->wide +
                3 * v->queries * SIDE) + 2048;
}

/* What the backward needs of `count` blocks of queries of one head: as operands on both sides, with lse and delta. */
static void ON(load_some)(const View *v, long head, long from, long count, const ON(Backward) *b) {
    const Attention *call = v->call;
    const long wide = v->wide;
    for (long i = 0; i < count; i++) {
        const long at = from + i * SIDE, rows = least(SIDE, v->item->to - at), first = v->first + at;
        const char *q = row_of(call, &call->q, first, head), *g = row_of(call, &call->grad, first, head);
        ON(load_queries)(b->query + i * SIDE * wide, b->spare, q, call->q.row, rows, v);
        ON(load_queries)(b->grad + i * SIDE * wide, b->spare, g, call->grad.row, rows, v);
        ON(load_right)(b->query_rows, i, q, call->q.row, rows, v);
        ON(load_right)(b->grad_rows, i, g, call->grad.row, rows, v);
        memset(b->logs + i * SIDE, 0, SIDE * 4);
        memset(b->totals + i * SIDE, 0, SIDE * 4);
        memset(b->deltas + i * SIDE, 0, SIDE * 4);
        memcpy(b->logs + i * SIDE, call->lse + head * call->queries + first, rows * 4);
    }
}

/* Weights of one block, in place of its scores, and what they add to their sums and to the deltas. */
INLINE void ON(weigh)(const View *v, const ON(Backward) *b, long query, long block) {
    float *scores = b->scores + (query * v->blocks + block) * BLOCK;
    const float *slopes = b->slopes + (query * v->blocks + block) * BLOCK, unit = v->call->scale * LOG2E;
    for (int h = 0; h < 2; h++) {
        const long lane = query * SIDE + h * LANES;
        const floats less = load(b->logs, lane, LANES, 0);
        floats totals[2] = {}, sums[2] = {};
        for (long r = 0; r < SIDE; r += 2)
            for (int odd = 0; odd < 2; odd++) {
                const long at = (r + odd) * SIDE + h * LANES;
                const floats p = power_of_two(load(scores, at, LANES, 0) * unit - less);
                totals[odd] += p;
                sums[odd] += p * load(slopes, at, LANES, 0);
                store(scores, at, LANES, p, 0);
            }
        store(b->totals, lane, LANES, load(b->totals, lane, LANES, 0) + (totals[0] + totals[1]), 0);
        store(b->deltas, lane, LANES, load(b->deltas, lane, LANES, 0) + (sums[0] + sums[1]), 0);
    }
}

/* Weights and the gradients of scores of one block as operands. */
static void ON(put)(const View *v, const ON(Backward) *b, long query, long block) {
    const long at = query * v->blocks + block, apart = v->queries * BLOCK;
    const float *weights = b->scores + at * BLOCK, *slopes = b->slopes + at * BLOCK;
    const float *deltas = b->deltas + query * SIDE, *totals = b->totals + query * SIDE;
    E *left = b->weights + query * BLOCK, *slopes_left = b->slopes_left + query * BLOCK;
    E *right = b->slopes_right + at * BLOCK;
    const floats less[2] = {load(deltas, 0, LANES, 0), load(deltas, LANES, LANES, 0)};
    const floats share[2] = {load(totals, 0, LANES, 0), load(totals, LANES, LANES, 0)};
    for (long r = 0; r < SIDE; r += 2) {
        floats p[2][2], d[2][2];
        for (int odd = 0; odd < 2; odd++)
            for (int h = 0; h < 2; h++) {
                const long place = (r + odd) * SIDE + h * LANES;
                p[odd][h] = load(weights, place, LANES, 0) * share[h];
                d[odd][h] = p[odd][h] * (load(slopes, place, LANES, 0) - less[h]);
                if (b->bends) d[odd][h] *= load(b->bends, at * BLOCK + place, LANES, 0);
            }
        ON(put_left)(left, left + apart, r, p);
        ON(put_both)(slopes_left, slopes_left + apart, right, right + apart * v->blocks, r, d);
    }
}

static void ON(backward_some)(const View *v, long head, long from, long count, const ON(Backward) *b) {
    const Attention *call = v->call;
    const long wide = v->wide, keys = SIDE * wide;
    ON(load_some)(v, head, from, count, b);
    for (long block = 0; block < v->blocks; block++)
        for (long i = 0; i < count; i++) {
            if (!sees(v, from + i * SIDE, block)) continue;
            float *scores = b->scores + (i * v->blocks + block) * BLOCK;
            float *slopes = b->slopes + (i * v->blocks + block) * BLOCK;
            ON(scores)(scores, b->keys + block * keys, b->query + i * keys, v);
            if (b->bends) cap_block(call, scores, b->bends + (i * v->blocks + block) * BLOCK);
            ON(scores)(slopes, b->values + block * keys, b->grad + i * keys, v);
            hide_block(v, scores, from + i * SIDE, block);
            ON(weigh)(v, b, i, block);
        }
    settle(b->totals, b->deltas, count * SIDE);
    for (long block = 0; block < v->blocks; block++) {
        long low = count, high = 0;
        for (long i = 0; i < count; i++) {
            if (!sees(v, from + i * SIDE, block)) continue;
            low = least(low, i), high = i + 1;
            ON(put)(v, b, i, block);
        }
        if (low >= high) continue;
        ON(down)(b->value_sums + block * keys, b->weights, BLOCK, b->grad_rows, low, high, v, v->queries * BLOCK);
        if (ON(left_is_right))
            ON(down)(b->key_sums + block * keys, b->slopes_right + block * BLOCK, v->blocks * BLOCK, b->query_rows, low,
                     high, v, 0);
        else
            ON(down)(b->key_sums + block * keys, b->slopes_left, BLOCK, b->query_rows, low, high, v,
                     v->queries * BLOCK);
    }
    for (long i = 0; i < count; i++) {
        const long at = from + i * SIDE, rows = least(SIDE, v->item->to - at);
        Run runs[2];
        const int parts = runs_of(v, at, runs);
        for (int r = 0; r < parts; r++) {
            const E *right = b->slopes_right + (i * v->blocks + runs[r].from) * BLOCK;
            ON(across)(b->sums, b->keys_turned, runs[r].from, right, right + v->queries * v->blocks * BLOCK,
                       runs[r].to - runs[r].from, v, r > 0);
        }
        turn(b->spare, wide, b->sums, SIDE, wide, SIDE);
        write_rows(row_of(call, &call->dq, v->first + at, head), call->dq.row, b->spare, wide, rows, call, call->scale);
    }
}

static int ON(backward)(const View *v) {
    const Attention *call = v->call;
    const long wide = v->wide, keys = v->blocks * SIDE * wide, some = v->queries * SIDE * wide;
    const long head = v->item->head, group = call->heads / call->kv_heads, step = v->queries * SIDE;
    char *at = ts_scratch(ON(backward_bytes)(v));
    if (!at) return 1;
    ON(Backward) b;
    b.keys = TAKE(at, E, keys);
    b.values = TAKE(at, E, keys);
    b.keys_turned = TAKE(at, E, keys);
    b.query = TAKE(at, E, some);
    b.grad = TAKE(at, E, some);
    b.query_rows = TAKE(at, E, some);
    b.grad_rows = TAKE(at, E, some);
    b.weights = TAKE(at, E, 2 * v->queries * BLOCK);
    b.slopes_left = TAKE(at, E, 2 * v->queries * BLOCK);
    b.slopes_right = TAKE(at, E, 2 * v->queries * v->blocks * BLOCK);
    b.key_sums = TAKE(at, float, keys);
    b.value_sums = TAKE(at, float, keys);
    b.scores = TAKE(at, float, v->queries * v->blocks * BLOCK);
    b.slopes = TAKE(at, float, v->queries * v->blocks * BLOCK);
    b.bends = call->cap > 0 ? TAKE(at, float, v->queries * v->blocks * BLOCK) : NULL;
    b.sums = TAKE(at, float, SIDE *wide);
    b.spare = TAKE(at, float, SIDE *wide);
    b.logs = TAKE(at, float, step);
    b.totals = TAKE(at, float, step);
    b.deltas = TAKE(at, float, step);
    memset(b.key_sums, 0, keys * 4);
    memset(b.value_sums, 0, keys * 4);
    ON(begin)();
    for (long i = 0; i < v->blocks; i++) {
        long rows;
        const long key = key_of(v, i, &rows);
        const char *k = row_of(call, &call->k, key, head), *value = row_of(call, &call->v, key, head);
        ON(load_left)(b.keys + i * SIDE * wide, k, call->k.row, rows, v);
        ON(load_left)(b.values + i * SIDE * wide, value, call->v.row, rows, v);
        ON(load_turned)(b.keys_turned, i, k, call->k.row, rows, v);
    }
    for (long g = 0; g < group; g++)
        for (long from = v->item->from; from < v->item->to; from += step)
            ON(backward_some)(v, head * group + g, from, least(v->queries, blocks_of(v->item->to - from)), &b);
    ON(end)();
    for (long i = 0; i < v->blocks; i++) deliver(v, i, b.key_sums + i * SIDE * wide, b.value_sums + i * SIDE * wide);
    return 0;
}
