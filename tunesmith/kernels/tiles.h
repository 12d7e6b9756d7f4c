/* Matrix products of bfloat16 in blocks, for the other files here: packers, and a block of 32 x 32 sums, which AMX keeps
   in four tiles and AVX-512 in registers, a few rows at a time.

   One step multiplies a block 32 x 32 of A by one of B. Formats of packed operands, where `steps` counts steps of 32
   along the summed axis:
     A panel: [steps][2 tiles][16 rows of A][32 k]          (32 rows of A; a tile's rows may also be read in place)
     B panel: [steps][2 tiles][16 pairs of k][16 columns][2] (32 columns of B)
   Both take 2048 bytes a step and should begin at a multiple of 64 bytes. What is beyond the edge of a matrix is zero
   in a panel. Use: tiles_begin(); (tiles_open(...); tiles_multiply(...) any number of times; tiles_close(...))...;
   tiles_end(); all in one thread. Each sum is made in one order, whatever else is in its block. */
#ifndef TUNESMITH_TILES_H
#define TUNESMITH_TILES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TILE_STEP 2048 /* bytes of a panel for one step of 32 along the summed axis */
#define TILE_STEPS(k) (((k) + 31) / 32)

int ts_has_tiles(void);          /* gemm.c: whether the processor can do this and the system lets us use it */
void *ts_scratch(size_t bytes);  /* gemm.c: this thread's own memory, at a multiple of 64 bytes; NULL: none left.
                                    Kept for the next call, so that pages are touched once: one user at a time. */

static inline uint16_t bf16_of(float x) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float bf16_to(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define TUNESMITH_TILES 1
#include <immintrin.h>

#define TILES_INLINE static inline __attribute__((always_inline))

typedef struct { /* where the sums of a block belong: rows of 32 floats, `row` floats apart */
    float *at;
    size_t row;
    int add; /* to what is there */
} Sums;

enum { NEARBY, PASSING, AFAR };  /* where a panel of B comes from: the first cache, the second, memory */
#define TILES_AHEAD (8 * TILE_STEP) /* bytes: what memory takes to answer, in steps */

TILES_INLINE void tiles_ask(const char *b, const int from) {
    for (int i = 0; from == AFAR && i < TILE_STEP; i += 64) _mm_prefetch(b + TILES_AHEAD + i, _MM_HINT_T0);
}

#ifdef __AMX_BF16__
#define TILES_AMX 1
/* The compiler's tile intrinsics do not tell it that they read memory: nothing may move across them. */
#define TILES_FENCE() __asm__ volatile("" ::: "memory")

static inline void tiles_begin(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    TILES_FENCE();
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

static inline void tiles_end(void) { _tile_release(); }

static inline void tiles_open(Sums *c, float *at, size_t row, int add) {
    *c = (Sums){at, row, add};
    TILES_FENCE();
    if (!add) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, at, row * 4);
    _tile_loadd(1, at + 16, row * 4);
    _tile_loadd(2, at + 16 * row, row * 4);
    _tile_loadd(3, at + 16 * row + 16, row * 4);
}

static inline void tiles_close(Sums *c) {
    _tile_stored(0, c->at, c->row * 4);
    _tile_stored(1, c->at + 16, c->row * 4);
    _tile_stored(2, c->at + 16 * c->row, c->row * 4);
    _tile_stored(3, c->at + 16 * c->row + 16, c->row * 4);
    TILES_FENCE();
}

/* sums += A B over `steps` steps, of `rows` rows and `columns` columns at least; what is in other sums has no meaning.
   a: the first row; `stride` bytes from row to row, `ahead` bytes from step to step: a packed panel has (64, 2048), a
   row-major matrix of row stride s bytes read in place (s, 64). b: a packed panel. */
TILES_INLINE void tiles_multiply(Sums *c, const void *a, size_t stride, size_t ahead, const void *b, long steps,
                                 long rows, long columns, const int from) {
    const char *pa = a, *pb = b;
    const size_t half = 16 * stride;
    (void)c;
    TILES_FENCE();
    if (rows > 16 && columns > 16 && from)
        for (long s = 0; s < steps; s++, pa += ahead, pb += TILE_STEP) {
            tiles_ask(pb, from);
            _tile_stream_loadd(6, pb, 64); /* shall not drive a out of the first cache */
            _tile_loadd(4, pa, stride);
            _tile_stream_loadd(7, pb + 1024, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, pa + half, stride);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    else if (rows > 16 && columns > 16)
        for (long s = 0; s < steps; s++, pa += ahead, pb += TILE_STEP) {
            _tile_loadd(6, pb, 64);
            _tile_loadd(4, pa, stride);
            _tile_loadd(7, pb + 1024, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, pa + half, stride);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    else if (columns > 16)
        for (long s = 0; s < steps; s++, pa += ahead, pb += TILE_STEP) {
            tiles_ask(pb, from);
            _tile_loadd(4, pa, stride);
            _tile_loadd(6, pb, 64);
            _tile_loadd(7, pb + 1024, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
    else
        for (long s = 0; s < steps; s++, pa += ahead, pb += TILE_STEP) {
            _tile_loadd(6, pb, 64);
            _tile_loadd(4, pa, stride);
            _tile_dpbf16ps(0, 4, 6);
            if (rows > 16) {
                _tile_loadd(5, pa + half, stride);
                _tile_dpbf16ps(2, 5, 6);
            }
        }
}
#else
static inline void tiles_begin(void) {}
static inline void tiles_end(void) {}
static inline void tiles_open(Sums *c, float *at, size_t row, int add) { *c = (Sums){at, row, add}; }
static inline void tiles_close(Sums *c) { (void)c; }

/* Some rows of a packed panel of A against the first 16 or 32 columns of one of B; all sums are in registers. */
TILES_INLINE void tiles_part(const Sums *c, long first, const char *a, size_t ahead, const char *b, long steps,
                             const int rows, const int wide, const int from) {
    __m512 sums[16][2];
    float *to = c->at + first * c->row;
    a += 64 * first;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v <= wide; v++)
            sums[r][v] = c->add ? _mm512_loadu_ps(to + r * c->row + 16 * v) : _mm512_setzero_ps();
    for (long s = 0; s < steps; s++, a += ahead, b += TILE_STEP) {
        tiles_ask(b, from);
#pragma GCC unroll 2
        for (int pair = 0; pair < 16; pair++) {
            const __m512bh low = (__m512bh)_mm512_load_si512(b + 64 * pair);
            const __m512bh high = (__m512bh)_mm512_load_si512(b + 1024 + 64 * pair);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                int32_t two;
                memcpy(&two, a + 64 * r + 4 * pair, 4);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
                sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, low);
                if (wide) sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, high);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v <= wide; v++) _mm512_storeu_ps(to + r * c->row + 16 * v, sums[r][v]);
}

#define TILES_PART(name, rows, wide, from)                                                                         \
    static __attribute__((noinline, unused)) void name(const Sums *c, long first, const char *a, size_t ahead, const char *b, \
                                                       long steps) {                                               \
        tiles_part(c, first, a, ahead, b, steps, rows, wide, from);                                                \
    }
TILES_PART(tiles_4_rows, 4, 1, PASSING)
TILES_PART(tiles_8_rows, 8, 1, PASSING)
TILES_PART(tiles_12_rows, 12, 1, PASSING)
TILES_PART(tiles_16_rows, 16, 0, PASSING)
TILES_PART(tiles_4_rows_afar, 4, 1, AFAR)
TILES_PART(tiles_8_rows_afar, 8, 1, AFAR)
TILES_PART(tiles_12_rows_afar, 12, 1, AFAR)

/* sums += A B over `steps` steps, of `rows` rows and `columns` columns at least; what is in other sums has no meaning.
   a: a packed panel, whose `stride` is 64, `ahead` bytes from step to step. b: a packed panel. */
TILES_INLINE void tiles_multiply(Sums *c, const void *a, size_t stride, size_t ahead, const void *b, long steps,
                                 long rows, long columns, const int from) {
    (void)stride;
    for (long first = 0; columns <= 16 && first < rows; first += 16) tiles_16_rows(c, first, a, ahead, b, steps);
    for (long first = 0, some; columns > 16 && first < rows; first += some) {
        const long left = rows - first;
        const int asking = from == AFAR && !first; /* what follows finds the panel in the cache */
        some = left > 16 || (left > 8 && left <= 12) ? 12 : left > 4 ? 8 : 4;
        if (some == 12) (asking ? tiles_12_rows_afar : tiles_12_rows)(c, first, a, ahead, b, steps);
        else if (some == 8) (asking ? tiles_8_rows_afar : tiles_8_rows)(c, first, a, ahead, b, steps);
        else (asking ? tiles_4_rows_afar : tiles_4_rows)(c, first, a, ahead, b, steps);
    }
    c->add = 1;
}
#endif

/* Sixteen rows of sixteen dwords, transposed. */
static inline __attribute__((always_inline)) void tile_transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

static inline __mmask32 tile_mask(long left) { /* the first `left` of 32 words */
    return left >= 32 ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
}

/* One tile row of pairs from two source rows (k and k + 1) of up to 32 columns: columns 0-15 low, 16-31 high. */
static inline void tile_pair(__m512i even, __m512i odd, __m512i *low, __m512i *high) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    *low = _mm512_permutex2var_epi16(even, first, odd);
    *high = _mm512_permutex2var_epi16(even, _mm512_add_epi16(first, _mm512_set1_epi16(16)), odd);
}

/* B panel from a source whose row n (of `rows` <= 32) holds column n of B: k contiguous, length k. */
static inline void pack_b_rows_n(void *panel, const uint16_t *source, size_t row, long rows, long k) {
    for (long s = 0; s < TILE_STEPS(k); s++)
        for (int half = 0; half < 2; half++) {
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = 16 * half + i >= rows ? _mm512_setzero_si512()
                                             : _mm512_maskz_loadu_epi16(tile_mask(k - 32 * s),
                                                                        source + (16 * half + i) * row + 32 * s);
            tile_transpose(r);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512((char *)panel + s * TILE_STEP + half * 1024 + i * 64, r[i]);
        }
}

/* B panel from a source whose row k holds row k of B: `columns` <= 32 contiguous, k rows. */
static inline void pack_b_rows_k(void *panel, const uint16_t *source, size_t row, long columns, long k) {
    const __mmask32 mask = tile_mask(columns);
    for (long p = 0; p < 16 * TILE_STEPS(k); p++) {
        __m512i even = _mm512_setzero_si512(), odd = even, low, high;
        if (2 * p < k) even = _mm512_maskz_loadu_epi16(mask, source + 2 * p * row);
        if (2 * p + 1 < k) odd = _mm512_maskz_loadu_epi16(mask, source + (2 * p + 1) * row);
        tile_pair(even, odd, &low, &high);
        char *to = (char *)panel + (p / 16) * TILE_STEP + (p % 16) * 64;
        _mm512_store_si512(to, low);
        _mm512_store_si512(to + 1024, high);
    }
}

/* A panel from a source whose row m (of `rows` <= 32) holds row m of A: k contiguous, length k. */
static inline void pack_a_rows_m(void *panel, const uint16_t *source, size_t row, long rows, long k) {
    for (long s = 0; s < TILE_STEPS(k); s++)
        for (long i = 0; i < 32; i++)
            _mm512_store_si512((char *)panel + s * TILE_STEP + i * 64,
                               i >= rows ? _mm512_setzero_si512()
                                         : _mm512_maskz_loadu_epi16(tile_mask(k - 32 * s), source + i * row + 32 * s));
}

/* A panel from a source whose row k holds column k of A: `columns` <= 32 (rows of A) contiguous, k rows. */
static inline void pack_a_rows_k(void *panel, const uint16_t *source, size_t row, long columns, long k) {
    const __mmask32 mask = tile_mask(columns);
    for (long s = 0; s < TILE_STEPS(k); s++) {
        __m512i low[16], high[16];
        for (int p = 0; p < 16; p++) {
            const long at = 32 * s + 2 * p;
            __m512i even = _mm512_setzero_si512(), odd = even;
            if (at < k) even = _mm512_maskz_loadu_epi16(mask, source + at * row);
            if (at + 1 < k) odd = _mm512_maskz_loadu_epi16(mask, source + (at + 1) * row);
            tile_pair(even, odd, &low[p], &high[p]);
        }
        tile_transpose(low);
        tile_transpose(high);
        for (int i = 0; i < 16; i++) {
            _mm512_store_si512((char *)panel + s * TILE_STEP + i * 64, low[i]);
            _mm512_store_si512((char *)panel + s * TILE_STEP + 1024 + i * 64, high[i]);
        }
    }
}
#endif
#endif
