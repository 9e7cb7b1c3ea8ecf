/* Everything that is compiled once per kind of machine, in order. The including file has set its target and names:
   EDGE_FMA, EDGE_F16C, EDGE_X86, EDGE_VNNI, EDGE_AVX512, EDGE_NEON for what the machine has. */

#include "simd.h"
#include "product.h"
#include "activate.h"
#if defined(EDGE_X86)
#include "dots_x86.h"
#elif defined(EDGE_NEON)
#include "dots_neon.h"
#else
#include "dots_any.h"
#endif
#include "panels.h"
#include "plain.h"
#include "linear.h"
#include "rows.h"
#include "pointwise.h"
#include "attend.h"
#include "experts.h"
#include "table.h"
