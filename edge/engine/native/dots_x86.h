/* The same with AVX2, and in fewer instructions with AVX-VNNI or AVX512-VNNI. */

/* Keeps the compiler from doing all multiplications first and spilling what they give: 63 GMAC/s instead of 36. */
#define IN_ORDER(a, b) __asm__ volatile("" : "+x"(a), "+x"(b))

static INLINE __m256i spread4(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

static INLINE __m256i bytes(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* For the portable order of lanes: widening and adding in pairs leaves 64-bit quarters 0, 2, 1, 3. */
static INLINE __m256i straight(__m256i x) { return _mm256_permute4x64_epi64(x, 0xD8); }

#if defined(EDGE_VNNI)
static INLINE __m256i add_bytes(__m256i sum, __m256i u, __m256i s) {
#if defined(EDGE_AVX512)
    return _mm256_dpbusd_epi32(sum, u, s);
#else
    return _mm256_dpbusd_avx_epi32(sum, u, s);
#endif
}

static INLINE __m256i add_pairs(__m256i sum, __m256i a, __m256i b) {
#if defined(EDGE_AVX512)
    return _mm256_dpwssd_epi32(sum, a, b);
#else
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#endif
}
#else
static INLINE __m256i add_pairs(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
#endif

/* Eight rows: bytes 32 * half of each 64. Sums of 8 products of bytes pairs stay below 2^15: 8 * 2 * 15 * 127. */
static INLINE __m256i half4(const uint8_t *codes, const int8_t *split) {
    const __m256i low_bits = _mm256_set1_epi8(15);
#if defined(EDGE_VNNI)
    __m256i h = _mm256_setzero_si256(), l = h;
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        const __m256i v = bytes(codes + 64 * k), a = _mm256_and_si256(v, low_bits);
        const __m256i b = _mm256_and_si256(_mm256_srli_epi16(v, 4), low_bits);
        h = add_bytes(add_bytes(h, a, spread4(split + 4 * k)), b, spread4(split + 16 + 4 * k));
        l = add_bytes(add_bytes(l, a, spread4(split + 32 + 4 * k)), b, spread4(split + 48 + 4 * k));
    }
    return _mm256_add_epi32(_mm256_slli_epi32(h, 7), l);
#else
    __m256i h = _mm256_setzero_si256(), l = h;
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        const __m256i v = bytes(codes + 64 * k), a = _mm256_and_si256(v, low_bits);
        const __m256i b = _mm256_and_si256(_mm256_srli_epi16(v, 4), low_bits);
        h = _mm256_add_epi16(h, _mm256_maddubs_epi16(a, spread4(split + 4 * k)));
        h = _mm256_add_epi16(h, _mm256_maddubs_epi16(b, spread4(split + 16 + 4 * k)));
        l = _mm256_add_epi16(l, _mm256_maddubs_epi16(a, spread4(split + 32 + 4 * k)));
        l = _mm256_add_epi16(l, _mm256_maddubs_epi16(b, spread4(split + 48 + 4 * k)));
        IN_ORDER(h, l);
    }
    return _mm256_add_epi32(_mm256_madd_epi16(h, _mm256_set1_epi16(128)), _mm256_madd_epi16(l, _mm256_set1_epi16(1)));
#endif
}

static INLINE __m256i half8(const uint8_t *codes, const int16_t *q) {
    __m256i a = _mm256_setzero_si256(), b = a;
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        int64_t four;
        memcpy(&four, q + 4 * k, 8);
        const __m256i x = _mm256_set1_epi64x(four);
        const __m128i *at = (const __m128i *)(codes + 64 * k);
        a = add_pairs(a, _mm256_cvtepi8_epi16(_mm_loadu_si128(at)), x);
        b = add_pairs(b, _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1)), x);
        IN_ORDER(a, b);
    }
    return straight(_mm256_hadd_epi32(a, b));
}

#if defined(EDGE_AVX512)
static INLINE Dots halves(__m512i x) {
    return {(v8i)_mm512_castsi512_si256(x), (v8i)_mm512_extracti64x4_epi64(x, 1)};
}

static INLINE __m512i spread16(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

static INLINE Dots dots4(const uint8_t *codes, const int8_t *split, int32_t sum) {
    const __m512i low_bits = _mm512_set1_epi8(15);
    __m512i h = _mm512_setzero_si512(), l = _mm512_set1_epi32(-8 * sum);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        const __m512i v = _mm512_loadu_si512(codes + 64 * k), a = _mm512_and_si512(v, low_bits);
        const __m512i b = _mm512_and_si512(_mm512_srli_epi16(v, 4), low_bits);
        h = _mm512_dpbusd_epi32(h, a, spread16(split + 4 * k));
        l = _mm512_dpbusd_epi32(l, a, spread16(split + 32 + 4 * k));
        h = _mm512_dpbusd_epi32(h, b, spread16(split + 16 + 4 * k));
        l = _mm512_dpbusd_epi32(l, b, spread16(split + 48 + 4 * k));
    }
    return halves(_mm512_add_epi32(_mm512_slli_epi32(h, 7), l));
}

/* Signed codes as unsigned ones are 128 too large. */
static INLINE Dots dots8(const uint8_t *codes, const int16_t *, const int8_t *split, int32_t sum) {
    const __m512i top = _mm512_set1_epi8((char)0x80);
    __m512i h = _mm512_setzero_si512(), l = _mm512_set1_epi32(-128 * sum);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        const __m512i u = _mm512_xor_si512(_mm512_loadu_si512(codes + 64 * k), top);
        h = _mm512_dpbusd_epi32(h, u, spread16(split + 4 * k));
        l = _mm512_dpbusd_epi32(l, u, spread16(split + 32 + 4 * k));
    }
    return halves(_mm512_add_epi32(_mm512_slli_epi32(h, 7), l));
}

template <int R>
static INLINE void dots16(const int16_t *codes, const int16_t *const *q, Dots *dots) {
    __m512i sums[R];
    for (int r = 0; r < R; r++) sums[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int c = 0; c < 16; c++) {
        const __m512i w = _mm512_loadu_si512(codes + 32 * c);
        for (int r = 0; r < R; r++)
            sums[r] = _mm512_dpwssd_epi32(sums[r], w, spread16(q[r] + 2 * c));
    }
    for (int r = 0; r < R; r++) dots[r] = halves(sums[r]);
}
#else
static INLINE Dots dots4(const uint8_t *codes, const int8_t *split, int32_t sum) {
    const __m256i less = _mm256_set1_epi32(8 * sum);
    return {(v8i)_mm256_sub_epi32(half4(codes, split), less), (v8i)_mm256_sub_epi32(half4(codes + 32, split), less)};
}

static INLINE Dots dots8(const uint8_t *codes, const int16_t *q, const int8_t *, int32_t) {
    return {(v8i)half8(codes, q), (v8i)half8(codes + 32, q)};
}

template <int R>
static INLINE void dots16(const int16_t *codes, const int16_t *const *q, Dots *dots) {
    __m256i low[R], high[R];
    for (int r = 0; r < R; r++) low[r] = high[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int c = 0; c < 16; c++) {
        const __m256i a = bytes(codes + 32 * c), b = bytes(codes + 32 * c + 16);
        for (int r = 0; r < R; r++) {
            const __m256i x = spread4(q[r] + 2 * c);
            low[r] = add_pairs(low[r], a, x);
            high[r] = add_pairs(high[r], b, x);
            IN_ORDER(low[r], high[r]);
        }
    }
    for (int r = 0; r < R; r++) dots[r] = {(v8i)low[r], (v8i)high[r]};
}
#endif

/* Four columns of 16 rows, as bytes, to two pairs of columns [16 rows][2] of int16, minus `less`. */
static INLINE void widen_four(__m256i rows0, __m256i rows8, __m256i less, int16_t *out) {
    for (int half = 0; half < 2; half++) {
        const __m256i v = half ? rows8 : rows0;
        const __m256i a = _mm256_sub_epi16(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(v)), less);
        const __m256i b = _mm256_sub_epi16(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(v, 1)), less);
        const __m256 fa = _mm256_castsi256_ps(a), fb = _mm256_castsi256_ps(b);
        const __m256i first = straight(_mm256_castps_si256(_mm256_shuffle_ps(fa, fb, 0x88)));
        const __m256i second = straight(_mm256_castps_si256(_mm256_shuffle_ps(fa, fb, 0xDD)));
        _mm256_storeu_si256((__m256i *)(out + 16 * half), first);
        _mm256_storeu_si256((__m256i *)(out + 32 + 16 * half), second);
    }
}

static INLINE void widen4(const uint8_t *codes, int16_t *out) {
    const __m256i low_bits = _mm256_set1_epi8(15), eight = _mm256_set1_epi16(8);
    for (int k = 0; k < 4; k++) {
        const __m256i v = bytes(codes + 64 * k), w = bytes(codes + 64 * k + 32);
        widen_four(_mm256_and_si256(v, low_bits), _mm256_and_si256(w, low_bits), eight, out + 64 * k);
        widen_four(_mm256_and_si256(_mm256_srli_epi16(v, 4), low_bits),
                   _mm256_and_si256(_mm256_srli_epi16(w, 4), low_bits), eight, out + 256 + 64 * k);
    }
}

static INLINE void widen8(const uint8_t *codes, int16_t *out) {
    for (int k = 0; k < 8; k++)
        widen_four(bytes(codes + 64 * k), bytes(codes + 64 * k + 32), _mm256_setzero_si256(), out + 64 * k);
}
