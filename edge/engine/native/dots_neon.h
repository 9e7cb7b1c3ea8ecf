/* The same with NEON: sdot multiplies four rows of a panel by one lane of four values; smmla two rows by two rows of x.
   EDGE_DOTPROD, EDGE_I8MM: the machine has them.

   How widened codes lie is known to widen4, widen8 and dots16 alone, and is not the portable order. Values are
   multiplied in two parts, q = 128 * high + low, so that codes stay bytes: half as many instructions as products of
   int16. */

static INLINE Dots rows16(const int32x4_t *s) {
    Dots dots;
    memcpy(&dots, s, sizeof dots);
    return dots;
}

static INLINE uint8x16_t low_nibbles(uint8x16_t v) { return vandq_u8(v, vdupq_n_u8(15)); }
static INLINE uint8x16_t high_nibbles(uint8x16_t v) { return vshrq_n_u8(v, 4); }
static INLINE int8x16_t minus8(uint8x16_t nibbles) { return vsubq_s8(vreinterpretq_s8_u8(nibbles), vdupq_n_s8(8)); }

#if defined(EDGE_DOTPROD)
/* Columns 4 * K to 4 * K + 3 of 16 rows, added to the sums of high and of low parts. */
template <int K>
static INLINE void four_columns(const int8x16_t *codes, int8x16_t high, int8x16_t low, int32x4_t *h, int32x4_t *l) {
    for (int i = 0; i < 4; i++) {
        h[i] = vdotq_laneq_s32(h[i], codes[i], high, K);
        l[i] = vdotq_laneq_s32(l[i], codes[i], low, K);
    }
}

template <int K>
static INLINE void four_columns4(const uint8_t *codes, const int8x16_t *x, int32x4_t *h, int32x4_t *l) {
    int8x16_t a[4], b[4];
    for (int i = 0; i < 4; i++) {
        const uint8x16_t v = vld1q_u8(codes + 64 * K + 16 * i);
        a[i] = vreinterpretq_s8_u8(low_nibbles(v));
        b[i] = vreinterpretq_s8_u8(high_nibbles(v));
    }
    four_columns<K>(a, x[0], x[2], h, l);
    four_columns<K>(b, x[1], x[3], h, l);
}

template <int K>
static INLINE void four_columns8(const uint8_t *codes, int8x16_t high, int8x16_t low, int32x4_t *h, int32x4_t *l) {
    int8x16_t v[4];
    for (int i = 0; i < 4; i++) v[i] = vld1q_s8((const int8_t *)codes + 64 * K + 16 * i);
    four_columns<K>(v, high, low, h, l);
}

/* High parts of 32 columns, then low ones. */
static INLINE void load_split(const int8_t *split, int8x16_t *x) {
    for (int i = 0; i < 4; i++) x[i] = vld1q_s8(split + 16 * i);
}

static INLINE Dots both_parts(const int32x4_t *h, const int32x4_t *l) {
    int32x4_t s[4];
    for (int i = 0; i < 4; i++) s[i] = vaddq_s32(vshlq_n_s32(h[i], 7), l[i]);
    return rows16(s);
}

static INLINE Dots dots4(const uint8_t *codes, const int8_t *split, int32_t sum) {
    int8x16_t x[4];
    int32x4_t h[4], l[4];
    load_split(split, x);
    for (int i = 0; i < 4; i++) h[i] = vdupq_n_s32(0), l[i] = vdupq_n_s32(-8 * sum);
    four_columns4<0>(codes, x, h, l);
    four_columns4<1>(codes, x, h, l);
    four_columns4<2>(codes, x, h, l);
    four_columns4<3>(codes, x, h, l);
    return both_parts(h, l);
}

static INLINE Dots dots8(const uint8_t *codes, const int16_t *, const int8_t *split, int32_t) {
    int8x16_t x[4];
    int32x4_t h[4], l[4];
    load_split(split, x);
    for (int i = 0; i < 4; i++) h[i] = l[i] = vdupq_n_s32(0);
    for (int half = 0; half < 2; half++) {
        four_columns8<0>(codes + 256 * half, x[half], x[2 + half], h, l);
        four_columns8<1>(codes + 256 * half, x[half], x[2 + half], h, l);
        four_columns8<2>(codes + 256 * half, x[half], x[2 + half], h, l);
        four_columns8<3>(codes + 256 * half, x[half], x[2 + half], h, l);
    }
    return both_parts(h, l);
}
#endif

#if defined(EDGE_DOTPROD)
/* Keeps gcc from loading all codes first and spilling sums. */
#define IN_ORDER(x) __asm__ volatile("" : "+w"(x))

/* The high parts, or the low ones, of 8 values at a and 8 at b. Modulo 256 a low one is q - 128 * high. */
static INLINE int8x16_t part(const int16_t *a, const int16_t *b, bool is_low) {
    const int16x8_t x = vld1q_s16(a), y = vld1q_s16(b);
    const int8x16_t high = vrshrn_high_n_s16(vrshrn_n_s16(x, 7), y, 7);
    if (!is_low) return high;
    return vsubq_s8(vuzp1q_s8(vreinterpretq_s8_s16(x), vreinterpretq_s8_s16(y)), vshlq_n_s8(high, 7));
}
#endif

#if defined(EDGE_I8MM)
/* Bytes [4 groups of 8 columns][8 pairs of rows][2][8]: of four rows, twice four columns of a panel. */
static INLINE void pair_rows(int8x16_t left, int8x16_t right, int8_t *out) {
    const int32x4_t a = vreinterpretq_s32_s8(left), b = vreinterpretq_s32_s8(right);
    vst1q_s8(out, vreinterpretq_s8_s32(vzip1q_s32(a, b)));
    vst1q_s8(out + 16, vreinterpretq_s8_s32(vzip2q_s32(a, b)));
}

static INLINE void widen4(const uint8_t *codes, int16_t *out) {
    int8_t *to = (int8_t *)out;
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < 4; i++) {
            const uint8x16_t a = vld1q_u8(codes + 128 * k + 16 * i), b = vld1q_u8(codes + 128 * k + 64 + 16 * i);
            pair_rows(minus8(low_nibbles(a)), minus8(low_nibbles(b)), to + 128 * k + 32 * i);
            pair_rows(minus8(high_nibbles(a)), minus8(high_nibbles(b)), to + 256 + 128 * k + 32 * i);
        }
}

static INLINE void widen8(const uint8_t *codes, int16_t *out) {
    const int8_t *from = (const int8_t *)codes;
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 4; i++) {
            const int8_t *at = from + 128 * k + 16 * i;
            pair_rows(vld1q_s8(at), vld1q_s8(at + 64), (int8_t *)out + 128 * k + 32 * i);
        }
}

/* One part of 32 values of P pairs of rows of x, times all codes, added to sums [P][8] of 2 rows by 2. */
template <int R, int P>
static INLINE void add_part(const int8_t *codes, const int16_t *const *q, bool is_low, int32x4_t (*sums)[8]) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        int8x16_t x[P];
        /* An odd row at the end meets itself. */
        for (int p = 0; p < P; p++)
            x[p] = part(q[2 * p] + 8 * k, q[2 * p + 1 < R ? 2 * p + 1 : 2 * p] + 8 * k, is_low);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const int8x16_t w = vld1q_s8(codes + 128 * k + 16 * i);
            for (int p = 0; p < P; p++) {
                sums[p][i] = vmmlaq_s32(sums[p][i], w, x[p]);
                IN_ORDER(sums[p][i]);
            }
        }
    }
}

template <int R>
static INLINE void dots16(const int16_t *codes, const int16_t *const *q, Dots *dots) {
    constexpr int P = (R + 1) / 2;
    int32x4_t sums[P][8];
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 8; i++) sums[p][i] = vdupq_n_s32(0);
    add_part<R, P>((const int8_t *)codes, q, false, sums);
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 8; i++) sums[p][i] = vshlq_n_s32(sums[p][i], 7);
    add_part<R, P>((const int8_t *)codes, q, true, sums);
    for (int r = 0; r < R; r++) {
        int32x4_t s[4];
        for (int i = 0; i < 4; i++) {
            const int32x4_t a = sums[r / 2][2 * i], b = sums[r / 2][2 * i + 1];
            s[i] = r % 2 ? vuzp2q_s32(a, b) : vuzp1q_s32(a, b);
        }
        dots[r] = rows16(s);
    }
}

#elif defined(EDGE_DOTPROD)
/* Bytes in the order of INT8 codes. */
static INLINE void widen4(const uint8_t *codes, int16_t *out) {
    int8_t *to = (int8_t *)out;
    for (int i = 0; i < 16; i++) {
        const uint8x16_t v = vld1q_u8(codes + 16 * i);
        vst1q_s8(to + 16 * i, minus8(low_nibbles(v)));
        vst1q_s8(to + 256 + 16 * i, minus8(high_nibbles(v)));
    }
}

static INLINE void widen8(const uint8_t *codes, int16_t *out) { memcpy(out, codes, 512); }

template <int R, int K>
static INLINE void add_columns(const int8_t *codes, const int8x16_t *x, int32x4_t (*sums)[4]) {
    for (int i = 0; i < 4; i++) {
        const int8x16_t w = vld1q_s8(codes + 64 * K + 16 * i);
        for (int r = 0; r < R; r++) {
            sums[r][i] = vdotq_laneq_s32(sums[r][i], w, x[r], K);
            IN_ORDER(sums[r][i]);
        }
    }
}

/* One part of 32 values of R rows of x, times all codes. */
template <int R>
static INLINE void add_part(const int8_t *codes, const int16_t *const *q, bool is_low, int32x4_t (*sums)[4]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++, codes += 256) {
        int8x16_t x[R];
        for (int r = 0; r < R; r++) x[r] = part(q[r] + 16 * half, q[r] + 16 * half + 8, is_low);
        add_columns<R, 0>(codes, x, sums);
        add_columns<R, 1>(codes, x, sums);
        add_columns<R, 2>(codes, x, sums);
        add_columns<R, 3>(codes, x, sums);
    }
}

template <int R>
static INLINE void dots16(const int16_t *codes, const int16_t *const *q, Dots *dots) {
    int32x4_t sums[R][4];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 4; i++) sums[r][i] = vdupq_n_s32(0);
    add_part<R>((const int8_t *)codes, q, false, sums);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 4; i++) sums[r][i] = vshlq_n_s32(sums[r][i], 7);
    add_part<R>((const int8_t *)codes, q, true, sums);
    for (int r = 0; r < R; r++) dots[r] = rows16(sums[r]);
}

#else
/* Without them: one column of 16 rows, as int16, times a lane of values. */
template <int J>
static INLINE void add_column(int16x8_t rows0, int16x8_t rows8, int16x8_t x, int32x4_t *s) {
    s[0] = vmlal_laneq_s16(s[0], vget_low_s16(rows0), x, J);
    s[1] = vmlal_high_laneq_s16(s[1], rows0, x, J);
    s[2] = vmlal_laneq_s16(s[2], vget_low_s16(rows8), x, J);
    s[3] = vmlal_high_laneq_s16(s[3], rows8, x, J);
}

template <int J> static INLINE void add_column(int8x16_t w, int16x8_t x, int32x4_t *s) {
    add_column<J>(vmovl_s8(vget_low_s8(w)), vmovl_high_s8(w), x, s);
}

/* Columns J to J + 3, taken apart by the load, times lanes J to J + 3. */
template <int J> static INLINE void add_columns(const uint8x16x4_t &w, int16x8_t x, int32x4_t *s) {
    add_column<J>(vreinterpretq_s8_u8(w.val[0]), x, s);
    add_column<J + 1>(vreinterpretq_s8_u8(w.val[1]), x, s);
    add_column<J + 2>(vreinterpretq_s8_u8(w.val[2]), x, s);
    add_column<J + 3>(vreinterpretq_s8_u8(w.val[3]), x, s);
}

static INLINE uint8x16x4_t lows(uint8x16x4_t v) {
    for (int i = 0; i < 4; i++) v.val[i] = low_nibbles(v.val[i]);
    return v;
}

static INLINE uint8x16x4_t highs(uint8x16x4_t v) {
    for (int i = 0; i < 4; i++) v.val[i] = high_nibbles(v.val[i]);
    return v;
}

static INLINE int16x8_t joined_parts(const int8_t *split) {
    return vaddw_s8(vshll_n_s8(vld1_s8(split), 7), vld1_s8(split + 32));
}

static INLINE Dots dots4(const uint8_t *codes, const int8_t *split, int32_t sum) {
    int32x4_t s[4];
    for (int i = 0; i < 4; i++) s[i] = vdupq_n_s32(-8 * sum);
    for (int half = 0; half < 2; half++, codes += 128, split += 8) {
        const int16x8_t x = joined_parts(split), y = joined_parts(split + 16);
        const uint8x16x4_t v = vld4q_u8(codes), w = vld4q_u8(codes + 64);
        add_columns<0>(lows(v), x, s);
        add_columns<4>(lows(w), x, s);
        add_columns<0>(highs(v), y, s);
        add_columns<4>(highs(w), y, s);
    }
    return rows16(s);
}

static INLINE Dots dots8(const uint8_t *codes, const int16_t *q, const int8_t *, int32_t) {
    int32x4_t s[4];
    for (int i = 0; i < 4; i++) s[i] = vdupq_n_s32(0);
    for (int k = 0; k < 4; k++, codes += 128) {
        const int16x8_t x = vld1q_s16(q + 8 * k);
        add_columns<0>(vld4q_u8(codes), x, s);
        add_columns<4>(vld4q_u8(codes + 64), x, s);
    }
    return rows16(s);
}

/* int16 [32 columns][16 rows]. */
static INLINE void put_column(int8x16_t w, int16_t *out) {
    vst1q_s16(out, vmovl_s8(vget_low_s8(w)));
    vst1q_s16(out + 8, vmovl_high_s8(w));
}

static INLINE void widen4(const uint8_t *codes, int16_t *out) {
    for (int k = 0; k < 4; k++) {
        const uint8x16x4_t v = vld4q_u8(codes + 64 * k);
        for (int j = 0; j < 4; j++) {
            put_column(minus8(low_nibbles(v.val[j])), out + 16 * (4 * k + j));
            put_column(minus8(high_nibbles(v.val[j])), out + 16 * (16 + 4 * k + j));
        }
    }
}

static INLINE void widen8(const uint8_t *codes, int16_t *out) {
    for (int k = 0; k < 8; k++) {
        const uint8x16x4_t v = vld4q_u8(codes + 64 * k);
        for (int j = 0; j < 4; j++) put_column(vreinterpretq_s8_u8(v.val[j]), out + 16 * (4 * k + j));
    }
}

template <int R, int J>
static INLINE void add_column(const int16_t *codes, const int16x8_t *x, int32x4_t (*sums)[4]) {
    const int16x8_t rows0 = vld1q_s16(codes + 16 * J), rows8 = vld1q_s16(codes + 16 * J + 8);
    for (int r = 0; r < R; r++) add_column<J>(rows0, rows8, x[r], sums[r]);
}

template <int R>
static INLINE void dots16(const int16_t *codes, const int16_t *const *q, Dots *dots) {
    int32x4_t sums[R][4];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 4; i++) sums[r][i] = vdupq_n_s32(0);
    for (int k = 0; k < 4; k++, codes += 128) {
        int16x8_t x[R];
        for (int r = 0; r < R; r++) x[r] = vld1q_s16(q[r] + 8 * k);
        add_column<R, 0>(codes, x, sums);
        add_column<R, 1>(codes, x, sums);
        add_column<R, 2>(codes, x, sums);
        add_column<R, 3>(codes, x, sums);
        add_column<R, 4>(codes, x, sums);
        add_column<R, 5>(codes, x, sums);
        add_column<R, 6>(codes, x, sums);
        add_column<R, 7>(codes, x, sums);
    }
    for (int r = 0; r < R; r++) dots[r] = rows16(sums[r]);
}
#endif
