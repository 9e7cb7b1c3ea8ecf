/* APPEND and ATTENTION: keys and values into caches, softmax attention over them.

   One row of queries is split by positions, in ranges of RANGE that begin at its multiples: what a range comes to goes
   into the scratch of view 2, and a second phase joins ranges in order. Of the scratch an instruction needs

       attention_scratch = heads * (capacity / 512 + 2) * (round_up(v_dim, 8) + 8)     floats

   Many rows are split by rows. Neither depends on the number of threads, nor does a row on the others of its pass. */

#include "attend_tiles.h"

constexpr int64_t RANGE = 512;
/* Rows up to which entries are used where they lie. */
constexpr int64_t FEW = 8;

static INLINE int64_t partial_floats(int64_t v_dim) { return up(v_dim, 8) * 8 + 8; }

/* ---- APPEND ---- */

static INLINE const Cache &cache_of(const Task &task) { return task.program.caches[task.in.number[0]]; }

static INLINE int64_t value_bytes(const Cache &c) { return c.kind == INT8 ? 1 : c.kind == BF16 ? 2 : 4; }

/* As edge/engine/kv_int8.py: where the scale is zero the values were next to nothing, and any code stands for zero. */
static void append_int8(const float *x, int64_t dim, int64_t group, int8_t *codes, uint16_t *scales) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: rounds to whole numbers */
    for (int64_t g = 0; g * group < dim; g++, x += group, codes += group) {
        float high = 0.0f;
        for (int64_t i = 0; i < group; i++) {
            const float a = fabsf(x[i]);
            high = a > high || a != a ? a : high; /* not a number stays */
        }
        const float wanted = high / 127.0f;
        scales[g] = to_half(wanted > 65504.0f ? 65504.0f : wanted);
        const float stored = half_value(scales[g]), scale = stored < 0x1p-24f ? 0x1p-24f : stored;
        for (int64_t i = 0; i < group; i++) {
            float code = x[i] / scale;
            code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
            codes[i] = (int8_t)(uint8_t)(bits_of(code + magic) & 255);
        }
    }
}

/* One head of one row; `entries` are those of the head. */
static void append_one(const Cache &c, const Entries &e, int64_t slot, const View &v, const float *x,
                       uint8_t *scratch) {
    const int64_t at = slot * e.row;
    if (v.unit != 1) {
        float *straight = (float *)scratch;
        for (int64_t i = 0; i < e.dim; i++) straight[i] = x[i * v.unit];
        x = straight;
    }
    if (c.kind == INT8) append_int8(x, e.dim, c.group, (int8_t *)e.data + at, (uint16_t *)e.scale + slot * e.groups);
    else if (c.kind == BF16)
        for (int64_t i = 0; i < e.dim; i++) ((uint16_t *)e.data)[at + i] = to_bf16(x[i]);
    else memcpy((float *)e.data + at, x, (size_t)e.dim * 4);
}

static int64_t append_items(const Task &task) { return task.rows(task.in.view[0]) * cache_of(task).heads; }

static int64_t append_cost(const Task &task) {
    const Cache &c = cache_of(task);
    return (c.k_dim + (c.latent ? 0 : c.v_dim)) * (c.kind == INT8 ? 16 : 8);
}

static void append_work(const Task &task, int64_t first, int64_t stop, uint8_t *scratch) {
    const Cache &c = cache_of(task);
    for (int64_t i = first; i < stop; i++) {
        const int64_t row = i / c.heads, head = i % c.heads;
        for (int part = 0; part < (c.latent ? 1 : 2); part++) {
            const View &v = task.in.view[part];
            const int64_t slot = task.position(v, row) % c.capacity;
            const Entries e = part ? values_of(c, head) : keys_of(c, head);
            append_one(c, e, slot, v, task.at(v, row) + head * v.step, scratch);
        }
    }
}

static constexpr Phase append_phases[] = {{append_items, append_cost, append_work}, {}};

/* ---- ATTENTION ---- */

/* What an instruction attends with. `ranges`: those that one row's keys fall in, from the one numbered `low`. */
struct Attend {
    const Task &task;
    const Cache &c;
    int64_t rows, group, tile, low, ranges;
    bool one;

    /* The first position that a query at p sees. */
    INLINE int64_t from(int64_t p) const {
        const int64_t window = task.in.number[1], chunk = task.in.number[2];
        return window > 0 ? most(0, p - window + 1) : chunk > 0 ? p - p % chunk : 0;
    }
};

static INLINE Attend attend_of(const Task &task) {
    const View &q = task.in.view[0];
    const Cache &c = cache_of(task);
    Attend a = {task, c, task.rows(q), q.n / c.heads, tile_shape(c).rows, 0, 0, task.rows(q) == 1};
    if (a.one) {
        const int64_t p = task.position(q, 0);
        a.low = a.from(p) / RANGE;
        a.ranges = p / RANGE - a.low + 1;
    }
    return a;
}

/* Rows [first, first + count) of a head, heads of its group beside each other: row / group is the token. */
static void load_queries(const Attend &a, Tile &t, int64_t first) {
    const View &v = a.task.in.view[0];
    for (int64_t i = 0; i < t.count; i++) {
        const int64_t row = first + i;
        const float *x = a.task.at(v, row / a.group) + (t.head * a.group + row % a.group) * v.step;
        float *q = t.q + i * t.s.k_pad;
        for (int64_t d = 0; d < t.c.k_dim; d++) q[d] = x[d * v.unit] * a.task.in.real[0];
        for (int64_t d = t.c.k_dim; d < t.s.k_pad; d++) q[d] = 0.0f;
    }
}

/* H rows from row h on: their scores, then what values add to them. With the first rows what follows is asked for: the
   values, and the keys of the next tile. */
template <int H, class T>
static void few_scores(Tile &t, const T *const *keys, const T *const *values, int64_t h, int64_t first, int64_t stop) {
    const int64_t bytes = h || t.c.latent ? 0 : t.c.v_dim * (int64_t)sizeof(T);
    dots_rows<H, (H > 2 ? 2 : 8 / H)>(keys, first, stop, t.c.k_dim, t.q + h * t.s.k_pad, t.s.k_pad,
                                      t.scores + h * t.s.score_row, t.s.score_row, values, bytes);
}

template <int H, class T>
static void few_values(Tile &t, const T *const *keys, const T *const *values, int64_t h, int64_t first, int64_t stop) {
    const int64_t ahead = h ? 0 : t.s.keys * t.c.k_dim * (int64_t)sizeof(T);
    blend_rows<H, (H > 2 ? 2 : 4)>(values, first, stop, t.c.v_dim, t.scores + h * t.s.score_row, t.s.score_row,
                                   t.acc + h * t.s.v_pad, t.s.v_pad, t.factor + h, keys, ahead);
}

/* Keys [first, stop) of a tile, each used for all rows where it lies. */
template <class T>
static void tile_few(Tile &t, const T *const *keys, const T *const *values, int64_t first, int64_t stop) {
    for (int64_t h = 0; h < t.count; h += 4) {
        const int64_t rows = t.count - h;
        if (rows >= 4) few_scores<4>(t, keys, values, h, first, stop);
        else if (rows == 3) few_scores<3>(t, keys, values, h, first, stop);
        else if (rows == 2) few_scores<2>(t, keys, values, h, first, stop);
        else few_scores<1>(t, keys, values, h, first, stop);
    }
    for (int64_t h = 0; h < t.count; h++) soften(t, h, first, stop, first & ~(int64_t)7, up(stop, 8) * 8);
    for (int64_t h = 0; h < t.count; h += 4) {
        const int64_t rows = t.count - h;
        if (rows >= 4) few_values<4>(t, keys, values, h, first, stop);
        else if (rows == 3) few_values<3>(t, keys, values, h, first, stop);
        else if (rows == 2) few_values<2>(t, keys, values, h, first, stop);
        else few_values<1>(t, keys, values, h, first, stop);
    }
}

/* The same, with where entries lie; INT8 is widened into scratch first. */
static void tile_few_at(Tile &t, int64_t base, int64_t first, int64_t stop) {
    const Entries k = keys_of(t.c, t.head), v = values_of(t.c, t.head);
    const void *keys[64], *values[64];
    const int64_t size = value_bytes(t.c);
    int64_t slot = (base + first) % t.c.capacity;
    for (int64_t j = first; j < stop; j++) {
        keys[j] = k.data + slot * k.row * size;
        values[j] = v.data + slot * v.row * size;
        if (t.c.kind == INT8) {
            keys[j] = t.k_panels + j * t.s.k_pad;
            values[j] = t.v_panels + j * t.s.v_pad;
            widen(t.c, k, slot, t.k_panels + j * t.s.k_pad, 16);
            widen(t.c, v, slot, t.v_panels + j * t.s.v_pad, 16);
        }
        if (++slot == t.c.capacity) slot = 0;
    }
    if (t.c.kind == BF16) tile_few(t, (const uint16_t *const *)keys, (const uint16_t *const *)values, first, stop);
    else tile_few(t, (const float *const *)keys, (const float *const *)values, first, stop);
}

/* Keys [first, stop) of a tile for many rows, of which row i is number `row` + i of its head. */
static void tile_many(const Attend &a, Tile &t, int64_t row, int64_t base, int64_t first, int64_t stop) {
    const int64_t from = first & ~(int64_t)15, to = up(stop, 16) * 16;
    widen_tile(t, base, first, stop, from, to);
    for (int64_t j = from; j < to; j += 16)
        dense_rows(t.count, t.q, t.s.k_pad, t.k_panels + j * t.s.k_pad, t.c.k_dim, t.scores + j, t.s.score_row,
                   nullptr);
    for (int64_t i = 0; i < t.count; i++) {
        const int64_t p = a.task.position(a.task.in.view[0], (row + i) / a.group);
        soften(t, i, most(first, a.from(p) - base), least(stop, p + 1 - base), from, to);
    }
    for (int64_t d = 0; d < t.s.v_pad; d += 16)
        dense_rows(t.count, t.scores + from, t.s.score_row, t.v_panels + d * t.s.keys + from * 16, to - from, t.acc + d,
                   t.s.v_pad, t.factor);
}

/* Rows from `row` on over the keys at [first, stop). */
static void attend_tiles(const Attend &a, Tile &t, int64_t row, int64_t first, int64_t stop) {
    load_queries(a, t, row);
    for (int64_t base = first / t.s.keys * t.s.keys; base < stop; base += t.s.keys) {
        const int64_t low = most(0, first - base), high = least(t.s.keys, stop - base);
        if (a.one && a.group <= FEW) tile_few_at(t, base, low, high);
        else tile_many(a, t, row, base, low, high);
    }
}

static int64_t attend_parts(const Attend &a) { return up(a.rows * a.group, a.tile); }

static int64_t attend_items(const Task &task) {
    const Attend a = attend_of(task);
    return a.c.heads * attend_parts(a) * (a.one ? a.ranges : 1);
}

/* Bytes of its keys, or the time of its products at four operations for a byte; on average where rows differ. */
static int64_t attend_cost(const Task &task) {
    const Attend a = attend_of(task);
    const int64_t last = task.pass.start + task.pass.tokens - 1, middle = a.one ? last : task.pass.start + a.rows / 2;
    const int64_t keys = least(middle + 1 - a.from(middle), a.one ? RANGE : middle + 1), dims = a.c.k_dim + a.c.v_dim;
    return keys * dims * most(value_bytes(a.c), least(a.tile, a.rows * a.group) / 2);
}

/* The partial results of a range for one head of queries: the largest score, the sum of weights, six unused, values. */
static INLINE float *partial(const Attend &a, int64_t head, int64_t range) {
    return a.task.at(a.task.in.view[2]) + (head * a.ranges + range) * partial_floats(a.c.v_dim);
}

static void attend_range(const Attend &a, int64_t piece, uint8_t *scratch) {
    const int64_t parts = attend_parts(a), range = piece / parts % a.ranges, head = piece / parts / a.ranges;
    const int64_t row = piece % parts * a.tile, p = a.task.position(a.task.in.view[0], 0);
    Tile t = tile_in(scratch, a.c, head, least(a.tile, a.group - row));
    const int64_t begin = (a.low + range) * RANGE;
    attend_tiles(a, t, row, most(begin, a.from(p)), least(begin + RANGE, p + 1));
    for (int64_t i = 0; i < t.count; i++) {
        float *out = partial(a, head * a.group + row + i, range);
        out[0] = t.top[i];
        out[1] = t.total[i];
        memcpy(out + 8, t.acc + i * t.s.v_pad, (size_t)(partial_floats(a.c.v_dim) - 8) * 4);
    }
}

static void attend_rows(const Attend &a, int64_t piece, uint8_t *scratch) {
    const View &out = a.task.in.view[1];
    const int64_t parts = attend_parts(a), all_rows = a.rows * a.group;
    /* Later rows see more: they come first, so that threads end together. */
    const int64_t head = piece % a.c.heads, row = (parts - 1 - piece / a.c.heads) * a.tile;
    Tile t = tile_in(scratch, a.c, head, least(a.tile, all_rows - row));
    const int64_t first = a.task.position(out, row / a.group);
    const int64_t last = a.task.position(out, (row + t.count - 1) / a.group);
    attend_tiles(a, t, row, a.from(first), last + 1);
    for (int64_t i = 0; i < t.count; i++) {
        const float share = 1.0f / t.total[i], *acc = t.acc + i * t.s.v_pad;
        float *y = a.task.at(out, (row + i) / a.group) + (head * a.group + (row + i) % a.group) * out.step;
        for (int64_t d = 0; d < a.c.v_dim; d++) y[d * out.unit] = acc[d] * share;
    }
}

static void attend_work(const Task &task, int64_t first, int64_t stop, uint8_t *scratch) {
    const Attend a = attend_of(task);
    for (int64_t i = first; i < stop; i++) a.one ? attend_range(a, i, scratch) : attend_rows(a, i, scratch);
}

static int64_t join_items(const Task &task) { return task.rows(task.in.view[0]) == 1 ? task.in.view[0].n : 0; }

static int64_t join_cost(const Task &task) { return attend_of(task).ranges * partial_floats(cache_of(task).v_dim) * 4; }

/* Ranges of each head, in order. */
static void join_work(const Task &task, int64_t first, int64_t stop, uint8_t *scratch) {
    const Attend a = attend_of(task);
    const View &out = task.in.view[1];
    const int64_t v_dim = a.c.v_dim, width = partial_floats(v_dim) - 8;
    float *acc = (float *)scratch;
    for (int64_t head = first; head < stop; head++) {
        float top = -INFINITY, total = 0.0f;
        for (int64_t i = 0; i < a.ranges; i++) top = partial(a, head, i)[0] > top ? partial(a, head, i)[0] : top;
        for (int64_t d = 0; d < width; d += 8) store(acc + d, all(0.0f));
        for (int64_t i = 0; i < a.ranges; i++) {
            const float *x = partial(a, head, i);
            const v8 weight = exp8(all(x[0] - top));
            total += x[1] * weight[0];
            for (int64_t d = 0; d < width; d += 8) store(acc + d, fma8(load(x + 8 + d), weight, load(acc + d)));
        }
        float *y = task.at(out) + head * out.step;
        for (int64_t d = 0; d < v_dim; d++) y[d * out.unit] = acc[d] / total;
    }
}

static constexpr Phase attention_phases[] = {
    {attend_items, attend_cost, attend_work}, {join_items, join_cost, join_work}, {}};
