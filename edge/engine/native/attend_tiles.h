/* What attention does with a tile of keys: reading cache entries, scores, softmax, sums of values.

   Rows of queries that share keys are done together, against `keys` positions at a time. Two ways, for few rows and for
   many: entries are used where they lie, each for all the rows while it is in registers; or they are widened into
   panels of 16 columns in scratch, [columns / 16][count][16], so that both products are the same dense one. In either a
   row's sums take its keys in order, and hidden ones weigh exactly nothing: what comes out for a row does not depend on
   the rows beside it. */

/* How much is done at a time; from the cache's dimensions alone. */
struct Shape {
    int64_t k_pad, v_pad, keys, rows, score_row;
};

/* Floats in scratch: panels of keys and of values, 8 entries on their way into panels, and per row what Tile has. */
static INLINE int64_t tile_rows(int64_t k_pad, int64_t v_pad, int64_t keys) {
    return (SCRATCH / 4 - keys * (k_pad + v_pad) - 8 * k_pad) / (k_pad + v_pad + keys + 12);
}

/* Entries of up to 2048 values fit, with at least 8 rows: check.cpp admits no more. */
static INLINE Shape tile_shape(const Cache &c) {
    Shape s = {up(c.k_dim, 16) * 16, up(c.v_dim, 16) * 16, 64, 0, 0};
    s.rows = tile_rows(s.k_pad, s.v_pad, s.keys);
    if (s.rows < 16) s.keys = 16, s.rows = tile_rows(s.k_pad, s.v_pad, s.keys);
    s.score_row = s.keys + 8; /* what is written past the last key */
    s.rows = s.rows > 64 ? 64 : s.rows & ~3;
    return s;
}

/* The entries of one head: the keys, or the values. */
struct Entries {
    const uint8_t *data;
    const uint16_t *scale;
    int64_t dim, row, groups; /* row: values from an entry to the next */
};

static INLINE Entries keys_of(const Cache &c, int64_t head) {
    const int64_t groups = c.kind == INT8 ? c.k_dim / c.group : 0, size = c.kind == INT8 ? 1 : c.kind == BF16 ? 2 : 4;
    return {c.k + head * c.capacity * c.k_dim * size, c.k_scale + head * c.capacity * groups, c.k_dim, c.k_dim, groups};
}

static INLINE Entries values_of(const Cache &c, int64_t head) {
    if (c.latent) {
        Entries e = keys_of(c, head);
        e.dim = c.v_dim;
        return e;
    }
    const int64_t groups = c.kind == INT8 ? c.v_dim / c.group : 0, size = c.kind == INT8 ? 1 : c.kind == BF16 ? 2 : 4;
    return {c.v + head * c.capacity * c.v_dim * size, c.v_scale + head * c.capacity * groups, c.v_dim, c.v_dim, groups};
}

static INLINE v8 get(const float *p) { return load(p); }
static INLINE v8 get_some(const float *p, int64_t n) { return load_some(p, n); }

/* gcc takes a vector conversion apart and puts it together again. */
static INLINE v8 get(const uint16_t *p) {
#if defined(EDGE_X86)
    return (v8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    return load_bf16(p);
#endif
}

static INLINE v8 get(const int8_t *p) {
#if defined(EDGE_X86)
    return (v8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return load_int8(p);
#endif
}

static INLINE v8 get_some(const uint16_t *p, int64_t n) {
    uint16_t buffer[8] = {0};
    for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
    return get(buffer);
}

static INLINE float half_value(uint16_t h) {
#if defined(EDGE_F16C)
    return _cvtsh_ss(h);
#else
    return from_half(h);
#endif
}

/* Where value d of an entry goes in panels, or in a row of floats where jump is 16. */
static INLINE float *placed(float *out, int64_t jump, int64_t d) { return out + (d >> 4) * jump + (d & 15); }

template <class T>
static INLINE void widen_plain(const T *x, int64_t dim, float *out, int64_t jump) {
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8) store(placed(out, jump, d), get(x + d));
    if (d < dim) store(placed(out, jump, d), get_some(x + d, dim - d)), d += 8;
    if (d & 8) store(placed(out, jump, d), all(0.0f));
}

static INLINE void widen_int8(const int8_t *codes, const uint16_t *scales, int64_t group, int64_t dim, float *out,
                              int64_t jump) {
    int64_t d = 0;
    for (; d < dim; scales++) {
        const int64_t stop = least(d + group, dim);
        const float scale = half_value(*scales);
        for (; d + 8 <= stop && !(d & 7); d += 8) store(placed(out, jump, d), get(codes + d) * all(scale));
        for (; d < stop; d++) *placed(out, jump, d) = (float)codes[d] * scale;
    }
    for (; d & 15; d++) *placed(out, jump, d) = 0.0f;
}

/* An entry as floats, and zeros up to a multiple of 16. */
static void widen(const Cache &c, const Entries &e, int64_t slot, float *out, int64_t jump) {
    const int64_t at = slot * e.row;
    if (c.kind == F32) widen_plain((const float *)e.data + at, e.dim, out, jump);
    else if (c.kind == BF16) widen_plain((const uint16_t *)e.data + at, e.dim, out, jump);
    else widen_int8((const int8_t *)e.data + at, e.scale + slot * e.groups, c.group, e.dim, out, jump);
}

#if defined(__clang__) || __GNUC__ >= 12
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (v8i){__VA_ARGS__})
#endif

/* Halves of pairs of rows, woven: three rounds turn 8 rows of 8 into columns. */
static INLINE void weave(const v8 *x, v8 *y) {
    v8 t[8], u[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = MIX(x[2 * i], x[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[2 * i + 1] = MIX(x[2 * i], x[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            u[4 * i + 2 * j] = MIX(t[4 * i + j], t[4 * i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            u[4 * i + 2 * j + 1] = MIX(t[4 * i + j], t[4 * i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        y[i] = MIX(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        y[i + 4] = MIX(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* Lane i: the sum of s[i], in the order of sum(). */
static INLINE v8 sums(const v8 *s) {
    v8 t[4], u[2];
    for (int i = 0; i < 4; i++)
        t[i] = MIX(s[i], s[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) + MIX(s[i], s[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; i++)
        u[i] = MIX(t[2 * i], t[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               MIX(t[2 * i], t[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return MIX(u[0], u[1], 0, 2, 8, 10, 4, 6, 12, 14) + MIX(u[0], u[1], 1, 3, 9, 11, 5, 7, 13, 15);
}

template <int H, int K>
static INLINE void dots_step(const v8 *x, const float *q, int64_t q_row, v8 *s) {
    for (int h = 0; h < H; h++) {
        const v8 y = load(q + h * q_row);
        for (int j = 0; j < K; j++) s[h * K + j] = fma8(y, x[j], s[h * K + j]);
    }
}

/* Scores of H rows with K keys, H * K <= 8: all K are written, of which the first `there` mean something. */
template <int H, int K, class T>
static INLINE void dots(const T *const *keys, int64_t there, int64_t dim, const float *q, int64_t q_row, float *out,
                        int64_t out_row) {
    v8 s[8];
    const T *k[K];
    for (int i = 0; i < 8; i++) s[i] = all(0.0f);
    for (int j = 0; j < K; j++) k[j] = keys[j < there ? j : 0];
    int64_t d = 0;
    v8 x[K];
    for (; d + 8 <= dim; d += 8) {
        for (int j = 0; j < K; j++) x[j] = get(k[j] + d);
        dots_step<H, K>(x, q + d, q_row, s);
    }
    if (d < dim) {
        for (int j = 0; j < K; j++) x[j] = get_some(k[j] + d, dim - d);
        dots_step<H, K>(x, q + d, q_row, s);
    }
    float found[8];
    store(found, sums(s));
    for (int h = 0; h < H; h++) memcpy(out + h * out_row, found + h * K, 4 * K);
}

/* Meanwhile the first `bytes` of each of `later` are asked for: the values of these keys, wanted next. */
template <int H, int K, class T>
static void dots_rows(const T *const *keys, int64_t first, int64_t stop, int64_t dim, const float *q, int64_t q_row,
                      float *out, int64_t out_row, const T *const *later, int64_t bytes) {
    for (int64_t j = first; j < stop; j += K) {
        for (int64_t i = j; bytes && i < least(j + K, stop); i++)
            for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch((const char *)later[i] + b);
        dots<H, K>(keys + j, stop - j, dim, q, q_row, out + j, out_row);
    }
}

/* acc[h][d ..] = factor[h] * acc[h][d ..] + the sum of weights times values [first, stop), for H rows and 8 V
   dimensions, or of the last eight those that there are. What lies `ahead` bytes behind `later` is asked for meanwhile:
   the keys wanted next. Left to itself the machine is late whenever keys and values take turns. */
template <int H, int V, class T>
static INLINE void blend(const T *const *values, int64_t first, int64_t stop, int64_t d, int64_t some,
                         const float *weight, int64_t weight_row, float *acc, int64_t acc_row, const float *factor,
                         const T *const *later, int64_t ahead) {
    v8 s[H][V];
    for (int h = 0; h < H; h++)
        for (int i = 0; i < V; i++) s[h][i] = load(acc + h * acc_row + d + 8 * i) * all(factor[h]);
    for (int64_t j = first; j < stop; j++) {
        v8 x[V];
        for (int64_t b = 0; ahead && b < V * 8 * (int64_t)sizeof(T); b += 64)
            __builtin_prefetch((const void *)((uintptr_t)(later[j] + d) + (uintptr_t)(ahead + b)));
        for (int i = 0; i < V; i++)
            x[i] = V > 1 || some == 8 ? get(values[j] + d + 8 * i) : get_some(values[j] + d, some);
        for (int h = 0; h < H; h++) {
            const v8 w = all(weight[h * weight_row + j]);
            for (int i = 0; i < V; i++) s[h][i] = fma8(w, x[i], s[h][i]);
        }
    }
    for (int h = 0; h < H; h++)
        for (int i = 0; i < V; i++) store(acc + h * acc_row + d + 8 * i, s[h][i]);
}

template <int H, int V, class T>
static void blend_rows(const T *const *values, int64_t first, int64_t stop, int64_t dim, const float *weight,
                       int64_t weight_row, float *acc, int64_t acc_row, const float *factor,
                       const T *const *later, int64_t ahead) {
    int64_t d = 0;
    for (; d + 8 * V <= dim; d += 8 * V)
        blend<H, V>(values, first, stop, d, 8, weight, weight_row, acc, acc_row, factor, later, ahead);
    for (; d < dim; d += 8)
        blend<H, 1>(values, first, stop, d, least(8, dim - d), weight, weight_row, acc, acc_row, factor, later, ahead);
}

/* c[r] = factor[r] * c[r] + a[r][..count] times a panel [count][16], for R rows; without factors c is not read. */
template <int R>
static INLINE void dense(const float *a, int64_t a_row, const float *panel, int64_t count, float *c, int64_t c_row,
                         const float *factor) {
    v8 s[R][2];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 2; i++) s[r][i] = factor ? load(c + r * c_row + 8 * i) * all(factor[r]) : all(0.0f);
    for (int64_t j = 0; j < count; j++) {
        const v8 x = load(panel + 16 * j), y = load(panel + 16 * j + 8);
        for (int r = 0; r < R; r++) {
            const v8 w = all(a[r * a_row + j]);
            s[r][0] = fma8(w, x, s[r][0]);
            s[r][1] = fma8(w, y, s[r][1]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 2; i++) store(c + r * c_row + 8 * i, s[r][i]);
}

static void dense_rows(int64_t rows, const float *a, int64_t a_row, const float *panel, int64_t count, float *c,
                       int64_t c_row, const float *factor) {
    for (int64_t r = 0, done; r < rows; r += done) {
        const float *x = a + r * a_row, *f = factor ? factor + r : nullptr;
        float *y = c + r * c_row;
        done = rows - r >= 6 ? 6 : rows - r >= 2 ? 2 : 1;
        if (done == 6) dense<6>(x, a_row, panel, count, y, c_row, f);
        else if (done == 2) dense<2>(x, a_row, panel, count, y, c_row, f);
        else dense<1>(x, a_row, panel, count, y, c_row, f);
    }
}

/* Rows of queries on their way through the keys. */
struct Tile {
    const Cache &c;
    Shape s;
    int64_t head, count;      /* rows */
    float *q;                 /* [count][k_pad], times the scale, zeros beyond a row's end */
    float *scores;            /* [count][score_row] */
    float *acc;               /* [count][v_pad] */
    float *top, *total, *factor;
    float *k_panels, *v_panels, *entries;
};

static INLINE Tile tile_in(uint8_t *scratch, const Cache &c, int64_t head, int64_t count) {
    const Shape s = tile_shape(c);
    float *p = (float *)scratch;
    Tile t = {c, s, head, count, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    t.k_panels = p, p += s.keys * s.k_pad;
    t.v_panels = p, p += s.keys * s.v_pad;
    t.entries = p, p += 8 * s.k_pad;
    t.q = p, p += s.rows * s.k_pad;
    t.acc = p, p += s.rows * s.v_pad;
    t.scores = p, p += s.rows * s.score_row;
    t.top = p, p += s.rows;
    t.total = p, p += s.rows;
    t.factor = p;
    for (int64_t i = 0; i < count * s.v_pad; i++) t.acc[i] = 0.0f;
    for (int64_t i = 0; i < count; i++) t.top[i] = -INFINITY, t.total[i] = 0.0f;
    return t;
}

/* exp(scores - top) of a row, and its sum; where `some`, only of [first, stop): the rest becomes nothing. */
template <bool some>
static INLINE v8 weigh(float *scores, float *top, int64_t first, int64_t stop, int64_t from, int64_t to) {
    const v8 none = all(-INFINITY);
    const v8i lane = {0, 1, 2, 3, 4, 5, 6, 7};
    v8 best = none, total = all(0.0f);
    for (int64_t j = from; j < to; j += 8) {
        const v8i at = lane + (int32_t)j, seen = (at >= (int32_t)first) & (at < (int32_t)stop);
        const v8 x = load(scores + j);
        best = max8(best, some ? (seen ? x : none) : x);
    }
    const float high = highest(best);
    if (!(*top > high)) *top = high;
    for (int64_t j = from; j < to; j += 8) {
        const v8i at = lane + (int32_t)j, seen = (at >= (int32_t)first) & (at < (int32_t)stop);
        v8 weight = exp8(load(scores + j) - all(*top));
        if (some) weight = (v8)((v8i)weight & seen);
        store(scores + j, weight);
        total += weight;
    }
    return total;
}

/* Scores of a row of the tile become weights; those outside [first, stop) nothing. All of [from, to) is written, both
   multiples of 8. */
static void soften(Tile &t, int64_t row, int64_t first, int64_t stop, int64_t from, int64_t to) {
    float *scores = t.scores + row * t.s.score_row, top = t.top[row];
    t.factor[row] = 1.0f;
    if (first >= stop) {
        memset(scores + from, 0, (size_t)(to - from) * 4);
        return;
    }
    const bool some = first > from || stop < to;
    const v8 total = some ? weigh<true>(scores, &top, first, stop, from, to)
                          : weigh<false>(scores, &top, first, stop, from, to);
    if (top != t.top[row]) t.factor[row] = exp8(all(t.top[row] - top))[0];
    t.total[row] = t.total[row] * t.factor[row] + sum(total);
    t.top[row] = top;
}

/* Keys `base + first .. base + stop` of the tile into panels; columns of [from, to) beside them become zeros. */
static void widen_tile(Tile &t, int64_t base, int64_t first, int64_t stop, int64_t from, int64_t to) {
    const Entries k = keys_of(t.c, t.head), v = values_of(t.c, t.head);
    const int64_t jump = 16 * t.s.keys;
    int64_t slot = (base + from) % t.c.capacity;
    for (int64_t j = from; j < to; j += 8) {
        for (int64_t i = j; i < j + 8; i++) {
            if (i >= first && i < stop) {
                widen(t.c, k, slot, t.entries + (i - j) * t.s.k_pad, 16);
                widen(t.c, v, slot, t.v_panels + 16 * i, jump);
            } else {
                memset(t.entries + (i - j) * t.s.k_pad, 0, (size_t)t.s.k_pad * 4);
                for (int64_t d = 0; d < t.s.v_pad / 16; d++) memset(t.v_panels + d * jump + 16 * i, 0, 64);
            }
            if (++slot == t.c.capacity) slot = 0;
        }
        float *panel = t.k_panels + j / 16 * 16 * t.s.k_pad + j % 16;
        for (int64_t d = 0; d < t.s.k_pad; d += 8) {
            v8 x[8], y[8];
            for (int i = 0; i < 8; i++) x[i] = load(t.entries + i * t.s.k_pad + d);
            weave(x, y);
            for (int i = 0; i < 8; i++) store(panel + (d + i) * 16, y[i]);
        }
    }
}
