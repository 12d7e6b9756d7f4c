/* Sixteen floats at a time, from float32 or bfloat16 memory, and the functions of them that training needs.

   Written with the vector types that gcc and clang lower to any processor; intrinsics only where AVX-512 does better.
   `dtype` is 0 for float32 and 1 for bfloat16, and a constant wherever these are inlined. `lanes` is how many of the
   sixteen are there, for the ends of rows: what is loaded beyond them is zero, what is stored beyond them is nothing. */
#ifndef TUNESMITH_VECTORS_H
#define TUNESMITH_VECTORS_H

#include <stdint.h>
#include <string.h>

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are handed over inside one file only */

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define WIDE_REGISTERS 1
#include <immintrin.h>
#endif

INLINE floats all(float x) { return (floats){} + x; }

INLINE floats pick(ints where, floats a, floats b) { return (floats)((where & (ints)a) | (~where & (ints)b)); }

INLINE floats larger(floats a, floats b) { /* b where one of them is NaN */
#ifdef WIDE_REGISTERS
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return pick(a > b, a, b);
#endif
}

INLINE floats smaller(floats a, floats b) {
#ifdef WIDE_REGISTERS
    return (floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return pick(a < b, a, b);
#endif
}

INLINE floats first_of(floats x, long lanes, float others) { /* `others` beyond the first lanes */
    const ints number = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_constant_p(lanes) && lanes == LANES ? x : pick(number < (int)lanes, x, all(others));
}

INLINE floats magnitude(floats x) { return (floats)((words)x & 0x7fffffffu); }

INLINE float sum_of(floats x) { /* always in the same order */
#ifdef WIDE_REGISTERS
    return _mm512_reduce_add_ps((__m512)x);
#endif
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) x[i] += x[i + step];
    return x[0];
}

INLINE float largest_of(floats x) {
#ifdef WIDE_REGISTERS
    return _mm512_reduce_max_ps((__m512)x);
#endif
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) x[i] = x[i] > x[i + step] ? x[i] : x[i + step];
    return x[0];
}

INLINE floats widened(halves x) {
#ifdef WIDE_REGISTERS
    return (floats)((words)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#else
    return (floats)(__builtin_convertvector(x, words) << 16);
#endif
}

INLINE halves narrowed(floats x) { /* to nearest, ties to even; NaN stays NaN */
#if defined(WIDE_REGISTERS) && defined(__AVX512BF16__)
    return (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    words bits = (words)x, nan = (words)((bits & 0x7fffffffu) > 0x7f800000u);
    words near = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector((near & ~nan) | (quiet & nan), halves);
#endif
}

/* The body for every sixteen of `width`, with `i` where they begin and `n` how many there are: a constant but for the
   last, so that only the end of a row pays for masks. */
#define EACH(width, ...)                                                                              \
    do {                                                                                              \
        long i = 0;                                                                                   \
        for (; i + LANES <= (width); i += LANES) { enum { n = LANES }; __VA_ARGS__ }                  \
        if (i < (width)) { const long n = (width) - i; __VA_ARGS__ }                                  \
    } while (0)

INLINE floats load(const void *from, long at, long lanes, const int dtype) {
    floats x = {};
    halves h = {};
    if (__builtin_constant_p(lanes) && lanes == LANES) {
        if (dtype) memcpy(&h, (const uint16_t *)from + at, sizeof h);
        else memcpy(&x, (const float *)from + at, sizeof x);
    } else {
#ifdef WIDE_REGISTERS
        const __mmask16 mask = (__mmask16)((1u << lanes) - 1u);
        if (dtype) h = (halves)_mm256_maskz_loadu_epi16(mask, (const uint16_t *)from + at);
        else x = (floats)_mm512_maskz_loadu_ps(mask, (const float *)from + at);
#else
        for (long i = 0; i < lanes; i++) {
            if (dtype) h[i] = ((const uint16_t *)from)[at + i];
            else x[i] = ((const float *)from)[at + i];
        }
#endif
    }
    return dtype ? widened(h) : x;
}

INLINE floats store(void *to, long at, long lanes, floats x, const int dtype) { /* returns what memory then holds */
    const halves h = dtype ? narrowed(x) : (halves){};
    if (__builtin_constant_p(lanes) && lanes == LANES) {
        if (dtype) memcpy((uint16_t *)to + at, &h, sizeof h);
        else memcpy((float *)to + at, &x, sizeof x);
    } else {
#ifdef WIDE_REGISTERS
        const __mmask16 mask = (__mmask16)((1u << lanes) - 1u);
        if (dtype) _mm256_mask_storeu_epi16((uint16_t *)to + at, mask, (__m256i)h);
        else _mm512_mask_storeu_ps((float *)to + at, mask, (__m512)x);
#else
        for (long i = 0; i < lanes; i++) {
            if (dtype) ((uint16_t *)to)[at + i] = h[i];
            else ((float *)to)[at + i] = x[i];
        }
#endif
    }
    return dtype ? widened(h) : x;
}

/* e^x to 1 unit in the last place; inf, 0 and NaN as they should be. x = n ln 2 + r; the polynomial is minimax. */
INLINE floats exp_of(floats x) {
    x = smaller(all(89.0f), larger(all(-105.0f), x));
    const floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 x 2^23: the sum has no digits after the point */
    const floats n = shifted - 12582912.0f;
    const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = r * 1.381440321e-3f + 8.368811570e-3f;
    p = p * r + 4.166839644e-2f;
    p = p * r + 1.666651964e-1f;
    p = p * r + 4.999999404e-1f;
    p = (p * r) * r + r + 1.0f;
#ifdef WIDE_REGISTERS
    return (floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const ints whole = __builtin_convertvector(n, ints), half = whole >> 1;
    return p * (floats)((half + 127) << 23) * (floats)((whole - half + 127) << 23);
#endif
}

/* 1 / x for x >= 1, to 1 unit in the last place; 0 beyond 1e38. A division would take as long as all the rest. */
INLINE floats inverse_of(floats x) {
#ifdef WIDE_REGISTERS
    const __m512 near = _mm512_rcp14_ps((__m512)x), left = _mm512_fnmadd_ps((__m512)x, near, _mm512_set1_ps(2.0f));
    return (floats)_mm512_maskz_mul_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(1e38f), _CMP_NGE_UQ), near, left);
#else
    return 1.0f / x;
#endif
}

INLINE floats sigmoid_of(floats x) { return inverse_of(1.0f + exp_of(-x)); }

INLINE floats tanh_of(floats x) { /* a minimax polynomial where 1 - 2 / (e^2x + 1) would lose digits */
    const floats s = x * x, a = magnitude(x), far = 1.0f - 2.0f * inverse_of(exp_of(a + a) + 1.0f);
    floats p = s * 2.164201112e-3f - 8.200067095e-3f;
    p = p * s + 2.170966007e-2f;
    p = p * s - 5.394836143e-2f;
    p = p * s + 1.333321780e-1f;
    p = p * s - 3.333333135e-1f;
    const floats sign = (floats)((words)x & 0x80000000u);
    return pick(a < 0.62f, p * s * x + x, (floats)((words)far | (words)sign));
}

/* The normal distribution's density and its integral up to x; minus |x| is e^(-x^2 / 2) times a smooth function of
   1 / (1 + 0.3 |x|), of which this is the minimax polynomial up to 14, where float32 ends. */
INLINE floats normal_of(floats x, floats *density) {
    const floats a = magnitude(x), h = a * a, bell = exp_of(-0.5f * h), t = inverse_of(1.0f + 0.3f * a);
    floats p = t * 3.837827966e-2f - 1.691660583e-1f;
    p = p * t + 2.286599874e-1f;
    p = p * t - 7.650636882e-2f;
    p = p * t + 1.425354630e-1f;
    p = p * t + 9.468355030e-2f;
    p = p * t + 1.219203398e-1f;
    p = p * t + 1.194876879e-1f;
    p = p * t + 7.168838238e-6f;
    const floats below = p * bell;
    *density = bell * 0.398942280f;
    return pick(x < 0.0f, below, 1.0f - below);
}

#endif
