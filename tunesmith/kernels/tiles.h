/* Matrix products on AMX tiles: configuration, packers and a 32 x 32 micro-kernel, for the other files here.

   A tile holds 16 rows of 64 bytes. A block of the result is 32 x 32 floats, held by four tiles; one step multiplies
   a block 32 x 32 of A by one of B. Formats of packed operands, where `steps` counts steps of 32 along the summed axis:
     A panel: [steps][2 tiles][16 rows of A][32 k]          (32 rows of A; a tile's rows may also be read in place)
     B panel: [steps][2 tiles][16 pairs of k][16 columns][2] (32 columns of B)
   Both take 2048 bytes a step and should begin at a multiple of 64 bytes. What is beyond the edge of a matrix is zero
   in a panel. Use: tiles_begin(); (tiles_zero(); tiles_multiply(...) any number of times; tiles_store(...))...;
   tiles_end(); all in one thread. */
#ifndef TUNESMITH_TILES_H
#define TUNESMITH_TILES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TILE_STEP 2048 /* bytes of a panel for one step of 32 along the summed axis */
#define TILE_STEPS(k) (((k) + 31) / 32)

int ts_has_amx(void);            /* gemm.c: whether the processor has AMX and the system lets us use it */
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

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define TUNESMITH_TILES 1
#include <immintrin.h>

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

static inline void tiles_zero(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* accumulators += A B over `steps` steps, for 16 or 32 rows (`high`: 32) and 16 or 32 columns (`wide`: 32).
   a: the first row; `stride` bytes from row to row, `half` bytes from row 0 to row 16, `ahead` bytes from step to step:
   a packed panel has (64, 1024, 2048), a row-major matrix of row stride s bytes read in place (s, 16 * s, 64).
   b: a packed panel. `passing`: b comes from the second cache and shall not drive a out of the first. */
static inline __attribute__((always_inline)) void tiles_multiply_from(const void *a, size_t stride, size_t half,
                                                                      size_t ahead, const void *b, long steps,
                                                                      int high, int wide, int passing) {
    const char *pa = a, *pb = b;
    TILES_FENCE();
    if (high && wide && passing)
        for (long s = 0; s < steps; s++, pa += ahead, pb += TILE_STEP) {
            _tile_stream_loadd(6, pb, 64);
            _tile_loadd(4, pa, stride);
            _tile_stream_loadd(7, pb + 1024, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, pa + half, stride);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    else if (high && wide)
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
    else if (wide)
        for (long s = 0; s < steps; s++, pa += ahead, pb += TILE_STEP) {
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
            if (high) {
                _tile_loadd(5, pa + half, stride);
                _tile_dpbf16ps(2, 5, 6);
            }
        }
}

static inline __attribute__((always_inline)) void tiles_multiply(const void *a, size_t stride, size_t half,
                                                                 size_t ahead, const void *b, long steps, int high,
                                                                 int wide) {
    tiles_multiply_from(a, stride, half, ahead, b, steps, high, wide, 0);
}

/* The accumulators from c, a row-major block of 32 x 32 floats with `row` floats from row to row: to go on adding. */
static inline void tiles_load(const float *c, size_t row) {
    TILES_FENCE();
    _tile_loadd(0, c, row * 4);
    _tile_loadd(1, c + 16, row * 4);
    _tile_loadd(2, c + 16 * row, row * 4);
    _tile_loadd(3, c + 16 * row + 16, row * 4);
}

static inline void tiles_store(float *c, size_t row) {
    _tile_stored(0, c, row * 4);
    _tile_stored(1, c + 16, row * 4);
    _tile_stored(2, c + 16 * row, row * 4);
    _tile_stored(3, c + 16 * row + 16, row * 4);
    TILES_FENCE();
}

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
