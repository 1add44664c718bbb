#if defined(__x86_64__)
#include "../entries.h"

#define ENTRY(name) .name = avx512bf16_##name

gemv_function avx512bf16_gemv;
gemv_one_function avx512bf16_gemv_one;
gemm_function avx512bf16_gemm;
lossless_gemv_function avx512bf16_lossless_gemv;
lossless_unpack_function avx512bf16_lossless_unpack;
rms_norm_function avx512bf16_rms_norm;
rms_norm_wide_function avx512bf16_rms_norm_wide;
experts_function avx512bf16_experts;
add_rows_function avx512bf16_add_rows;
gate_of_function avx512bf16_gate_of;
prompt_experts_function avx512bf16_prompt_experts;
add_rows_of_each_function avx512bf16_add_rows_of_each;

const struct entries avx512bf16_entries = {
    .isa = "avx512_bf16",
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

#endif
