/* Products of some rows with a weight that is laid out already, for weights that are read many times as they are.

   bfloat16 (tiles.h): a weight [n, k] lies as panels of 32 of its rows, one after the other, so that a product
   streams through it once, asking for what comes next ahead of time. */
#include "tiles.h"

#ifdef TUNESMITH_TILES
#include <sys/mman.h>

#define HUGE ((uintptr_t)2 << 20)

static __m512 wide(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

static void finish(const float *sums, const uint16_t *bias, uint16_t *y, long y_row, long rows, __mmask32 mask) {
    const __m512i held = bias ? _mm512_maskz_loadu_epi16(mask, bias) : _mm512_setzero_si512();
    const __m512 first = wide(_mm512_castsi512_si256(held)), last = wide(_mm512_extracti64x4_epi64(held, 1));
    for (long i = 0; i < rows; i++) {
        const __m512 low = _mm512_add_ps(_mm512_load_ps(sums + 32 * i), first);
        const __m512 high = _mm512_add_ps(_mm512_load_ps(sums + 32 * i + 16), last);
        _mm512_mask_storeu_epi16(y + i * y_row, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

/* w [n, k] as panels; packed: (n rounded up to 32) x (k rounded up to 32), at a multiple of 64 bytes. */
void ts_pack(const uint16_t *w, char *packed, long n, long k) {
    for (long j = 0; j < n; j += 32, packed += TILE_STEPS(k) * TILE_STEP)
        pack_b_rows_n(packed, w + j * k, k, n - j < 32 ? n - j : 32, k);
}

/* Asks for large pages, which streaming through the panels is faster with; before anything is written there. */
void ts_pack_room(char *room, long bytes) {
    const uintptr_t start = ((uintptr_t)room + HUGE - 1) / HUGE * HUGE, end = ((uintptr_t)room + bytes) / HUGE * HUGE;
    if (end > start) madvise((void *)start, end - start, MADV_HUGEPAGE);
}

/* y [rows, n] = x [rows, k] w' + bias; blocks: scratch for x, (rows rounded up to 32) x (k rounded up to 32). */
void ts_packed(const uint16_t *x, const char *packed, const uint16_t *bias, uint16_t *y, char *blocks, long rows, long n,
               long k, int threads) {
    const long steps = TILE_STEPS(k), pitch = steps * TILE_STEP;
    for (long r = 0; r < rows; r += 32)
        pack_a_rows_m(blocks + r / 32 * pitch, x + r * k, k, rows - r < 32 ? rows - r : 32, k);
#pragma omp parallel num_threads(threads)
    {
        float sums[1024] __attribute__((aligned(64)));
        tiles_begin();
#pragma omp for schedule(static)
        for (long j = 0; j < (n + 31) / 32; j++)
            for (long r = 0; r < rows; r += 32) {
                const long some = rows - r < 32 ? rows - r : 32;
                const char *a = blocks + r / 32 * pitch, *b = packed + j * pitch;
                Sums c;
                tiles_open(&c, sums, 32, 0);
                tiles_multiply(&c, a, 64, TILE_STEP, b, steps, some, 32, AFAR);
                tiles_close(&c);
                finish(sums, bias ? bias + 32 * j : 0, y + r * n + 32 * j, n, some, tile_mask(n - 32 * j));
            }
        tiles_end();
    }
}
#else
void ts_pack(const uint16_t *w, char *packed, long n, long k) {}
void ts_pack_room(char *room, long bytes) {}
void ts_packed(const uint16_t *x, const char *packed, const uint16_t *bias, uint16_t *y, char *blocks, long rows, long n,
               long k, int threads) {}
#endif
