/* This folder's entries get names of their own in the library, and are checked against the table's. */
#ifndef FLASHMOE_AVX512BF16_NAMES_H
#define FLASHMOE_AVX512BF16_NAMES_H

#include "../entries.h"

#define gemv avx512bf16_gemv
#define gemv_one avx512bf16_gemv_one
#define gemm avx512bf16_gemm
#define lossless_gemv avx512bf16_lossless_gemv
#define lossless_unpack avx512bf16_lossless_unpack
#define rms_norm avx512bf16_rms_norm
#define rms_norm_wide avx512bf16_rms_norm_wide
#define experts avx512bf16_experts
#define add_rows avx512bf16_add_rows
#define gate_of avx512bf16_gate_of
#define prompt_experts avx512bf16_prompt_experts
#define add_rows_of_each avx512bf16_add_rows_of_each
#define weigh avx512bf16_weigh

gemv_function gemv;
gemv_one_function gemv_one;
gemm_function gemm;
lossless_gemv_function lossless_gemv;
lossless_unpack_function lossless_unpack;
rms_norm_function rms_norm;
rms_norm_wide_function rms_norm_wide;
experts_function experts;
add_rows_function add_rows;
gate_of_function gate_of;
prompt_experts_function prompt_experts;
add_rows_of_each_function add_rows_of_each;
void weigh(const uint16_t *row, float weight, int64_t columns, uint16_t *weighted);

#endif
