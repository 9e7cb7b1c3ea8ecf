/* The functions of one value, eight at a time. */

#pragma once

/* An Activation of x; of a kind that is not known, x itself. */
static INLINE v8 activated(v8 x, int32_t kind) {
    const v8 one = all(1.0f);
    switch (kind) {
        case SILU: return x / (one + exp8(-x));
        /* x (1 + tanh(u)) / 2 is x / (1 + e^-2u), and no tanh is needed. */
        case GELU_TANH: return x / (one + exp8(-1.5957691216f * (x + 0.044715f * (x * x * x))));
        case TANH: return tanh8(x);
        default: return x;
    }
}
