/* The kernels, written once. Included once per path, with NAME, TARGET, HALVES and UNPACK4/8/16 of that path defined.

   A row is read in blocks of 32 columns: the codes become four vectors of floats, are multiplied with x, and the block's
   sum is scaled once. Sums are kept per lane and per row, so a row's result depends on nothing but the row and x. */

TARGET INLINE void NAME(unpack)(int bits, const uint8_t *codes, v8 *w) {
    if (bits == 4)
        UNPACK4(codes, w);
    else if (bits == 8)
        UNPACK8(codes, w);
    else
        UNPACK16(codes, w);
}

/* y[k, row + r] for R rows and T vectors of x; R, T and bits are constants wherever this is inlined. */
TARGET INLINE void NAME(tile)(const struct job *job, int64_t row, int64_t k, const int R, const int T, const int bits) {
    const struct matrix *m = job->matrix;
    const float *x = job->x + k * job->x_stride;
    const int64_t blocks = m->cols / BLOCK;
    const uint8_t *codes[MOST_R];
    const uint16_t *scales[MOST_R];
    const int64_t next = R * m->code_stride, ahead = next <= NEAR ? next : 0;
    v8 sum[MOST_R][MOST_T];
    UNROLL for (int r = 0; r < R; r++) {
        codes[r] = m->codes + (row + r) * m->code_stride;
        scales[r] = bits == 16 ? NULL : m->scales + (row + r) * m->scale_stride;
        UNROLL for (int t = 0; t < T; t++) sum[r][t] = (v8){0};
    }
    for (int64_t group = 0; group < blocks; group += GROUP) {
        const int n = blocks - group < GROUP ? (int)(blocks - group) : GROUP;
        float scale[MOST_R][GROUP];
        UNROLL for (int r = 0; r < R; r++) {
            if (bits != 16) HALVES(scales[r] + group, n, scale[r]);
            for (int p = 0; p < GROUP * 4 * bits; p += 64)
                __builtin_prefetch(codes[r] + group * (4 * bits) + ahead + p);
        }
        for (int i = 0; i < n; i++) {
            const float *at = x + (group + i) * BLOCK;
            UNROLL for (int r = 0; r < R; r++) {
                v8 w[4];
                NAME(unpack)(bits, codes[r] + (group + i) * (4 * bits), w);
                UNROLL for (int t = 0; t < T; t++) {
                    const float *xt = at + t * job->x_stride;
                    v8 dot = w[0] * load(xt);
                    dot = dot + w[1] * load(xt + 8);
                    dot = dot + w[2] * load(xt + 16);
                    dot = dot + w[3] * load(xt + 24);
                    sum[r][t] = bits == 16 ? sum[r][t] + dot : sum[r][t] + dot * scale[r][i];
                }
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) {
        v8 s = sum[r][t];
        float total = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
        for (int64_t j = blocks * BLOCK; bits == 16 && j < m->cols; j++)
            total += bf16(codes[r] + 2 * j) * x[t * job->x_stride + j];
        job->y[(k + t) * m->rows + row + r] = total;
    }
}

#define TILES(T, R) \
    case T: \
        for (row = first; row + R <= stop; row += R) NAME(tile)(job, row, k, R, T, bits); \
        for (; row < stop; row++) NAME(tile)(job, row, k, 1, T, bits); \
        break;

TARGET INLINE void NAME(multiply_bits)(const struct job *job, int64_t first, int64_t stop, const int bits) {
    int64_t row;
    for (int64_t k = 0, t; k < job->t; k += t) {
        t = job->t - k < MOST_T ? job->t - k : MOST_T;
        switch (t) {
            TILES(1, 4)
            TILES(2, 2)
            TILES(3, 2)
            TILES(4, 2)
        }
    }
}

TARGET static void NAME(multiply)(const struct job *job, int64_t first, int64_t stop) {
    if (job->matrix->bits == 4)
        NAME(multiply_bits)(job, first, stop, 4);
    else if (job->matrix->bits == 8)
        NAME(multiply_bits)(job, first, stop, 8);
    else
        NAME(multiply_bits)(job, first, stop, 16);
}

TARGET INLINE void NAME(expand_bits)(const struct matrix *m, int64_t row, float *out, const int bits) {
    const uint8_t *codes = m->codes + row * m->code_stride;
    const int64_t blocks = m->cols / BLOCK;
    for (int64_t group = 0; group < blocks; group += GROUP) {
        const int n = blocks - group < GROUP ? (int)(blocks - group) : GROUP;
        float scale[GROUP];
        if (bits != 16) HALVES(m->scales + row * m->scale_stride + group, n, scale);
        for (int i = 0; i < n; i++) {
            v8 w[4];
            NAME(unpack)(bits, codes + (group + i) * (4 * bits), w);
            UNROLL for (int q = 0; q < 4; q++)
                store(out + (group + i) * BLOCK + 8 * q, bits == 16 ? w[q] : w[q] * scale[i]);
        }
    }
    for (int64_t j = blocks * BLOCK; bits == 16 && j < m->cols; j++) out[j] = bf16(codes + 2 * j);
}

/* Row ids[i], or row i where there are no ids, to out[i - start]. */
TARGET static void NAME(expand)(const struct job *job, int64_t first, int64_t stop) {
    const struct matrix *m = job->matrix;
    for (int64_t i = first; i < stop; i++) {
        int64_t row = job->ids ? job->ids[i] : i;
        float *out = job->y + (i - job->start) * m->cols;
        if (m->bits == 4)
            NAME(expand_bits)(m, row, out, 4);
        else if (m->bits == 8)
            NAME(expand_bits)(m, row, out, 8);
        else
            NAME(expand_bits)(m, row, out, 16);
    }
}

#undef TILES
#undef NAME
#undef TARGET
#undef HALVES
#undef UNPACK4
#undef UNPACK8
#undef UNPACK16
