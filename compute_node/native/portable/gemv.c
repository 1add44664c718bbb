/* One token times bf16 matrices, with the bits of torch's own loop on CPUs without bf16 instructions.
 *
 * torch keeps 64 float32 sums for each output, adds the products of 64 neighbouring columns to them,
 * then adds the sums up in halves. The columns beyond a multiple of 64 have eight sums of their own.
 */
#include "numbers.h"

enum {
  SUMS = 64,
  REST_SUMS = 8,
  CHUNK_BYTES = 128 << 10 /* what a thread takes at a time */
};

/* What a row has of its output so far. */
struct dot {
  float sums[SUMS], rest[REST_SUMS];
};

struct gemv_job {
  const uint16_t *const *weights; /* count times [rows, columns] */
  const uint16_t *const *biases;  /* count times [rows], or null */
  const uint16_t *inputs;         /* a row every input_stride numbers */
  uint16_t *outputs;              /* [count, rows] */
  int64_t count, input_stride, rows, columns;
  int64_t chunk_rows, num_chunks; /* of one matrix */
  int64_t next;                   /* chunk of all matrices; threads take one after the other */
};

FUSED_BEGIN

/* More columns of a row. Only the last call may bring columns beyond a multiple of SUMS. */
INLINE void add_columns(struct dot *dot, const uint16_t *row, const uint16_t *input, int64_t columns) {
  float sums[SUMS];
  int64_t at = 0;
  memcpy(sums, dot->sums, sizeof sums);
  for (; at + SUMS <= columns; at += SUMS)
    for (int i = 0; i < SUMS; i++) sums[i] += widen(row[at + i]) * widen(input[at + i]);
  memcpy(dot->sums, sums, sizeof sums);
  for (; at < columns; at += REST_SUMS)
    for (int i = 0; i < REST_SUMS; i++) dot->rest[i] += widen(row[at + i]) * widen(input[at + i]);
}

FUSED_END

INLINE float add_up(float *sums, int count) {
  for (int half = count / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[half + i];
  return sums[0];
}

/* columns: of the whole row */
INLINE uint16_t output_of(struct dot *dot, int64_t columns, const uint16_t *bias) {
  float total = add_up(dot->sums, SUMS);
  if (columns % SUMS) total += add_up(dot->rest, REST_SUMS);
  return narrow(bias ? total + widen(*bias) : total);
}

INLINE void multiply_rows(const struct gemv_job *job, int64_t matrix, int64_t begin, int64_t end) {
  const uint16_t *input = job->inputs + matrix * job->input_stride;
  for (int64_t row = begin; row < end; row++) {
    struct dot dot = {{0}, {0}};
    add_columns(&dot, job->weights[matrix] + row * job->columns, input, job->columns);
    job->outputs[matrix * job->rows + row] =
        output_of(&dot, job->columns, job->biases ? job->biases[matrix] + row : 0);
  }
}

static void gemv_work(void *data) {
  struct gemv_job *job = data;
  int64_t chunk;
  while ((chunk = take(&job->next)) < job->count * job->num_chunks) {
    int64_t begin = chunk % job->num_chunks * job->chunk_rows, end = begin + job->chunk_rows;
    multiply_rows(job, chunk / job->num_chunks, begin, end < job->rows ? end : job->rows);
  }
}

static void gemv(const uint16_t *const *weights, const uint16_t *const *biases, int64_t count,
                 const uint16_t *inputs, int64_t input_stride, uint16_t *outputs, int64_t rows,
                 int64_t columns, parallel_function *parallel, int64_t threads) {
  int64_t chunk_rows = CHUNK_BYTES / (columns * 2);
  struct gemv_job job = {weights, biases, inputs, outputs, count, input_stride, rows, columns, 0, 0, 0};
  job.chunk_rows = chunk_rows > 1 ? chunk_rows : 1;
  job.num_chunks = (rows + job.chunk_rows - 1) / job.chunk_rows;
  share_out(gemv_work, &job, count * rows * columns * 2, parallel, threads);
}

static void gemv_one(const uint16_t *weight, const uint16_t *bias, const uint16_t *input,
                     uint16_t *output, int64_t rows, int64_t columns, parallel_function *parallel,
                     int64_t threads) {
  gemv(&weight, bias ? &bias : 0, 1, input, 0, output, rows, columns, parallel, threads);
}
