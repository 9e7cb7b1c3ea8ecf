/* What is done to whole rows: EMBED, PLE_ROWS, MATMUL, NORM, LAYER_NORM, RMS, ROTATION, ROPE, GAUSSIAN_TOPK.

   A piece is one part [m] of a row, of which there are rows x n; of EMBED, ROTATION and MATMUL it is a row or a stretch
   of one. Out may be the view that is read, but for MATMUL. */

constexpr int64_t STRETCH = 4096; /* values of a long row that are one piece */

static INLINE float *part_of(const Task &t, const View &v, int64_t piece) {
    return t.at(v, piece / v.n) + piece % v.n * v.step;
}

static INLINE const float *vector_of(const Task &t, int i) { return (const float *)t.weight(i).data; }

static int64_t part_items(const Task &t) { return t.rows(t.in.view[0]) * t.in.view[0].n; }
static int64_t part_cost(const Task &t) { return 12 * (int64_t)t.in.view[0].m; }
static int64_t row_items(const Task &t) { return t.rows(t.in.view[0]); }

/* The first n < 8 and `beyond` for the rest. */
static INLINE v8 load_filled(const float *p, int64_t n, float beyond) {
    float buffer[8];
    for (int64_t i = 0; i < 8; i++) buffer[i] = i < n ? p[i] : beyond;
    return load(buffer);
}

/* The sum of x over m, and of its squared distance to `middle`. In four vectors: one would wait for itself. */
static INLINE float total(const float *x, int64_t m) {
    v8 s[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
    int64_t j = 0;
    for (; j + 32 <= m; j += 32)
        for (int i = 0; i < 4; i++) s[i] += load(x + j + 8 * i);
    for (; j + 8 <= m; j += 8) s[0] += load(x + j);
    if (j < m) s[1] += load_some(x + j, m - j);
    return sum((s[0] + s[2]) + (s[1] + s[3]));
}

static INLINE float squares(const float *x, int64_t m, float middle) {
    v8 s[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
    int64_t j = 0;
    for (; j + 32 <= m; j += 32)
        for (int i = 0; i < 4; i++) {
            const v8 d = load(x + j + 8 * i) - middle;
            s[i] = fma8(d, d, s[i]);
        }
    for (; j + 8 <= m; j += 8) {
        const v8 d = load(x + j) - middle;
        s[0] = fma8(d, d, s[0]);
    }
    if (j < m) {
        const v8 d = load_filled(x + j, m - j, middle) - middle;
        s[1] = fma8(d, d, s[1]);
    }
    return sum((s[0] + s[2]) + (s[1] + s[3]));
}

/* y = (x - middle) * scale * w + bias; w and bias are arguments of their own, so that without them nothing is added. */
static INLINE v8 scaled(v8 x, float middle, float scale, bool weighted, v8 w, bool biased, v8 bias) {
    v8 y = (biased ? x - middle : x) * scale;
    if (weighted) y = y * w;
    return biased ? y + bias : y;
}

static INLINE void scale_part(const float *x, float *y, int64_t m, float middle, float scale, const float *w,
                              const float *bias, const bool weighted, const bool biased) {
    int64_t j = 0;
    for (; j + 8 <= m; j += 8)
        store(y + j, scaled(load(x + j), middle, scale, weighted, weighted ? load(w + j) : all(0.0f), biased,
                            biased ? load(bias + j) : all(0.0f)));
    if (j == m) return;
    const int64_t n = m - j;
    store_some(y + j, scaled(load_some(x + j, n), middle, scale, weighted, weighted ? load_some(w + j, n) : all(0.0f),
                             biased, biased ? load_some(bias + j, n) : all(0.0f)), n);
}

static void norm_work(const Task &t, int64_t first, int64_t stop, uint8_t *) {
    const View &in = t.in.view[0];
    const float *w = t.in.weight[0] >= 0 ? vector_of(t, 0) : nullptr;
    for (int64_t i = first; i < stop; i++) {
        const float *x = part_of(t, in, i);
        float *y = part_of(t, t.in.view[1], i);
        const float scale = 1.0f / sqrtf(squares(x, in.m, 0.0f) / (float)in.m + t.in.real[0]);
        if (w)
            scale_part(x, y, in.m, 0.0f, scale, w, nullptr, true, false);
        else
            scale_part(x, y, in.m, 0.0f, scale, nullptr, nullptr, false, false);
    }
}

static void layer_norm_work(const Task &t, int64_t first, int64_t stop, uint8_t *) {
    const View &in = t.in.view[0];
    const float *bias = vector_of(t, 1);
    for (int64_t i = first; i < stop; i++) {
        const float *x = part_of(t, in, i);
        float *y = part_of(t, t.in.view[1], i);
        const float mean = total(x, in.m) / (float)in.m;
        const float scale = 1.0f / sqrtf(squares(x, in.m, mean) / (float)in.m + t.in.real[0]);
        if (t.in.weight[0] >= 0)
            scale_part(x, y, in.m, mean, scale, vector_of(t, 0), bias, true, true);
        else
            scale_part(x, y, in.m, mean, scale, nullptr, bias, false, true);
    }
}

static void rms_work(const Task &t, int64_t first, int64_t stop, uint8_t *) {
    const View &in = t.in.view[0];
    for (int64_t i = first; i < stop; i++) {
        const float mean = squares(part_of(t, in, i), in.m, 0.0f) / (float)in.m, floor = t.in.real[0];
        *part_of(t, t.in.view[1], i) = sqrtf(mean < floor ? floor : mean);
    }
}

/* relu(x - (mean + cut * deviation)) */
static void gaussian_topk_work(const Task &t, int64_t first, int64_t stop, uint8_t *) {
    const View &in = t.in.view[0];
    const v8 zero = all(0.0f);
    for (int64_t i = first; i < stop; i++) {
        const float *x = part_of(t, in, i);
        float *y = part_of(t, t.in.view[1], i);
        const float mean = total(x, in.m) / (float)in.m;
        const float least_kept = mean + t.in.real[0] * sqrtf(squares(x, in.m, mean) / (float)in.m);
        int64_t j = 0;
        for (; j + 8 <= in.m; j += 8) store(y + j, max8(zero, load(x + j) - least_kept)); /* not a number stays one */
        if (j < in.m) store_some(y + j, max8(zero, load_some(x + j, in.m - j) - least_kept), in.m - j);
    }
}

/* Angles are float32 products as in the published models: far into a text their last bit can be seen. */
static void rotation_work(const Task &t, int64_t first, int64_t stop, uint8_t *) {
    const View &out = t.in.view[0];
    const int64_t half = out.m / 2;
    const float *frequencies = vector_of(t, 0), size = t.in.real[0];
    for (int64_t row = first; row < stop; row++) {
        const float position = (float)t.position(out, row);
        float *y = t.at(out, row);
        for (int64_t j = 0; j < half; j++) {
            const float angle = position * frequencies[j];
            y[j] = cosf(angle) * size;
            y[half + j] = sinf(angle) * size;
        }
    }
}

/* A cosine is as long as some hundred bytes. */
static int64_t rotation_cost(const Task &t) { return 100 * (int64_t)t.in.view[0].m; }

/* Pairs j and half + j. */
static INLINE void rotate_halves(const float *x, float *y, const float *turn, int64_t half) {
    int64_t j = 0;
    for (; j + 8 <= half; j += 8) {
        const v8 a = load(x + j), b = load(x + half + j), cos = load(turn + j), sin = load(turn + half + j);
        store(y + j, a * cos - b * sin);
        store(y + half + j, b * cos + a * sin);
    }
    for (; j < half; j++) {
        const float a = x[j], b = x[half + j];
        y[j] = a * turn[j] - b * turn[half + j];
        y[half + j] = b * turn[j] + a * turn[half + j];
    }
}

/* Pairs 2j and 2j + 1, eight of them through copies: the compiler cannot know that x and y are the same or apart. */
static INLINE void rotate_neighbours(const float *x, float *y, const float *turn, int64_t half) {
    int64_t j = 0;
    for (; j + 8 <= half; j += 8) {
        float pairs[16], turned[16];
        memcpy(pairs, x + 2 * j, sizeof pairs);
        for (int i = 0; i < 8; i++) {
            const float a = pairs[2 * i], b = pairs[2 * i + 1], cos = turn[j + i], sin = turn[half + j + i];
            turned[2 * i] = a * cos - b * sin;
            turned[2 * i + 1] = b * cos + a * sin;
        }
        memcpy(y + 2 * j, turned, sizeof turned);
    }
    for (; j < half; j++) {
        const float a = x[2 * j], b = x[2 * j + 1];
        y[2 * j] = a * turn[j] - b * turn[half + j];
        y[2 * j + 1] = b * turn[j] + a * turn[half + j];
    }
}

static void rope_work(const Task &t, int64_t first, int64_t stop, uint8_t *) {
    const View &in = t.in.view[0];
    const int64_t dim = t.in.number[0], half = dim / 2;
    for (int64_t i = first; i < stop; i++) {
        const float *x = part_of(t, in, i), *turn = t.at(t.in.view[2], i / in.n);
        float *y = part_of(t, t.in.view[1], i);
        if (t.in.number[1])
            rotate_neighbours(x, y, turn, half);
        else
            rotate_halves(x, y, turn, half);
        if (x != y) memcpy(y + dim, x + dim, (size_t)(in.m - dim) * 4);
    }
}

static INLINE int64_t stretches(const View &v) { return up(v.m, STRETCH); }

static int64_t matmul_items(const Task &t) { return t.rows(t.in.view[2]) * stretches(t.in.view[2]); }

static int64_t matmul_cost(const Task &t) {
    const View &b = t.in.view[1], &out = t.in.view[2];
    return least(out.m, STRETCH) * (b.n + out.n * (1 + b.n / 4)) * 4;
}

/* Eight columns, or the first `some` of them, of N rows of a product. */
static INLINE void matmul_columns(const float *a, int64_t a_step, const float *b, int64_t b_step, int64_t inner,
                                  float *y, int64_t y_step, int64_t some, const int N) {
    v8 s[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
    for (int64_t k = 0; k < inner; k++) {
        const v8 row = some == 8 ? load(b + k * b_step) : load_some(b + k * b_step, some);
        for (int i = 0; i < N; i++) s[i] = fma8(all(a[i * a_step + k]), row, s[i]);
    }
    for (int i = 0; i < N; i++)
        if (some == 8)
            store(y + i * y_step, s[i]);
        else
            store_some(y + i * y_step, s[i], some);
}

static void matmul_work(const Task &t, int64_t first, int64_t stop, uint8_t *) {
    const View &av = t.in.view[0], &bv = t.in.view[1], &out = t.in.view[2];
    const int64_t strips = stretches(out);
    for (int64_t piece = first; piece < stop; piece++) {
        const int64_t row = piece / strips, from = piece % strips * STRETCH, to = least(from + STRETCH, out.m);
        const float *a = t.at(av, row), *b = t.at(bv, row);
        float *y = t.at(out, row);
        for (int64_t j = from; j < to; j += 8) {
            const int64_t some = least(8, to - j);
            int64_t i = 0;
            for (; i + 4 <= out.n; i += 4)
                matmul_columns(a + i * av.step, av.step, b + j, bv.step, bv.n, y + i * out.step + j, out.step, some, 4);
            for (; i < out.n; i++)
                matmul_columns(a + i * av.step, av.step, b + j, bv.step, bv.n, y + i * out.step + j, out.step, some, 1);
        }
    }
}

/* Stored values, as they lie at any byte, to floats. */
static INLINE void floats_of(const uint8_t *p, float *y, int64_t m, int32_t kind) {
    if (kind == F32) {
        memcpy(y, p, (size_t)m * 4);
        return;
    }
    for (int64_t j = 0; j < m; j++) {
        uint16_t h;
        memcpy(&h, p + 2 * j, 2);
        y[j] = kind == BF16 ? from_bf16(h) : from_half(h);
    }
}

/* Row `row` of panels: of every block 32 codes in fours, 64 bytes apart. */
static INLINE void panel_row(const Weight &w, int64_t row, float *y) {
    const int64_t block_bytes = w.kind == INT4 ? PANEL_BYTES_4 : PANEL_BYTES_8, r = row % PANEL;
    const uint8_t *block = w.data + row / PANEL * w.row;
    for (int64_t start = 0; start < w.cols; start += BLOCK, block += block_bytes) {
        const uint8_t *codes = block + 2 * PANEL + 4 * r;
        uint16_t half;
        int8_t code[BLOCK];
        memcpy(&half, block + 2 * r, 2);
        for (int c = 0; c < BLOCK; c++) {
            if (w.kind == INT8)
                code[c] = (int8_t)codes[64 * (c / 4) + c % 4];
            else
                code[c] = (int8_t)((codes[64 * (c % 16 / 4) + c % 4] >> (c < 16 ? 0 : 4) & 15) - 8);
        }
        const float scale = from_half(half);
        for (int64_t c = 0; c < least(BLOCK, w.cols - start); c++) y[start + c] = scale * (float)code[c];
    }
}

static void embed_work(const Task &t, int64_t first, int64_t stop, uint8_t *) {
    const View &out = t.in.view[0];
    const Weight &w = t.weight(0);
    for (int64_t row = first; row < stop; row++) {
        const int64_t id = t.in.number[0] ? t.position(out, row) : t.pass.ids[row];
        if (quantized(w))
            panel_row(w, id, t.at(out, row));
        else
            floats_of(w.data + id * w.row, t.at(out, row), out.m, w.kind);
    }
}

/* A record of per-layer embeddings: an fp16 scale, then codes; int4 byte j holds value j low and j + m / 2 high. */
static INLINE void record_floats(const uint8_t *p, float *y, int64_t m, int32_t kind) {
    uint16_t half;
    memcpy(&half, p, 2);
    const float scale = from_half(half);
    p += 2;
    if (kind == INT8) {
        for (int64_t j = 0; j < m; j++) y[j] = scale * (float)(int8_t)p[j];
        return;
    }
    for (int64_t j = 0; j < m / 2; j++) {
        y[j] = scale * (float)((p[j] & 15) - 8);
        y[j + m / 2] = scale * (float)((p[j] >> 4) - 8);
    }
}

static void ple_rows_work(const Task &t, int64_t first, int64_t stop, uint8_t *) {
    const View &out = t.in.view[0];
    const int32_t kind = t.in.number[0];
    const bool record = kind == INT8 || kind == INT4;
    const int64_t bytes = kind == INT8 ? 2 + out.m : kind == INT4 ? 2 + out.m / 2 : kind == F32 ? 4 * out.m : 2 * out.m;
    for (int64_t i = first; i < stop; i++) {
        const uint8_t *p = t.pass.ple + i / out.n * t.program.ple_row_bytes + i % out.n * bytes;
        float *y = part_of(t, out, i);
        if (record)
            record_floats(p, y, out.m, kind);
        else
            floats_of(p, y, out.m, kind);
    }
}

static constexpr Phase embed_phases[] = {{row_items, part_cost, embed_work}, {}};
static constexpr Phase ple_rows_phases[] = {{part_items, part_cost, ple_rows_work}, {}};
static constexpr Phase matmul_phases[] = {{matmul_items, matmul_cost, matmul_work}, {}};
static constexpr Phase norm_phases[] = {{part_items, part_cost, norm_work}, {}};
static constexpr Phase layer_norm_phases[] = {{part_items, part_cost, layer_norm_work}, {}};
static constexpr Phase rms_phases[] = {{part_items, part_cost, rms_work}, {}};
static constexpr Phase rotation_phases[] = {{row_items, rotation_cost, rotation_work}, {}};
static constexpr Phase rope_phases[] = {{part_items, part_cost, rope_work}, {}};
static constexpr Phase gaussian_topk_phases[] = {{part_items, part_cost, gaussian_topk_work}, {}};
