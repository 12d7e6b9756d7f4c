/* Matrix products in bfloat16 (tiles.h), summed in float and rounded once.

   The weight is packed on the way, a group of panels at a time that stays in the second cache while the rows of the
   other operand pass by: nothing is kept between calls, so weights may train. Each element of a result is summed by one
   thread in one order, whatever the number of threads. Every function returns 0, or 1 where it could not run. */
#include <stdlib.h>
#include <unistd.h>

#include "tiles.h"

void *ts_scratch(size_t bytes) {
    static __thread struct {
        void *at;
        size_t bytes;
    } held;
    if (held.bytes < bytes) {
        free(held.at);
        held.bytes = posix_memalign(&held.at, 64, bytes) ? 0 : bytes;
    }
    return held.bytes ? held.at : NULL;
}

typedef struct { /* part of a weight: rows of one matrix; in a block diagonal its columns begin at `from` */
    const uint16_t *at;
    int64_t rows, row, width, from;
} Piece;

typedef struct { /* one operand pair: a [m, k] and pieces of b, one below the other */
    const uint16_t *a;
    int64_t a_row, k;
    const Piece *pieces;
    int64_t count;
} Pair;

typedef struct {
    int by_columns; /* 0: a row of a piece is a column of b; 1: it is a row of b */
    long m, n;
    Pair pairs[2];
    const uint16_t *bias;
    uint16_t *out;
    long out_row;
} Product;

typedef struct { /* out (+)= scale a' b, a [t, m], b [t, n]; out [m, n], or [n, m] where it is turned */
    long t, m, n;
    const uint16_t *a, *b;
    long a_row, b_row;
    float *out;
    long out_row;
    int turned, add;
    float scale;
} Gradient;

#ifdef TUNESMITH_TILES
#include <sys/syscall.h>

#ifdef TILES_AMX
#define GROUP_BYTES (1280 << 10) /* packed weight that stays in the second cache */
#else
#define GROUP_BYTES (640 << 10)
#endif
#define GROUP_PANELS 30 /* more would leave the other operand's rows no place in it */
#define NEAR 18         /* steps of a block of rows that stay in the first cache */
#define MANY_STEPS 64   /* from here on a sum of one weight is made in passes, so that its panels fit the cache */
#define SOME_STEPS 16   /* of one pass */
#define LONGEST 256     /* rows of one partial sum in ts_gradient */
#define PITCH(steps) ((steps) * TILE_STEP + 192) /* bytes from panel to panel: apart in the cache */

int ts_has_tiles(void) {
#ifdef TILES_AMX /* Linux lends the tiles' registers only to processes that ask */
    static int had = -1;
    if (had < 0) had = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return had;
#else
    return 1;
#endif
}

static long least(long a, long b) { return a < b ? a : b; }

/* How parts of `columns` x `rows` blocks are dealt out: by columns where that is even, so that no panel is packed
   twice, else by rows as well. Each part's panels fit the cache. */
typedef struct {
    long across, down, most;
} Deal;

static Deal deal_out(long columns, long rows, size_t panel_bytes, int threads) {
    Deal d = {.across = threads, .down = 1};
    d.most = least(GROUP_BYTES / (long)panel_bytes, GROUP_PANELS);
    if (d.most < 1) d.most = 1;
    const double even = (double)columns / (threads * ((columns + threads - 1) / threads));
    const double other = (double)rows / (threads * ((rows + threads - 1) / threads)) * rows / (rows + 2.0);
    if (even < other) d.across = 1, d.down = threads;
    return d;
}

static void gather_rows_n(const Pair *p, uint16_t *to, long first, long columns) { /* to [columns][k] */
    memset(to, 0, columns * p->k * 2);
    long start = 0;
    for (long i = 0; i < p->count; start += p->pieces[i++].rows) {
        const Piece *piece = p->pieces + i;
        for (long n = first > start ? first : start; piece->at && n < least(first + columns, start + piece->rows); n++)
            memcpy(to + (n - first) * p->k + piece->from, piece->at + (n - start) * piece->row, piece->width * 2);
    }
}

static void gather_rows_k(const Pair *p, uint16_t *to, long first, long columns) { /* to [k][columns] */
    for (long i = 0; i < p->count; i++)
        for (long k = 0; k < p->pieces[i].rows; k++, to += columns)
            memcpy(to, p->pieces[i].at + k * p->pieces[i].row + first, columns * 2);
}

static const uint16_t *within(const Pair *p, long first, long columns, size_t *row) { /* if they are in one piece */
    long start = 0;
    for (long i = 0; i < p->count; start += p->pieces[i++].rows) {
        const Piece *piece = p->pieces + i;
        *row = piece->row;
        if (first >= start && first + columns <= start + piece->rows && piece->width == p->k)
            return piece->at + (first - start) * piece->row;
    }
    return NULL;
}

static void pack_rows_n(const Pair *p, char *packed, size_t pitch, uint16_t *spare, long first, long columns) {
    for (long j = 0; p->k && 32 * j < columns; j++) {
        const long some = least(32, columns - 32 * j);
        size_t row;
        const uint16_t *from = within(p, first + 32 * j, some, &row);
        if (!from) {
            gather_rows_n(p, spare, first + 32 * j, some);
            from = spare, row = p->k;
        }
        pack_b_rows_n(packed + j * pitch, from, row, some, p->k);
    }
}

/* Panels side by side from rows of k, `pitch` bytes from panel to panel: each row is read once, along its length. */
static void pack_side_by_side(char *to, size_t pitch, const uint16_t *from, size_t row, long columns, long k) {
    for (long p = 0; p < 16 * TILE_STEPS(k); p++)
        for (long j = 0; 32 * j < columns; j++) {
            const __mmask32 mask = tile_mask(columns - 32 * j);
            __m512i even = _mm512_setzero_si512(), odd = even, low, high;
            if (2 * p < k) even = _mm512_maskz_loadu_epi16(mask, from + 2 * p * row + 32 * j);
            if (2 * p + 1 < k) odd = _mm512_maskz_loadu_epi16(mask, from + (2 * p + 1) * row + 32 * j);
            tile_pair(even, odd, &low, &high);
            char *at = to + j * pitch + (p / 16) * TILE_STEP + (p % 16) * 64;
            _mm512_store_si512(at, low);
            _mm512_store_si512(at + 1024, high);
        }
}

static void pack_rows_k(const Pair *p, char *packed, size_t pitch, uint16_t *spare, long first, long columns) {
    int whole = 1;
    for (long i = 0; i + 1 < p->count; i++) whole &= p->pieces[i].rows % 32 == 0;
    for (long i = 0; whole && i < p->count; packed += TILE_STEPS(p->pieces[i++].rows) * TILE_STEP)
        pack_side_by_side(packed, pitch, p->pieces[i].at + first, p->pieces[i].row, columns, p->pieces[i].rows);
    for (long j = 0; !whole && 32 * j < columns; j++) {
        const long some = least(32, columns - 32 * j);
        gather_rows_k(p, spare, first + 32 * j, some);
        pack_b_rows_k(packed + j * pitch, spare, some, some, p->k);
    }
}

/* Sums to bfloat16, with the bias, where they belong. */
static void finish(const Product *p, const float *sums, long row, long rows, long column, long columns) {
    const __mmask32 mask = tile_mask(columns);
    __m512 low = _mm512_setzero_ps(), high = low;
    if (p->bias) {
        const __m512i bias = _mm512_maskz_loadu_epi16(mask, p->bias + column);
        low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bias)), 16));
        high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bias, 1)), 16));
    }
    for (long i = 0; i < rows; i++) {
        const __m512 a = _mm512_add_ps(_mm512_load_ps(sums + 32 * i), low);
        const __m512 b = _mm512_add_ps(_mm512_load_ps(sums + 32 * i + 16), high);
        _mm512_mask_storeu_epi16(p->out + (row + i) * p->out_row + column, mask, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

typedef struct { /* where a block of rows of one operand is read: in place, or packed */
    const char *at;
    size_t stride, ahead;
    long steps;
} Block;

static Block block_of(const Pair *pair, long row, long rows, char *spare) {
    const uint16_t *from = pair->a + row * pair->a_row;
    const long steps = TILE_STEPS(pair->k);
#ifdef TILES_AMX
    if (rows == 32 && pair->k % 32 == 0) return (Block){(const char *)from, 2 * pair->a_row, 64, steps};
#endif
    pack_a_rows_m(spare, from, pair->a_row, rows, pair->k);
    return (Block){spare, 64, TILE_STEP, steps};
}

/* A block of rows against packed panels, NEAR steps at a time: so much of the block stays in the first cache while the
   panels pass by. Sums wait in memory between; `add`: they are there already, `last`: they are complete then. */
static void rows_by_panels(const Product *p, long row, long rows, long first, long panels, const char *packed,
                           char *spare[2], float *sums, int add, int last) {
    const Block a = block_of(p->pairs, row, rows, spare[0]), a2 = block_of(p->pairs + 1, row, rows, spare[1]);
    const long pitch = PITCH(a.steps + a2.steps);
    for (long s = 0; s < a.steps; s += NEAR) {
        const int ends = s + NEAR >= a.steps;
        for (long j = 0; j < panels; j++) {
            const long column = 32 * (first + j), columns = least(32, p->n - column);
            float *sum = sums + 1024 * j;
            const char *b = packed + j * pitch;
            Sums c;
            tiles_open(&c, sum, 32, add || s > 0);
            tiles_multiply(&c, a.at + s * a.ahead, a.stride, a.ahead, b + s * TILE_STEP, least(NEAR, a.steps - s), rows,
                           columns, PASSING);
            if (ends && a2.steps)
                tiles_multiply(&c, a2.at, a2.stride, a2.ahead, b + a.steps * TILE_STEP, a2.steps, rows, columns, NEARBY);
            tiles_close(&c);
            if (ends && last) finish(p, sum, row, rows, column, columns);
        }
    }
}

/* Steps of one pass: all of them, unless the sum is long and of one weight. */
static long steps_of(const Product *p) {
    const long steps = TILE_STEPS(p->pairs[0].k);
    return p->pairs[0].count == 1 && steps >= MANY_STEPS ? SOME_STEPS : steps;
}

/* The part of a product that sums `some` from k on; the second pair belongs to the last part. */
static Product part_of(const Product *p, long k, long some, Piece *piece) {
    Product part = *p;
    if (some == p->pairs[0].k) return part;
    *piece = p->pairs[0].pieces[0];
    piece->at += p->by_columns ? k * piece->row : k;
    if (p->by_columns) piece->rows = some;
    else piece->width = some;
    part.pairs[0].a += k, part.pairs[0].k = some, part.pairs[0].pieces = piece;
    if (k + some < p->pairs[0].k) part.pairs[1].k = part.pairs[1].count = 0;
    return part;
}

static void pack_group(const Product *p, char *packed, char *spare, long first, long columns) {
    const long steps[2] = {TILE_STEPS(p->pairs[0].k), TILE_STEPS(p->pairs[1].k)};
    const size_t pitch = PITCH(steps[0] + steps[1]);
    for (int i = 0; i < 2; packed += steps[i++] * TILE_STEP)
        (p->by_columns ? pack_rows_k : pack_rows_n)(p->pairs + i, packed, pitch, (uint16_t *)spare, first, columns);
}

/* Panels [first, last) for the row blocks [from, to), in groups of at most `most` panels. */
static int product_part(const Product *p, long first, long last, long from, long to, long most) {
    const long steps[2] = {steps_of(p), TILE_STEPS(p->pairs[1].k)}, all = steps[0] + steps[1];
    const long groups = (last - first + most - 1) / most; /* of one size, as nearly as can be */
    const long k = p->pairs[0].k, kept = 32 * steps[0] < k ? to - from : 1; /* row blocks whose sums are kept */
    most = groups ? (last - first + groups - 1) / groups : 1;
    char *at = ts_scratch((size_t)kept * most * 4096 + (size_t)(most + 2) * PITCH(all));
    if (!at) return 1;
    float *sums = (float *)at;
    char *blocks[2] = {at + kept * most * 4096, at + kept * most * 4096 + steps[0] * TILE_STEP};
    char *spare = blocks[1] + steps[1] * TILE_STEP, *packed = spare + all * TILE_STEP;
    tiles_begin();
    for (; first < last; first += most) {
        const long panels = least(most, last - first);
        for (long done = 0, some; done < k; done += some) {
            Piece piece;
            some = least(32 * steps[0], k - done);
            const Product part = part_of(p, done, some, &piece);
            pack_group(&part, packed, spare, 32 * first, least(32 * panels, p->n - 32 * first));
            for (long r = from; r < to; r++)
                rows_by_panels(&part, 32 * r, least(32, p->m - 32 * r), first, panels, packed, blocks,
                               sums + (kept > 1 ? r - from : 0) * most * 1024, done > 0, done + some == k);
        }
    }
    tiles_end();
    return 0;
}

static int product(const Product *p, int threads) {
    const long columns = TILE_STEPS(p->n), rows = TILE_STEPS(p->m);
    const size_t panel = PITCH(steps_of(p) + TILE_STEPS(p->pairs[1].k));
    const Deal d = deal_out(columns, rows, panel, threads);
    int failed = 0;
    if (!ts_has_tiles()) return 1;
    if (threads == 1) return product_part(p, 0, columns, 0, rows, d.most);
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
    for (long i = 0; i < d.across * d.down; i++) {
        const long x = i % d.across, y = i / d.across;
        failed |= product_part(p, columns * x / d.across, columns * (x + 1) / d.across, rows * y / d.down,
                               rows * (y + 1) / d.down, d.most);
    }
    return failed;
}
/* A block of sums added to where it belongs; turned: its columns are rows there. */
static void add_block(const Gradient *g, float *sums, long row, long rows, long column, long columns, int add) {
    for (int half = 0; g->turned && half < 4; half++) {
        __m512i r[16];
        float *from = sums + (half & 2) * 256 + (half & 1) * 16;
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + 32 * i);
        tile_transpose(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(from + 32 * i, r[i]);
    }
    const __m512 scale = _mm512_set1_ps(g->scale);
    const long down = g->turned ? columns : rows, along = g->turned ? rows : columns;
    float *out = g->out + (g->turned ? column * g->out_row + row : row * g->out_row + column);
    for (long i = 0; i < down; i++)
        for (int half = 0; 16 * half < along; half++) { /* turned: the blocks off the diagonal change places */
            const float *from = sums + (g->turned ? (i % 16 + 16 * half) * 32 + i / 16 * 16 : 32 * i + 16 * half);
            float *to = out + i * g->out_row + 16 * half;
            const __mmask16 mask = (__mmask16)tile_mask(least(16, along - 16 * half));
            const __m512 held = add ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(scale, _mm512_load_ps(from), held));
        }
}

/* Panels [first, last) for the row blocks [from, to), LONGEST rows of t at a time. */
static int gradient_part(const Gradient *g, long first, long last, long from, long to) {
    const long steps = least(TILE_STEPS(g->t), LONGEST / 32), pitch = PITCH(steps);
    const long most = least(last - first, 32), kept = least(to - from, 4);
    char *at = ts_scratch(4096 + (size_t)(most + kept) * pitch);
    if (!at) return 1;
    float *sums = (float *)at;
    char *a = at + 4096, *b = a + kept * pitch;
    tiles_begin();
    for (long t = 0; t < g->t; t += LONGEST) {
        const long some = least(LONGEST, g->t - t);
        for (long j = first; j < last; j += most) {
            const long columns = least(32 * least(most, last - j), g->n - 32 * j);
            pack_side_by_side(b, pitch, g->b + t * g->b_row + 32 * j, g->b_row, columns, some);
            for (long r = from; r < to; r++) {
                char *block = a + (r - from) % kept * pitch;
                const long rows = least(32, g->m - 32 * r);
                if (j == first || to - from > kept)
                    pack_a_rows_k(block, g->a + t * g->a_row + 32 * r, g->a_row, rows, some);
                for (long c = 0; c < columns; c += 32) {
                    Sums into;
                    tiles_open(&into, sums, 32, 0);
                    tiles_multiply(&into, block, 64, TILE_STEP, b + c / 32 * pitch, TILE_STEPS(some), rows, columns - c,
                                   NEARBY);
                    tiles_close(&into);
                    add_block(g, sums, 32 * r, rows, 32 * j + c, least(32, columns - c), g->add || t > 0);
                }
            }
        }
    }
    tiles_end();
    return 0;
}

static int gradient(const Gradient *g, int threads) {
    const long columns = TILE_STEPS(g->n), rows = TILE_STEPS(g->m);
    int failed = 0;
    if (!ts_has_tiles()) return 1;
    if (threads == 1) return gradient_part(g, 0, columns, 0, rows);
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
    for (long i = 0; i < threads; i++)
        failed |= gradient_part(g, columns * i / threads, columns * (i + 1) / threads, 0, rows);
    return failed;
}
#else
int ts_has_tiles(void) { return 0; }
static int product(const Product *p, int threads) { return (void)p, (void)threads, 1; }
static int gradient(const Gradient *g, int threads) { return (void)g, (void)threads, 1; }
#endif

/* out [m, n] = a b + a2 b2 + bias; b [k, n] and b2 [k2, n] lie in pieces (Product.by_columns says how). One pointer,
   since a caller's conversion of every argument would take longer than a small product. */
typedef struct {
    int64_t by_columns, m, n;
    struct {
        int64_t a, a_row, k, count;
    } pairs[2];
    int64_t bias, out, threads;
    Piece pieces[]; /* those of the first pair, then those of the second */
} Call;

int ts_product(const Call *c) {
    Product p = {.by_columns = (int)c->by_columns, .m = c->m, .n = c->n, .out_row = c->n};
    const Piece *pieces = c->pieces;
    for (int i = 0; i < 2; pieces += c->pairs[i++].count)
        p.pairs[i] = (Pair){(const uint16_t *)c->pairs[i].a, c->pairs[i].a_row, c->pairs[i].k, pieces,
                            c->pairs[i].count};
    p.bias = (const uint16_t *)c->bias;
    p.out = (uint16_t *)c->out;
    return product(&p, (int)c->threads);
}

/* out (+)= scale a' b in float: a [t, m], b [t, n], out [m, n], or [n, m] where it is `turned`. */
int ts_gradient(int64_t t, int64_t m, int64_t n, const uint16_t *a, int64_t a_row, const uint16_t *b, int64_t b_row,
                float *out, int64_t out_row, int turned, int add, float scale, int threads) {
    const Gradient g = {t, m, n, a, b, a_row, b_row, out, out_row, turned, add, scale};
    return gradient(&g, threads);
}
