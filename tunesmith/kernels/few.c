/* Products of few rows with a weight, where reading the weight is most of the work: each of its rows is read once, where
   it lies, and multiplied with all of the others. And changes of rank r that differ from row to row.

   A result's sum has one order, whatever the number of rows and threads. `dtype` as in vectors.h. */
#include "vectors.h"

#define SIZE(dtype) ((dtype) ? 2 : 4)
#define WIDE 4 /* rows of either side at a time */

/* Whether thirty-two halves are multiplied at once, in pairs. */
#if defined(WIDE_REGISTERS) && defined(__AVX512BF16__)
#define PAIRS 1
#else
#define PAIRS 0
#endif

/* The sums of sixteen vectors, each in the same order. */
INLINE floats sums_of(const floats *x) {
#ifdef WIDE_REGISTERS
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) {
        const __m512 even = (__m512)x[2 * i], odd = (__m512)x[2 * i + 1];
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(even, odd), _mm512_unpackhi_ps(even, odd));
    }
    for (int i = 0; i < 4; i++) {
        const __m512d even = (__m512d)a[2 * i], odd = (__m512d)a[2 * i + 1];
        b[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(even, odd), (__m512)_mm512_unpackhi_pd(even, odd));
    }
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return (floats)_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
#else
    floats found;
    for (int i = 0; i < LANES; i++) found[i] = sum_of(x[i]);
    return found;
#endif
}

/* Dot products of `rows` rows of x with `outputs` of w along k, added to sums. */
INLINE void dots(const char *x, long x_row, const char *w, long w_row, long k, floats (*sums)[WIDE], const int rows,
                 const int outputs, const int dtype) {
    long i = 0;
#if PAIRS
    for (; dtype && i + 2 * LANES <= k; i += 2 * LANES) {
        __m512bh a[WIDE];
        for (int r = 0; r < rows; r++) a[r] = (__m512bh)_mm512_loadu_si512(x + (r * x_row + i) * 2);
        for (int o = 0; o < outputs; o++) {
            const __m512bh b = (__m512bh)_mm512_loadu_si512(w + (o * w_row + i) * 2);
            for (int r = 0; r < rows; r++) sums[r][o] = (floats)_mm512_dpbf16_ps((__m512)sums[r][o], a[r], b);
        }
    }
#endif
    for (; i + LANES <= k; i += LANES) {
        floats a[WIDE];
        for (int r = 0; r < rows; r++) a[r] = load(x, r * x_row + i, LANES, dtype);
        for (int o = 0; o < outputs; o++) {
            const floats b = load(w, o * w_row + i, LANES, dtype);
            for (int r = 0; r < rows; r++) sums[r][o] += a[r] * b;
        }
    }
    for (int o = 0; i < k && o < outputs; o++)
        for (int r = 0; r < rows; r++)
            sums[r][o] += load(x, r * x_row + i, k - i, dtype) * load(w, o * w_row + i, k - i, dtype);
}

typedef struct {
    const char *x, *x2, *w, *w2, *bias;
    char *y;
    long rows, k, k2, y_row;
} Few;

INLINE void block(const Few *f, long row, long output, const int rows, const int outputs, const int dtype) {
    const int size = SIZE(dtype);
    floats sums[WIDE][WIDE] = {};
    dots(f->x + row * f->k * size, f->k, f->w + output * f->k * size, f->k, f->k, sums, rows, outputs, dtype);
    if (f->w2)
        dots(f->x2 + row * f->k2 * size, f->k2, f->w2 + output * f->k2 * size, f->k2, f->k2, sums, rows, outputs, dtype);
    const floats found = sums_of(sums[0]), bias = f->bias ? load(f->bias, output, outputs, dtype) : (floats){};
    for (int r = 0; r < rows; r++) {
        floats some = {};
        for (int o = 0; o < outputs; o++) some[o] = found[r * WIDE + o] + bias[o];
        store(f->y, (row + r) * f->y_row + output, outputs, some, dtype);
    }
}

INLINE void all_rows(const Few *f, long output, const int outputs, const int dtype) {
    long row = 0;
    for (; row + WIDE <= f->rows; row += WIDE) block(f, row, output, WIDE, outputs, dtype);
    switch (f->rows - row) {
    case 3: block(f, row, output, 3, outputs, dtype); break;
    case 2: block(f, row, output, 2, outputs, dtype); break;
    case 1: block(f, row, output, 1, outputs, dtype); break;
    default: break;
    }
}

INLINE void all_outputs(const Few *f, long outputs, int threads, const int dtype) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long output = 0; output < outputs - outputs % WIDE; output += WIDE) all_rows(f, output, WIDE, dtype);
    for (long output = outputs - outputs % WIDE; output < outputs; output++) all_rows(f, output, 1, dtype);
}

/* y [rows, outputs of y_row] = x [rows, k] w' + x2 [rows, k2] w2' + bias; no w2 and no bias where these are null. */
void ts_few(const void *x, const void *w, const void *x2, const void *w2, const void *bias, void *y, long rows, long k,
            long k2, long outputs, long y_row, int dtype, int threads) {
    const Few f = {x, x2, w, w2, bias, y, rows, k, k2, y_row};
    if (dtype) all_outputs(&f, outputs, threads, 1);
    else all_outputs(&f, outputs, threads, 0);
}

/* y[r] += B (A x[r]) for `rows` rows that have the same factors: a [rank, k], b [rank, outputs]. */
INLINE void change(const char *x, long k, const char *a, const char *b, long rank, char *y, long y_row, long outputs,
                   float *narrow, const int rows, const int dtype) {
    const int size = SIZE(dtype);
    for (long from = 0; from < rank; from += WIDE) {
        floats sums[WIDE][WIDE] = {};
        const long some = rank - from < WIDE ? rank - from : WIDE;
        switch (some) {
        case 1: dots(x, k, a + from * k * size, k, k, sums, rows, 1, dtype); break;
        case 2: dots(x, k, a + from * k * size, k, k, sums, rows, 2, dtype); break;
        case 3: dots(x, k, a + from * k * size, k, k, sums, rows, 3, dtype); break;
        default: dots(x, k, a + from * k * size, k, k, sums, rows, 4, dtype);
        }
        const floats found = sums_of(sums[0]);
        for (int r = 0; r < rows; r++)
            for (long o = 0; o < some; o++) narrow[r * rank + from + o] = found[r * WIDE + o];
    }
    EACH(outputs, {
        floats found[WIDE];
        for (int r = 0; r < rows; r++) found[r] = load(y, r * y_row + i, n, dtype);
        for (long o = 0; o < rank; o++) {
            const floats factor = load(b, o * outputs + i, n, dtype);
            for (int r = 0; r < rows; r++) found[r] += narrow[r * rank + o] * factor;
        }
        for (int r = 0; r < rows; r++) store(y, r * y_row + i, n, found[r], dtype);
    });
}

INLINE void changes(const char *x, char *y, const int64_t *a, const int64_t *b, const int32_t *ranks,
                    const int32_t *groups, float *spare, long rows, long k, long outputs, long y_row, long most,
                    int threads, const int dtype) {
    const long blocks = (rows + WIDE - 1) / WIDE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long item = 0; item < blocks; item++) {
        const long first = item * WIDE, end = first + WIDE < rows ? first + WIDE : rows;
        float *narrow = spare + item * WIDE * most;
        const int32_t *of = groups + first;
        const char *from = x + first * k * SIZE(dtype);
        char *to = y + first * y_row * SIZE(dtype);
        if (end - first == WIDE && of[0] == of[1] && of[0] == of[2] && of[0] == of[3] && ranks[of[0]]) {
            change(from, k, (char *)a[of[0]], (char *)b[of[0]], ranks[of[0]], to, y_row, outputs, narrow, WIDE, dtype);
            continue;
        }
        for (long r = 0; r < end - first; r++)
            if (ranks[of[r]])
                change(from + r * k * SIZE(dtype), k, (char *)a[of[r]], (char *)b[of[r]], ranks[of[r]],
                       to + r * y_row * SIZE(dtype), y_row, outputs, narrow, 1, dtype);
    }
}

/* y [rows, outputs of y_row] += B_g (A_g x), g = groups[row], for x [rows, k]; addresses and ranks of each group's A
   [rank, k] and B [rank, outputs]; spare [rows rounded up to 4, largest rank]. */
void ts_few_changes(const void *x, void *y, const int64_t *a, const int64_t *b, const int32_t *ranks,
                    const int32_t *groups, float *spare, long rows, long k, long outputs, long y_row, long most,
                    int dtype, int threads) {
    if (dtype) changes(x, y, a, b, ranks, groups, spare, rows, k, outputs, y_row, most, threads, 1);
    else changes(x, y, a, b, ranks, groups, spare, rows, k, outputs, y_row, most, threads, 0);
}
