/* All instructions, for the machine that the including file is compiled for. */

/* Known when it is compiled: code that ran as the module is loaded would be for a machine that this may not be. */
#define PHASES_OF(op, list) take_phases(found.phases[op], list)

static constexpr void take_phases(Phase *to, const Phase *from) {
    for (int i = 0; i < PHASES; i++) {
        to[i] = from[i];
        if (!from[i].work) return;
    }
}

static constexpr Kernels all_kernels() {
    Kernels found = {};
    found.name = NAME_OF_ISA;
    PHASES_OF(EMBED, embed_phases);
    PHASES_OF(PLE_ROWS, ple_rows_phases);
    PHASES_OF(QUANTIZE, quantize_phases);
    PHASES_OF(LINEAR, linear_phases);
    PHASES_OF(HEAD_LINEAR, head_linear_phases);
    PHASES_OF(MATMUL, matmul_phases);
    PHASES_OF(NORM, norm_phases);
    PHASES_OF(LAYER_NORM, layer_norm_phases);
    PHASES_OF(RMS, rms_phases);
    PHASES_OF(ROTATION, rotation_phases);
    PHASES_OF(ROPE, rope_phases);
    PHASES_OF(TEMPERATURE, temperature_phases);
    PHASES_OF(APPEND, append_phases);
    PHASES_OF(ATTENTION, attention_phases);
    PHASES_OF(ROUTE, route_phases);
    PHASES_OF(EXPERTS, experts_phases);
    PHASES_OF(ACTIVATION, activation_phases);
    PHASES_OF(GAUSSIAN_TOPK, gaussian_topk_phases);
    PHASES_OF(BINARY, binary_phases);
    PHASES_OF(COPY, copy_phases);
    return found;
}

static constexpr Kernels own = all_kernels();
