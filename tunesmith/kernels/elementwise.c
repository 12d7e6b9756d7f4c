/* Norms, rotary positions, gated activations and cross-entropy in few passes over memory, forward and backward.

   Rows are shared out among threads, and a row is always summed in the same order, so that no result depends on how
   many threads there are. dtype: 0 float32, 1 bfloat16; everything between load and store is float32. */
#include <math.h>
#include <omp.h>

#include "vectors.h"

#define ROWS _Pragma("omp parallel for num_threads(threads) schedule(static)")
/* A body for each dtype, so that the dtype is a constant inside. */
#define BY_DTYPE(call) do { if (dtype) { enum { D = 1 }; call; } else { enum { D = 0 }; call; } } while (0)
#define BY_DTYPES(call)                                                                              \
    do {                                                                                             \
        if (weight_dtype) { enum { W = 1 }; BY_DTYPE(call); } else { enum { W = 0 }; BY_DTYPE(call); } \
    } while (0)

static inline void *row_of(const void *matrix, long at, int dtype) {
    return matrix ? (char *)matrix + at * (dtype ? 2 : 4) : 0;
}

/* y = (offset + weight) x / rms(x), where with r first x becomes s = x + r. */
INLINE float norm_row(const char *x, const char *r, const char *weight, char *s, char *y, long width, float eps,
                      float offset, const int dtype, const int weight_dtype) {
    floats squares = {};
    EACH(width, {
        floats v = load(x, i, n, dtype);
        if (r) v = store(s, i, n, v + load(r, i, n, dtype), dtype);
        squares += v * v;
    });
    const float inverse = 1.0f / sqrtf(sum_of(squares) / (float)width + eps);
    const char *held = r ? s : x;
    EACH(width, {
        const floats w = load(weight, i, n, weight_dtype) + offset;
        store(y, i, n, load(held, i, n, dtype) * inverse * w, dtype);
    });
    return inverse;
}

void ts_rms_norm(const void *x, const void *r, const void *weight, void *s, void *y, float *inverse, long rows,
                 long width, float eps, float offset, int dtype, int weight_dtype, int threads) {
    ROWS for (long row = 0; row < rows; row++) {
        const long at = row * width;
        BY_DTYPES(inverse[row] = norm_row(row_of(x, at, D), row_of(r, at, D), weight, row_of(s, at, D),
                                          row_of(y, at, D), width, eps, offset, D, W));
    }
}

/* dx = ds + inverse w dy - x inverse^3 mean(w dy x); dweight, where wanted, gains inverse dy x. */
INLINE void norm_back_row(const char *dy, const char *x, const char *weight, float inverse, const char *ds, char *dx,
                          float *dweight, long width, float offset, const int dtype, const int weight_dtype) {
    floats products = {};
    EACH(width, {
        const floats w = load(weight, i, n, weight_dtype) + offset;
        products += load(dy, i, n, dtype) * w * load(x, i, n, dtype);
    });
    const float along = inverse * inverse * inverse * (sum_of(products) / (float)width);
    EACH(width, {
        const floats v = load(x, i, n, dtype), g = load(dy, i, n, dtype) * inverse;
        floats d = g * (load(weight, i, n, weight_dtype) + offset) - v * along;
        if (ds) d += load(ds, i, n, dtype);
        store(dx, i, n, d, dtype);
        if (dweight) store(dweight, i, n, load(dweight, i, n, 0) + g * v, 0);
    });
}

/* dweight: null, or [blocks, width] zeros: each block of rows sums into its own, whichever thread has it. */
void ts_rms_norm_back(const void *dy, const void *x, const void *weight, const float *inverse, const void *ds, void *dx,
                      float *dweight, long blocks, long rows, long width, float offset, int dtype, int weight_dtype,
                      int threads) {
    ROWS for (long block = 0; block < blocks; block++) {
        float *sums = dweight ? dweight + block * width : 0;
        for (long row = rows * block / blocks; row < rows * (block + 1) / blocks; row++) {
            const long at = row * width;
            BY_DTYPES(norm_back_row(row_of(dy, at, D), row_of(x, at, D), weight, inverse[row], row_of(ds, at, D),
                                    row_of(dx, at, D), sums, width, offset, D, W));
        }
    }
}

/* Rows of `heads`, then `kv_heads` of keys, then as many of values, of `width` each: every head of q and of k normed by
   itself, values copied. y may be x. inverse: [rows, heads + kv_heads]. */
void ts_norm_heads(const void *x, const void *q_weight, const void *k_weight, void *y, float *inverse, long rows,
                   long heads, long kv_heads, long width, float eps, float offset, int dtype, int weight_dtype,
                   int threads) {
    const long normed = heads + kv_heads, total = (normed + kv_heads) * width;
    ROWS for (long row = 0; row < rows; row++) {
        for (long h = 0; h < normed; h++) {
            const long at = row * total + h * width;
            BY_DTYPES(inverse[row * normed + h] = norm_row(row_of(x, at, D), 0, h < heads ? q_weight : k_weight, 0,
                                                           row_of(y, at, D), width, eps, offset, D, W));
        }
        const long at = row * total + normed * width;
        if (x != y) memcpy(row_of(y, at, dtype), row_of(x, at, dtype), kv_heads * width * (dtype ? 2 : 4));
    }
}

/* dweights: null, or [blocks, 2, width] zeros, of q and of k, as in ts_rms_norm_back. */
void ts_norm_heads_back(const void *dy, const void *x, const void *q_weight, const void *k_weight,
                        const float *inverse, void *dx, float *dweights, long blocks, long rows, long heads,
                        long kv_heads, long width, float offset, int dtype, int weight_dtype, int threads) {
    const long normed = heads + kv_heads, total = (normed + kv_heads) * width;
    ROWS for (long block = 0; block < blocks; block++)
        for (long row = rows * block / blocks; row < rows * (block + 1) / blocks; row++) {
            for (long h = 0; h < normed; h++) {
                const long at = row * total + h * width;
                float *sums = dweights ? dweights + (2 * block + (h >= heads)) * width : 0;
                BY_DTYPES(norm_back_row(row_of(dy, at, D), row_of(x, at, D), h < heads ? q_weight : k_weight,
                                        inverse[row * normed + h], 0, row_of(dx, at, D), sums, width, offset, D, W));
            }
            const long at = row * total + normed * width;
            memcpy(row_of(dx, at, dtype), row_of(dy, at, dtype), kv_heads * width * (dtype ? 2 : 4));
        }
}

/* Heads turned: first half a, second half b of the first `turned` columns of each; what is beyond is copied. */
INLINE void turn(const char *from, char *to, long heads, const char *cosines, const char *sines, long turned,
                 long width, const int back, const int dtype, const int table_dtype) {
    const long half = turned / 2;
    EACH(half, {
        const floats ca = load(cosines, i, n, table_dtype), cb = load(cosines, half + i, n, table_dtype);
        const floats sa = load(sines, i, n, table_dtype), sb = load(sines, half + i, n, table_dtype);
        for (long at = i; at < heads * width; at += width) {
            const floats a = load(from, at, n, dtype), b = load(from, half + at, n, dtype);
            store(to, at, n, back ? a * ca + b * sb : a * ca - b * sa, dtype);
            store(to, half + at, n, back ? b * cb - a * sa : b * cb + a * sb, dtype);
        }
    });
    if (turned == width) return;
    for (long at = turned; at < heads * width; at += width)
        memcpy(row_of(to, at, dtype), row_of(from, at, dtype), (width - turned) * (dtype ? 2 : 4));
}

INLINE void rope_row(char *joined, char *part, long heads, const char *cosines, const char *sines, long turned,
                     long width, int back, const int dtype, const int table_dtype) {
    if (back) turn(part, joined, heads, cosines, sines, turned, width, 1, dtype, table_dtype);
    else turn(joined, part, heads, cosines, sines, turned, width, 0, dtype, table_dtype);
}

/* Forward from joined [rows, (heads + 2 kv_heads) width] to q, k and v; backward from their gradients to its. */
void ts_split_rope(void *joined, const void *cosines, const void *sines, void *q, void *k, void *v, long rows,
                   long heads, long kv_heads, long width, long turned, int back, int dtype, int weight_dtype,
                   int threads) {
    const long bytes = dtype ? 2 : 4, total = (heads + 2 * kv_heads) * width;
    ROWS for (long row = 0; row < rows; row++) {
        char *from = row_of(joined, row * total, dtype), *middle = from + heads * width * bytes;
        char *last = middle + kv_heads * width * bytes, *values = row_of(v, row * kv_heads * width, dtype);
        const char *c = row_of(cosines, row * turned, weight_dtype), *s = row_of(sines, row * turned, weight_dtype);
        BY_DTYPES(
            rope_row(from, row_of(q, row * heads * width, D), heads, c, s, turned, width, back, D, W);
            rope_row(middle, row_of(k, row * kv_heads * width, D), kv_heads, c, s, turned, width, back, D, W));
        memcpy(back ? last : values, back ? values : last, kv_heads * width * bytes);
    }
}

enum { SILU, GELU_TANH, GELU };

/* act(x) and its derivative. The gelu by tanh is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE floats activated(floats x, floats *slope, const int kind) {
    if (kind == GELU) {
        floats density;
        const floats below = normal_of(x, &density);
        *slope = below + x * density;
        return x * below;
    }
    const floats inner = kind == SILU ? x : x * (1.595769122f + 0.0713548163f * x * x);
    const floats gate = sigmoid_of(inner);
    const floats steep = kind == SILU ? x : x * (1.595769122f + 0.214064449f * x * x);
    *slope = gate * (1.0f + steep * (1.0f - gate));
    return x * gate;
}

INLINE void gated_row(const char *gate, const char *up, char *y, long width, const int kind, const int dtype) {
    floats slope;
    EACH(width, {
        store(y, i, n, activated(load(gate, i, n, dtype), &slope, kind) * load(up, i, n, dtype), dtype);
    });
}

INLINE void gated_back_row(const char *dy, const char *gate, const char *up, char *dgate, char *dup, long width,
                           const int kind, const int dtype) {
    floats slope;
    EACH(width, {
        const floats d = load(dy, i, n, dtype), a = activated(load(gate, i, n, dtype), &slope, kind);
        store(dgate, i, n, d * load(up, i, n, dtype) * slope, dtype);
        store(dup, i, n, d * a, dtype);
    });
}

#define BY_KIND(call)                                                                           \
    do {                                                                                        \
        if (kind == SILU) { enum { K = SILU }; BY_DTYPE(call); }                                \
        else if (kind == GELU_TANH) { enum { K = GELU_TANH }; BY_DTYPE(call); }                 \
        else { enum { K = GELU }; BY_DTYPE(call); }                                             \
    } while (0)

/* y = act(gate) up, where a row of gu holds gate and then up, `width` of each. */
void ts_gated(const void *gu, void *y, long rows, long width, int kind, int dtype, int threads) {
    ROWS for (long row = 0; row < rows; row++) {
        const char *gate = row_of(gu, 2 * row * width, dtype), *up = row_of(gate, width, dtype);
        BY_KIND(gated_row(gate, up, row_of(y, row * width, D), width, K, D));
    }
}

void ts_gated_back(const void *dy, const void *gu, void *dgu, long rows, long width, int kind, int dtype, int threads) {
    ROWS for (long row = 0; row < rows; row++) {
        const char *gate = row_of(gu, 2 * row * width, dtype), *up = row_of(gate, width, dtype);
        char *dgate = row_of(dgu, 2 * row * width, dtype), *dup = row_of(dgate, width, dtype);
        BY_KIND(gated_back_row(row_of(dy, row * width, D), gate, up, dgate, dup, width, K, D));
    }
}

enum { AS_IS, SCALED, CAPPED };

/* A logit from the raw product: scaled, and bent towards +-cap where there is a cap. Both keep the order. */
INLINE floats shaped(floats x, float scale, float cap, const int shape) {
    if (shape != AS_IS) x = x * scale;
    return shape == CAPPED ? cap * tanh_of(x / cap) : x;
}

/* The loss of one row; `powers` [width] receives e^(logit - the largest), which is summed. */
INLINE float loss_of_row(const char *z, long target, float *powers, float *sum, long width, float scale, float cap,
                         const int shape, const int dtype) {
    floats top = all(-INFINITY), sums = {};
    EACH(width, { top = larger(first_of(load(z, i, n, dtype), n, -INFINITY), top); });
    const floats largest = shaped(all(largest_of(top)), scale, cap, shape);
    EACH(width, {
        const floats power = exp_of(shaped(load(z, i, n, dtype), scale, cap, shape) - largest);
        sums += first_of(store(powers, i, n, power, 0), n, 0.0f);
    });
    *sum = sum_of(sums);
    return largest[0] - shaped(load(z, target, 1, dtype), scale, cap, shape)[0] + logf(*sum);
}

/* The gradient of the raw product: softmax - onehot, back through cap and scale. */
INLINE void pull_row(char *z, long target, const float *powers, float sum, long width, float scale, float cap,
                     const int shape, const int dtype) {
    const float share = 1.0f / sum;
    const floats wanted = load(z, target, 1, dtype);
    for (int last = 0; last < 2; last++) { /* at last the target alone, from its own logit */
        if (last) z = row_of(z, target, dtype), powers += target, width = 1;
        EACH(width, {
            floats d = load(powers, i, n, 0) * share;
            if (last) d -= 1.0f;
            if (shape == CAPPED) {
                const floats bent = tanh_of((last ? wanted : load(z, i, n, dtype)) * scale / cap);
                d *= 1.0f - bent * bent;
            }
            store(z, i, n, shape == AS_IS ? d : d * scale, dtype);
        });
    }
}

#define BY_SHAPE(call)                                                                            \
    do {                                                                                          \
        if (cap > 0.0f) { enum { S = CAPPED }; BY_DTYPE(call); }                                  \
        else if (scale != 1.0f) { enum { S = SCALED }; BY_DTYPE(call); }                          \
        else { enum { S = AS_IS }; BY_DTYPE(call); }                                              \
    } while (0)

/* Losses of logits z, which become their gradient where wanted. cap 0: none. powers: [threads, width]. */
void ts_cross_entropy(void *z, const int64_t *targets, float *losses, float *powers, long rows, long width, float scale,
                      float cap, int wanted, int dtype, int threads) {
    ROWS for (long row = 0; row < rows; row++) {
        char *at = row_of(z, row * width, dtype);
        float *own = powers + omp_get_thread_num() * width, sum;
        BY_SHAPE(losses[row] = loss_of_row(at, targets[row], own, &sum, width, scale, cap, S, D);
                 if (wanted) pull_row(at, targets[row], own, sum, width, scale, cap, S, D));
    }
}
