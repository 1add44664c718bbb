/* The portable entries: plain C for any CPU. Other files here compile this one again for newer CPUs.
 *
 * ENTRIES: the table's name
 * LANES:   float32 numbers of a register
 * TOKENS:  times 16 / LANES accumulators of a product fit the registers; a multiple of 3
 */
#ifndef ENTRIES
#define ENTRIES portable_entries
#define LANES 4
#define TOKENS 3
#endif

#include "gemv.c"
#include "lossless.c"
#include "one_token.c"
#include "gemm.c"

#define THREAD static
#define ENTRY_OF_FOLDER static
#include "../prompt.h"

#define ENTRY(name) .name = name

const struct entries ENTRIES = {
    .isa = "portable",
    ENTRY(gemv),
    ENTRY(gemv_one),
    ENTRY(gemm),
    ENTRY(lossless_gemv),
    ENTRY(lossless_unpack),
    ENTRY(rms_norm),
    ENTRY(rms_norm_wide),
    ENTRY(experts),
    ENTRY(add_rows),
    ENTRY(gate_of),
    ENTRY(prompt_experts),
    ENTRY(add_rows_of_each),
};
