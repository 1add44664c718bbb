/* The dispatch table: what every instruction set's folder implements, and who is in charge here.
 *
 * An entry keeps one contract in every folder, written beside its AVX-512 version; the order in which it
 * adds up is the folder's own. compute_node/native/binding.py reads the table in this order.
 */
#ifndef FLASHMOE_ENTRIES_H
#define FLASHMOE_ENTRIES_H

#include <stdint.h>

/* OpenMP's entry into a parallel region, as GCC's runtime has it. */
typedef void parallel_function(void (*body)(void *), void *data, unsigned threads, unsigned flags);

struct prompt;
struct expert;

typedef void gemv_function(const uint16_t *const *weights, const uint16_t *const *biases,
                           int64_t count, const uint16_t *inputs, int64_t input_stride,
                           uint16_t *outputs, int64_t rows, int64_t columns,
                           parallel_function *parallel, int64_t threads);
typedef void gemv_one_function(const uint16_t *weight, const uint16_t *bias, const uint16_t *input,
                               uint16_t *output, int64_t rows, int64_t columns,
                               parallel_function *parallel, int64_t threads);
typedef void gemm_function(const void *const *weight, int64_t lossless, const uint16_t *bias,
                           const uint16_t *inputs, uint16_t *outputs, int64_t tokens, int64_t rows,
                           int64_t columns, int64_t accumulator_columns,
                           parallel_function *parallel, int64_t threads);
typedef void lossless_gemv_function(const void *const *parts, const uint16_t *const *biases,
                                    int64_t count, const uint16_t *inputs, int64_t input_stride,
                                    uint16_t *outputs, int64_t rows, int64_t columns,
                                    parallel_function *parallel, int64_t threads);
typedef void lossless_unpack_function(const void *const *parts, uint16_t *outputs, int64_t rows,
                                      int64_t columns, parallel_function *parallel,
                                      int64_t threads);
typedef void rms_norm_function(const uint16_t *inputs, const uint16_t *weight, float epsilon,
                               int64_t rows, int64_t columns, int64_t form, uint16_t *outputs);
typedef void rms_norm_wide_function(const uint16_t *inputs, const uint16_t *weight, float epsilon,
                                    int64_t rows, int64_t columns, int64_t form, float *outputs);
typedef void experts_function(const void *const *gate_up, const void *const *down,
                              int64_t lossless, int64_t count, const uint16_t *input,
                              const uint16_t *table, const float *gates, uint16_t *scratch,
                              uint16_t *outputs, int64_t hidden, int64_t inner,
                              parallel_function *parallel, int64_t threads);
typedef void add_rows_function(const uint16_t *rows, const int64_t *order, int64_t count,
                               int64_t columns, uint16_t *total);
typedef void gate_of_function(const uint16_t *gate_up, const uint16_t *table, int64_t count,
                              int64_t inner, uint16_t *activated);
typedef void prompt_experts_function(const struct prompt *prompt, const struct expert *experts,
                                     int64_t num_experts, parallel_function *parallel,
                                     int64_t threads);
typedef void add_rows_of_each_function(const uint16_t *rows, const int64_t *order, int64_t tokens,
                                       int64_t count, int64_t columns, uint16_t *totals,
                                       parallel_function *parallel, int64_t threads);

struct entries {
  const char *isa; /* whose folder this is */
  gemv_function *gemv;
  gemv_one_function *gemv_one;
  gemm_function *gemm;
  lossless_gemv_function *lossless_gemv;
  lossless_unpack_function *lossless_unpack;
  rms_norm_function *rms_norm;
  rms_norm_wide_function *rms_norm_wide;
  experts_function *experts;
  add_rows_function *add_rows;
  gate_of_function *gate_of;
  prompt_experts_function *prompt_experts;
  add_rows_of_each_function *add_rows_of_each;
};

#if defined(__x86_64__)
extern const struct entries avx512bf16_entries;
/* The portable code, compiled for newer processors too. */
extern const struct entries portable_avx512_entries, portable_avx2_entries;
#endif
extern const struct entries portable_entries;

#endif
