/* What one token passes through between its matrices: RMS norms, the gate of experts, the weighted sum
 * of what they made. Every number is computed in float32 and rounded to bf16 where torch's own sequence
 * of operations rounds it; sums go in torch's order.
 */
#include "lossless.h"

enum {
  SUM_LANES = 8, /* torch's */
  CHAINS = 4,    /* torch's: sums kept side by side */
  LEVELS = 4     /* torch's: sums of sums */
};

/* How a norm ends; compute_node/kernels/one_token_norm.py has the same numbers. */
enum { WEIGHT_AFTER_ROUNDING = 0, WEIGHT_BEFORE_ROUNDING = 1, ONE_PLUS_WEIGHT = 2 };

enum { SQUARES = CHAINS * SUM_LANES };

INLINE int64_t ceil_log2(int64_t number) {
  return number <= 2 ? 1 : 64 - __builtin_clzll((unsigned long long)number - 1);
}

INLINE void add_squares(float *sums, const uint16_t *row, int count) {
  for (int i = 0; i < count; i++) sums[i] += widen(row[i]) * widen(row[i]);
}

/* The sum of squares of a row: CHAINS sums of SUM_LANES numbers, each a cascade, as torch's
 * SumKernel has it. */
INLINE float sum_of_squares(const uint16_t *row, int64_t columns) {
  float sums[LEVELS][SQUARES];
  int64_t size = columns / SQUARES, at = 0;
  int64_t power = ceil_log2(size) / LEVELS > 4 ? ceil_log2(size) / LEVELS : 4;
  int64_t step = (int64_t)1 << power, mask = step - 1;
  memset(sums, 0, sizeof sums);
  while (at < size) {
    int whole = at + step <= size;
    int64_t end = whole ? at + step : size;
    for (; at < end; at++) add_squares(sums[0], row + at * SQUARES, SQUARES);
    for (int level = 1; whole && level < LEVELS; level++) {
      for (int i = 0; i < SQUARES; i++) sums[level][i] += sums[level - 1][i];
      memset(sums[level - 1], 0, sizeof sums[0]);
      if (at & (mask << (level * power))) break;
    }
  }
  for (int level = 1; level < LEVELS; level++)
    for (int i = 0; i < SQUARES; i++) sums[0][i] += sums[level][i];
  for (int64_t rest = size * SQUARES; rest < columns; rest += SUM_LANES)
    add_squares(sums[0], row + rest, SUM_LANES);
  for (int chain = 1; chain < CHAINS; chain++)
    for (int i = 0; i < SUM_LANES; i++) sums[0][i] += sums[0][chain * SUM_LANES + i];
  float total = 0.0f;
  for (int i = 0; i < SUM_LANES; i++) total += sums[0][i];
  return total;
}

INLINE float scale_of(const uint16_t *row, int64_t columns, float epsilon) {
  float mean = sum_of_squares(row, columns) / (float)columns;
  return 1.0f / __builtin_sqrtf(mean + epsilon);
}

INLINE float weight_at(const uint16_t *weight, int64_t form) {
  return form == ONE_PLUS_WEIGHT ? widen(*weight) + 1.0f : widen(*weight);
}

static void rms_norm(const uint16_t *inputs, const uint16_t *weight, float epsilon, int64_t rows,
                     int64_t columns, int64_t form, uint16_t *outputs) {
  for (int64_t row = 0; row < rows; row++, inputs += columns, outputs += columns) {
    float scale = scale_of(inputs, columns, epsilon);
    for (int64_t at = 0; at < columns; at++) {
      float x = widen(inputs[at]) * scale;
      if (form == WEIGHT_AFTER_ROUNDING) x = widen(narrow(x));
      outputs[at] = narrow(weight_at(weight + at, form) * x);
    }
  }
}

/* The same before any rounding to bf16, to be compared with more care. */
static void rms_norm_wide(const uint16_t *inputs, const uint16_t *weight, float epsilon,
                          int64_t rows, int64_t columns, int64_t form, float *outputs) {
  for (int64_t row = 0; row < rows; row++, inputs += columns, outputs += columns) {
    float scale = scale_of(inputs, columns, epsilon);
    for (int64_t at = 0; at < columns; at++)
      outputs[at] = weight_at(weight + at, form) * (widen(inputs[at]) * scale);
  }
}

static void gate_of(const uint16_t *gate_up, const uint16_t *table, int64_t count, int64_t inner,
                    uint16_t *activated) {
  for (int64_t row = 0; row < count; row++, gate_up += 2 * inner, activated += inner)
    for (int64_t at = 0; at < inner; at++)
      activated[at] = narrow(widen(table[gate_up[at]]) * widen(gate_up[inner + at]));
}

static void weigh(const uint16_t *row, float weight, int64_t columns, uint16_t *weighted) {
  for (int64_t at = 0; at < columns; at++) weighted[at] = narrow(widen(row[at]) * weight);
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

static void experts(const void *const *gate_up, const void *const *down, int64_t lossless,
                    int64_t count, const uint16_t *input, const uint16_t *table,
                    const float *gates, uint16_t *scratch, uint16_t *outputs, int64_t hidden,
                    int64_t inner, parallel_function *parallel, int64_t threads) {
  uint16_t *activated = scratch + 2 * count * inner;
  multiply(gate_up, lossless, count, input, 0, scratch, 2 * inner, hidden, parallel, threads);
  gate_of(scratch, table, count, inner, activated);
  multiply(down, lossless, count, activated, inner, outputs, hidden, inner, parallel, threads);
  for (int64_t row = 0; row < count; row++)
    weigh(outputs + row * hidden, gates[row], hidden, outputs + row * hidden);
}

enum { SUM_COLUMNS = 64 /* of add_rows at a time: its totals stay in registers */ };

INLINE void add_some_columns(const uint16_t *rows, const int64_t *order, int64_t count,
                             int64_t columns, const int64_t width, uint16_t *total) {
  float sums[SUM_COLUMNS] = {0};
  for (int64_t row = 0; row < count; row++) {
    const uint16_t *next = rows + (order ? order[row] : row) * columns;
    for (int64_t i = 0; i < width; i++) sums[i] = widen(narrow(sums[i] + widen(next[i])));
  }
  for (int64_t i = 0; i < width; i++) total[i] = narrow(sums[i]);
}

static void add_rows(const uint16_t *rows, const int64_t *order, int64_t count, int64_t columns,
                     uint16_t *total) {
  int64_t at = 0;
  for (; at + SUM_COLUMNS <= columns; at += SUM_COLUMNS)
    add_some_columns(rows + at, order, count, columns, SUM_COLUMNS, total + at);
  if (at < columns) add_some_columns(rows + at, order, count, columns, columns - at, total + at);
}
