/* Whether a program stays inside its memory. */

#pragma once

#include "program.h"

namespace edge {

/* 0, or 1 + the place of the first instruction that does not fit, described in `message`. */
int64_t check(const Program &program, char *message, int64_t size);

/* Whether a checked program can run a pass: its tokens, their ids and positions, room for what comes out. */
bool pass_fits(const Program &program, const Pass &pass);

}  // namespace edge
