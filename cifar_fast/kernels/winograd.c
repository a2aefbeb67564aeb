/* Winograd F(4x4, 3x3) convolution of channels-last float32 images; winograd.py explains the method and calls this file.

   A tile is a 4x4 patch of outputs together with the 6x6 patch of inputs it needs. Every loop runs over a flat list of
   tiles (sheet of images, row, column) and vectorises over channels. Each thread takes its own tiles in blocks small
   enough for its caches: transform in, 36 matrix products, transform out. No memory is shared while it is written, and
   every sum has a fixed order, so a result depends only on the number of threads.

   A 4x4 tile contains whole 2x2 windows of a max-pool that follows. Then only each window's maximum is written, and its
   place in the window, a byte. In the backward pass each gradient counts at its place, and as zero at the others. */
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16 /* floats in a vector register */
#define ROWS 14  /* rows of the register block: 2 * ROWS accumulators must fit beside 2 operands and a broadcast */
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6
#else
#define LANES 4
#define ROWS 12
#endif
#define PANEL (2 * LANES)
#define POINTS 36
#define DEPTH 256 /* rows of a panel of u that fit in the first cache beside the rest */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

int lanes(void) { return LANES; }
int rows(void) { return ROWS; }

/* The first n of LANES floats; the others read as zero and are not written. */
INLINE vec load(const float *from, int n) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), from);
#else
    if (n == LANES) return *(const vec *)from;
    vec v = {0};
    for (int i = 0; i < n; i++) v[i] = from[i];
    return v;
#endif
}

INLINE void store(float *to, vec v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    if (n == LANES) *(vec *)to = v;
    else for (int i = 0; i < n; i++) to[i] = v[i];
#endif
}

/* Like store, but bypassing the caches: an output is too large to stay there until the next layer reads it. */
INLINE void store_once(float *to, vec v, int n, int whole) {
#if defined(__AVX512F__)
    if (whole) {
        _mm512_stream_ps(to, (__m512)v);
        return;
    }
#endif
    store(to, v, n);
}

INLINE int least(int a, int b) { return a < b ? a : b; }
INLINE int ceil_to(int n, int unit) { return (n + unit - 1) / unit * unit; }

/* Floats from one of the 36 points to the next: an odd number of cache lines, or all 36 would share a cache set. */
INLINE ptrdiff_t point_stride(ptrdiff_t floats) { return (floats + 15) / 16 * 16 | 16; }

/* The three one-dimensional transforms, on six values a stride s apart, in place. */
INLINE void input_1d(vec *d, int s) { /* B^T d */
    vec a = d[4 * s] - 4 * d[2 * s], b = d[3 * s] - 4 * d[s], c = d[4 * s] - d[2 * s], e = 2 * (d[3 * s] - d[s]);
    d[0] = 4 * d[0] - 5 * d[2 * s] + d[4 * s];
    d[5 * s] = 4 * d[s] - 5 * d[3 * s] + d[5 * s];
    d[s] = a + b, d[2 * s] = a - b, d[3 * s] = c + e, d[4 * s] = c - e;
}

INLINE void output_1d(vec *m, int s) { /* A^T m: six values become four */
    vec a = m[s] + m[2 * s], b = m[s] - m[2 * s], c = m[3 * s] + m[4 * s], e = m[3 * s] - m[4 * s];
    m[0] += a + c, m[s] = b + 2 * e, m[2 * s] = a + 4 * c, m[3 * s] = b + 8 * e + m[5 * s];
}

INLINE void gradient_1d(vec *y, int s) { /* A y: four values become six */
    vec a = y[0] + y[2 * s], b = y[s] + y[3 * s], c = y[0] + 4 * y[2 * s], e = 2 * y[s] + 8 * y[3 * s];
    y[5 * s] = y[3 * s], y[s] = a + b, y[2 * s] = a - b, y[3 * s] = c + e, y[4 * s] = c - e;
}

/* Images lie side by side on sheets, `rows` x `columns` of them, which across x down tiles cover. Between two images
   there are zeros: the padding of both. The distance from one to the next is even, as the windows of a max-pool are. */
typedef struct {
    int images, height, width, rows, columns, across, down;
    long sheets;
} grid;

INLINE int pitch(int size) { return (size + 2) / 2 * 2; }
INLINE int tiles_along(int size, int together) { return ((together - 1) * pitch(size) + size + 3) / 4; }

/* Where two images in a line take fewer tiles than twice one, as with 5, 9, 13 or 17 pixels, they share them. */
INLINE int together(int size) { return tiles_along(size, 2) < 2 * tiles_along(size, 1) ? 2 : 1; }

INLINE grid make_grid(int images, int height, int width) {
    int rows = together(height), columns = together(width);
    return (grid){images, height, width, rows, columns, tiles_along(width, columns), tiles_along(height, rows),
                  (images + rows * columns - 1) / (rows * columns)};
}

long count_tiles(int images, int height, int width) {
    grid g = make_grid(images, height, width);
    return g.sheets * g.across * g.down;
}

typedef struct {
    float *values;   /* (images, height, width, channels); after max-pool height / 2 and width / 2 */
    uint8_t *places; /* after max-pool: the value's place, 2 * row + column; rows of ceil_to(channels, LANES) */
    int channels;
} maps; /* places is NULL where there is no max-pool */

/* Addresses of a tile's size x size pixels from (4 row - margin, 4 column - margin) on; `outside` stands for the padding.
   After max-pool the four pixels of a window share an address, and pixels that fill no window are outside. */
INLINE void pixels(float **at, uint8_t **place, maps a, grid g, long tile, int size, int margin, float *outside) {
    int column = (int)(tile % g.across), row = (int)(tile / g.across % g.down);
    int half = a.places != NULL, height = g.height >> half, width = g.width >> half;
    int down = pitch(g.height), right = pitch(g.width);
    long first = tile / g.across / g.down * g.rows * g.columns;
    for (int i = 0; i < size; i++) {
        int top = 4 * row - margin + i, below = g.rows > 1 && top >= down, y = (top - below * down) >> half;
        for (int j = 0; j < size; j++) {
            int left = 4 * column - margin + j, beside = g.columns > 1 && left >= right;
            int x = (left - beside * right) >> half;
            long n = first + below * g.columns + beside;
            int inside = n < g.images && y >= 0 && y < height && x >= 0 && x < width;
            ptrdiff_t pixel = (n * height + y) * width + x;
            at[size * i + j] = inside ? a.values + pixel * a.channels : outside;
            if (half) place[size * i + j] = inside ? a.places + pixel * ceil_to(a.channels, LANES) : (uint8_t *)outside;
        }
    }
}

/* The values at pixel (y, x), counted from any window; after max-pool, zero where the maximum was at another pixel. */
INLINE vec load_pixel(const float *from, const uint8_t *place, int y, int x, int n) {
    if (!place) return load(from, n);
#if defined(__AVX512F__)
    ints at = (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)place));
#else
    ints at = __builtin_convertvector(*(const bytes *)place, ints);
#endif
    return (vec)((ints)load(from, n) & (at == 2 * (y % 2) + x % 2));
}

/* Write the first maximum (or a NaN) of a 2x2 window in d, whose rows are six apart, and its place. */
INLINE void store_maximum(const vec *d, float *to, uint8_t *place, int n, int whole) {
    vec best = d[0];
    ints at = {0};
#pragma GCC unroll 3
    for (int k = 1; k < 4; k++) {
        vec v = d[k / 2 * 6 + k % 2];
        ints better = (v > best) | (v != v);
        best = (vec)(((ints)v & better) | ((ints)best & ~better));
        at = (k & better) | (at & ~better);
    }
    store_once(to, best, n, whole);
    *(bytes *)place = __builtin_convertvector(at, bytes);
}

/* One tile to its 36 points: to[point * step + place(c)] where vectors of channels lie `skip` floats apart. */
INLINE void transform_input(float *const *at, uint8_t *const *place, int channels, float *to, ptrdiff_t step,
                            ptrdiff_t skip) {
    for (int c = 0; c < channels; c += LANES, to += skip) {
        int n = least(LANES, channels - c);
        vec d[36];
#pragma GCC unroll 6
        for (int j = 0; j < 6; j++) {
#pragma GCC unroll 6
            for (int i = 0; i < 6; i++) { /* the margin begins in the middle of a window */
                int k = 6 * i + j;
                d[k] = load_pixel(at[k] + c, place ? place[k] + c : NULL, i + 1, j + 1, n);
            }
            input_1d(d + j, 6);
        }
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) {
            input_1d(d + 6 * i, 1);
#pragma GCC unroll 6
            for (int j = 0; j < 6; j++) *(vec *)(to + (6 * i + j) * step) = d[6 * i + j];
        }
    }
}

INLINE void transform_output(const float *from, ptrdiff_t step, ptrdiff_t panel, int channels, int whole,
                             float *const *at, uint8_t *const *place) {
    for (int c = 0; c < channels; c += LANES) {
        int n = least(LANES, channels - c);
        const float *m = from + c / PANEL * panel + c % PANEL;
        vec d[36];
#pragma GCC unroll 6
        for (int j = 0; j < 6; j++) {
#pragma GCC unroll 6
            for (int i = 0; i < 6; i++) d[6 * i + j] = *(const vec *)(m + (6 * i + j) * step);
            output_1d(d + j, 6);
        }
#pragma GCC unroll 6
        for (int i = 0; i < 4; i++) {
            output_1d(d + 6 * i, 1);
#pragma GCC unroll 6
            for (int j = 0; j < 4; j++) {
                int k = 4 * i + j;
                if (!place) store_once(at[k] + c, d[6 * i + j], n, whole);
                else if (i % 2 && j % 2) store_maximum(d + 6 * (i - 1) + j - 1, at[k] + c, place[k] + c, n, whole);
            }
        }
    }
}

INLINE void transform_gradient(float *const *at, uint8_t *const *place, int channels, float *to, ptrdiff_t step,
                               ptrdiff_t panel) {
    for (int c = 0; c < channels; c += LANES) {
        int n = least(LANES, channels - c);
        float *m = to + c / PANEL * panel + c % PANEL;
        vec d[36];
#pragma GCC unroll 6
        for (int j = 0; j < 4; j++) {
#pragma GCC unroll 6
            for (int i = 0; i < 4; i++) {
                int k = 4 * i + j;
                d[6 * i + j] = load_pixel(at[k] + c, place ? place[k] + c : NULL, i, j, n);
            }
            gradient_1d(d + j, 6);
        }
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) {
            gradient_1d(d + 6 * i, 1);
#pragma GCC unroll 6
            for (int j = 0; j < 6; j++) *(vec *)(m + (6 * i + j) * step) = d[6 * i + j];
        }
    }
}

/* C (R x PANEL) (+)= A (R x K) B (K x PANEL), the sums kept in registers. A's rows lie `row` floats apart and its columns
   `column`, with a jump after each LANES columns. B and C are packed: PANEL floats a row. */
INLINE void multiply(const int R, const float *a, ptrdiff_t row, ptrdiff_t column, ptrdiff_t jump, const float *b, int K,
                     float *c, int add) {
    vec sum[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int h = 0; h < 2; h++) sum[r][h] = add ? *(vec *)(c + r * PANEL + h * LANES) : (vec){0};
    for (int k0 = 0; k0 < K; k0 += LANES, a += jump) {
        const float *ak = a;
        for (int k = least(LANES, K - k0); k > 0; k--, b += PANEL, ak += column) {
            vec b0 = *(const vec *)b, b1 = *(const vec *)(b + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                float s = ak[r * row];
                sum[r][0] += s * b0, sum[r][1] += s * b1;
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int h = 0; h < 2; h++) *(vec *)(c + r * PANEL + h * LANES) = sum[r][h];
}

/* Floats of scratch memory a thread needs for `block` tiles (a multiple of ROWS). */
long scratch_floats(int cin, int cout, int block) {
    int in = ceil_to(cin, LANES), out = ceil_to(cout, PANEL);
    return POINTS * (point_stride((ptrdiff_t)block * (in + 16)) + point_stride((ptrdiff_t)block * out)) + in + out;
}

/* y = x * w with u the transformed weights, packed (36, cout / PANEL, cin, PANEL). With x_places x is the gradient of a
   max-pooled (height, width) image; with y_places y is max-pooled. */
void convolve(float *x, uint8_t *x_places, const float *u, float *y, uint8_t *y_places, float *scratch, int images,
              int height, int width, int cin, int cout, int block, int threads) {
    grid g = make_grid(images, height, width);
    maps from = {x, x_places, cin}, to = {y, y_places, cout};
    int whole = cout % LANES == 0 && (uintptr_t)y % sizeof(vec) == 0; /* every vector is a whole cache line */
    long tiles = g.sheets * g.across * g.down;
    int in = ceil_to(cin, LANES), out = ceil_to(cout, PANEL);
    ptrdiff_t v_step = point_stride((ptrdiff_t)block * in), m_step = point_stride((ptrdiff_t)block * out);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        float *zero = scratch + thread * scratch_floats(cin, cout, block), *sink = zero + in;
        float *v = sink + out, *m = v + POINTS * v_step, *at[36];
        uint8_t *place[36];
        for (int c = 0; c < in; c++) zero[c] = 0;
        long first = tiles * thread / threads, last = tiles * (thread + 1) / threads;
        for (long start = first; start < last; start += block) {
            int count = (int)(last - start < block ? last - start : block);
            for (int t = 0; t < count; t++) { /* V: (36, block / ROWS, cin / LANES, ROWS, LANES) */
                float *tile = v + t / ROWS * ROWS * in + t % ROWS * LANES;
                pixels(at, place, from, g, start + t, 6, 1, zero);
                if (x_places) transform_input(at, place, cin, tile, v_step, ROWS * LANES);
                else transform_input(at, NULL, cin, tile, v_step, ROWS * LANES);
            }
            for (int p = 0; p < POINTS; p++)
                for (int j = 0; j < out; j += PANEL)
                    for (int k = 0; k < cin; k += DEPTH) { /* DEPTH rows of a panel of u stay in the first cache */
                        const float *panel = u + ((ptrdiff_t)p * out + j) * cin + k * PANEL;
                        for (int t = 0; t < count; t += ROWS) /* M: (36, cout / PANEL, block, PANEL) */
                            multiply(ROWS, v + p * v_step + t * in + k * ROWS, LANES, 1, ROWS * LANES, panel,
                                     least(DEPTH, cin - k), m + p * m_step + (ptrdiff_t)j * block + t * PANEL, k > 0);
                    }
            for (int t = 0; t < count; t++) {
                float *tile = m + t * PANEL;
                pixels(at, place, to, g, start + t, 4, 0, sink);
                if (y_places) transform_output(tile, m_step, (ptrdiff_t)block * PANEL, cout, whole, at, place);
                else transform_output(tile, m_step, (ptrdiff_t)block * PANEL, cout, whole, at, NULL);
            }
        }
#if defined(__AVX512F__)
        _mm_sfence();
#endif
    }
}

INLINE void multiply_rows(int r, const float *a, ptrdiff_t column, const float *b, int K, float *c, int add) {
    switch (r) { /* the compiler needs the number of rows to keep the sums in registers */
#define CASE(R) case R: multiply(R, a, 1, column, LANES * column, b, K, c, add); break;
#if ROWS > 12
    CASE(14) CASE(13)
#endif
#if ROWS > 6
    CASE(12) CASE(11) CASE(10) CASE(9) CASE(8) CASE(7)
#endif
    CASE(6) CASE(5) CASE(4) CASE(3) CASE(2) CASE(1)
    }
}

/* du (splits, 36, cout / PANEL, cin, PANEL): the gradient of u, one partial sum for each of `splits` shares of the tiles.
   threads = splits * (threads / splits): the second factor shares out the panels. With dy_places dy is the
   gradient of a max-pooled (height, width) image. */
void weight_gradient(float *x, float *dy, uint8_t *dy_places, float *du, float *scratch, int images, int height,
                     int width, int cin, int cout, int block, int splits, int threads) {
    grid g = make_grid(images, height, width);
    long tiles = g.sheets * g.across * g.down;
    int in = ceil_to(cin, LANES), out = ceil_to(cout, PANEL), lda = in + 16, parts = threads / splits;
    ptrdiff_t v_step = point_stride((ptrdiff_t)block * lda), m_step = point_stride((ptrdiff_t)block * out);
    int row_blocks = (cin + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        int split = thread % splits, part = thread / splits, panels = out / PANEL;
        int j_first = panels * part / parts * PANEL, j_last = panels * (part + 1) / parts * PANEL;
        int width_here = least(j_last, cout) - j_first;
        float *zero = scratch + thread * scratch_floats(cin, cout, block), *v = zero + in + out;
        float *m = v + POINTS * v_step, *at[36];
        uint8_t *place[36];
        maps from = {x, NULL, cin}, gradient = {dy + j_first, dy_places ? dy_places + j_first : NULL, cout};
        for (int c = 0; c < in + out; c++) zero[c] = 0;
        long first = tiles * split / splits, last = tiles * (split + 1) / splits;
        for (long start = first; start < last; start += block) {
            int count = (int)(last - start < block ? last - start : block);
            for (int t = 0; t < count; t++) {
                float *tile = m + t * PANEL;
                pixels(at, NULL, from, g, start + t, 6, 1, zero);
                transform_input(at, NULL, cin, v + (ptrdiff_t)t * lda, v_step, LANES); /* V: (36, block, lda) */
                pixels(at, place, gradient, g, start + t, 4, 0, zero);
                if (dy_places) transform_gradient(at, place, width_here, tile, m_step, (ptrdiff_t)block * PANEL);
                else transform_gradient(at, NULL, width_here, tile, m_step, (ptrdiff_t)block * PANEL);
            }
            for (int p = 0; p < POINTS; p++)
                for (int j = j_first; j < j_last; j += PANEL)
                    for (int b = 0; b < row_blocks; b++) {
                        int i = cin * b / row_blocks, r = cin * (b + 1) / row_blocks - i;
                        multiply_rows(r, v + p * v_step + i, lda, m + p * m_step + (ptrdiff_t)(j - j_first) * block, count,
                                      du + (((ptrdiff_t)split * POINTS + p) * out + j) * cin + i * PANEL, start > first);
                    }
        }
    }
}
