/* Operands and products of attention in floats, on any processor: operands are rows of floats, whichever side they are
   on. Part of attention.c; attention_passes.h says what is asked of them. */

enum { wide_left_is_right = 1 };
static void wide_begin(void) {}
static void wide_end(void) {}

static void wide_load_left(float *to, const char *from, long row, long rows, const View *v) {
    if (v->call->dtype) widen(to, v->wide, from, row, rows, v->call->width, 1);
    else widen(to, v->wide, from, row, rows, v->call->width, 0);
}

static void wide_load_turned(float *to, long block, const char *from, long row, long rows, const View *v) {
    wide_load_left(to + block * SIDE * v->wide, from, row, rows, v);
}

static void wide_load_right(float *to, long block, const char *from, long row, long rows, const View *v) {
    wide_load_left(to + block * SIDE * v->wide, from, row, rows, v);
}

static void wide_load_queries(float *to, float *spare, const char *from, long row, long rows, const View *v) {
    wide_load_left(spare, from, row, rows, v);
    turn(to, SIDE, spare, v->wide, SIDE, v->wide);
}

static void wide_scores(float *to, const float *keys, const float *query, const View *v) {
    multiply(to, SIDE, (Strided){keys, v->wide, 1}, (Strided){query, SIDE, 1}, SIDE, v->call->width, 0);
}

static void wide_across(float *to, const float *rows, long block, const float *right, const float *rest, long blocks,
                        const View *v, int add) {
    (void)rest;
    const Strided a = {rows + block * SIDE * v->wide, 1, v->wide}, b = {right, SIDE, 1};
    if (add) multiply(to, SIDE, a, b, v->wide, blocks * SIDE, 1);
    else multiply(to, SIDE, a, b, v->wide, blocks * SIDE, 0);
}

static void wide_down(float *to, const float *left, long ahead, const float *rows, long low, long high, const View *v,
                      long apart) {
    (void)apart;
    for (; low < high; low++) /* block by block: sums of few terms are exacter */
        for (long i = 0; i < v->wide; i += SIDE)
            multiply(to + i, v->wide, (Strided){left + low * ahead, SIDE, 1},
                     (Strided){rows + low * SIDE * v->wide + i, v->wide, 1}, SIDE, SIDE, 1);
}

static void wide_put_left(float *to, float *rest, long row, floats p[2][2]) {
    (void)rest;
    for (int odd = 0; odd < 2; odd++)
        for (int h = 0; h < 2; h++) store(to, (row + odd) * SIDE + h * LANES, LANES, p[odd][h], 0);
}

static void wide_put_right(float *to, float *rest, long row, floats p[2][2]) { wide_put_left(to, rest, row, p); }

static void wide_put_both(float *left, float *left_rest, float *right, float *right_rest, long row, floats p[2][2]) {
    (void)left, (void)left_rest;
    wide_put_left(right, right_rest, row, p);
}
