/* Operands and products of attention in bfloat16: bfloat16 panels of tiles.h, weights in two parts that are multiplied
   apart. Part of attention.c; attention_passes.h says what is asked of them. */

enum { tiled_left_is_right = 0 };
static void tiled_begin(void) { tiles_begin(); }
static void tiled_end(void) { tiles_end(); }

static void tiled_load_left(uint16_t *to, const char *from, long row, long rows, const View *v) {
    pack_a_rows_m(to, (const uint16_t *)from, row, rows, v->call->width);
}

static void tiled_load_turned(uint16_t *to, long block, const char *from, long row, long rows, const View *v) {
    for (long i = 0; i < v->call->width; i += SIDE)
        pack_a_rows_k(to + (i * v->blocks + block * SIDE) * SIDE, (const uint16_t *)from + i, row,
                      least(SIDE, v->call->width - i), rows);
}

static void tiled_load_right(uint16_t *to, long block, const char *from, long row, long rows, const View *v) {
    for (long i = 0; i < v->call->width; i += SIDE)
        pack_b_rows_k(to + (i * v->queries + block * SIDE) * SIDE, (const uint16_t *)from + i, row,
                      least(SIDE, v->call->width - i), rows);
}

static void tiled_load_queries(uint16_t *to, float *spare, const char *from, long row, long rows, const View *v) {
    (void)spare;
    pack_b_rows_n(to, (const uint16_t *)from, row, rows, v->call->width);
}

static void tiled_scores(float *to, const uint16_t *keys, const uint16_t *query, const View *v) {
    Sums c;
    tiles_open(&c, to, SIDE, 0);
    tiles_multiply(&c, keys, 64, TILE_STEP, query, v->wide / SIDE, SIDE, SIDE, NEARBY);
    tiles_close(&c);
}

static void tiled_across(float *to, const uint16_t *rows, long block, const uint16_t *right, const uint16_t *rest,
                         long blocks, const View *v, int add) {
    for (long i = 0; i < v->wide; i += SIDE, to += BLOCK) {
        const uint16_t *left = rows + (i * v->blocks + block * SIDE) * SIDE;
        Sums c;
        tiles_open(&c, to, SIDE, add);
        tiles_multiply(&c, left, 64, TILE_STEP, right, blocks, SIDE, SIDE, NEARBY);
        tiles_multiply(&c, left, 64, TILE_STEP, rest, blocks, SIDE, SIDE, NEARBY);
        tiles_close(&c);
    }
}

static void tiled_down(float *to, const uint16_t *left, long ahead, const uint16_t *rows, long low, long high,
                       const View *v, long apart) {
    left += low * ahead;
    for (long i = 0; i < v->wide; i += SIDE) {
        const uint16_t *right = rows + (i * v->queries + low * SIDE) * SIDE;
        Sums c;
        tiles_open(&c, to + i, v->wide, 1);
        tiles_multiply(&c, left, 64, 2 * ahead, right, high - low, SIDE, SIDE, NEARBY);
        tiles_multiply(&c, left + apart, 64, 2 * ahead, right, high - low, SIDE, SIDE, NEARBY);
        tiles_close(&c);
    }
}

INLINE void tiled_put_left(uint16_t *to, uint16_t *rest, long row, floats p[2][2]) {
    for (int odd = 0; odd < 2; odd++) {
        put_row(to, row + odd, p[odd][0], p[odd][1]);
        put_row(rest, row + odd, rest_of(p[odd][0]), rest_of(p[odd][1]));
    }
}

INLINE void tiled_put_right(uint16_t *to, uint16_t *rest, long row, floats p[2][2]) {
    to += row / SIDE * BLOCK, rest += row / SIDE * BLOCK;
    for (int h = 0; h < 2; h++) {
        put_pairs(to, row % SIDE / 2, h, p[0][h], p[1][h]);
        put_pairs(rest, row % SIDE / 2, h, rest_of(p[0][h]), rest_of(p[1][h]));
    }
}

INLINE void tiled_put_both(uint16_t *left, uint16_t *left_rest, uint16_t *right, uint16_t *right_rest, long row,
                           floats p[2][2]) {
    tiled_put_left(left, left_rest, row, p);
    tiled_put_right(right, right_rest, row, p);
}
