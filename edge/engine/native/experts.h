/* ROUTE and EXPERTS: who is chosen, and only the chosen multiplied, grouped by expert. */

#include "activate.h"

/* ---- ROUTE: how much of each expert a token wants ---- */

/* What is added to a sum of sigmoids before dividing by it. */
constexpr float TINY = 1e-20f;

struct Router {
    int64_t experts, active, groups, active_groups;
    bool sigmoid, normalized;
    const float *bias; /* [experts], or null */
    float scale;
};

static INLINE Router router(const Task &t) {
    const int32_t *number = t.in.number;
    const float *bias = t.in.weight[0] < 0 ? nullptr : (const float *)t.weight(0).data;
    return {t.in.view[0].m, number[0], number[3], number[4], number[1] != 0, number[2] != 0, bias, t.in.real[0]};
}

/* Not a number is above every number, so that it shows in the result. */
static INLINE bool above(float a, float b) { return a > b || (a != a && b == b); }

/* The k highest of n, in descending order; of equals the first. */
static void choose(const float *choice, int64_t n, int64_t k, int32_t *chosen) {
    for (int64_t i = 0; i < n; i++) {
        if (i >= k && !above(choice[i], choice[chosen[k - 1]])) continue;
        int64_t at = least(i, k - 1);
        for (; at > 0 && above(choice[i], choice[chosen[at - 1]]); at--) chosen[at] = chosen[at - 1];
        chosen[at] = (int32_t)i;
    }
}

static void sigmoids(const float *x, int64_t n, float *y) {
    const v8 one = all(1.0f);
    for (int64_t i = 0; i < n; i += 8) {
        const int64_t some = least(8, n - i);
        store_some(y + i, one / (one + exp8(-load_some(x + i, some))), some);
    }
}

static void softmax(const float *x, int64_t n, float *y) {
    float top = x[0];
    for (int64_t i = 1; i < n; i++) top = x[i] > top ? x[i] : top;
    for (int64_t i = 0; i < n; i += 8) {
        const int64_t some = least(8, n - i);
        store_some(y + i, exp8(load_some(x + i, some) - all(top)), some);
    }
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += y[i];
    for (int64_t i = 0; i < n; i++) y[i] /= (float)total;
}

/* What a group counts: the sum of its two best. */
static float two_best(const float *choice, int64_t n) {
    if (n == 1) return choice[0];
    float first = -INFINITY, second = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        if (above(choice[i], first)) {
            second = first;
            first = choice[i];
        } else if (above(choice[i], second))
            second = choice[i];
    }
    return first + second;
}

/* Those of other than the best groups become minus infinity. */
static void keep_best_groups(const Router &r, float *choice, float *totals, int32_t *kept) {
    const int64_t size = r.experts / r.groups;
    for (int64_t g = 0; g < r.groups; g++) totals[g] = two_best(choice + g * size, size);
    choose(totals, r.groups, r.active_groups, kept);
    for (int64_t g = 0; g < r.groups; g++) totals[g] = 0;
    for (int64_t i = 0; i < r.active_groups; i++) totals[kept[i]] = 1;
    for (int64_t i = 0; i < size * r.groups; i++)
        if (totals[i / size] == 0) choice[i] = -INFINITY;
}

/* One token. Scratch: 4 x experts values, so that experts are at most SCRATCH / 16. `out` may be `logits`. */
static void route_row(const Router &r, const float *logits, float *out, float *scratch) {
    float *scores = scratch, *choice = scores + r.experts, *totals = choice + r.experts;
    int32_t *chosen = (int32_t *)(totals + r.experts);
    if (r.sigmoid)
        sigmoids(logits, r.experts, scores);
    else
        softmax(logits, r.experts, scores);
    /* Scores of large logits are all the same number: the logits still tell them apart, in the same order. Groups are
       judged by sums, though, and those of a softmax by sums of scores. */
    const bool by_logits = !r.bias && (r.sigmoid || r.groups == 1);
    for (int64_t i = 0; i < r.experts; i++) choice[i] = by_logits ? logits[i] : scores[i] + (r.bias ? r.bias[i] : 0.0f);
    if (r.groups > 1) keep_best_groups(r, choice, totals, chosen);
    choose(choice, r.experts, r.active, chosen);
    float total = 0;
    for (int64_t i = 0; i < r.active; i++) total += scores[chosen[i]];
    for (int64_t i = 0; i < r.experts; i++) out[i] = 0;
    for (int64_t i = 0; i < r.active; i++) {
        const float score = scores[chosen[i]];
        out[chosen[i]] = (r.normalized ? score / (total + TINY) : score) * r.scale;
    }
}

static int64_t route_items(const Task &t) { return t.rows(t.in.view[1]); }
static int64_t route_cost(const Task &t) { return 64 * (int64_t)t.in.view[0].m; }

static void route_work(const Task &t, int64_t first, int64_t stop, uint8_t *scratch) {
    const Router r = router(t);
    for (int64_t row = first; row < stop; row++)
        route_row(r, t.at(t.in.view[0], row), t.at(t.in.view[1], row), (float *)scratch);
}

static constexpr Phase route_phases[] = {{route_items, route_cost, route_work}, {}};

/* ---- EXPERTS: what they make of it ---- */

/* Scratch holds whole numbers among floats. */
typedef int32_t whole __attribute__((may_alias));

/* Tokens of a piece of the first phase, which reads all the weights [rows, experts] once for each of its calls. */
constexpr int64_t GATHERED = 16;

/* A pair is a token and one of its experts. Pairs are in order of expert, then token; an expert's lie together. Scratch
   has room for `active` pairs a token, and more are not taken whatever the weights are. It begins with whole numbers,
   [1 + experts + experts + 1 + rows x active]; then come five parts, a row for each pair, at multiples of 8 floats. So
   it takes at most, of each token, active x (x_floats(dim) + 2 x width + x_floats(width) + dim) + 4 x experts + 64. */
struct Mixture {
    const Weight &gate, &up, &down;
    int64_t rows, experts, active, dim, width;
    bool on_input;
    int64_t x_row, x_step, hidden_row;   /* x_step 0: a lone token's row serves all its experts */
    whole *found;                        /* how many experts anyone chose */
    whole *who;                          /* [found], ascending */
    whole *begin;                        /* [experts + 1]: the first pair of each */
    whole *pair;                         /* [rows][active]: the pairs of a token, then -1 */
    float *x, *gates, *ups, *hidden, *y; /* [pairs][x_row, width, width, hidden_row, dim] */

    explicit INLINE Mixture(const Task &t)
        : gate(t.weight(0)), up(t.weight(1)), down(t.weight(2)), rows(t.rows(t.in.view[2])), experts(t.in.view[1].m),
          active(t.in.number[0]), dim(gate.cols), width(gate.rows), on_input(t.in.number[2] != 0),
          x_row(x_floats(gate)), x_step(rows == 1 && !on_input ? 0 : x_row), hidden_row(x_floats(down)) {
        float *at = t.at(t.in.view[3]);
        found = (whole *)at;
        who = found + 1;
        begin = who + experts;
        pair = begin + experts + 1;
        const int64_t pairs = rows * active;
        at = x = at + (1 + experts + experts + 1 + pairs + 7) / 8 * 8;
        at = gates = at + (pairs * x_row + 7) / 8 * 8;
        at = ups = at + (pairs * width + 7) / 8 * 8;
        at = hidden = at + (pairs * width + 7) / 8 * 8;
        y = at + (pairs * hidden_row + 7) / 8 * 8;
    }

    INLINE int64_t pairs() const { return begin[experts]; }
};

/* The experts of a token, ascending -> how many. who: [active]. */
static INLINE int64_t chosen_by(const Mixture &m, const float *weights, int32_t *who) {
    int64_t count = 0;
    for (int64_t e = 0; e < m.experts && count < m.active; e++) {
        who[count] = (int32_t)e; /* stays where the next line counts it: a branch would be guessed wrong */
        count += weights[e] != 0;
    }
    return count;
}

/* cursor [experts]: where each expert's first token from `row` on goes. Every call counts all tokens alike, and the one
   of row 0 leaves the lists for the next phases. totals [experts], who [active]: scratch. */
static void count_pairs(const Mixture &m, const Task &t, int64_t row, int32_t *cursor, int32_t *totals, int32_t *who) {
    memset(cursor, 0, (size_t)m.experts * 4);
    memset(totals, 0, (size_t)m.experts * 4);
    for (int64_t r = 0; r < m.rows; r++) {
        const int64_t count = chosen_by(m, t.at(t.in.view[1], r), who);
        for (int64_t i = 0; i < count; i++) {
            totals[who[i]]++;
            cursor[who[i]] += r < row;
        }
    }
    int32_t found = 0, at = 0;
    for (int64_t e = 0; e < m.experts; e++) {
        if (row == 0) {
            m.begin[e] = at;
            if (totals[e] > 0) m.who[found++] = (int32_t)e;
        }
        cursor[e] += at;
        at += totals[e];
    }
    if (row == 0) {
        m.begin[m.experts] = at;
        m.found[0] = found;
    }
}

/* A row of floats as gate and up want it. */
static INLINE void give(const Mixture &m, const float *x, float *out) {
    if (quantized(m.gate))
        quantize_row(x, m.dim, out);
    else
        memcpy(out, x, (size_t)m.dim * 4);
}

static INLINE void scaled(const float *x, float weight, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) store(out + i, load(x + i) * weight);
    for (; i < n; i++) out[i] = x[i] * weight;
}

/* A token's row to all its pairs. */
static void gather_token(const Mixture &m, const float *x, const float *weights, const int32_t *who, const whole *pair,
                         int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float *out = m.x + pair[i] * m.x_step;
        if (m.on_input) {
            float *product = m.y + pair[i] * m.dim; /* free until the products of down */
            scaled(x, weights[who[i]], m.dim, product);
            give(m, product, out);
        } else if (i == 0)
            give(m, x, out);
        else if (m.x_step > 0)
            memcpy(out, m.x + pair[0] * m.x_step, (size_t)m.x_row * 4);
    }
}

static int64_t gather_items(const Task &t) { return up(t.rows(t.in.view[2]), GATHERED); }

static int64_t gather_cost(const Task &t) {
    const Mixture m(t);
    return least(m.rows, GATHERED) * (m.experts + m.dim + m.active * 2 * m.x_row) * 4;
}

static void gather_work(const Task &t, int64_t first, int64_t stop, uint8_t *scratch) {
    const Mixture m(t);
    int32_t *cursor = (int32_t *)scratch, *totals = cursor + m.experts, *who = totals + m.experts;
    first *= GATHERED;
    stop = least(stop * GATHERED, m.rows);
    count_pairs(m, t, first, cursor, totals, who);
    for (int64_t row = first; row < stop; row++) {
        const float *weights = t.at(t.in.view[1], row);
        whole *pair = m.pair + row * m.active;
        const int64_t count = chosen_by(m, weights, who);
        for (int64_t i = 0; i < m.active; i++) pair[i] = i < count ? cursor[who[i]]++ : -1;
        gather_token(m, t.at(t.in.view[0], row), weights, who, pair, count);
    }
}

/* One of the products that an expert has of the same x. */
struct Side {
    const Weight &w;
    float *y;
};

/* Units [first, stop) of those of all experts that were found: of an expert the units of each side, side after side. */
static void expert_units(const Mixture &m, const float *x, int64_t x_step, const Side *sides, int64_t count,
                         int64_t first, int64_t stop, uint8_t *scratch) {
    const int64_t each = units(sides[0].w);
    while (first < stop) {
        const int64_t run = first / each, unit = first % each, many = least(each - unit, stop - first);
        const Side &side = sides[run % count];
        const int64_t expert = m.who[run / count], pair = m.begin[expert], rows = m.begin[expert + 1] - pair;
        const int64_t y_row = side.w.rows;
        const Product product = {&side.w, expert, x + pair * x_step, x_step, rows, side.y + pair * y_row, y_row};
        multiply(product, unit, unit + many, scratch);
        first += many;
    }
}

static INLINE int64_t expert_cost(const Mixture &m, const Weight &w) {
    return m.found[0] == 0 ? 0 : unit_cost(w, up(m.pairs(), m.found[0]));
}

static int64_t inner_items(const Task &t) {
    const Mixture m(t);
    return m.found[0] * units(m.gate) * 2;
}

static int64_t inner_cost(const Task &t) {
    const Mixture m(t);
    return expert_cost(m, m.gate);
}

static void inner_work(const Task &t, int64_t first, int64_t stop, uint8_t *scratch) {
    const Mixture m(t);
    const Side sides[] = {{m.gate, m.gates}, {m.up, m.ups}};
    expert_units(m, m.x, m.x_step, sides, 2, first, stop, scratch);
}

static int64_t hidden_items(const Task &t) { return Mixture(t).pairs(); }

static int64_t hidden_cost(const Task &t) {
    const Mixture m(t);
    return (m.width * 8 + m.hidden_row) * 4;
}

/* activation(gate) x up, as down wants it. */
static void hidden_work(const Task &t, int64_t first, int64_t stop, uint8_t *) {
    const Mixture m(t);
    const int32_t kind = t.in.number[1];
    const bool as_blocks = quantized(m.down);
    for (int64_t pair = first; pair < stop; pair++) {
        float *gate = m.gates + pair * m.width, *hidden = m.hidden + pair * m.hidden_row;
        const float *other = m.ups + pair * m.width;
        float *out = as_blocks ? gate : hidden;
        int64_t i = 0;
        for (; i + 8 <= m.width; i += 8) store(out + i, activated(load(gate + i), kind) * load(other + i));
        if (i < m.width) {
            const int64_t some = m.width - i;
            store_some(out + i, activated(load_some(gate + i, some), kind) * load_some(other + i, some), some);
        }
        if (as_blocks) quantize_row(gate, m.width, hidden);
    }
}

static int64_t outer_items(const Task &t) {
    const Mixture m(t);
    return m.found[0] * units(m.down);
}

static int64_t outer_cost(const Task &t) {
    const Mixture m(t);
    return expert_cost(m, m.down);
}

static void outer_work(const Task &t, int64_t first, int64_t stop, uint8_t *scratch) {
    const Mixture m(t);
    const Side side = {m.down, m.y};
    expert_units(m, m.hidden, m.hidden_row, &side, 1, first, stop, scratch);
}

static int64_t total_items(const Task &t) { return t.rows(t.in.view[2]); }

static int64_t total_cost(const Task &t) {
    const Mixture m(t);
    return (m.active + 1) * m.dim * 4;
}

/* One token: the sum over its pairs, in order of expert. shares: what each counts. */
static void total_row(const Mixture &m, const whole *pair, const float *shares, int64_t count, float *out) {
    int64_t i = 0;
    for (; i + 8 <= m.dim; i += 8) {
        v8 total = all(0.0f);
        for (int64_t k = 0; k < count; k++) total += load(m.y + pair[k] * m.dim + i) * shares[k];
        store(out + i, total);
    }
    for (; i < m.dim; i++) {
        float total = 0;
        for (int64_t k = 0; k < count; k++) total += m.y[pair[k] * m.dim + i] * shares[k];
        out[i] = total;
    }
}

static void total_work(const Task &t, int64_t first, int64_t stop, uint8_t *scratch) {
    const Mixture m(t);
    int32_t *who = (int32_t *)scratch;
    float *shares = (float *)scratch + m.active;
    for (int64_t row = first; row < stop; row++) {
        const float *weights = t.at(t.in.view[1], row);
        const int64_t count = chosen_by(m, weights, who);
        for (int64_t k = 0; k < count; k++) shares[k] = m.on_input ? 1.0f : weights[who[k]];
        total_row(m, m.pair + row * m.active, shares, count, t.at(t.in.view[2], row));
    }
}

static constexpr Phase experts_phases[] = {
    {gather_items, gather_cost, gather_work},
    {inner_items, inner_cost, inner_work},
    {hidden_items, hidden_cost, hidden_work},
    {outer_items, outer_cost, outer_work},
    {total_items, total_cost, total_work},
    {}};
