/* Fused batch norm and activation of channels-last images, with as few passes over memory as possible: two reads and one
   write forward, four reads and one or two writes backward. fused.py explains the method and calls this file.

   An image tensor is a table with a row for each pixel and a column for each channel. Batch norm's groups are whole rows,
   one group after the other. Threads share the rows of a group, or take whole groups where there are enough. Sums run
   over BLOCK rows in registers and are then added up in double precision, in a fixed order, so a result depends only on
   the number of threads. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16 /* floats in a vector register */
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define BLOCK 64 /* rows that are summed in single precision, few enough to stay in the caches */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

enum { RELU, SILU, GELU, CELU };

typedef struct {
    int activation, half; /* which of the above; whether images are bfloat16 instead of float32 */
    float alpha;          /* of CELU */
} kind;

INLINE vec both(float s) { return s - (vec){0}; }
INLINE vec choose(ints mask, vec yes, vec no) { return (vec)(((ints)yes & mask) | ((ints)no & ~mask)); }

/* The first n of LANES numbers from element `at` on; the others read as zero and are not written. */
INLINE vec load(const void *from, ptrdiff_t at, int n, int half) {
    if (half) {
        halves bits = {0};
        if (n == LANES) bits = *(const halves *)((const uint16_t *)from + at);
        else memcpy(&bits, (const uint16_t *)from + at, 2 * n);
        return (vec)(__builtin_convertvector(bits, words) << 16);
    }
    if (n == LANES) return *(const vec *)((const float *)from + at);
    vec v = {0};
    memcpy(&v, (const float *)from + at, 4 * n);
    return v;
}

INLINE void store(void *to, ptrdiff_t at, vec v, int n, int half) {
    if (half) { /* rounded to the nearest, ties to even; a NaN keeps its highest bits */
#if defined(__AVX512BF16__)
        halves h = (halves)_mm512_cvtneps_pbh((__m512)v);
#else
        words bits = (words)v, nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        halves h = __builtin_convertvector((words)choose(v == v, (vec)nearest, (vec)(bits >> 16 | 64)), halves);
#endif
        if (n == LANES) *(halves *)((uint16_t *)to + at) = h;
        else memcpy((uint16_t *)to + at, &h, 2 * n);
    } else if (n == LANES) *(vec *)((float *)to + at) = v;
    else memcpy((float *)to + at, &v, 4 * n);
}

/* e^x = 2^k e^r with |r| <= ln 2 / 2, and e^r by its series, exact to about a unit in the last place; with `half` to 6e-5,
   while bfloat16 has steps of 4e-3. */
INLINE vec exponential(vec x, int half) {
#if defined(__AVX512F__)
    if (half) { /* 2^t with t = k + r, |r| <= 1/2 */
        __m512 t = (__m512)(x * 1.44269504f), k = _mm512_roundscale_ps(t, 0);
        vec r = (vec)(t - k), p = 9.61812911e-3f * r + 5.55041087e-2f; /* the series of 2^r */
        p = p * r + 2.40226507e-1f, p = p * r + 6.93147181e-1f, p = p * r + 1.0f;
        return (vec)_mm512_scalef_ps((__m512)p, k);
    }
#endif
    x = choose(x < -87.0f, both(-87.0f), choose(x > 88.0f, both(88.0f), x)); /* a NaN stays */
    vec k = x * 1.44269504f + 12582912.0f - 12582912.0f; /* rounded: the sum has no room for a fraction */
    vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vec p = both(1.0f / 5040);
    p = p * r + 1.0f / 720, p = p * r + 1.0f / 120, p = p * r + 1.0f / 24, p = p * r + 1.0f / 6, p = p * r + 0.5f;
    p = p * r + 1.0f, p = p * r + 1.0f;
    return p * (vec)((__builtin_convertvector(k, ints) + 127) << 23);
}

/* 1 / x; with `half` exact to 6e-5. */
INLINE vec inverse(vec x, int half) {
#if defined(__AVX512F__)
    if (half) return (vec)_mm512_rcp14_ps((__m512)x);
#endif
    return 1.0f / x;
}

/* The share of a normal distribution below t, exact to 8e-8, and its density there. Source: M. Abramowitz and I. A. Stegun,
   "Handbook of Mathematical Functions", 1964, 7.1.26. */
INLINE vec normal(vec t, vec *density, int half) {
    vec size = choose(t < 0.0f, -t, t), bell = exponential(-0.5f * t * t, half);
    vec k = inverse(1.0f + 0.23164190f * size, half); /* 0.3275911 / sqrt(2) */
    vec tail = 1.061405429f * k - 1.453152027f;
    tail = tail * k + 1.421413741f, tail = tail * k - 0.284496736f, tail = tail * k + 0.254829592f;
    tail = 0.5f * tail * k * bell;
    *density = 0.39894228f * bell;
    return choose(t < 0.0f, tail, 1.0f - tail);
}

INLINE vec activate(vec t, kind of) {
    if (of.activation == RELU) return choose(t < 0.0f, both(0.0f), t);
    if (of.activation == SILU) return t * inverse(1.0f + exponential(-t, of.half), of.half);
    if (of.activation == GELU) {
        vec density;
        return t * normal(t, &density, of.half);
    }
    return choose(t <= 0.0f, of.alpha * (exponential(t / of.alpha, of.half) - 1.0f), t);
}

INLINE vec slope(vec t, kind of) {
    if (of.activation == RELU) return choose(t <= 0.0f, both(0.0f), both(1.0f));
    if (of.activation == SILU) {
        vec s = inverse(1.0f + exponential(-t, of.half), of.half);
        return s * (1.0f + t * (1.0f - s));
    }
    if (of.activation == GELU) {
        vec density, below = normal(t, &density, of.half);
        return below + t * density;
    }
    return choose(t <= 0.0f, exponential(t / of.alpha, of.half), both(1.0f));
}

INLINE int least(long a, long b) { return (int)(a < b ? a : b); }

/* Add the lanes of two vectors to two rows of sums. */
INLINE void add(double *sums, int channels, vec first, vec second, int n) {
    for (int i = 0; i < n; i++) sums[i] += first[i], sums[channels + i] += second[i];
}

/* Load a vector of each of three rows. */
INLINE void take(const float *now, int channels, int n, vec *a, vec *b, vec *c) {
    *a = load(now, 0, n, 0), *b = load(now, channels, n, 0), *c = load(now, 2 * channels, n, 0);
}

/* Call loop(W, c, n) for all channels: W whole vectors at a time while there are that many, then one of n values at a time.
   W vectors are neighbours in memory, so that a row is read in long pieces. */
#define OVER_CHANNELS(WIDE, loop)                                                                                      \
    do {                                                                                                               \
        int c = 0;                                                                                                     \
        for (; c + (WIDE) * LANES <= channels; c += (WIDE) * LANES) { loop(WIDE, c, LANES) }                           \
        for (; c < channels; c += LANES) { loop(1, c, least(LANES, channels - c)) }                                    \
    } while (0)

/* Add to sums (2, channels): x - pivot and its square, over rows first ... last. */
INLINE void sum_moments(const void *x, const float *pivot, double *sums, long first, long last, int channels, kind of) {
    for (long start = first; start < last; start += BLOCK) {
        int rows = least(BLOCK, last - start);
#define LOOP(W, c, n)                                                                                                  \
    vec p[W], sum[W], squares[W];                                                                                      \
    for (int w = 0; w < W; w++) p[w] = load(pivot, c + w * LANES, n, 0), sum[w] = squares[w] = (vec){0};               \
    for (int r = 0; r < rows; r++)                                                                                     \
        for (int w = 0; w < W; w++) {                                                                                  \
            vec d = load(x, (start + r) * channels + c + w * LANES, n, of.half) - p[w];                                \
            sum[w] += d, squares[w] += d * d;                                                                          \
        }                                                                                                              \
    for (int w = 0; w < W; w++) add(sums + c + w * LANES, channels, sum[w], squares[w], n);
        OVER_CHANNELS(4, LOOP);
#undef LOOP
    }
}

/* y = act((x - mean) scale + bias) over rows first ... last; `now` holds mean, scale and bias, `channels` values each. */
INLINE void apply_rows(const void *x, void *y, const float *now, long first, long last, int channels, kind of) {
    for (long start = first; start < last; start += BLOCK) {
        int rows = least(BLOCK, last - start);
#define LOOP(W, c, n)                                                                                                  \
    vec mean[W], scale[W], bias[W];                                                                                    \
    for (int w = 0; w < W; w++) take(now + c + w * LANES, channels, n, mean + w, scale + w, bias + w);                 \
    for (int r = 0; r < rows; r++)                                                                                     \
        for (int w = 0; w < W; w++) {                                                                                  \
            ptrdiff_t at = (start + r) * channels + c + w * LANES;                                                     \
            store(y, at, activate((load(x, at, n, of.half) - mean[w]) * scale[w] + bias[w], of), n, of.half);          \
        }
        OVER_CHANNELS(4, LOOP);
#undef LOOP
    }
}

/* Whether computing the activation's slope again costs more than writing and reading its product with dy. */
INLINE int keeps_gradient(kind of) { return of.activation != RELU; }

/* Add to sums (2, channels): the gradient dt of the activation's input, and dt (x - mean). dt is stored in dx if the
   activation keeps it. */
INLINE void sum_gradients(const void *x, const void *dy, void *dx, const float *now, double *sums, long first, long last,
                          int channels, kind of) {
    for (long start = first; start < last; start += BLOCK) {
        int rows = least(BLOCK, last - start);
#define LOOP(W, c, n)                                                                                                  \
    vec mean[W], scale[W], bias[W], sum[W], products[W];                                                               \
    for (int w = 0; w < W; w++) {                                                                                      \
        take(now + c + w * LANES, channels, n, mean + w, scale + w, bias + w);                                         \
        sum[w] = products[w] = (vec){0};                                                                               \
    }                                                                                                                  \
    for (int r = 0; r < rows; r++)                                                                                     \
        for (int w = 0; w < W; w++) {                                                                                  \
            ptrdiff_t at = (start + r) * channels + c + w * LANES;                                                     \
            vec d = load(x, at, n, of.half) - mean[w];                                                                 \
            vec dt = load(dy, at, n, of.half) * slope(d * scale[w] + bias[w], of);                                     \
            sum[w] += dt, products[w] += dt * d;                                                                       \
            if (keeps_gradient(of)) store(dx, at, dt, n, of.half);                                                     \
        }                                                                                                              \
    for (int w = 0; w < W; w++) add(sums + c + w * LANES, channels, sum[w], products[w], n);
        OVER_CHANNELS(2, LOOP);
#undef LOOP
    }
}

/* dx = scale dt - a - (x - mean) b, with a and b in now[3] and now[4]. */
INLINE void gradient_rows(const void *x, const void *dy, void *dx, const float *now, long first, long last, int channels,
                          kind of) {
    for (long start = first; start < last; start += BLOCK) {
        int rows = least(BLOCK, last - start);
#define LOOP(W, c, n)                                                                                                  \
    vec mean[W], scale[W], bias[W], a[W], b[W];                                                                        \
    for (int w = 0; w < W; w++) {                                                                                      \
        take(now + c + w * LANES, channels, n, mean + w, scale + w, bias + w);                                         \
        a[w] = load(now, 3 * channels + c + w * LANES, n, 0), b[w] = load(now, 4 * channels + c + w * LANES, n, 0);    \
    }                                                                                                                  \
    for (int r = 0; r < rows; r++)                                                                                     \
        for (int w = 0; w < W; w++) {                                                                                  \
            ptrdiff_t at = (start + r) * channels + c + w * LANES;                                                     \
            vec d = load(x, at, n, of.half) - mean[w], dt = load(keeps_gradient(of) ? dx : dy, at, n, of.half);        \
            if (!keeps_gradient(of)) dt *= slope(d * scale[w] + bias[w], of);                                          \
            store(dx, at, scale[w] * dt - a[w] - d * b[w], n, of.half);                                                \
        }
        OVER_CHANNELS(2, LOOP);
#undef LOOP
    }
}

/* The compiler makes one copy of a loop for each kind, in which the kind is a constant. */
#define FOR_KIND(call)                                                                                                 \
    do {                                                                                                               \
        switch (asked.activation * 2 + asked.half) {                                                                   \
            CASE(RELU, 0, call) CASE(RELU, 1, call) CASE(SILU, 0, call) CASE(SILU, 1, call)                            \
            CASE(GELU, 0, call) CASE(GELU, 1, call) CASE(CELU, 0, call) CASE(CELU, 1, call)                            \
        }                                                                                                              \
    } while (0)
#define CASE(ACTIVATION, HALF, call)                                                                                   \
    case ACTIVATION * 2 + HALF: {                                                                                      \
        kind of = {ACTIVATION, HALF, asked.alpha};                                                                     \
        call;                                                                                                          \
        break;                                                                                                         \
    }

static void moments(const void *x, const float *pivot, double *sums, long first, long last, int channels, kind asked) {
    memset(sums, 0, 2 * channels * sizeof *sums);
    if (asked.half) sum_moments(x, pivot, sums, first, last, channels, (kind){RELU, 1, 0});
    else sum_moments(x, pivot, sums, first, last, channels, (kind){RELU, 0, 0});
}

static void apply(const void *x, void *y, const float *now, long first, long last, int channels, kind asked) {
    FOR_KIND(apply_rows(x, y, now, first, last, channels, of));
}

static void gradient_sums(const void *x, const void *dy, void *dx, const float *now, double *sums, long first, long last,
                          int channels, kind asked) {
    memset(sums, 0, 2 * channels * sizeof *sums);
    FOR_KIND(sum_gradients(x, dy, dx, now, sums, first, last, channels, of));
}

static void gradients(const void *x, const void *dy, void *dx, const float *now, long first, long last, int channels,
                      kind asked) {
    FOR_KIND(gradient_rows(x, dy, dx, now, first, last, channels, of));
}

static const void *rows_of(const void *images, long rows, int channels, kind of) {
    return (const char *)images + rows * channels * (of.half ? 2 : 4);
}

/* Mean, scale and bias, in now (3, channels), of a group whose mean and variance are known. */
static void prepare(const float *mean, const float *variance, const float *weight, const float *bias, float eps,
                    int channels, float *now) {
    for (int c = 0; c < channels; c++) {
        now[c] = mean[c], now[2 * channels + c] = bias[c];
        now[channels + c] = weight[c] / __builtin_sqrtf(variance[c] + eps);
    }
}

/* A group's mean and variance from the sums of all its parts. */
static void finish_moments(const double *sums, int parts, const float *pivot, long rows, int channels, float *mean,
                           float *variance) {
    for (int c = 0; c < channels; c++) {
        double sum = 0, squares = 0;
        for (ptrdiff_t at = c; at < (ptrdiff_t)parts * 2 * channels; at += 2 * channels)
            sum += sums[at], squares += sums[at + channels];
        double middle = sum / rows, spread = squares / rows - middle * middle;
        mean[c] = (float)(pivot[c] + middle);
        variance[c] = (float)(spread < 0 ? 0 : spread);
    }
}

/* y = act((x - mean) / sqrt(variance + eps) weight + bias) by groups of `rows` rows, whose mean and variance (groups,
   channels) are written. scratch: 2 * channels doubles a thread; room: 4 * channels floats a thread. */
void forward(const void *x, void *y, const float *weight, const float *bias, float eps, float *mean, float *variance,
             double *scratch, float *room, long groups, long rows, int channels, int activation, int half, float alpha,
             int threads) {
    kind of = {activation, half, alpha};
    if (groups >= threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int thread = 0; thread < threads; thread++) {
            double *sums = scratch + (ptrdiff_t)thread * 2 * channels;
            float *pivot = room + (ptrdiff_t)thread * 4 * channels, *now = pivot + channels;
            for (long g = groups * thread / threads; g < groups * (thread + 1) / threads; g++) {
                const void *from = rows_of(x, g * rows, channels, of);
                float *m = mean + g * channels, *v = variance + g * channels;
                for (int c = 0; c < channels; c++) pivot[c] = load(from, c, 1, half)[0];
                moments(from, pivot, sums, 0, rows, channels, of);
                finish_moments(sums, 1, pivot, rows, channels, m, v);
                prepare(m, v, weight, bias, eps, channels, now);
                apply(from, (void *)rows_of(y, g * rows, channels, of), now, 0, rows, channels, of);
            }
        }
        return;
    }
    for (long g = 0; g < groups; g++) {
        const void *from = rows_of(x, g * rows, channels, of);
        void *to = (void *)rows_of(y, g * rows, channels, of);
        float *pivot = room, *now = pivot + channels, *m = mean + g * channels, *v = variance + g * channels;
        for (int c = 0; c < channels; c++) pivot[c] = load(from, c, 1, half)[0];
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int thread = 0; thread < threads; thread++)
            moments(from, pivot, scratch + (ptrdiff_t)thread * 2 * channels, rows * thread / threads,
                    rows * (thread + 1) / threads, channels, of);
        finish_moments(scratch, threads, pivot, rows, channels, m, v);
        prepare(m, v, weight, bias, eps, channels, now);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int thread = 0; thread < threads; thread++)
            apply(from, to, now, rows * thread / threads, rows * (thread + 1) / threads, channels, of);
    }
}

/* y = act((x - mean) scale + bias), the three in now (3, channels). */
void evaluate(const void *x, void *y, const float *now, long rows, int channels, int activation, int half, float alpha,
              int threads) {
    kind of = {activation, half, alpha};
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        apply(x, y, now, rows * thread / threads, rows * (thread + 1) / threads, channels, of);
}

/* The sums over a group, of all its parts, to dweight and dbias (channels), and what dx needs of them to now[3] and
   now[4]. */
static void finish_gradients(const double *sums, int parts, long rows, int channels, const float *variance, float eps,
                             float *dweight, float *dbias, float *now) {
    for (int c = 0; c < channels; c++) {
        double sum = 0, products = 0, inverse = 1 / __builtin_sqrt((double)variance[c] + eps);
        for (ptrdiff_t at = c; at < (ptrdiff_t)parts * 2 * channels; at += 2 * channels)
            sum += sums[at], products += sums[at + channels];
        dbias[c] = (float)sum, dweight[c] = (float)(products * inverse);
        now[3 * channels + c] = (float)(now[channels + c] * sum / rows);
        now[4 * channels + c] = (float)(now[channels + c] * products * inverse * inverse / rows);
    }
}

/* dx, and dweight and dbias (groups, channels), from dy. scratch as forward's; room: 5 * channels floats a thread. */
void backward(const void *x, const void *dy, void *dx, const float *weight, const float *bias, float eps,
              const float *mean, const float *variance, float *dweight, float *dbias, double *scratch, float *room,
              long groups, long rows, int channels, int activation, int half, float alpha, int threads) {
    kind of = {activation, half, alpha};
    if (groups >= threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int thread = 0; thread < threads; thread++) {
            double *sums = scratch + (ptrdiff_t)thread * 2 * channels;
            float *now = room + (ptrdiff_t)thread * 5 * channels;
            for (long g = groups * thread / threads; g < groups * (thread + 1) / threads; g++) {
                const void *from = rows_of(x, g * rows, channels, of), *back = rows_of(dy, g * rows, channels, of);
                void *to = (void *)rows_of(dx, g * rows, channels, of);
                const float *v = variance + g * channels;
                prepare(mean + g * channels, v, weight, bias, eps, channels, now);
                gradient_sums(from, back, to, now, sums, 0, rows, channels, of);
                finish_gradients(sums, 1, rows, channels, v, eps, dweight + g * channels, dbias + g * channels, now);
                gradients(from, back, to, now, 0, rows, channels, of);
            }
        }
        return;
    }
    for (long g = 0; g < groups; g++) {
        const void *from = rows_of(x, g * rows, channels, of), *back = rows_of(dy, g * rows, channels, of);
        void *to = (void *)rows_of(dx, g * rows, channels, of);
        const float *v = variance + g * channels;
        float *now = room;
        prepare(mean + g * channels, v, weight, bias, eps, channels, now);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int thread = 0; thread < threads; thread++)
            gradient_sums(from, back, to, now, scratch + (ptrdiff_t)thread * 2 * channels, rows * thread / threads,
                          rows * (thread + 1) / threads, channels, of);
        finish_gradients(scratch, threads, rows, channels, v, eps, dweight + g * channels, dbias + g * channels, now);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int thread = 0; thread < threads; thread++)
            gradients(from, back, to, now, rows * thread / threads, rows * (thread + 1) / threads, channels, of);
    }
}
