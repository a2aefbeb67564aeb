/* 3x3 convolution of channels-last bfloat16 images on a CPU's matrix tiles (AMX); amx.py explains the method and calls
   this file.

   A tile register holds 16 rows of 64 bytes, and one instruction adds to 16 x 16 float32 sums the product of 16 x 32 and
   32 x 16 bfloat16 numbers. Here the 16 rows are one pixel of 16 images. So a tap that falls outside the image is
   left out for the whole tile, no row is ever padding, and an image may have any size. Two tiles by two are multiplied
   at a time, 32 images by 32 channels, since each operand is then used twice for one load.

   Images are taken 32 at a time (a block), and their pixels copied to where a tile is 1 KB in a row; forward, between
   products, so that the processor does so while its tiles are busy. Every sum has a fixed order, so a result depends on
   the number of threads alone. */
#include <stdint.h>
#include <string.h>
#if defined(CIFAR_FAST_EMULATE_AMX) /* by the tests alone: the instructions below in plain C */
#include "amx_emulation.h"
#elif defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Ask the operating system for the use of AMX in all threads of this process; 0 where it is granted. */
int permit(void) { return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */); }
#else
#define NO_AMX
int permit(void) { return -1; } /* this processor, compiler or operating system has no AMX */
#endif

#ifndef NO_AMX
#define BLOCK 32 /* images of a block, and channels of a line: two tiles of 16 */
#define TILE 512 /* bfloat16 numbers in a tile, 1 KB */
#define PAIR (2 * TILE)
#define PIXELS 10 /* of two operands, 2 KB each, and three kernel taps' sums: what the nearest cache holds */
#define INLINE static inline __attribute__((always_inline))
/* gcc's tile intrinsics do not say that they read memory: nothing may be moved across the line between two phases. */
#define PHASE() __asm__ volatile("" ::: "memory")

typedef uint16_t bf16;

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) configuration;

static const configuration all_full = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* Others, oneDNN among them, remember what they configured last: they get it back. */
INLINE void begin_tiles(configuration *before) {
    _tile_storeconfig(before);
    PHASE();
    _tile_loadconfig(&all_full);
}

INLINE void end_tiles(const configuration *before) {
    PHASE();
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

INLINE int least(int a, int b) { return a < b ? a : b; }
INLINE int most(int a, int b) { return a > b ? a : b; }
INLINE int lines(int channels) { return (channels + BLOCK - 1) / BLOCK; }

typedef struct {
    bf16 *values;    /* (images, height, width, channels), or half the height and width where there are places */
    uint8_t *places; /* after max-pool: where in its 2x2 window each value stood, 2 * row + column; else NULL */
    int height, width, channels;
} maps;

/* Where the channels of a pixel of an image begin. */
INLINE long at_pixel(const maps *a, long image, int y, int x) {
    int half = a->places != NULL;
    return ((image * (a->height >> half) + (y >> half)) * (a->width >> half) + (x >> half)) * a->channels;
}

/* Line `line` (32 channels) of a pixel of an image: zero beyond the channels and, after max-pool, where the maximum stood
   elsewhere. */
INLINE __m512i load_line(const maps *a, long image, int y, int x, int line) {
    int half = a->places != NULL, n = least(BLOCK, a->channels - BLOCK * line);
    __mmask32 wanted = n == BLOCK ? ~0u : (1u << n) - 1;
    long at = at_pixel(a, image, y, x) + BLOCK * line;
    if (half) {
        __m256i place = _mm256_maskz_loadu_epi8(wanted, a->places + at);
        wanted &= _mm256_cmpeq_epi8_mask(place, _mm256_set1_epi8((char)(2 * (y & 1) + (x & 1))));
    }
    return _mm512_maskz_loadu_epi16(wanted, a->values + at);
}

/* Two images' lines, channel by channel beside each other: channels 0 ... 15 and 16 ... 31. */
INLINE void interleave(__m512i a, __m512i b, __m512i *low, __m512i *high) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                           5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    *low = _mm512_permutex2var_epi16(a, first, b);
    *high = _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(16)), b);
}

/* Lines `from` ... `to` of pixel (y, x) of two images, as a row of right operands, the lines `step` apart. */
INLINE void pack_pair(const maps *a, long first, int count, int pair, int y, int x, int from, int to, bf16 *out,
                      long step) {
    for (int line = from; line < to; line++, out += step) {
        __m512i v[2], low, high;
        for (int i = 0; i < 2; i++)
            v[i] = 2 * pair + i < count ? load_line(a, first + 2 * pair + i, y, x, line) : _mm512_setzero_si512();
        interleave(v[0], v[1], &low, &high);
        _mm512_store_si512(out + pair * 32, low);
        _mm512_store_si512(out + pair * 32 + TILE, high);
    }
}

/* Lines `from` ... `to` of rows top ... bottom of a block's images as right operands, whose rows are pairs of images:
   (lines, pixels, 2, 16 pairs, 16, 2), the lines `step` apart. Images are read as they lie in memory where all their
   lines are wanted; else a tile is filled at a time. */
INLINE void pack_right(const maps *a, long first, int count, int top, int bottom, int from, int to, bf16 *out,
                       long step) {
    if (to - from == lines(a->channels))
        for (int pair = 0; pair < BLOCK / 2; pair++) {
            bf16 *pixel = out;
            for (int y = top; y < bottom; y++)
                for (int x = 0; x < a->width; x++, pixel += PAIR)
                    pack_pair(a, first, count, pair, y, x, from, to, pixel, step);
        }
    else
        for (int y = top; y < bottom; y++)
            for (int x = 0; x < a->width; x++, out += PAIR)
                for (int pair = 0; pair < BLOCK / 2; pair++) {
                    /* Too little lies together for the processor to foresee: the next pixel is asked for now. */
                    for (int i = 0; i < 2 && !a->places; i++)
                        for (int line = from; line < to; line++)
                            _mm_prefetch(a->values + at_pixel(a, first + 2 * pair + i, y, x + 1) + line * BLOCK,
                                         _MM_HINT_T0);
                    pack_pair(a, first, count, pair, y, x, from, to, out, step);
                }
}

/* Exchange rows and columns of a tile of 16 x 16 pairs, so that a right operand becomes a left one: its rows are then
   channels, its columns images. */
INLINE void transpose(bf16 *to) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        __m512i p = _mm512_load_si512(to + 32 * i), q = _mm512_load_si512(to + 32 * (i + 1));
        a[i] = _mm512_unpacklo_epi32(p, q);
        a[i + 1] = _mm512_unpackhi_epi32(p, q);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i p = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), q = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        __m512i s = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88), t = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
        _mm512_store_si512(to + 32 * i, _mm512_shuffle_i32x4(p, s, 0x88));
        _mm512_store_si512(to + 32 * (i + 4), _mm512_shuffle_i32x4(q, t, 0x88));
        _mm512_store_si512(to + 32 * (i + 8), _mm512_shuffle_i32x4(p, s, 0xdd));
        _mm512_store_si512(to + 32 * (i + 12), _mm512_shuffle_i32x4(q, t, 0xdd));
    }
}

/* 32 numbers from `from`, of which `wanted` there are, rounded. */
INLINE __m512i load_rounded(const float *from, int wanted) {
    __mmask32 mask = wanted >= BLOCK ? ~0u : wanted > 0 ? (1u << wanted) - 1 : 0;
    __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, from), high = _mm512_maskz_loadu_ps(mask >> 16, from + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* Filters (cout, 3, 3, cin), float32, as right operands: (cout / 32, 9 taps, cin / 32, 2, 16 pairs, 16, 2). With `flipped`
   for the gradient of the images, whose inputs are the outputs: the taps in reverse, (cin / 32, 9, cout / 32, ...). */
void pack_filters(const float *w, bf16 *to, int cout, int cin, int flipped, int threads) {
    int in_lines = lines(flipped ? cout : cin), out_lines = lines(flipped ? cin : cout);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int block = 0; block < out_lines; block++)
        for (int tap = 0; tap < 9; tap++) {
            bf16 *pair = to + (long)(block * 9 + tap) * in_lines * PAIR;
            for (int line = 0; line < in_lines; line++, pair += PAIR) {
                /* 32 rows of 32 numbers that lie beside each other, from filter o and input channel i on */
                int o = (flipped ? line : block) * BLOCK, i = (flipped ? block : line) * BLOCK;
                const float *from = w + (o * 9L + (flipped ? 8 - tap : tap)) * cin + i;
                for (int r = 0; r < BLOCK; r += 2) {
                    __m512i a = load_rounded(from + r * 9L * cin, o + r < cout ? cin - i : 0);
                    __m512i b = load_rounded(from + (r + 1) * 9L * cin, o + r + 1 < cout ? cin - i : 0), low, high;
                    if (flipped) { /* the rows are what is summed over, in pairs */
                        interleave(a, b, &low, &high);
                        _mm512_store_si512(pair + r * 16, low);
                        _mm512_store_si512(pair + r * 16 + TILE, high);
                    } else { /* they are the columns of the two tiles */
                        _mm512_store_si512(pair + r * 32, a);
                        _mm512_store_si512(pair + r * 32 + 32, b);
                    }
                }
                if (!flipped) transpose(pair), transpose(pair + TILE);
            }
        }
}

INLINE void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

INLINE void load_sums(const float *from) { /* (32, 32) */
    _tile_loadd(0, from, 4 * BLOCK);
    _tile_loadd(1, from + 16, 4 * BLOCK);
    _tile_loadd(2, from + 16 * BLOCK, 4 * BLOCK);
    _tile_loadd(3, from + 16 * BLOCK + 16, 4 * BLOCK);
}

INLINE void store_sums(float *to) {
    _tile_stored(0, to, 4 * BLOCK);
    _tile_stored(1, to + 16, 4 * BLOCK);
    _tile_stored(2, to + 16 * BLOCK, 4 * BLOCK);
    _tile_stored(3, to + 16 * BLOCK + 16, 4 * BLOCK);
}

INLINE __mmask16 greater_or_nan(__m512 a, __m512 b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
}

/* Line `line` of one pixel of image n of a block, rounded from the sums; where there are places the largest of four, which
   are the pixel's 2x2 window. */
INLINE void write_pixel(const maps *a, float sums[4][BLOCK * BLOCK], int n, long image, int y, int x, int line) {
    int wanted = least(BLOCK, a->channels - BLOCK * line);
    __mmask32 mask = wanted == BLOCK ? ~0u : (1u << wanted) - 1;
    long at = ((image * (a->height >> (a->places != NULL)) + y) * (a->width >> (a->places != NULL)) + x) * a->channels;
    at += BLOCK * line;
    __m512 low = _mm512_load_ps(sums[0] + n * BLOCK), high = _mm512_load_ps(sums[0] + n * BLOCK + 16);
    if (a->places) {
        __m512i at_low = _mm512_setzero_si512(), at_high = at_low;
#pragma GCC unroll 3
        for (int k = 1; k < 4; k++) {
            __m512 v = _mm512_load_ps(sums[k] + n * BLOCK), w = _mm512_load_ps(sums[k] + n * BLOCK + 16);
            __mmask16 p = greater_or_nan(v, low), q = greater_or_nan(w, high);
            low = _mm512_mask_mov_ps(low, p, v), at_low = _mm512_mask_set1_epi32(at_low, p, k);
            high = _mm512_mask_mov_ps(high, q, w), at_high = _mm512_mask_set1_epi32(at_high, q, k);
        }
        __m256i place = _mm256_set_m128i(_mm512_cvtepi32_epi8(at_high), _mm512_cvtepi32_epi8(at_low));
        _mm256_mask_storeu_epi8(a->places + at, mask, place);
    }
    __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    bf16 *to = a->values + at;
    /* Whole cache lines go past the caches, which need not fetch first what is then overwritten. */
    if (wanted == BLOCK && !((uintptr_t)to & 63)) _mm512_stream_si512((void *)to, rounded);
    else _mm512_mask_storeu_epi16(to, mask, rounded);
}

/* What `convolve` does between products: write the pixel or window before, and pack the rows that come next. */
typedef struct {
    const maps *from, *to;
    long first; /* of the block's images */
    int count;
    float (*sums)[BLOCK * BLOCK]; /* of the pixel or window that is written, */
    int y, x, line;               /* where it stands, */
    int written, writes;          /* the images done, and how many are at a time */
    bf16 *ring, *slot;            /* all packed rows, and the one that is packed, */
    int slots, packed, end;       /* how many are kept, the row's number, and up to which one to go on, */
    int image, column;            /* and the pixel that is next */
} meanwhile;

INLINE void write_one(meanwhile *m) {
    write_pixel(m->to, m->sums, m->written, m->first + m->written, m->y, m->x, m->line);
    m->written++;
}

/* All lines of one pixel, as a row of left operands: rows are (width, lines, 32 images, 32 channels). */
INLINE void pack_one(meanwhile *m) {
    int n_lines = lines(m->from->channels), n = m->image, x = m->column;
    bf16 *to = m->slot + (long)x * n_lines * PAIR + n * BLOCK;
    for (int line = 0; line < n_lines; line++, to += PAIR)
        _mm512_store_si512(
            to, n < m->count ? load_line(m->from, m->first + n, m->packed, x, line) : _mm512_setzero_si512());
    if (++m->column < m->from->width) return;
    m->column = 0;
    if (++m->image < BLOCK) return;
    m->image = 0;
    m->packed++;
    m->slot = m->ring + (m->packed % m->slots) * ((long)m->from->width * n_lines * PAIR);
}

INLINE void do_some(meanwhile *m) {
    for (int k = 0; k < m->writes && m->written < m->count; k++) write_one(m);
    if (m->packed < m->end) pack_one(m);
}

/* Add `steps` products of a 32 x 32 left operand with a right one to the four tiles of sums, and after each do some of
   `also`, for which the processor finds time while the tiles are busy. */
INLINE void multiply(const bf16 *a, const bf16 *b, int steps, meanwhile *also) {
    for (; steps > 0; steps--, a += PAIR, b += PAIR) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + TILE, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (also) do_some(also);
    }
}

/* Rows that a thread of `convolve` keeps packed: those that a row of pixels or windows sees, and what the next adds. */
INLINE int slots(int pooled) { return pooled ? 6 : 4; }

/* Bytes of scratch memory a thread of `convolve` needs: that many rows. */
long convolve_scratch(int width, int channels, int pooled) {
    return (long)slots(pooled) * width * lines(channels) * PAIR * sizeof(bf16);
}

/* y = x * w, with w packed. Images: x (height_in, width_in) and y (height_out, width_out), of which the smaller lies in the
   upper left of the larger; with x_places x is the gradient of a max-pooled image, with y_places y is max-pooled. */
void convolve(bf16 *x, uint8_t *x_places, const bf16 *w, bf16 *y, uint8_t *y_places, char *scratch, int images,
              int height_in, int width_in, int cin, int height_out, int width_out, int cout, int threads) {
    const maps from = {x, x_places, height_in, width_in, cin}, to = {y, y_places, height_out, width_out, cout};
    int n_lines = lines(cin), blocks = (images + BLOCK - 1) / BLOCK, window = y_places ? 2 : 1;
    long row = (long)width_in * n_lines * PAIR;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        bf16 *ring = (bf16 *)(scratch + thread * convolve_scratch(width_in, cin, window > 1));
        float sums[2][4][BLOCK * BLOCK] __attribute__((aligned(64)));
        int turn = 0;
        configuration before;
        begin_tiles(&before);
        for (int block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++) {
            meanwhile m = {.from = &from, .to = &to, .first = (long)block * BLOCK, .ring = ring, .slot = ring};
            m.count = m.written = least(BLOCK, images - block * BLOCK); /* nothing to write yet */
            m.slots = slots(window > 1), m.writes = 1 + BLOCK / (9 * n_lines * window * window);
            for (int top = 0; top < height_out; top += window) {
                for (m.end = least(height_in, top + window + 1); m.packed < m.end;) pack_one(&m);
                m.end = least(height_in, top + 2 * window + 1);
                PHASE();
                for (int out = 0; out < lines(cout); out++)
                    for (int left = 0; left < width_out; left += window) {
                        for (int k = 0; k < window * window; k++) {
                            int r = top + k / 2, c = left + k % 2, c0 = most(0, c - 1), c1 = least(width_in, c + 2);
                            zero_sums();
                            /* The taps of a row of the filter lie beside each other, as do the pixels they see. */
                            for (int seen = most(0, r - 1); seen < least(height_in, r + 2); seen++)
                                multiply(ring + (seen % m.slots) * row + (long)c0 * n_lines * PAIR,
                                         w + (9L * out + 3 * (seen - r + 1) + c0 - c + 1) * n_lines * PAIR,
                                         (c1 - c0) * n_lines, &m);
                            store_sums(sums[turn][k]);
                        }
                        while (m.written < m.count) write_one(&m);
                        PHASE();
                        m.sums = sums[turn], turn = !turn;
                        m.y = top / window, m.x = left / window, m.line = out, m.written = 0;
                    }
            }
            while (m.written < m.count) write_one(&m);
            PHASE();
        }
        _mm_sfence(); /* what went past the caches is there before another thread reads it */
        end_tiles(&before);
    }
}

/* How `weight_gradient` cuts its work so that what it has packed stays in the second cache: channels of the outputs and of
   the inputs at a time in lines, rows of the outputs, blocks of images. */
typedef struct {
    int out_lines, in_lines, rows, blocks;
} portion;

INLINE portion make_portion(int height, int width, int cin, int cout, int budget) {
    portion p = {least(lines(cout), 8), least(lines(cin), 2), height, 1};
    long line = width * PAIR * (long)sizeof(bf16);
    while (p.rows > 1 && line * ((p.rows) * p.out_lines + (p.rows + 2) * p.in_lines) > budget) p.rows = (p.rows + 1) / 2;
    if (p.rows == height)
        while (line * (p.blocks + 1) * (height * p.out_lines + height * p.in_lines) <= budget) p.blocks++;
    return p;
}

/* Add to the sums of a kernel row's three taps, (3, 32, 32), the products of `rows` rows of packed gradients with packed
   inputs: few pixels at a time, so that the second and third tap find them in the nearest cache. */
INLINE void add_gradient(const bf16 *left, const bf16 *right, int rows, int width_out, int width, float *sums) {
    int together = most(1, PIXELS / width_out);
    for (int r0 = 0; r0 < rows; r0 += together)
        for (int c0 = 0; c0 < width_out; c0 += PIXELS)
            for (int dc = -1; dc <= 1; dc++) {
                int first = most(c0, -dc), last = least(least(width_out, c0 + PIXELS), width - dc);
                load_sums(sums + (dc + 1) * BLOCK * BLOCK);
                for (int r = r0; r < least(rows, r0 + together); r++)
                    multiply(left + ((long)r * width_out + first) * PAIR,
                             right + ((long)r * width + first + dc) * PAIR, last - first, NULL);
                store_sums(sums + (dc + 1) * BLOCK * BLOCK);
            }
}

/* Bytes of scratch memory a thread of `weight_gradient` needs. */
long gradient_scratch(int height, int width, int cin, int cout, int budget) {
    portion p = make_portion(height, width, cin, cout, budget);
    return (long)sizeof(bf16) * PAIR * width * p.blocks * (p.rows * p.out_lines + (p.rows + 2) * p.in_lines);
}

/* dw (cout, 3, 3, cin), float32: the gradient of the filters, summed over images x (height, width) and gradients dy
   (height_out, width_out), the latter with `places` for a max-pooled image. sums: (threads, cout / 32, cin / 32, 9, 32,
   32), one partial sum for each thread's share of the images. */
void weight_gradient(bf16 *x, bf16 *dy, uint8_t *places, float *dw, float *sums, char *scratch, int images, int height,
                     int width, int cin, int height_out, int width_out, int cout, int budget, int threads) {
    const maps inputs = {x, NULL, height, width, cin}, gradients = {dy, places, height_out, width_out, cout};
    int in_lines = lines(cin), out_lines = lines(cout), blocks = (images + BLOCK - 1) / BLOCK;
    long size = (long)out_lines * in_lines * 9 * BLOCK * BLOCK;
    portion p = make_portion(height, width, cin, cout, budget);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (int thread = 0; thread < threads; thread++) {
            bf16 *left = (bf16 *)(scratch + thread * gradient_scratch(height, width, cin, cout, budget));
            bf16 *right = left + (long)PAIR * width * p.blocks * p.rows * p.out_lines;
            float *own = sums + thread * size;
            memset(own, 0, size * sizeof(float));
            configuration before;
            begin_tiles(&before);
            int end = blocks * (thread + 1) / threads;
            for (int block = blocks * thread / threads; block < end; block += p.blocks)
                for (int top = 0; top < height_out; top += p.rows)
                    for (int o0 = 0; o0 < out_lines; o0 += p.out_lines) {
                        int n_blocks = least(p.blocks, end - block), bottom = least(height_out, top + p.rows);
                        int o1 = least(out_lines, o0 + p.out_lines), above = most(0, top - 1);
                        int below = least(height, bottom + 1);
                        long of_left = (long)(bottom - top) * width_out * PAIR; /* from one line and block to the next */
                        long of_right = (long)(below - above) * width * PAIR;
                        for (int b = 0; b < n_blocks; b++) {
                            int first = (block + b) * BLOCK;
                            pack_right(&gradients, first, least(BLOCK, images - first), top, bottom, o0, o1,
                                       left + b * of_left, n_blocks * of_left);
                        }
                        for (long at = 0; at < (o1 - o0) * n_blocks * of_left; at += TILE) transpose(left + at);
                        for (int i0 = 0; i0 < in_lines; i0 += p.in_lines) {
                            int i1 = least(in_lines, i0 + p.in_lines);
                            for (int b = 0; b < n_blocks; b++) {
                                int first = (block + b) * BLOCK;
                                pack_right(&inputs, first, least(BLOCK, images - first), above, below, i0, i1,
                                           right + b * of_right, n_blocks * of_right);
                            }
                            PHASE();
                            for (int o = o0; o < o1; o++)
                                for (int i = i0; i < i1; i++)
                                    for (int dr = -1; dr <= 1; dr++) {
                                        float *sum = own + ((o * in_lines + i) * 9L + 3 * (dr + 1)) * BLOCK * BLOCK;
                                        int r0 = most(top, -dr), r1 = least(bottom, height - dr);
                                        for (int b = 0; b < n_blocks; b++)
                                            add_gradient(left + ((o - o0) * n_blocks + b) * of_left +
                                                             (long)(r0 - top) * width_out * PAIR,
                                                         right + ((i - i0) * n_blocks + b) * of_right +
                                                             (long)(r0 + dr - above) * width * PAIR,
                                                         r1 - r0, width_out, width, sum);
                                    }
                            PHASE();
                        }
                    }
            end_tiles(&before);
        }
#pragma omp for schedule(static) collapse(2)
        for (int o = 0; o < cout; o++)
            for (int tap = 0; tap < 9; tap++)
                for (int i = 0; i < in_lines; i++) {
                    const float *from = sums + (((o / BLOCK * in_lines + i) * 9L + tap) * BLOCK + o % BLOCK) * BLOCK;
                    float *to = dw + (o * 9L + tap) * cin + i * BLOCK;
                    for (int k = 0; k < least(BLOCK, cin - i * BLOCK); k++) {
                        float total = from[k];
                        for (int thread = 1; thread < threads; thread++) total += from[thread * size + k];
                        to[k] = total;
                    }
                }
    }
}

/* Multiply tiles that stay in registers, on each thread `products` (a multiple of four) of 16 x 32 by 32 x 16 numbers: the
   rate that nothing can pass. */
void multiply_in_registers(long products, int threads) {
    static const bf16 zeros[TILE] __attribute__((aligned(64)));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        configuration before;
        begin_tiles(&before);
        zero_sums();
        _tile_loadd(4, zeros, 64);
        _tile_loadd(5, zeros, 64);
        _tile_loadd(6, zeros, 64);
        _tile_loadd(7, zeros, 64);
        for (long i = 0; i < products; i += 4) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        end_tiles(&before);
    }
}
#endif
