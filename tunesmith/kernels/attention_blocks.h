/* Blocks of 32 keys by 32 queries for attention, in two ways: in floats on any processor, and in bfloat16 (tiles.h).

   A block holds one row a key and one lane a query, so that sums and largest values over keys need no sums across
   lanes. On tiles, weights are cut in two bfloat16 parts that are multiplied apart: together they hold 16 bits, and
   results differ from those in floats far less than the rounding of the result does. */
#ifndef TUNESMITH_ATTENTION_BLOCKS_H
#define TUNESMITH_ATTENTION_BLOCKS_H

#include "tiles.h"
#include "vectors.h"

#define SIDE 32               /* keys and queries of a block */
#define BLOCK (SIDE * SIDE)   /* its elements */
#define HIDDEN (-1e30f)       /* the score of what is not seen: finite, so that no lane is without a largest one */

/* 2^x for x <= 0, relative error 2e-8 and rounding; 0 below 2^-126; NaN stays. A minimax polynomial over [-.5, .5]. */
INLINE floats power_of_two(floats x) {
    const floats shifted = x + 12582912.0f; /* 1.5 x 2^23: the sum has no digits after the point */
    const floats r = x - (shifted - 12582912.0f);
    floats p = r * 1.535336e-4f + 1.3398874e-3f;
    p = p * r + 9.618437e-3f;
    p = p * r + 5.5503324e-2f;
    p = p * r + 2.4022648e-1f;
    p = p * r + 6.931472e-1f;
    p = p * r + 1.0f;
    return (floats)(((words)p + ((words)shifted << 23)) & ~(words)(x < -126.0f));
}

/* The logarithm to base 2 of normal numbers: of the mantissa m in [.7, 1.4] by the series of artanh((m-1) / (m+1)). */
INLINE floats log_of_two(floats x) {
    const ints bits = (ints)x - 0x3f3504f3, whole = bits >> 23;
    const floats m = (floats)((bits & 0x7fffff) + 0x3f3504f3), z = (m - 1.0f) / (m + 1.0f), s = z * z;
    floats p = s * 0.32059890f + 0.41219858f;
    p = p * s + 0.57707802f;
    p = p * s + 0.96179669f;
    p = p * s + 2.8853901f;
    return p * z + __builtin_convertvector(whole, floats);
}

/* The lanes of one row that are not seen: bit i for query i. */
INLINE void hide(float *row, uint32_t lanes) {
#ifdef WIDE_REGISTERS
    const __m512 low = _mm512_set1_ps(HIDDEN);
    _mm512_mask_storeu_ps(row, (__mmask16)lanes, low);
    _mm512_mask_storeu_ps(row + LANES, (__mmask16)(lanes >> LANES), low);
#else
    for (int i = 0; i < SIDE; i++) row[i] = lanes >> i & 1 ? HIDDEN : row[i];
#endif
}

/* Sixteen rows of sixteen floats, transposed. */
INLINE void turn_16(float *to, long to_row, const float *from, long from_row) {
#ifdef TUNESMITH_TILES
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * from_row);
    tile_transpose(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * to_row, r[i]);
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[i * to_row + j] = from[j * from_row + i];
#endif
}

INLINE void turn(float *to, long to_row, const float *from, long from_row, long rows, long columns) {
    for (long i = 0; i < rows; i += 16)
        for (long j = 0; j < columns; j += 16) turn_16(to + j * to_row + i, to_row, from + i * from_row + j, from_row);
}

/* `rows` of 32 rows of `width` elements as floats, `wide` from row to row; zeros where nothing is. */
INLINE void widen(float *to, long wide, const void *from, long row, long rows, long width, const int dtype) {
    for (long r = 0; r < SIDE; r++)
        for (long i = 0; i < wide; i += LANES) {
            const long n = r < rows ? width - i : 0;
            const floats x = n >= LANES ? load(from, r * row + i, LANES, dtype)
                             : n > 0    ? load(from, r * row + i, n, dtype)
                                        : (floats){};
            store(to, r * wide + i, LANES, x, 0);
        }
}

/* ---- in floats -------------------------------------------------------------------------------------------------- */

#ifdef WIDE_REGISTERS
enum { ROWS = 8, ACROSS = 2, PART = 16 }; /* of a result in registers: rows, vectors, and what a vector holds */
#elif defined(__AVX__)
enum { ROWS = 4, ACROSS = 2, PART = 8 };
#else
enum { ROWS = 4, ACROSS = 2, PART = 4 };
#endif
typedef float part __attribute__((vector_size(4 * PART), aligned(4), may_alias)); /* as large as a register */

typedef struct { /* an operand: element (i, k) lies at i * row + k * column */
    const float *at;
    long row, column;
} Strided;

/* c [m, 32] = or += a [m, inner] b [inner, 32], whose rows are contiguous. */
INLINE void multiply(float *c, long c_row, const Strided a, const Strided b, long m, long inner, int add) {
    for (long i = 0; i < m; i += ROWS)
        for (long j = 0; j < SIDE; j += ACROSS * PART) {
            part sums[ROWS][ACROSS] = {};
            const float *pa = a.at + i * a.row, *pb = b.at + j;
            for (long k = 0; k < inner; k++, pa += a.column, pb += b.row)
                for (int x = 0; x < ACROSS; x++) {
                    const part other = *(const part *)(pb + x * PART);
                    for (int r = 0; r < ROWS; r++) sums[r][x] += pa[r * a.row] * other;
                }
            for (int r = 0; r < ROWS; r++)
                for (int x = 0; x < ACROSS; x++) {
                    part *to = (part *)(c + (i + r) * c_row + j + x * PART);
                    if (add) *to += sums[r][x];
                    else *to = sums[r][x];
                }
        }
}

/* ---- on tiles --------------------------------------------------------------------------------------------------- */

#ifdef TUNESMITH_TILES
/* What is left of x after its upper 16 bits: with these it makes x again, but for the last 8 bits. */
INLINE floats rest_of(floats x) { return x - (floats)((words)x & 0xffff0000u); }

INLINE void put_pairs(uint16_t *block, long pair, int half, floats even, floats odd) { /* as an operand on the right */
    const words both = (words)even >> 16 | ((words)odd & 0xffff0000u);
    memcpy(block + half * 512 + pair * 32, &both, 64);
}

INLINE void put_row(uint16_t *block, long row, floats low, floats high) { /* as an operand on the left */
    const __m512i first = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                                           25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm512_store_si512(block + row * SIDE, _mm512_permutex2var_epi16((__m512i)low, first, (__m512i)high));
}
#endif
#endif
