/* The tokens of a prompt that chose one expert, from their hidden states to their weighted outputs.
 *
 * Between the two products every number is rounded where torch's own operations round it;
 * compute_node/prompt_experts.py takes this way where each step is known to give torch's bits.
 */
#include <string.h>

#if defined(__x86_64__)
#include "tiles.h"

void gemm(const void *const *weight, int64_t lossless, const uint16_t *bias, const uint16_t *inputs,
          uint16_t *outputs, int64_t tokens, int64_t rows, int64_t columns,
          int64_t accumulator_columns, parallel_function *parallel, int64_t threads);
void gate_of(const uint16_t *gate_up, const uint16_t *table, int64_t count, int64_t inner,
             uint16_t *activated);
void weigh(const uint16_t *row, float weight, int64_t columns, uint16_t *weighted);

struct sizes {
  int64_t tokens, top_k, hidden, inner;
  int64_t up_step, down_step; /* columns of an accumulator in either product */
};

/* gate_up, down: one array of bf16, or the arrays of a lossless matrix
 * places:  [count], k * tokens + token of each choice of this expert
 * states:  [tokens, hidden], weights: [tokens, top_k], outputs: [tokens, top_k, hidden]
 * table:   the activation of every bf16 number
 * scratch: room for count * (2 * hidden + 3 * inner) numbers */
void prompt_expert(const void *const *gate_up, const void *const *down, int64_t lossless,
                   const int64_t *places, int64_t count, const uint16_t *states,
                   const float *weights, const uint16_t *table, uint16_t *scratch,
                   uint16_t *outputs, const struct sizes *sizes, parallel_function *parallel,
                   int64_t threads) {
  int64_t hidden = sizes->hidden, inner = sizes->inner;
  uint16_t *chosen = scratch, *made = chosen + count * hidden;
  uint16_t *projected = made + count * hidden, *activated = projected + count * 2 * inner;
  for (int64_t i = 0; i < count; i++)
    memcpy(chosen + i * hidden, states + places[i] % sizes->tokens * hidden, (size_t)hidden * 2);
  gemm(gate_up, lossless, 0, chosen, projected, count, 2 * inner, hidden, sizes->up_step, parallel,
       threads);
  gate_of(projected, table, count, inner, activated);
  gemm(down, lossless, 0, activated, made, count, hidden, inner, sizes->down_step, parallel,
       threads);
  for (int64_t i = 0; i < count; i++) {
    int64_t token = places[i] % sizes->tokens, k = places[i] / sizes->tokens;
    int64_t at = token * sizes->top_k + k;
    weigh(made + i * hidden, weights[at], hidden, outputs + at * hidden);
  }
}

#endif
