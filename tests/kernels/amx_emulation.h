/* The instructions that amx.c uses, in plain C, so that its loops, packing and masks are tested on any processor.

   AMX: Intel, "Intel 64 and IA-32 architectures software developer's manual", volume 2, LDTILECFG, TILELOADD,
   TDPBF16PS and VCVTNE2PS2BF16. The product of two tiles has the order of sums given there: the even and the odd
   elements of a row in two chains of fused multiply-adds, then their sum, then the old value; denormals count as zero.
   What would fault on a processor (a tile that is not configured, an address that is not aligned) ends the process. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EMULATED static __attribute__((noinline, unused))

EMULATED void require(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "emulated AMX: %s\n", what);
    abort();
}

EMULATED const void *aligned(const void *address) {
    require((uintptr_t)address % 64 == 0, "the address is not that of a whole cache line");
    return address;
}

/* --- Vectors (AVX-512) --- */

typedef long long __m512i __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef long long __m128i __attribute__((vector_size(16)));
typedef float __m512 __attribute__((vector_size(64)));
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

typedef uint16_t words16 __attribute__((vector_size(64)));
typedef uint32_t words32 __attribute__((vector_size(64)));
typedef uint64_t words64 __attribute__((vector_size(64)));
typedef uint8_t words8 __attribute__((vector_size(32)));
typedef uint8_t quarter8 __attribute__((vector_size(16)));

#define FOR(i, n) for (int i = 0; i < (n); i++)

EMULATED __m512i _mm512_setzero_si512(void) { return (__m512i){0}; }
EMULATED __m512i _mm512_load_si512(const void *from) { return *(const __m512i *)aligned(from); }
EMULATED __m512 _mm512_load_ps(const void *from) { return *(const __m512 *)aligned(from); }
EMULATED void _mm512_store_si512(void *to, __m512i v) { memcpy((void *)aligned(to), &v, 64); }
EMULATED void _mm512_stream_si512(void *to, __m512i v) { _mm512_store_si512(to, v); }

/* Elements outside the mask are neither read nor written. */
EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void *from) {
    words16 v = {0};
    FOR(i, 32) if (mask >> i & 1) v[i] = ((const uint16_t *)from)[i];
    return (__m512i)v;
}

EMULATED __m256i _mm256_maskz_loadu_epi8(__mmask32 mask, const void *from) {
    words8 v = {0};
    FOR(i, 32) if (mask >> i & 1) v[i] = ((const uint8_t *)from)[i];
    return (__m256i)v;
}

EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void *from) {
    __m512 v = {0};
    FOR(i, 16) if (mask >> i & 1) v[i] = ((const float *)from)[i];
    return v;
}

EMULATED void _mm512_mask_storeu_epi16(void *to, __mmask32 mask, __m512i v) {
    FOR(i, 32) if (mask >> i & 1) ((uint16_t *)to)[i] = ((words16)v)[i];
}

EMULATED void _mm256_mask_storeu_epi8(void *to, __mmask32 mask, __m256i v) {
    FOR(i, 32) if (mask >> i & 1) ((uint8_t *)to)[i] = ((words8)v)[i];
}

EMULATED __m256i _mm256_set1_epi8(char value) {
    words8 v;
    FOR(i, 32) v[i] = (uint8_t)value;
    return (__m256i)v;
}

EMULATED __mmask32 _mm256_cmpeq_epi8_mask(__m256i a, __m256i b) {
    __mmask32 mask = 0;
    FOR(i, 32) mask |= (__mmask32)(((words8)a)[i] == ((words8)b)[i]) << i;
    return mask;
}

EMULATED __m512i _mm512_set1_epi16(short value) {
    words16 v;
    FOR(i, 32) v[i] = (uint16_t)value;
    return (__m512i)v;
}

/* The arguments come from the highest element down. */
#define _mm512_set_epi16(...) set_words16((const uint16_t[32]){__VA_ARGS__})
EMULATED __m512i set_words16(const uint16_t *highest) {
    words16 v;
    FOR(i, 32) v[i] = highest[31 - i];
    return (__m512i)v;
}

EMULATED __m512i _mm512_add_epi16(__m512i a, __m512i b) { return (__m512i)((words16)a + (words16)b); }

EMULATED __m512i _mm512_permutex2var_epi16(__m512i a, __m512i which, __m512i b) {
    words16 v;
    FOR(i, 32) {
        int k = ((words16)which)[i];
        v[i] = k & 32 ? ((words16)b)[k & 31] : ((words16)a)[k & 31];
    }
    return (__m512i)v;
}

/* In each quarter (128 bits) of a and b, their elements from `from` on in turns. */
#define UNPACK(name, words, per_quarter, from)                                                                         \
    EMULATED __m512i name(__m512i a, __m512i b) {                                                                      \
        words v;                                                                                                       \
        FOR(q, 4) FOR(i, (per_quarter) / 2) {                                                                          \
            v[q * (per_quarter) + 2 * i] = ((words)a)[q * (per_quarter) + (from) + i];                                 \
            v[q * (per_quarter) + 2 * i + 1] = ((words)b)[q * (per_quarter) + (from) + i];                             \
        }                                                                                                              \
        return (__m512i)v;                                                                                             \
    }
UNPACK(_mm512_unpacklo_epi32, words32, 4, 0)
UNPACK(_mm512_unpackhi_epi32, words32, 4, 2)
UNPACK(_mm512_unpacklo_epi64, words64, 2, 0)
UNPACK(_mm512_unpackhi_epi64, words64, 2, 1)

/* Two quarters of a and two of b, each chosen by two bits. */
EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int which) {
    words64 v;
    FOR(q, 4) FOR(i, 2) v[2 * q + i] = ((words64)(q < 2 ? a : b))[2 * (which >> 2 * q & 3) + i];
    return (__m512i)v;
}

enum { _CMP_GT_OQ, _CMP_UNORD_Q };
EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int relation) {
    __mmask16 mask = 0;
    FOR(i, 16) {
        int holds = relation == _CMP_GT_OQ ? a[i] > b[i] : a[i] != a[i] || b[i] != b[i];
        mask |= (__mmask16)(holds << i);
    }
    return mask;
}

EMULATED __m512 _mm512_mask_mov_ps(__m512 old, __mmask16 mask, __m512 new) {
    FOR(i, 16) if (mask >> i & 1) old[i] = new[i];
    return old;
}

EMULATED __m512i _mm512_mask_set1_epi32(__m512i old, __mmask16 mask, int value) {
    words32 v = (words32)old;
    FOR(i, 16) if (mask >> i & 1) v[i] = (uint32_t)value;
    return (__m512i)v;
}

EMULATED __m128i _mm512_cvtepi32_epi8(__m512i a) {
    quarter8 v;
    FOR(i, 16) v[i] = (uint8_t)((words32)a)[i];
    return (__m128i)v;
}

EMULATED __m256i _mm256_set_m128i(__m128i high, __m128i low) { return (__m256i){low[0], low[1], high[0], high[1]}; }

/* A float's bits, zero where it is denormal. */
EMULATED uint32_t flushed_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7f800000 ? bits : bits & 0x80000000;
}

/* To the nearest, ties to even; a NaN becomes quiet. */
EMULATED uint16_t rounded(float x) {
    uint32_t bits = flushed_bits(x);
    if (x != x) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

EMULATED __m512i _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    words16 v;
    FOR(i, 16) v[i] = rounded(low[i]), v[16 + i] = rounded(high[i]);
    return (__m512i)v;
}

#define _MM_HINT_T0 3
EMULATED void _mm_prefetch(const void *address, int hint) { (void)address, (void)hint; }
EMULATED void _mm_sfence(void) {}

/* --- Tiles (AMX) --- */

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shapes;

static _Thread_local shapes shape;                /* of this thread's tiles; palette 0: they are not in use */
static _Thread_local uint8_t tiles[8][16][64];

int permit(void) { return 0; }

EMULATED void _tile_release(void) {
    memset(&shape, 0, sizeof shape);
    memset(tiles, 0, sizeof tiles);
}

EMULATED void _tile_loadconfig(const void *from) {
    _tile_release();
    shapes wanted;
    memcpy(&wanted, from, sizeof wanted);
    require(wanted.palette <= 1, "there is no such palette");
    if (!wanted.palette) return;
    FOR(i, 8) require(wanted.bytes[i] <= 64 && wanted.rows[i] <= 16, "a tile has at most 16 rows of 64 bytes");
    shape = wanted;
}

EMULATED void _tile_storeconfig(void *to) { memcpy(to, &shape, sizeof shape); }

EMULATED int rows_of(int tile) {
    require(shape.palette == 1 && shape.rows[tile] && shape.bytes[tile], "the tile is not configured");
    return shape.rows[tile];
}

EMULATED void _tile_zero(int tile) {
    rows_of(tile);
    memset(tiles[tile], 0, sizeof tiles[tile]);
}

EMULATED void _tile_loadd(int tile, const void *from, long stride) {
    int rows = rows_of(tile);
    memset(tiles[tile], 0, sizeof tiles[tile]);
    FOR(r, rows) memcpy(tiles[tile][r], (const char *)from + r * stride, shape.bytes[tile]);
}

EMULATED void _tile_stored(int tile, void *to, long stride) {
    int rows = rows_of(tile);
    FOR(r, rows) memcpy((char *)to + r * stride, tiles[tile][r], shape.bytes[tile]);
}

typedef float some __attribute__((vector_size(32))); /* eight columns of a tile */
typedef uint32_t bits_of_some __attribute__((vector_size(32)));

/* Denormals become zero. */
static inline some flushed(some v) {
    bits_of_some bits = (bits_of_some)v, normal = (bits_of_some)((bits & 0x7f800000) != 0);
    return (some)(bits & (normal | 0x80000000));
}

/* The first or the second numbers of eight pairs of bfloat16, as float32. */
static inline some widened(const uint8_t *pairs, int second) {
    bits_of_some bits;
    memcpy(&bits, pairs, sizeof bits);
    return flushed((some)(second ? bits & 0xffff0000 : bits << 16));
}

/* Columns that a tile lacks are zeros here, and stay so. */
EMULATED void _tile_dpbf16ps(int sums, int left, int right) {
    int rows = rows_of(sums), pairs = shape.bytes[left] / 4;
    require(rows_of(left) == rows && rows_of(right) == pairs && shape.bytes[right] == shape.bytes[sums],
            "the tiles' shapes do not fit");
    for (int at = 0; at < 64; at += sizeof(some)) {
        some of_right[16][2];
        FOR(k, pairs) FOR(i, 2) of_right[k][i] = widened(tiles[right][k] + at, i);
        FOR(m, rows) {
            some sum, even = {0}, odd = {0};
            float of_left[2][16];
            FOR(i, 2) FOR(half, 2) {
                some v = widened(tiles[left][m] + half * sizeof v, i);
                memcpy(of_left[i] + half * 8, &v, sizeof v);
            }
            /* Two bfloat16 numbers have an exact product in float32: fused with the sum or not, it is rounded once. */
            FOR(k, pairs) {
                even = flushed(of_left[0][k] * of_right[k][0] + even);
                odd = flushed(of_left[1][k] * of_right[k][1] + odd);
            }
            memcpy(&sum, tiles[sums][m] + at, sizeof sum);
            sum = flushed(flushed(sum) + flushed(even + odd));
            memcpy(tiles[sums][m] + at, &sum, sizeof sum);
        }
    }
}

/* What another library would do with this thread's tiles, for the tests. */
void configure(const void *from) { _tile_loadconfig(from); }
void read_configuration(void *to) { _tile_storeconfig(to); }
