/* INT8 and INT4 panels times quantized activations.

   A row of activations keeps 15 bits a value: scale = max|x| / 16256 of its block, q = round(x / scale). Products of
   a block are whole numbers, exact on any machine; only y += (w_scale * x_scale) * dot is arithmetic of floats,
   block after block, never fused. So a result is the same to the bit whatever the machine, the number of rows, or of
   threads.

   Of one quantized row, nb blocks: float scale[nb], int32 sum[nb], int16 q[nb * 32], and for machines that multiply
   bytes int8 split[nb * 64]: of each block its high parts, then its low parts, q = 128 * high + low, low from -64 to
   63. */

constexpr float MOST_CODE = 16256.0f;
/* So many rows are multiplied as panels lie, three at a time; more pay for widening codes to 16 bits first. */
constexpr int64_t FEW_ROWS = 6;
constexpr int64_t WIDE_BLOCKS = 16; /* of a panel that are widened at a time, 1 KB each */
constexpr int64_t PANELS = 4;     /* panels that rows of x meet while they are near */
constexpr int64_t MOST_ROWS = 1024; /* of x whose sums are kept at a time */
constexpr int TILE_ROWS = 4;        /* that meet a widened block at once */
static_assert(PANELS * (WIDE_BLOCKS * 1024 + MOST_ROWS * 64) <= SCRATCH, "scratch is too small");

struct Quants {
    float *scale;
    int32_t *sum;
    int16_t *q;
    int8_t *split;
};

static INLINE Quants quants(float *row, int64_t blocks) {
    return {row, (int32_t *)(row + blocks), (int16_t *)(row + 2 * blocks), (int8_t *)(row + 18 * blocks)};
}

/* From the bits of the largest |x| of a block: its scale, and what x is multiplied by. What is not finite gives a
   scale that is not, and zeros: products are then no numbers either. */
static INLINE float block_scale(int32_t bits, float *scale) {
    const float largest = float_of((uint32_t)bits);
    const bool finite = bits < 0x7f800000;
    *scale = finite ? largest * (1.0f / MOST_CODE) : float_of(0x7fc00000);
    return finite && largest > 1e-30f ? MOST_CODE / largest : 0.0f;
}

#if defined(EDGE_X86)
/* The whole numbers of a block, and what the others are made of: the same to the bit as below. */
static INLINE void quantize_block(const float *x, float *scale, int32_t *sum, int16_t *q, int8_t *split) {
    const __m256i positive = _mm256_set1_epi32(0x7fffffff);
    __m256 v[4];
    __m256i top = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(v[i]), positive));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
    const float inverse = block_scale(_mm_cvtsi128_si32(m), scale);
    __m256i code[4];
    for (int i = 0; i < 4; i++) {
        if (*scale != *scale) v[i] = _mm256_setzero_ps();
        code[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(inverse)));
    }
    const __m256i low = straight(_mm256_packs_epi32(code[0], code[1]));
    const __m256i high = straight(_mm256_packs_epi32(code[2], code[3]));
    _mm256_storeu_si256((__m256i *)q, low);
    _mm256_storeu_si256((__m256i *)(q + 16), high);
    const __m256i round = _mm256_set1_epi16(64);
    const __m256i h0 = _mm256_srai_epi16(_mm256_add_epi16(low, round), 7);
    const __m256i h1 = _mm256_srai_epi16(_mm256_add_epi16(high, round), 7);
    const __m256i l0 = _mm256_sub_epi16(low, _mm256_slli_epi16(h0, 7));
    const __m256i l1 = _mm256_sub_epi16(high, _mm256_slli_epi16(h1, 7));
    _mm256_storeu_si256((__m256i *)split, straight(_mm256_packs_epi16(h0, h1)));
    _mm256_storeu_si256((__m256i *)(split + 32), straight(_mm256_packs_epi16(l0, l1)));
    const __m256i total = _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_set1_epi16(1)),
                                           _mm256_madd_epi16(high, _mm256_set1_epi16(1)));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
    *sum = _mm_cvtsi128_si32(s);
}
#else
/* One block of 32 values. */
static INLINE void quantize_block(const float *x, float *scale, int32_t *sum, int16_t *q, int8_t *split) {
    v8 v[4];
    v8i top = {0};
    for (int i = 0; i < 4; i++) {
        v[i] = load(x + 8 * i);
        v8i bits = (v8i)v[i] & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    int32_t m = 0;
    for (int i = 0; i < 8; i++) m = top[i] > m ? top[i] : m;
    const v8 inverse = all(block_scale(m, scale));
    const v8 magic = all(12582912.0f); /* rounds to the nearest whole number, ties to even */
    v8i total = {0};
    for (int i = 0; i < 4; i++) {
        const v8 safe = *scale == *scale ? v[i] : all(0.0f);
        const v8i code = __builtin_convertvector((safe * inverse + magic) - magic, v8i);
        const v8i high = (code + 64) >> 7;
        total += code;
        *(s8_any *)(q + 8 * i) = __builtin_convertvector(code, s8v);
        *(b8_any *)(split + 8 * i) = __builtin_convertvector(high, b8);
        *(b8_any *)(split + 32 + 8 * i) = __builtin_convertvector(code - high * 128, b8);
    }
    int32_t s = 0;
    for (int i = 0; i < 8; i++) s += total[i];
    *sum = s;
}
#endif

static void quantize_row(const float *x, int64_t cols, float *out) {
    const int64_t blocks = up(cols, BLOCK);
    const Quants row = quants(out, blocks);
    for (int64_t b = 0; b < blocks; b++) {
        float rest[BLOCK] = {0};
        const float *from = x + b * BLOCK;
        if (cols - b * BLOCK < BLOCK) {
            memcpy(rest, from, (size_t)(cols - b * BLOCK) * sizeof(float));
            from = rest;
        }
        quantize_block(from, row.scale + b, row.sum + b, row.q + b * BLOCK, row.split + b * 2 * BLOCK);
    }
}

/* The rows of y that a panel writes: fewer than 16 at the end of a matrix. */
static INLINE void put(const Product &p, int64_t row, int64_t panel, v8 low, v8 high) {
    float *y = p.y + row * p.y_row + panel * PANEL;
    const int64_t n = p.w->rows - panel * PANEL;
    if (n >= PANEL) {
        store(y, low);
        store(y + 8, high);
    } else if (n >= 8) {
        store(y, low);
        store_some(y + 8, high, n - 8);
    } else {
        store_some(y, low, n);
    }
}

/* R rows of x times a panel as it lies. */
template <int R, bool FOUR>
static INLINE void direct(const Product &p, int64_t row, int64_t panel, const uint8_t *block, int64_t blocks) {
    Quants x[R];
    v8 low[R], high[R];
    for (int r = 0; r < R; r++) {
        x[r] = quants((float *)p.x + (row + r) * p.x_row, blocks);
        low[r] = high[r] = all(0.0f);
    }
    constexpr int64_t bytes = FOUR ? PANEL_BYTES_4 : PANEL_BYTES_8;
    for (int64_t b = 0; b < blocks; b++, block += bytes) {
        for (int64_t ahead = 0; ahead < bytes; ahead += 64) __builtin_prefetch(block + 2048 + ahead);
        const v8 s0 = load_half((const uint16_t *)block), s1 = load_half((const uint16_t *)block + 8);
        for (int r = 0; r < R; r++) {
            const Dots dots = FOUR ? dots4(block + 32, x[r].split + b * 64, x[r].sum[b])
                                   : dots8(block + 32, x[r].q + b * 32, x[r].split + b * 64, x[r].sum[b]);
            const v8 s = all(x[r].scale[b]);
            low[r] += (s0 * s) * __builtin_convertvector(dots.low, v8);
            high[r] += (s1 * s) * __builtin_convertvector(dots.high, v8);
        }
    }
    for (int r = 0; r < R; r++) put(p, row + r, panel, low[r], high[r]);
}

/* R rows of x times one widened block, added to their sums [R][16]. */
template <int R>
static INLINE void meet(const int16_t *codes, v8 s0, v8 s1, const Product &p, int64_t row, int64_t blocks, int64_t b,
                        float *sums) {
    const int16_t *q[R];
    Dots dots[R];
    for (int r = 0; r < R; r++) q[r] = quants((float *)p.x + (row + r) * p.x_row, blocks).q + b * BLOCK;
    dots16<R>(codes, q, dots);
    for (int r = 0; r < R; r++) {
        const v8 s = all(p.x[(row + r) * p.x_row + b]);
        store(sums + 16 * r, load(sums + 16 * r) + (s0 * s) * __builtin_convertvector(dots[r].low, v8));
        store(sums + 16 * r + 8, load(sums + 16 * r + 8) + (s1 * s) * __builtin_convertvector(dots[r].high, v8));
    }
}

/* `rows` rows of x, from `row` on, times `count` panels, some columns at a time: widened codes stay in a core's nearest
   cache while they meet all of the rows, and that part of the rows in the next one while it meets all of the panels. */
template <bool FOUR>
static void spread(const Product &p, int64_t row, int64_t rows, int64_t panel, int64_t count, int64_t blocks,
                   uint8_t *scratch) {
    int16_t *codes = (int16_t *)scratch;
    float *sums = (float *)(scratch + PANELS * WIDE_BLOCKS * 1024);
    constexpr int64_t bytes = FOUR ? PANEL_BYTES_4 : PANEL_BYTES_8;
    const uint8_t *first = p.w->data + p.matrix * p.w->matrix + panel * p.w->row;
    memset(sums, 0, (size_t)(count * rows) * 64);
    for (int64_t start = 0; start < blocks; start += WIDE_BLOCKS) {
        const int64_t stop = least(start + WIDE_BLOCKS, blocks);
        for (int64_t i = 0; i < count; i++)
            for (int64_t b = start; b < stop; b++) {
                const uint8_t *block = first + i * p.w->row + b * bytes + 32;
                int16_t *to = codes + (i * WIDE_BLOCKS + b - start) * 512;
                FOUR ? widen4(block, to) : widen8(block, to);
            }
        for (int64_t i = 0; i < count; i++)
            for (int64_t r = 0; r < rows; r += TILE_ROWS)
                for (int64_t b = start; b < stop; b++) {
                    const uint16_t *scales = (const uint16_t *)(first + i * p.w->row + b * bytes);
                    const v8 s0 = load_half(scales), s1 = load_half(scales + 8);
                    const int16_t *at = codes + (i * WIDE_BLOCKS + b - start) * 512;
                    float *to = sums + 16 * (i * rows + r);
                    switch (least(TILE_ROWS, rows - r)) {
                        case 4: meet<4>(at, s0, s1, p, row + r, blocks, b, to); break;
                        case 3: meet<3>(at, s0, s1, p, row + r, blocks, b, to); break;
                        case 2: meet<2>(at, s0, s1, p, row + r, blocks, b, to); break;
                        default: meet<1>(at, s0, s1, p, row + r, blocks, b, to);
                    }
                }
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t r = 0; r < rows; r++) {
            const float *from = sums + 16 * (i * rows + r);
            put(p, row + r, panel + i, load(from), load(from + 8));
        }
}

template <bool FOUR>
static INLINE void multiply_kind(const Product &p, int64_t first, int64_t stop, uint8_t *scratch) {
    const Weight &w = *p.w;
    const int64_t blocks = up(w.cols, BLOCK);
    for (int64_t panel = first; panel < stop && p.rows <= FEW_ROWS; panel++) {
        const uint8_t *block = w.data + p.matrix * w.matrix + panel * w.row;
        for (int64_t row = 0; row < p.rows; row += 3) switch (p.rows - row) {
                case 1: direct<1, FOUR>(p, row, panel, block, blocks); break;
                case 2: direct<2, FOUR>(p, row, panel, block, blocks); break;
                default: direct<3, FOUR>(p, row, panel, block, blocks);
            }
    }
    for (int64_t panel = first; panel < stop && p.rows > FEW_ROWS; panel += PANELS)
        for (int64_t row = 0; row < p.rows; row += MOST_ROWS)
            spread<FOUR>(p, row, least(MOST_ROWS, p.rows - row), panel, least(PANELS, stop - panel), blocks, scratch);
}

/* Units [first, stop) of a product with INT8 or INT4. */
static void multiply_panels(const Product &p, int64_t first, int64_t stop, uint8_t *scratch) {
    if (p.w->kind == INT4)
        multiply_kind<true>(p, first, stop, scratch);
    else
        multiply_kind<false>(p, first, stop, scratch);
}
