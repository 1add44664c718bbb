/* What one token passes through between its matrices, with torch's bits in one call each: RMS norms,
 * the gate of experts, the weighted sum of what they made.
 *
 * Every number is computed in float32 and rounded to bf16 where torch's own sequence of operations
 * rounds it; sums go in torch's order. compute_node/kernels/one_token_norm.py and
 * compute_node/kernels/one_token_experts.py find out for each module whether the bits are the same. Nothing
 * here may be contracted to a fused multiply-add: compile with -ffp-contract=off.
 */
#if defined(__x86_64__)
#include "tiles.h"

#define FUNCTION __attribute__((target(TARGET)))

enum {
  LANES = 16,    /* float32 numbers of a register; counts of columns are multiples of it */
  SUM_LANES = 8, /* torch's: sums have no AVX-512 version there */
  CHAINS = 4,    /* torch's: sums kept side by side */
  LEVELS = 4     /* torch's: sums of sums */
};

/* How a norm ends; compute_node/kernels/one_token_norm.py has the same numbers. */
enum { WEIGHT_AFTER_ROUNDING = 0, WEIGHT_BEFORE_ROUNDING = 1, ONE_PLUS_WEIGHT = 2 };

INLINE __m512 widen(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

INLINE __m512 load(const uint16_t *numbers) {
  return widen(_mm256_loadu_si256((const __m256i *)numbers));
}

/* To the nearest, ties to even; denormal numbers stay, unlike in the CPU's own instruction. */
INLINE __m256i narrow(__m512 numbers) {
  __m512i bits = _mm512_castps_si512(numbers);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
  sum = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(sum, 16), _mm512_set1_epi32(0xffff));
  return _mm512_cvtepi32_epi16(sum);
}

INLINE void store(uint16_t *place, __m512 numbers) {
  _mm256_storeu_si256((__m256i *)place, narrow(numbers));
}

INLINE int64_t ceil_log2(int64_t number) {
  return number <= 2 ? 1 : 64 - __builtin_clzll((uint64_t)number - 1);
}

INLINE __m256 square(const uint16_t *numbers) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)numbers));
  __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  return _mm256_mul_ps(x, x);
}

/* The sum of squares of a row: CHAINS sums of SUM_LANES numbers, each a cascade, as torch's
 * SumKernel has it. */
INLINE float sum_of_squares(const uint16_t *row, int64_t columns) {
  __m256 sums[LEVELS][CHAINS];
  int64_t pieces = columns / SUM_LANES, size = pieces / CHAINS, at = 0;
  int64_t power = ceil_log2(size) / LEVELS > 4 ? ceil_log2(size) / LEVELS : 4;
  int64_t step = (int64_t)1 << power, mask = step - 1;
  for (int level = 0; level < LEVELS; level++)
    for (int k = 0; k < CHAINS; k++) sums[level][k] = _mm256_setzero_ps();
  while (at < size) {
    int whole = at + step <= size;
    int64_t end = whole ? at + step : size;
    for (; at < end; at++)
      for (int k = 0; k < CHAINS; k++)
        sums[0][k] = _mm256_add_ps(sums[0][k], square(row + (at * CHAINS + k) * SUM_LANES));
    for (int level = 1; whole && level < LEVELS; level++) {
      for (int k = 0; k < CHAINS; k++) {
        sums[level][k] = _mm256_add_ps(sums[level][k], sums[level - 1][k]);
        sums[level - 1][k] = _mm256_setzero_ps();
      }
      if (at & (mask << (level * power))) break;
    }
  }
  for (int level = 1; level < LEVELS; level++)
    for (int k = 0; k < CHAINS; k++) sums[0][k] = _mm256_add_ps(sums[0][k], sums[level][k]);
  for (int64_t rest = size * CHAINS; rest < pieces; rest++)
    sums[0][0] = _mm256_add_ps(sums[0][0], square(row + rest * SUM_LANES));
  for (int k = 1; k < CHAINS; k++) sums[0][0] = _mm256_add_ps(sums[0][0], sums[0][k]);
  float lanes[SUM_LANES], total = 0.0f;
  _mm256_storeu_ps(lanes, sums[0][0]);
  for (int lane = 0; lane < SUM_LANES; lane++) total += lanes[lane];
  return total;
}

INLINE __m512 scale_of(const uint16_t *row, int64_t columns, float epsilon) {
  float mean = sum_of_squares(row, columns) / (float)columns;
  __m512 root = _mm512_sqrt_ps(_mm512_set1_ps(mean + epsilon));
  return _mm512_div_ps(_mm512_set1_ps(1.0f), root);
}

INLINE __m512 weight_at(const uint16_t *weight, int64_t form) {
  __m512 w = load(weight);
  return form == ONE_PLUS_WEIGHT ? _mm512_add_ps(w, _mm512_set1_ps(1.0f)) : w;
}

/* inputs, outputs: [rows, columns]; weight: [columns]. */
FUNCTION void rms_norm(const uint16_t *inputs, const uint16_t *weight, float epsilon, int64_t rows,
                       int64_t columns, int64_t form, uint16_t *outputs) {
  for (int64_t row = 0; row < rows; row++, inputs += columns, outputs += columns) {
    __m512 scale = scale_of(inputs, columns, epsilon);
    for (int64_t at = 0; at < columns; at += LANES) {
      __m512 x = _mm512_mul_ps(load(inputs + at), scale);
      if (form == WEIGHT_AFTER_ROUNDING) x = widen(narrow(x));
      store(outputs + at, _mm512_mul_ps(weight_at(weight + at, form), x));
    }
  }
}

/* The same before any rounding to bf16, to be compared with more care. */
FUNCTION void rms_norm_wide(const uint16_t *inputs, const uint16_t *weight, float epsilon,
                            int64_t rows, int64_t columns, int64_t form, float *outputs) {
  for (int64_t row = 0; row < rows; row++, inputs += columns, outputs += columns) {
    __m512 scale = scale_of(inputs, columns, epsilon);
    for (int64_t at = 0; at < columns; at += LANES) {
      __m512 x = _mm512_mul_ps(load(inputs + at), scale);
      _mm512_storeu_ps(outputs + at, _mm512_mul_ps(weight_at(weight + at, form), x));
    }
  }
}

/* activated [count, inner] = table[gate] * up of gate_up [count, 2 * inner]. table: the activation
 * of every bf16 number. */
INLINE void apply_gate(const uint16_t *gate_up, const uint16_t *table, int64_t count, int64_t inner,
                       uint16_t *activated) {
  for (int64_t row = 0; row < count; row++, gate_up += 2 * inner, activated += inner)
    for (int64_t at = 0; at < inner; at += LANES) {
      uint16_t gate[LANES];
      for (int lane = 0; lane < LANES; lane++) gate[lane] = table[gate_up[at + lane]];
      store(activated + at, _mm512_mul_ps(load(gate), load(gate_up + inner + at)));
    }
}

FUNCTION void gate_of(const uint16_t *gate_up, const uint16_t *table, int64_t count, int64_t inner,
                      uint16_t *activated) {
  apply_gate(gate_up, table, count, inner, activated);
}

/* weighted = row * weight, columns of them. */
FUNCTION void weigh(const uint16_t *row, float weight, int64_t columns, uint16_t *weighted) {
  for (int64_t at = 0; at < columns; at += LANES)
    store(weighted + at, _mm512_mul_ps(load(row + at), _mm512_set1_ps(weight)));
}

/* Products of `count` matrices, of either kind. */
static void multiply(const void *const *arrays, int64_t lossless, int64_t count,
                     const uint16_t *inputs, int64_t input_stride, uint16_t *outputs, int64_t rows,
                     int64_t columns, parallel_function *parallel, int64_t threads) {
  if (lossless)
    lossless_gemv(arrays, 0, count, inputs, input_stride, outputs, rows, columns, parallel, threads);
  else
    gemv((const uint16_t *const *)arrays, 0, count, inputs, input_stride, outputs, rows, columns,
         parallel, threads);
}

/* One token through `count` gated experts, their outputs weighted.
 *
 * gate_up:  count times [2 * inner, hidden], down: count times [hidden, inner]; one array each, or
 *           those of lossless.h
 * input:    [hidden], table: [65536], gates: [count]
 * scratch:  room for 3 * count * inner numbers
 * outputs:  [count, hidden] */
FUNCTION void experts(const void *const *gate_up, const void *const *down, int64_t lossless,
                      int64_t count, const uint16_t *input, const uint16_t *table,
                      const float *gates, uint16_t *scratch, uint16_t *outputs, int64_t hidden,
                      int64_t inner, parallel_function *parallel, int64_t threads) {
  uint16_t *activated = scratch + 2 * count * inner;
  multiply(gate_up, lossless, count, input, 0, scratch, 2 * inner, hidden, parallel, threads);
  apply_gate(scratch, table, count, inner, activated);
  multiply(down, lossless, count, activated, inner, outputs, hidden, inner, parallel, threads);
  for (int64_t row = 0; row < count; row++)
    for (int64_t at = row * hidden; at < (row + 1) * hidden; at += LANES)
      store(outputs + at, _mm512_mul_ps(load(outputs + at), _mm512_set1_ps(gates[row])));
}

/* total [columns] = the rows [count, columns] added to zero one after the other, rounded each time.
 * order: [count], which row comes when; null: as they lie. */
FUNCTION void add_rows(const uint16_t *rows, const int64_t *order, int64_t count, int64_t columns,
                       uint16_t *total) {
  for (int64_t at = 0; at < columns; at += LANES) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t row = 0; row < count; row++)
      sum = widen(
          narrow(_mm512_add_ps(sum, load(rows + (order ? order[row] : row) * columns + at))));
    store(total + at, sum);
  }
}

#endif
