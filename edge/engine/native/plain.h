/* multiply_plain: rows of F32 or BF16 times rows of floats.

   Whatever the shape of the work, the sum of a pair of rows is made alike: STRIP columns into one vector of eight
   sums, the vectors of the strips added one after another, the eight at last. So a token's results are the same alone
   and in a chunk, and errors grow with a strip's length and the number of strips, not with their product.

   Work is done in tiles, a strip of 4 rows of w and 3 of x: the most that 16 registers hold. For few rows of x, weights
   go by at the memory's speed, four rows at a time. For UNPACKED and more, a strip of a whole unit is first unpacked to
   floats in the order in which it is read, for rows that lie a power of two apart throw each other out of the cache,
   and multiplied with up to TOGETHER rows of x. Either way weights come from memory once. */

#define EDGE_UNROLL _Pragma("GCC unroll 4")

constexpr int64_t STRIP = 256;     /* columns */
constexpr int64_t TOGETHER = 96;   /* rows of x; a multiple of 3 */
constexpr int64_t UNPACKED = 12;   /* rows of x from which on unpacking pays */
constexpr int64_t NEAR = 64 << 10; /* bytes that a cache keeps until they are read */
constexpr int TALL = 4, MOST_WIDE = 3;
#if defined(EDGE_FMA) || defined(__aarch64__)
constexpr int WIDE = MOST_WIDE;
#else
constexpr int WIDE = 1; /* a vector takes two of 16 registers */
#endif

/* A strip of a unit as [4 tiles][STRIP / 8][4][8], and the sums [row of x][16][8] so far. */
constexpr int64_t PLAIN_STRIP = PANEL * STRIP * 4, PLAIN_SUMS = TOGETHER * PANEL * 32;
static_assert(PLAIN_STRIP + PLAIN_SUMS <= SCRATCH, "");

/* Rows of a tile of w: `row` bytes apart, `step` bytes from eight columns to the next. */
struct Rows {
    const uint8_t *at;
    int64_t row, step;
};

/* Eight columns. Rows of a file may lie at any byte. */
static INLINE v8 load_plain(const uint8_t *p, const int kind) {
    if (kind == BF16) {
#if defined(EDGE_X86) /* what gcc 12 makes of a conversion is three times as long */
        return (v8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
        h8 h;
        memcpy(&h, p, 16);
        return (v8)(__builtin_convertvector(h, v8u) << 16);
#endif
    }
    v8 x;
    memcpy(&x, p, 32);
    return x;
}

/* The first n < 8, zeros beyond. */
static INLINE v8 load_plain_some(const uint8_t *p, int64_t n, const int kind) {
    uint8_t buffer[32] = {0};
    for (int64_t i = 0; i < n * (kind == BF16 ? 2 : 4); i++) buffer[i] = p[i];
    return load_plain(buffer, kind);
}

/* One strip of R rows of w times T rows of x, added to sums [T][16][8]. R, T and kind are constants wherever this is
   inlined; `whole` where zeros follow the last column, `ahead` where rows of w come from memory. */
static INLINE void plain_tile(Rows w, const float *x, int64_t x_row, int64_t cols, float *sums, const int R,
                              const int T, const int kind, const bool whole, const bool ahead) {
    const int64_t line = kind == BF16 ? 32 : 16, next = TALL * w.row <= NEAR ? TALL * w.row : 1024;
    v8 s[TALL][MOST_WIDE], xs[MOST_WIDE];
    EDGE_UNROLL for (int r = 0; r < R; r++) EDGE_UNROLL for (int t = 0; t < T; t++) s[r][t] = all(0.0f);
    int64_t j = 0;
    if (ahead)
        for (; j + line <= cols; j += line) {
            EDGE_UNROLL for (int r = 0; r < R; r++) __builtin_prefetch(w.at + r * w.row + next);
            EDGE_UNROLL for (int64_t i = j; i < j + line; i += 8, w.at += w.step) {
                EDGE_UNROLL for (int t = 0; t < T; t++) xs[t] = load(x + t * x_row + i);
                EDGE_UNROLL for (int r = 0; r < R; r++) {
                    const v8 one = load_plain(w.at + r * w.row, kind);
                    EDGE_UNROLL for (int t = 0; t < T; t++) s[r][t] = fma8(one, xs[t], s[r][t]);
                }
            }
        }
    for (; j + 8 <= cols; j += 8, w.at += w.step) {
        EDGE_UNROLL for (int t = 0; t < T; t++) xs[t] = load(x + t * x_row + j);
        EDGE_UNROLL for (int r = 0; r < R; r++) {
            const v8 one = load_plain(w.at + r * w.row, kind);
            EDGE_UNROLL for (int t = 0; t < T; t++) s[r][t] = fma8(one, xs[t], s[r][t]);
        }
    }
    if (j < cols) {
        for (int t = 0; t < T; t++) xs[t] = load_some(x + t * x_row + j, cols - j);
        for (int r = 0; r < R; r++) {
            const uint8_t *at = w.at + r * w.row;
            const v8 one = whole ? load_plain(at, kind) : load_plain_some(at, cols - j, kind);
            for (int t = 0; t < T; t++) s[r][t] = fma8(one, xs[t], s[r][t]);
        }
    }
    EDGE_UNROLL for (int t = 0; t < T; t++) EDGE_UNROLL for (int r = 0; r < R; r++) {
        float *at = sums + (t * PANEL + r) * 8;
        store(at, load(at) + s[r][t]);
    }
}

static INLINE Rows plain_rows(const Product &p, int64_t row, int64_t col) {
    const int64_t size = p.w->kind == BF16 ? 2 : 4;
    return {p.w->data + p.matrix * p.w->matrix + row * p.w->row + col * size, p.w->row, 8 * size};
}

/* The sums of rows of w from `row` on and of rows of x from `k` on. */
static INLINE void plain_store(const Product &p, int64_t row, int64_t rows, int64_t k, int64_t count,
                               const float *sums) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t r = 0; r < rows; r++) p.y[(k + t) * p.y_row + row + r] = sum(load(sums + (t * PANEL + r) * 8));
}

/* R rows of w with T rows of x, from the first column to the last. */
static INLINE void plain_few(const Product &p, int64_t row, int64_t k, const int R, const int T, const int kind) {
    float sums[MOST_WIDE * PANEL * 8] = {0};
    for (int64_t start = 0; start < p.w->cols; start += STRIP)
        plain_tile(plain_rows(p, row, start), p.x + k * p.x_row + start, p.x_row, least(STRIP, p.w->cols - start), sums,
                   R, T, kind, false, true);
    plain_store(p, row, R, k, T, sums);
}

/* The same with all rows of x: the rows of w stay near until they are through. */
static INLINE void plain_rows_of(const Product &p, int64_t row, const int R, const int kind) {
    int64_t k = 0;
    for (; k + MOST_WIDE <= p.rows; k += MOST_WIDE) plain_few(p, row, k, R, MOST_WIDE, kind);
    if (p.rows - k == 2) plain_few(p, row, k, R, 2, kind);
    if (p.rows - k == 1) plain_few(p, row, k, R, 1, kind);
}

/* Rows of w [row, row + 16) as floats, a strip from `start` on, in the order of the tiles; zeros outside. */
static INLINE void plain_unpack(const Product &p, int64_t row, int64_t start, float *out, const int kind) {
    const int64_t cols = least(STRIP, p.w->cols - start), steps = up(cols, 8);
    for (int64_t r = 0; r < PANEL; r++) {
        float *to = out + r / TALL * TALL * steps * 8 + r % TALL * 8;
        Rows w = plain_rows(p, row + r, start);
        for (int64_t j = 0; j < steps; j++, to += TALL * 8, w.at += w.step) {
            if (row + r >= p.w->rows) {
                store(to, all(0.0f));
                continue;
            }
            store(to, cols - 8 * j >= 8 ? load_plain(w.at, kind) : load_plain_some(w.at, cols - 8 * j, kind));
        }
    }
}

/* Asks for a part of the next strip of a unit's rows, as floats or halves, while this one is at work. */
static INLINE void plain_ask(const Product &p, int64_t row, int64_t start, int64_t part, int64_t parts,
                             const int kind) {
    const int64_t line = kind == BF16 ? 32 : 16, lines = STRIP / line;
    if (start >= p.w->cols) row += PANEL, start = 0;
    const int64_t rows = most(0, least(PANEL, p.w->rows - row));
    for (int64_t i = rows * lines * part / parts; i < rows * lines * (part + 1) / parts; i++)
        __builtin_prefetch(plain_rows(p, row + i / lines, start + i % lines * line).at, 0, 2);
}

/* An unpacked strip times T rows of x. */
static INLINE void plain_strip(const float *w, const float *x, int64_t x_row, int64_t cols, float *sums, const int T) {
    for (int64_t r = 0; r < PANEL; r += TALL) {
        /* Of the rows of x that follow: what a machine fetches ahead by itself is of these. */
        for (int64_t t = T; t < 2 * T; t++)
            for (int64_t j = r * STRIP / PANEL; j < (r + TALL) * STRIP / PANEL; j += 16)
                __builtin_prefetch(x + t * x_row + j);
        plain_tile({(const uint8_t *)(w + r * up(cols, 8) * 8), 32, TALL * 32}, x, x_row, cols, sums + r * 8, TALL, T,
                   F32, true, false);
    }
}

/* A unit times rows [k, k + count) of x, at most TOGETHER. */
static INLINE void plain_unit(const Product &p, int64_t row, int64_t k, int64_t count, uint8_t *scratch,
                              const int kind) {
    float *w = (float *)scratch, *sums = (float *)(scratch + PLAIN_STRIP);
    memset(sums, 0, count * PANEL * 32);
    for (int64_t start = 0; start < p.w->cols; start += STRIP) {
        const int64_t cols = least(STRIP, p.w->cols - start);
        const float *x = p.x + k * p.x_row + start;
        plain_unpack(p, row, start, w, kind);
        int64_t t = 0;
        for (; t + WIDE <= count; t += WIDE) {
            plain_ask(p, row, start + STRIP, t / WIDE, up(count, WIDE), kind);
            plain_strip(w, x + t * p.x_row, p.x_row, cols, sums + t * PANEL * 8, WIDE);
        }
        for (; t < count; t++) plain_strip(w, x + t * p.x_row, p.x_row, cols, sums + t * PANEL * 8, 1);
    }
    plain_store(p, row, least(PANEL, p.w->rows - row), k, count, sums);
}

static INLINE void plain_units(const Product &p, int64_t first, int64_t stop, uint8_t *scratch, const int kind) {
    int64_t row = first * PANEL;
    const int64_t end = least(stop * PANEL, p.w->rows);
    if (p.rows >= UNPACKED) {
        for (; row < end; row += PANEL)
            for (int64_t k = 0; k < p.rows; k += TOGETHER)
                plain_unit(p, row, k, least(TOGETHER, p.rows - k), scratch, kind);
        return;
    }
    for (; row + TALL <= end; row += TALL) plain_rows_of(p, row, TALL, kind);
    for (; row < end; row++) plain_rows_of(p, row, 1, kind);
}

/* y[r][i] for units [first, stop) of w; uses the first PLAIN_STRIP + PLAIN_SUMS bytes of scratch. */
static void multiply_plain(const Product &p, int64_t first, int64_t stop, uint8_t *scratch) {
    if (p.w->kind == BF16)
        plain_units(p, first, stop, scratch, BF16);
    else
        plain_units(p, first, stop, scratch, F32);
}
