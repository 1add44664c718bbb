/* One token times bf16 matrices, with the bits of torch's own loop on CPUs without bf16 instructions.
 *
 * torch keeps 64 float32 sums for each output, adds the products of 64 neighbouring columns to them,
 * then adds the sums up in halves. The columns beyond a multiple of 64 have eight sums of their own.
 * So does this file, for LANES rows at a time. A register holds the sums of the first numbers of pairs
 * of columns, or of the second ones: a shift or a mask then makes float32 of what memory holds.
 */
#include "vectors.h"

enum {
  SUMS = 64,
  REST_SUMS = 8,
  SUM_VECTORS = SUMS / 2 / LANES,         /* of the first numbers of pairs, and as many of the second */
  ROWS_AT_ONCE = LANES == 16 ? 4 : 1,     /* whose sums fit the registers */
  REST_ROWS = LANES / (REST_SUMS / 2),    /* whose rest sums of first numbers fill a register */
  LINE_BYTES = 64,
  STEPS_AHEAD = 8,                        /* of SUMS columns, prefetched */
  CHUNK_BYTES = 128 << 10                 /* what a thread takes at a time */
};

struct gemv_job {
  const uint16_t *const *weights; /* count times [rows, columns] */
  const uint16_t *const *biases;  /* count times [rows], or null */
  const uint16_t *inputs;         /* a row every input_stride numbers */
  uint16_t *outputs;              /* [count, rows] */
  int64_t count, input_stride, rows, columns;
  int64_t chunk_rows, num_chunks; /* of one matrix */
  int64_t ahead_bytes;            /* where a row's prefetched bytes lie */
  int64_t next;                   /* chunk of all matrices; threads take one after the other */
};

/* Of one row: the sums of the first numbers of pairs, and of the second ones. */
struct sums {
  vector first[SUM_VECTORS], second[SUM_VECTORS];
};

/* The columns up to a multiple of SUMS of `count` rows. */
INLINE void add_columns(struct sums *sums, const int count, const uint16_t *const *rows,
                        const uint16_t *input, int64_t columns, int64_t ahead_bytes) {
  for (int64_t at = 0; at + SUMS <= columns; at += SUMS)
    for (int i = 0; i < SUM_VECTORS; i++) {
      vector_bits x = load_pairs(input + at + i * 2 * LANES);
      for (int row = 0; row < count; row++) {
        const uint16_t *place = rows[row] + at + i * 2 * LANES;
        vector_bits w = load_pairs(place);
        if (i * LANES * 4 % LINE_BYTES == 0) __builtin_prefetch((const char *)place + ahead_bytes);
        sums[row].first[i] = add_product(sums[row].first[i], firsts(w), firsts(x));
        sums[row].second[i] = add_product(sums[row].second[i], seconds(w), seconds(x));
      }
    }
}

/* A row's sums added up in halves, down to LANES of them: LANES / 2 of first numbers, then of second. */
INLINE vector halve(struct sums *sums) {
  for (int half = SUM_VECTORS / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) {
      sums->first[i] += sums->first[half + i];
      sums->second[i] += sums->second[half + i];
    }
  return fold(LANES / 2, sums->first[0], sums->second[0]);
}

INLINE void fold_rows(vector *rows, const int half, const int count) {
  for (int i = 0; i < count; i++) rows[i] = fold(half, rows[2 * i], rows[2 * i + 1]);
}

/* What `halve` left of LANES rows, added up: a row's sum in each lane. */
INLINE vector add_up(vector rows[LANES]) {
  if (LANES > 8) fold_rows(rows, 4, 8);
  if (LANES > 4) fold_rows(rows, 2, 4);
  fold_rows(rows, 1, 2);
  return fold(1, rows[0], rows[1]);
}

/* REST_SUMS neighbouring columns of REST_ROWS rows. */
INLINE vector_bits load_rest(const uint16_t *const *rows, int64_t at) {
  uint16_t numbers[REST_ROWS][REST_SUMS];
  vector_bits pairs;
  for (int row = 0; row < REST_ROWS; row++) memcpy(numbers[row], rows[row] + at, sizeof numbers[row]);
  memcpy(&pairs, numbers, sizeof pairs);
  return pairs;
}

/* The columns from `begin` of REST_ROWS rows: sums of first numbers of each row, then of second. */
INLINE vector multiply_rest_of_some(const uint16_t *const *rows, const uint16_t *input,
                                    int64_t begin, int64_t columns) {
  const uint16_t *inputs[REST_ROWS];
  vector first = {0}, second = {0};
  for (int row = 0; row < REST_ROWS; row++) inputs[row] = input;
  for (int64_t at = begin; at < columns; at += REST_SUMS) {
    vector_bits w = load_rest(rows, at), x = load_rest(inputs, at);
    first = add_product(first, firsts(w), firsts(x));
    second = add_product(second, seconds(w), seconds(x));
  }
  return fold(2, first, second);
}

/* The columns from `begin` of LANES rows, added up. */
INLINE vector multiply_rest(const uint16_t *const *rows, const uint16_t *input, int64_t begin,
                            int64_t columns) {
  vector sums[LANES / REST_ROWS];
  for (int i = 0; i < LANES / REST_ROWS; i++)
    sums[i] = multiply_rest_of_some(rows + i * REST_ROWS, input, begin, columns);
  fold_rows(sums, 1, 2);
  return fold(REST_ROWS, sums[0], sums[1]);
}

/* The products of LANES rows. */
INLINE vector multiply_rows(const uint16_t *const *rows, const uint16_t *input, int64_t columns,
                            int64_t ahead_bytes) {
  vector made[LANES];
  for (int row = 0; row < LANES; row += ROWS_AT_ONCE) {
    struct sums sums[ROWS_AT_ONCE] = {0};
    add_columns(sums, ROWS_AT_ONCE, rows + row, input, columns, ahead_bytes);
    for (int i = 0; i < ROWS_AT_ONCE; i++) made[row + i] = halve(sums + i);
  }
  vector total = add_up(made);
  int64_t rest = columns % SUMS;
  return rest ? total + multiply_rest(rows, input, columns - rest, columns) : total;
}

/* Bias and rounding. */
INLINE void finish(const float *totals, const uint16_t *bias, uint16_t *outputs, int64_t count) {
  for (int64_t row = 0; row < count; row++)
    outputs[row] = narrow(bias ? totals[row] + widen(bias[row]) : totals[row]);
}

INLINE void multiply_chunk(const struct gemv_job *job, int64_t matrix, int64_t begin, int64_t end) {
  const uint16_t *input = job->inputs + matrix * job->input_stride;
  for (int64_t row = begin; row < end; row += LANES) {
    const uint16_t *rows[LANES];
    int64_t count = end - row < LANES ? end - row : LANES;
    for (int64_t i = 0; i < LANES; i++) /* the last stands for those missing */
      rows[i] = job->weights[matrix] + (row + (i < count ? i : count - 1)) * job->columns;
    float totals[LANES];
    vector made = multiply_rows(rows, input, job->columns, job->ahead_bytes);
    memcpy(totals, &made, sizeof totals);
    finish(totals, job->biases ? job->biases[matrix] + row : 0,
           job->outputs + matrix * job->rows + row, count);
  }
}

static void gemv_work(void *data) {
  struct gemv_job *job = data;
  int64_t chunk;
  while ((chunk = take(&job->next)) < job->count * job->num_chunks) {
    int64_t begin = chunk % job->num_chunks * job->chunk_rows, end = begin + job->chunk_rows;
    multiply_chunk(job, chunk / job->num_chunks, begin, end < job->rows ? end : job->rows);
  }
}

/* How far on the bytes lie that are multiplied STEPS_AHEAD later: in the same rows, or in later ones. */
INLINE int64_t ahead_of(int64_t columns) {
  int64_t steps = columns / SUMS;
  if (steps > STEPS_AHEAD || steps == 0) return STEPS_AHEAD * SUMS * 2;
  return STEPS_AHEAD / steps * ROWS_AT_ONCE * columns * 2;
}

static void gemv(const uint16_t *const *weights, const uint16_t *const *biases, int64_t count,
                 const uint16_t *inputs, int64_t input_stride, uint16_t *outputs, int64_t rows,
                 int64_t columns, parallel_function *parallel, int64_t threads) {
  int64_t chunk_rows = CHUNK_BYTES / (columns * 2) / LANES * LANES;
  struct gemv_job job = {.weights = weights, .biases = biases, .inputs = inputs,
                         .outputs = outputs, .count = count, .input_stride = input_stride,
                         .rows = rows, .columns = columns, .ahead_bytes = ahead_of(columns)};
  job.chunk_rows = chunk_rows > LANES ? chunk_rows : LANES;
  job.num_chunks = (rows + job.chunk_rows - 1) / job.chunk_rows;
  share_out(gemv_work, &job, count * rows * columns * 2, parallel, threads);
}

static void gemv_one(const uint16_t *weight, const uint16_t *bias, const uint16_t *input,
                     uint16_t *output, int64_t rows, int64_t columns, parallel_function *parallel,
                     int64_t threads) {
  gemv(&weight, bias ? &bias : 0, 1, input, 0, output, rows, columns, parallel, threads);
}
