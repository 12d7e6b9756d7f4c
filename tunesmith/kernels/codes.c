/* Numbers out of codes: 4-bit codes of blocks of 64 through a table, 8-bit codes of rows. Everything is float32 until it
   is stored; each number depends on its own code and scale alone. dtype: 0 float32, 1 bfloat16. */
#include <omp.h>

#include "vectors.h"

#define BLOCK 64
typedef int8_t eights __attribute__((vector_size(16)));
#define EVERY _Pragma("omp parallel for num_threads(threads) schedule(static)")

/* Sixteen numbers out of eight bytes: of each byte first the high half, then the low one. */
INLINE floats looked_up(const uint8_t *codes, const float *table) {
#ifdef WIDE_REGISTERS
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)codes);
    const __m512i twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
    const __m512i turns = _mm512_set1_epi64(4); /* 4 for even lanes, 0 for odd ones */
    const __m512i index = _mm512_and_epi32(_mm512_srlv_epi32(twice, turns), _mm512_set1_epi32(15));
    return (floats)_mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
#else
    floats found;
    for (int i = 0; i < LANES; i++) found[i] = table[codes[i / 2] >> (i % 2 ? 0 : 4) & 15];
    return found;
#endif
}

void ts_from_four_bits(const uint8_t *codes, const float *table, const float *scales, void *out, long count, int dtype,
                       int threads) {
    const long blocks = (count + BLOCK - 1) / BLOCK;
    EVERY for (long block = 0; block < blocks; block++) {
        const long start = block * BLOCK, end = start + BLOCK < count ? start + BLOCK : count;
        for (long at = start; at < end; at += LANES) {
            const floats x = looked_up(codes + at / 2, table) * scales[block];
            const long lanes = end - at < LANES ? end - at : LANES;
            if (lanes == LANES) {
                if (dtype) store(out, at, LANES, x, 1);
                else store(out, at, LANES, x, 0);
            } else store(out, at, lanes, x, dtype);
        }
    }
}

void ts_from_eight_bits(const int8_t *codes, const float *scales, void *out, long rows, long width, int dtype,
                        int threads) {
    EVERY for (long row = 0; row < rows; row++) {
        const int8_t *from = codes + row * width;
        const float scale = scales[row];
        if (dtype) {
            uint16_t *to = (uint16_t *)out + row * width;
            EACH(width, {
                eights held = {};
                memcpy(&held, from + i, n);
                store(to, i, n, __builtin_convertvector(held, floats) * scale, 1);
            });
        } else {
            float *to = (float *)out + row * width;
            for (long i = 0; i < width; i++) to[i] = from[i] * scale;
        }
    }
}
