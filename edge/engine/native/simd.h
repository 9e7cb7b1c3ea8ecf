/* Eight floats at a time, on whatever machine the including file is compiled for. Included once per file of kernels,
   inside namespace edge::ISA: everything here is of that file alone, for copies that the linker merges may be for
   another machine. No std:: functions for the same reason. */

typedef float v8 __attribute__((vector_size(32)));
typedef float v8_any __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint32_t v8u __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef int8_t b8 __attribute__((vector_size(8)));
typedef int8_t b8_any __attribute__((vector_size(8), aligned(1), may_alias));
typedef int16_t s8v __attribute__((vector_size(16)));
typedef int16_t s8_any __attribute__((vector_size(16), aligned(2), may_alias));

static INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static INLINE int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static INLINE v8 load(const float *p) { return *(const v8_any *)p; }
static INLINE void store(float *p, v8 x) { *(v8_any *)p = x; }
static INLINE v8 all(float x) { return (v8){x, x, x, x, x, x, x, x}; }

#if defined(EDGE_NEON)
static INLINE float32x4_t half(v8 x, int i) {
    float32x4_t halves[2];
    memcpy(halves, &x, 32);
    return halves[i];
}

static INLINE v8 joined(float32x4_t low, float32x4_t high) {
    const float32x4_t halves[2] = {low, high};
    v8 x;
    memcpy(&x, halves, 32);
    return x;
}
#endif

static INLINE v8 fma8(v8 a, v8 b, v8 c) {
#if defined(EDGE_FMA)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(EDGE_NEON)
    return joined(vfmaq_f32(half(c, 0), half(a, 0), half(b, 0)), vfmaq_f32(half(c, 1), half(a, 1), half(b, 1)));
#else
    return a * b + c;
#endif
}

/* Always in this order: results do not depend on the compiler. */
static INLINE float sum(v8 s) { return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])); }

#if defined(EDGE_NEON)
/* gcc compares one lane after another there. */
static INLINE float32x4_t higher(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static INLINE float32x4_t lower(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static INLINE v8 max8(v8 a, v8 b) { return joined(higher(half(a, 0), half(b, 0)), higher(half(a, 1), half(b, 1))); }
static INLINE v8 min8(v8 a, v8 b) { return joined(lower(half(a, 0), half(b, 0)), lower(half(a, 1), half(b, 1))); }
#else
static INLINE v8 max8(v8 a, v8 b) { return a > b ? a : b; }
static INLINE v8 min8(v8 a, v8 b) { return a < b ? a : b; }
#endif

static INLINE float highest(v8 s) {
    float m = s[0];
    for (int i = 1; i < 8; i++) m = s[i] > m ? s[i] : m;
    return m;
}

static INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static INLINE float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

/* To nearest, ties to even; not a number stays one. */
static INLINE uint16_t to_bf16(float x) {
    uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static INLINE v8 load_bf16(const uint16_t *p) {
    h8 h;
    memcpy(&h, p, 16);
    return (v8)(__builtin_convertvector(h, v8u) << 16);
}

static INLINE float from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest < 0x400) return float_of(sign) + (sign ? -1.0f : 1.0f) * ((float)rest * 0x1p-24f);
    return float_of(sign | ((rest << 13) + (rest < 0x7c00 ? 0x38000000 : 0x70000000)));
}

static INLINE uint16_t to_half(float x) {
#if defined(EDGE_F16C)
    return (uint16_t)_cvtss_sh(x, 0);
#elif defined(EDGE_NEON)
    const __fp16 h = (__fp16)x;
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
#else
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest >= 0x7f800000) return (uint16_t)(sign | (rest > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) { /* subnormal: counts of 2^-24, rounded by adding a number of that grid */
        float grid = float_of(rest) + 0.5f;
        return (uint16_t)(sign | (bits_of(grid) - bits_of(0.5f)));
    }
    return (uint16_t)(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13));
#endif
}

static INLINE v8 load_half(const uint16_t *p) {
#if defined(EDGE_F16C)
    return (v8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(EDGE_NEON)
    return joined(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4))));
#else
    return (v8){from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3]),
                from_half(p[4]), from_half(p[5]), from_half(p[6]), from_half(p[7])};
#endif
}

static INLINE v8 load_int8(const int8_t *p) {
    b8 b;
    memcpy(&b, p, 8);
    return __builtin_convertvector(b, v8);
}

/* The first n < 8 of p, zeros beyond. */
static INLINE v8 load_some(const float *p, int64_t n) {
    float buffer[8] = {0};
    for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
    return load(buffer);
}

static INLINE void store_some(float *p, v8 x, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = x[i];
}

/* e^x: 2^k times a polynomial on half an octave; within 2 units in the last place, 0 below -87. */
static INLINE v8 exp8(v8 x) {
    const v8 low = all(-87.3f), high = all(88.0f), magic = all(12582912.0f); /* 1.5 * 2^23: rounds to whole numbers */
    v8i under = x < low;
    x = min8(high, max8(low, x)); /* in this order not a number stays one */
    v8 k = fma8(x, all(1.44269504f), magic) - magic;
    v8 r = fma8(k, all(-0.693359375f), x);
    r = fma8(k, all(2.12194440e-4f), r);
    v8 p = all(1.9875691500e-4f);
    p = fma8(p, r, all(1.3981999507e-3f));
    p = fma8(p, r, all(8.3334519073e-3f));
    p = fma8(p, r, all(4.1665795894e-2f));
    p = fma8(p, r, all(1.6666665459e-1f));
    p = fma8(p, r, all(5.0000001201e-1f));
    p = fma8(p, r * r, r) + all(1.0f);
    v8 scale = (v8)((__builtin_convertvector(k, v8i) + 127) << 23);
    return (v8)((v8i)(p * scale) & ~under);
}

/* For small x the difference of exponentials would lose everything: an odd polynomial there. */
static INLINE v8 tanh8(v8 x) {
    const v8 a = (v8)((v8u)x & 0x7fffffff), sign = (v8)((v8u)x & 0x80000000);
    v8 e = exp8(min8(all(15.0f), a) * 2.0f);
    v8 big = all(1.0f) - all(2.0f) / (e + all(1.0f));
    v8 s = x * x, p = all(-5.70498872745e-3f);
    p = fma8(p, s, all(2.06390887954e-2f));
    p = fma8(p, s, all(-5.37397155531e-2f));
    p = fma8(p, s, all(1.33314422036e-1f));
    p = fma8(p, s, all(-3.33332819422e-1f));
    v8 small = fma8(p * s, x, x);
    big = (v8)((v8u)big | (v8u)sign);
    return a < all(0.625f) ? small : big;
}
