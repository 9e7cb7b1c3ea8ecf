/* Matrices in int4, int8 and bf16 times float32 vectors, without ever holding the matrix in float32.

   Everything is checked in blocks.py before it comes here. No allocation, no threads of its own, nothing linked: the
   thread pool is the one the process already has, called through a pointer. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__GNUC__)
#error "needs the vector extensions of gcc or clang; edge runs without this file"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the formats are little-endian"
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define BLOCK 32
#define GROUP 8 /* blocks whose scales are converted at once */
#define MOST_R 4
#define MOST_T 4
#define NEAR (16 << 10) /* where the rows of a tile lie this close, the machine does not foresee the next tile */
#define SMALL (1 << 16) /* bytes of work below which a second thread costs more than it brings */
#define CHUNK (1 << 17) /* bytes of work a thread takes at once */

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint32_t v8u __attribute__((vector_size(32)));
typedef uint8_t b8 __attribute__((vector_size(8)));
typedef int8_t s8 __attribute__((vector_size(8)));
typedef uint16_t h8 __attribute__((vector_size(16)));

/* Row-major; `cols` counts whole blocks, but for bits = 16. Mirrored by `_Struct` in blocks.py. */
struct matrix {
    const uint8_t *codes;
    const uint16_t *scales;
    int64_t rows, cols;
    int64_t code_stride;  /* bytes */
    int64_t scale_stride; /* elements */
    int64_t bits;
};

struct job {
    const struct matrix *matrix;
    void (*work)(const struct job *, int64_t first, int64_t stop);
    const float *x;
    int64_t x_stride, t;
    float *y;
    const int64_t *ids;
    const int64_t *starts; /* with `each`: see multiply_parts */
    int64_t each;
    int64_t start, stop, chunk, next;
};

/* A plain vector load of any alignment: memcpy of 32 bytes is one where there are such vectors. */
#define load(p) (*(const v8_any *)(p))
#define store(p, v) (*(v8_any *)(p) = (v))
typedef float v8_any __attribute__((vector_size(32), aligned(4), may_alias));

INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float bf16(const uint8_t *p) {
    uint16_t raw;
    memcpy(&raw, p, 2);
    return bits_float((uint32_t)raw << 16);
}

/* ---- any machine ---- */

INLINE float half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest < 0x400) /* subnormal: an exact multiple of 2^-24 */
        return bits_float(sign) + (sign ? -1.0f : 1.0f) * ((float)rest * 0x1p-24f);
    return bits_float(sign | ((rest << 13) + (rest < 0x7c00 ? 0x38000000 : 0x70000000)));
}

INLINE void halves_any(const uint16_t *p, int n, float *out) {
    for (int i = 0; i < n; i++) out[i] = half(p[i]);
}

INLINE void unpack8_any(const uint8_t *p, v8 *w) {
    UNROLL for (int q = 0; q < 4; q++) {
        s8 c;
        memcpy(&c, p + 8 * q, 8);
        w[q] = __builtin_convertvector(c, v8);
    }
}

INLINE void unpack4_any(const uint8_t *p, v8 *w) {
    UNROLL for (int q = 0; q < 2; q++) {
        b8 c;
        memcpy(&c, p + 8 * q, 8);
        w[q] = __builtin_convertvector((s8)(c & 15) - 8, v8);
        w[q + 2] = __builtin_convertvector((s8)(c >> 4) - 8, v8);
    }
}

INLINE void unpack16_any(const uint8_t *p, v8 *w) {
    UNROLL for (int q = 0; q < 4; q++) {
        h8 c;
        memcpy(&c, p + 16 * q, 16);
        w[q] = (v8)(__builtin_convertvector(c, v8u) << 16);
    }
}

#define NAME(x) x##_any
#define TARGET
#define HALVES halves_any
#define UNPACK4 unpack4_any
#define UNPACK8 unpack8_any
#define UNPACK16 unpack16_any
#include "blocks_core.h"

/* ---- x86 with AVX2, FMA and F16C: chosen when the machine has them, whatever this file was compiled for ---- */

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma,f16c")))

AVX2 INLINE void halves_avx2(const uint16_t *p, int n, float *out) {
    if (n == GROUP)
        _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)));
    else
        for (int i = 0; i < n; i++) out[i] = _cvtsh_ss(p[i]);
}

AVX2 INLINE void unpack8_avx2(const uint8_t *p, v8 *w) {
    UNROLL for (int q = 0; q < 4; q++)
        w[q] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * q))));
}

/* No conversion at all: -8..7 as bf16 are looked up, low and high byte apart, and are floats once shifted into place.
   The first shuffle puts the codes so that every vector comes out in the order of its columns. */
AVX2 INLINE void unpack4_avx2(const uint8_t *p, v8 *w) {
    const __m256i order = _mm256_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 0, 8, 1, 9, 2, 10, 3, 11,  //
                                           4, 12, 5, 13, 6, 14, 7, 15, 4, 12, 5, 13, 6, 14, 7, 15);
    const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, (char)0xE0, (char)0xC0, (char)0xA0, (char)0x80, 0x40, 0, (char)0x80,  //
        0, (char)0x80, 0, 0x40, (char)0x80, (char)0xA0, (char)0xC0, (char)0xE0));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        (char)0xC1, (char)0xC0, (char)0xC0, (char)0xC0, (char)0xC0, (char)0xC0, (char)0xC0, (char)0xBF,  //
        0, 0x3F, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40));
    const __m256i shift = _mm256_setr_epi32(0, 0, 4, 4, 0, 0, 4, 4), top = _mm256_set1_epi32((int)0xFFFF0000);
    __m256i c = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)), order);
    c = _mm256_and_si256(_mm256_srlv_epi32(c, shift), _mm256_set1_epi8(15));
    __m256i l = _mm256_shuffle_epi8(low, c), h = _mm256_shuffle_epi8(high, c);
    __m256i first = _mm256_unpacklo_epi8(l, h), second = _mm256_unpackhi_epi8(l, h);
    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(first, 16));
    w[1] = _mm256_castsi256_ps(_mm256_and_si256(first, top));
    w[2] = _mm256_castsi256_ps(_mm256_slli_epi32(second, 16));
    w[3] = _mm256_castsi256_ps(_mm256_and_si256(second, top));
}

AVX2 INLINE void unpack16_avx2(const uint8_t *p, v8 *w) {
    UNROLL for (int q = 0; q < 4; q++) {
        __m256i c = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 16 * q)));
        w[q] = _mm256_castsi256_ps(_mm256_slli_epi32(c, 16));
    }
}

#define NAME(x) x##_avx2
#define TARGET AVX2
#define HALVES halves_avx2
#define UNPACK4 unpack4_avx2
#define UNPACK8 unpack8_avx2
#define UNPACK16 unpack16_avx2
#include "blocks_core.h"

static int has_avx2(void) {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c & bit_F16C);
}
#else
static int has_avx2(void) { return 0; }
#define multiply_avx2 multiply_any
#define expand_avx2 expand_any
#endif

/* ---- what blocks.py calls ---- */

typedef void (*pool_t)(void (*)(void *), void *, unsigned, unsigned);
static pool_t pool;      /* GOMP_parallel, or NULL */
static unsigned threads; /* 0: as many as the pool likes */
static int fast;         /* the AVX2 path is in use */

/* 1 where the AVX2 path is in use afterwards. `wanted`: 0 portable, 1 the best there is. */
API int edge_path(int wanted) { return fast = wanted && has_avx2(); }

API void edge_pool(void *parallel, unsigned count) {
    pool = (pool_t)parallel;
    threads = count;
}

static void worker(void *data) {
    struct job *job = data;
    int64_t first;
    while ((first = __atomic_fetch_add(&job->next, job->chunk, __ATOMIC_RELAXED)) < job->stop)
        job->work(job, first, job->stop - first < job->chunk ? job->stop : first + job->chunk);
}

/* Rows [start, stop), `row_bytes` of work each, over the pool. Chunks are whole tiles: no result depends on them. */
static void run(struct job *job, int64_t row_bytes) {
    int64_t count = job->stop - job->start, chunk = CHUNK / row_bytes / MOST_R * MOST_R;
    job->next = job->start;
    job->chunk = chunk < MOST_R ? MOST_R : chunk;
    if (pool && threads != 1 && count > job->chunk / 2 && count * row_bytes > SMALL) {
        if (count < 4 * job->chunk) job->chunk = (count / 4 + MOST_R) / MOST_R * MOST_R;
        pool(worker, job, threads, 0);
    } else {
        job->work(job, job->start, job->stop);
    }
}

API void edge_multiply(const struct matrix *m, const float *x, int64_t t, int64_t x_stride, float *y) {
    struct job job = {.matrix = m, .work = fast ? multiply_avx2 : multiply_any, .x = x, .x_stride = x_stride, .t = t};
    job.y = y;
    job.stop = m->rows;
    run(&job, m->cols * m->bits / 8 + 1);
}

/* Rows [first, stop) of the parts `ids`, `each` rows a part, as if they lay one after another. */
static void multiply_parts(const struct job *job, int64_t first, int64_t stop) {
    for (int64_t at = first, end; at < stop; at = end) {
        const int64_t k = at / job->each, row = at % job->each, t = job->starts[k + 1] - job->starts[k];
        struct matrix part = *job->matrix;
        end = (k + 1) * job->each < stop ? (k + 1) * job->each : stop;
        part.codes += job->ids[k] * job->each * part.code_stride;
        if (part.bits != 16) part.scales += job->ids[k] * job->each * part.scale_stride;
        part.rows = job->each;
        struct job one = {.matrix = &part, .x = job->x + job->starts[k] * job->x_stride, .x_stride = job->x_stride, .t = t};
        one.y = job->y + job->starts[k] * job->each;
        (fast ? multiply_avx2 : multiply_any)(&one, row, row + end - at);
    }
}

/* -1, or the place of a part that is not there or of vectors that are not in order; then nothing is written. */
API int64_t edge_multiply_parts(const struct matrix *m, int64_t each, const int64_t *ids, const int64_t *starts,
                                int64_t n, const float *x, int64_t x_stride, float *y) {
    for (int64_t k = 0; k < n; k++)
        if (ids[k] < 0 || ids[k] >= m->rows / each || starts[k] < 0 || starts[k + 1] < starts[k]) return k;
    struct job job = {.matrix = m, .work = multiply_parts, .x = x, .x_stride = x_stride, .y = y, .ids = ids};
    job.starts = starts;
    job.each = each;
    job.stop = n * each;
    run(&job, m->cols * m->bits / 8 + 1);
    return -1;
}

API void edge_dequantize(const struct matrix *m, int64_t first, int64_t stop, float *out) {
    struct job job = {.matrix = m, .work = fast ? expand_avx2 : expand_any, .y = out, .start = first, .stop = stop};
    run(&job, m->cols * 4 + 1);
}

/* -1, or the place of an id that is no row; then nothing is written. */
API int64_t edge_gather(const struct matrix *m, const int64_t *ids, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= m->rows) return i;
    struct job job = {.matrix = m, .work = fast ? expand_avx2 : expand_any, .y = out, .ids = ids, .stop = n};
    run(&job, m->cols * 4 + 1);
    return -1;
}
