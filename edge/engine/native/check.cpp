/* Every extent of a program, and that shapes agree: kernels trust both. Sizes are bounded first, so that what is
   computed with them stays within 64 bits. */

#include "check.h"

#include <stdio.h>

namespace edge {
namespace {

constexpr int64_t MOST = 1ll << 40, MOST_SIZE = 1ll << 31;

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
bool between(int64_t x, int64_t low, int64_t high) { return low <= x && x <= high; }

int64_t panel_bytes(int32_t kind) { return kind == INT4 ? PANEL_BYTES_4 : PANEL_BYTES_8; }
bool in_panels(const Weight &w) { return w.kind == INT4 || w.kind == INT8; }

/* Why a weight reaches outside its memory, or null. */
const char *bad_weight(const Weight &w) {
    if (!w.data || !between(w.bytes, 1, 1ll << 46)) return "no memory";
    if (!between(w.count, 1, MOST_SIZE) || !between(w.rows, 1, MOST_SIZE) || !between(w.cols, 1, MOST_SIZE))
        return "sizes";
    if (!between(w.row, 0, MOST) || !between(w.matrix, 0, MOST)) return "strides";
    if (w.kind != F32 && w.kind != BF16 && !in_panels(w)) return "kind";
    const int64_t lines = in_panels(w) ? up(w.rows, PANEL) : w.rows;
    const int64_t line = in_panels(w) ? up(w.cols, BLOCK) * panel_bytes(w.kind) : w.cols * (w.kind == F32 ? 4 : 2);
    if (lines > 1 && w.row > (1ll << 46) / lines) return "rows";
    if (w.count > 1 && w.matrix > (1ll << 46) / w.count) return "matrices";
    if ((w.count - 1) * w.matrix + (lines - 1) * w.row + line > w.bytes) return "shorter than its shape";
    const int64_t unit = w.kind == F32 ? 4 : 2;
    if ((int64_t)(uintptr_t)w.data % unit || w.row % unit || w.matrix % unit) return "alignment";
    return nullptr;
}

const char *bad_cache(const Cache &c) {
    if (!between(c.heads, 1, 1 << 20) || !between(c.capacity, 1, MOST_SIZE)) return "sizes";
    if (!between(c.k_dim, 1, 2048) || !between(c.v_dim, 1, 2048) || !between(c.group, 1, 1 << 20)) return "dims";
    if (c.kind != F32 && c.kind != BF16 && c.kind != INT8) return "kind";
    if (c.heads * c.capacity > (1ll << 34)) return "size";
    const int64_t unit = c.kind == F32 ? 4 : c.kind == BF16 ? 2 : 1, entries = c.heads * c.capacity;
    if (!c.k || entries * c.k_dim * unit > c.k_bytes || (uintptr_t)c.k % (uintptr_t)unit) return "keys";
    if (c.latent ? c.v_dim > c.k_dim || c.kind == INT8
                 : !c.v || entries * c.v_dim * unit > c.v_bytes || (uintptr_t)c.v % (uintptr_t)unit)
        return "values";
    if (c.kind != INT8) return nullptr;
    if (c.k_dim % c.group || c.v_dim % c.group || !c.k_scale || !c.v_scale) return "groups";
    if ((uintptr_t)c.k_scale % 2 || (uintptr_t)c.v_scale % 2) return "alignment";
    if (entries * (c.k_dim / c.group) * 2 > c.k_scale_bytes || entries * (c.v_dim / c.group) * 2 > c.v_scale_bytes)
        return "scales";
    return nullptr;
}

/* Checks one instruction; `why` is null as long as all is well. */
struct Checker {
    const Program &p;
    const Instruction &in;
    const char *why = nullptr;

    bool need(bool ok, const char *what) {
        if (!ok && !why) why = what;
        return !why;
    }

    const View &v(int i) const { return in.view[i]; }
    int64_t rows(const View &view) const { return view.one ? 1 : p.chunk; }

    /* A view inside its space, its rows those of the pass or one; n x m as wanted, -1 for any. */
    const View &view(int i, int64_t n = -1, int64_t m = -1) {
        const View &x = v(i);
        const bool flags = (x.unit == 0 || x.unit == 1) && (x.one == 0 || x.one == 1);
        const bool strides = between(x.at, 0, MOST) && between(x.row, 0, MOST_SIZE) && between(x.step, 0, MOST_SIZE);
        if (!need(x.n >= 1 && x.m >= 1 && flags, "a view") || !need(strides, "a view's strides")) return x;
        const int64_t part = (int64_t)(x.n - 1) * x.step + (x.unit ? x.m - 1 : 0) + 1;
        if (x.space == ARENA)
            need(x.at + (rows(x) - 1) * x.row + part <= p.arena_floats, "a view outside the arena");
        else
            need(x.space == OUTPUT && x.at + part <= p.out_width && (x.one || !p.out_one) &&
                     (x.one || x.row == p.out_width), "a view outside the output");
        need((n < 0 || x.n == n) && (m < 0 || x.m == m), "the shape of a view");
        return x;
    }

    /* One that is read value by value, not repeated. */
    const View &dense(int i, int64_t n = -1, int64_t m = -1) {
        const View &x = view(i, n, m);
        need(x.unit == 1 || x.m == 1, "an input that repeats a value");
        return x;
    }

    /* The same as what is written: rows must not lie on each other. */
    const View &out(int i, int64_t n = -1, int64_t m = -1) {
        const View &x = view(i, n, m);
        need(x.unit == 1 || x.m == 1, "an output that repeats a value");
        need(x.n == 1 || x.step >= x.m, "parts of an output that overlap");
        need(x.one || x.row >= (int64_t)(x.n - 1) * x.step + x.m, "rows of an output that overlap");
        return x;
    }

    /* As many rows as another. */
    void like(int a, int b) { need(v(a).one == v(b).one, "rows of views"); }

    /* Past the last float of a view that was found to be inside. */
    int64_t end(const View &x) const {
        return x.at + (rows(x) - 1) * x.row + (int64_t)(x.n - 1) * x.step + (x.unit ? x.m - 1 : 0) + 1;
    }

    /* No float of one between those of the other. */
    void apart(int a, int b) {
        if (!why) need(v(a).space != v(b).space || end(v(a)) <= v(b).at || end(v(b)) <= v(a).at, "views that overlap");
    }

    const Weight *weight(int i, int64_t count = -1, int64_t rows = -1, int64_t cols = -1) {
        const int32_t at = in.weight[i];
        if (!need(at >= 0 && at < p.weight_count, "a weight that is not there")) return nullptr;
        const Weight &w = p.weights[at];
        need((count < 0 || w.count == count) && (rows < 0 || w.rows == rows) && (cols < 0 || w.cols == cols),
             "the shape of a weight");
        return &w;
    }

    /* A vector of floats. */
    void vector(int i, int64_t size) {
        const Weight *w = weight(i, 1, 1, size);
        if (w) need(w->kind == F32, "a vector that is not float32");
    }

    const Cache *cache() {
        if (!need(in.number[0] >= 0 && in.number[0] < p.cache_count, "a cache that is not there")) return nullptr;
        return &p.caches[in.number[0]];
    }

    bool wanted(const Weight &w, const View &x) const {
        return x.m == (in_panels(w) ? up(w.cols, BLOCK) * QUANT_FLOATS : w.cols) && x.unit == 1;
    }

    void same(const View &x) {
        out(1, x.n, x.m);
        like(0, 1);
    }

    void embed() {
        const View &x = out(0);
        const Weight *w = weight(0, 1, -1, x.m);
        need(x.n == 1, "an embedding in parts");
        if (w) need(w->rows >= (in.number[0] ? p.context : p.vocab) && !x.one, "a table with fewer rows than ids");
    }

    void ple_rows() {
        const View &x = out(0);
        const int64_t n = x.n, m = x.m;
        const int32_t kind = in.number[0];
        const int64_t codes = kind == INT8 ? 2 + m : kind == INT4 ? 2 + m / 2 : kind == F32 ? 4 * m : 2 * m;
        need(between(kind, F32, F16) && !(kind == INT4 && m % 2) && n * codes <= p.ple_row_bytes && !x.one,
             "rows of the table");
    }

    void linear() {
        const View &x = dense(0);
        const int count = in.number[0];
        if (!need(between(count, 1, WEIGHTS), "the number of products")) return;
        need(x.n == 1, "an input in parts");
        for (int i = 0; i < count; i++) {
            const Weight *w = weight(i, 1);
            if (!w) return;
            const View &y = out(1 + i);
            need(w->kind == p.weights[in.weight[0]].kind && wanted(*w, x), "the input of a product");
            need(y.n == 1 && y.m == w->rows, "the output of a product");
            like(0, 1 + i);
        }
    }

    void head_linear() {
        const View &x = dense(0);
        const Weight *w = weight(0, x.n);
        if (!w) return;
        need(wanted(*w, x), "the input of a product");
        out(1, x.n, w->rows);
        like(0, 1);
    }

    void matmul() {
        const View &a = dense(0), &b = dense(1);
        need(a.m == b.n, "the inner size of a product");
        out(2, a.n, b.m);
        like(0, 1);
        like(0, 2);
    }

    void rope() {
        const View &x = dense(0);
        out(1, x.n, x.m);
        need(between(in.number[0], 2, x.m) && in.number[0] % 2 == 0, "what is rotated");
        dense(2, 1, in.number[0]);
        like(0, 1);
        like(0, 2);
    }

    void append() {
        const Cache *c = cache();
        if (!c) return;
        dense(0, c->heads, c->k_dim);
        if (!c->latent) dense(1, c->heads, c->v_dim), like(0, 1);
        need(!v(0).one && (c->capacity >= p.chunk || c->capacity >= p.context), "a cache shorter than a pass");
    }

    void attention() {
        const Cache *c = cache();
        if (!c) return;
        const View &q = dense(0, -1, c->k_dim);
        out(1, q.n, c->v_dim);
        like(0, 1);
        need(q.n % c->heads == 0, "heads of queries");
        const int64_t window = in.number[1], chunk = in.number[2], seen = window ? window : chunk ? chunk : p.context;
        need(window >= 0 && chunk >= 0, "a window");
        need(c->capacity >= p.context || c->capacity >= seen + p.chunk - 1, "a cache shorter than what is seen");
        /* attention_scratch of attend.h */
        const int64_t floats = q.n * (c->capacity / 512 + 2) * (up(c->v_dim, 8) * 8 + 8);
        const View &s = out(2);
        need(s.one && s.n == 1 && s.m >= floats, "scratch");
    }

    void route() {
        const View &x = dense(0);
        out(1, 1, x.m);
        like(0, 1);
        if (in.weight[0] >= 0) vector(0, x.m);
        const int64_t groups = in.number[3];
        need(x.n == 1 && x.m <= SCRATCH / 16 && between(in.number[0], 1, x.m) && between(groups, 1, x.m) &&
                 x.m % groups == 0 && between(in.number[4], 1, groups) &&
                 x.m / groups * in.number[4] >= in.number[0], "what is chosen");
    }

    void experts() {
        const View &x = dense(0), &chosen = dense(1);
        const Weight *gate = weight(0, chosen.m, -1, x.m), *up_ = weight(1, chosen.m, gate ? gate->rows : 0, x.m);
        const Weight *down = weight(2, chosen.m, x.m, gate ? gate->rows : 0);
        if (!gate || !up_ || !down) return;
        out(2, 1, x.m);
        const int64_t active = in.number[0], width = gate->rows, dim = x.m;
        need(x.n == 1 && chosen.n == 1 && gate->kind == up_->kind && between(active, 1, chosen.m), "experts");
        const auto floats = [](const Weight &w) { return in_panels(w) ? up(w.cols, BLOCK) * QUANT_FLOATS : w.cols; };
        const View &s = out(3);
        need(s.n == 1 && (s.one || s.row < s.m + 16) && chosen.m <= SCRATCH / 16 &&
                 s.m >= active * (floats(*gate) + 2 * width + floats(*down) + dim) + 4 * chosen.m + 64, "scratch");
        for (int i = 1; i < 4; i++) like(0, i);
        /* It has places in it that are followed. */
        for (int i = 0; i < 3; i++) apart(3, i);
    }

    void binary() {
        const View &a = view(0);
        out(2, a.n, a.m);
        like(0, 2);
        if (in.number[1] == 2)
            vector(0, a.m);
        else if (in.number[1] == 0)
            view(1, a.n, a.m), need(v(1).one == a.one, "rows of views");
        need(between(in.number[0], ADD, DIV) && between(in.number[1], 0, 2), "the kind of arithmetic");
    }

    void copy() {
        const View &x = view(0);
        out(1, x.n, x.m);
        need(v(1).one || !x.one, "one row to many");
    }

    const char *run() {
        switch (in.op) {
            case EMBED: embed(); break;
            case PLE_ROWS: ple_rows(); break;
            case QUANTIZE: {
                const View &x = dense(0);
                out(1, x.n, up(x.m, BLOCK) * QUANT_FLOATS);
                like(0, 1);
                break;
            }
            case LINEAR: linear(); break;
            case HEAD_LINEAR: head_linear(); break;
            case MATMUL: matmul(); break;
            case NORM:
            case LAYER_NORM:
                same(dense(0));
                if (in.weight[0] >= 0) vector(0, v(0).m);
                if (in.op == LAYER_NORM) vector(1, v(0).m);
                break;
            case RMS: dense(0), out(1, v(0).n, 1), like(0, 1); break;
            case ROTATION: {
                const View &x = out(0, 1);
                need(x.m % 2 == 0, "an odd number of angles");
                vector(0, x.m / 2);
                break;
            }
            case ROPE: rope(); break;
            case TEMPERATURE: same(view(0)), need(in.number[0] >= 1, "the floor"); break;
            case APPEND: append(); break;
            case ATTENTION: attention(); break;
            case ROUTE: route(); break;
            case EXPERTS: experts(); break;
            case ACTIVATION: same(view(0)); break;
            case GAUSSIAN_TOPK: same(dense(0)); break;
            case BINARY: binary(); break;
            case COPY: copy(); break;
            default: need(false, "no such operation");
        }
        return why;
    }
};

}  // namespace

int64_t check(const Program &p, char *message, int64_t size) {
    const auto refuse = [&](int64_t place, const char *what, int64_t which, const char *why) {
        snprintf(message, (size_t)size, "%s %lld: %s", what, (long long)which, why);
        return place;
    };
    if (!between(p.chunk, 1, 1 << 24) || !between(p.arena_floats, 0, MOST) || (p.arena_floats && !p.arena) ||
        !between(p.out_width, 0, MOST_SIZE) || !between(p.context, 1, MOST_SIZE) || !between(p.vocab, 1, MOST_SIZE) ||
        !between(p.ple_row_bytes, 0, MOST_SIZE) || (uintptr_t)p.arena % 64)
        return refuse(1, "program", 0, "sizes");
    for (int64_t i = 0; i < p.weight_count; i++)
        if (const char *why = bad_weight(p.weights[i])) return refuse(1, "weight", i, why);
    for (int64_t i = 0; i < p.cache_count; i++)
        if (const char *why = bad_cache(p.caches[i])) return refuse(1, "cache", i, why);
    for (int64_t i = 0; i < p.instruction_count; i++) {
        Checker checker = {p, p.instructions[i]};
        if (const char *why = checker.run()) return refuse(i + 1, "operation", p.instructions[i].op, why);
    }
    return 0;
}

bool pass_fits(const Program &p, const Pass &pass) {
    if (!between(pass.tokens, 1, p.chunk) || !between(pass.start, 0, p.context - pass.tokens) || !pass.ids)
        return false;
    for (int64_t i = 0; i < pass.tokens; i++)
        if (pass.ids[i] < 0 || pass.ids[i] >= p.vocab) return false;
    if (p.ple_row_bytes && !pass.ple) return false;
    return !p.out_width || (pass.out && pass.out_rows >= (p.out_one ? 1 : pass.tokens));
}

}  // namespace edge
