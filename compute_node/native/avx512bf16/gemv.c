/* One token times bf16 matrices: the bits of oneDNN's matmul, at the speed of memory.
 *
 * oneDNN keeps a float32 accumulator an output, adds to it the products of two neighbouring columns
 * by one vdpbf16ps after the other, starts a new accumulator every 512 columns, adds these up in
 * order and rounds the sum to bf16. So does this file, for 16 rows at a time, which it transposes in
 * registers; oneDNN first writes a repacked copy of the matrix. That the bits are the same is not
 * taken for granted: compute_node/kernels/gemv.py finds out for each shape.
 */
#include <string.h>

#if defined(__x86_64__)
#include "tiles.h"

enum {
  AHEAD_BYTES = 16 << 10, /* prefetched so far ahead; rows shorter than a page need it */
  CHUNK_BYTES = 128 << 10 /* what a thread takes at a time */
};

struct job {
  const uint16_t *const *weights; /* count times [rows, columns] */
  const uint16_t *const *biases;  /* count times [rows], or null */
  const uint16_t *inputs;         /* a row every input_stride numbers */
  uint16_t *outputs;              /* [count, rows] */
  int64_t count, input_stride, rows, columns;
  int64_t chunk_rows, num_chunks; /* of one matrix */
  int64_t next;                   /* chunk of all matrices; threads take one after the other */
};

/* One accumulator of `count` rows: columns [begin, end). Fetches what lies AHEAD_BYTES on, up to
 * `limit`, in the order of addresses. */
INLINE __m512 accumulate(const char *rows, int64_t count, int64_t columns, const uint16_t *input,
                         int64_t begin, int64_t end, const char *limit) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t column = begin; column < end; column += COLUMNS) {
    const char *line = rows + column * 2;
    const char *ahead = rows + AHEAD_BYTES + column / COLUMNS * ROWS * LINE_BYTES;
    int fetch = ahead + ROWS * LINE_BYTES <= limit;
    int32_t pairs[ROWS];
    __m512i tile[ROWS];
    memcpy(pairs, input + column, sizeof pairs);
    for (int r = 0; r < ROWS; r++) {
      tile[r] = _mm512_loadu_si512(line + (r < count ? r : count - 1) * columns * 2);
      if (fetch) _mm_prefetch(ahead + r * LINE_BYTES, _MM_HINT_T1);
    }
    transpose(tile);
    for (int c = 0; c < ROWS; c++)
      sum = _mm512_dpbf16_ps(sum, (__m512bh)tile[c], (__m512bh)_mm512_set1_epi32(pairs[c]));
  }
  return sum;
}

/* Up to 16 outputs. */
INLINE void multiply_rows(const char *rows, int64_t count, int64_t columns, const uint16_t *input,
                          const uint16_t *bias, uint16_t *output, const char *limit) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t begin = 0; begin < columns; begin += ACCUMULATOR_COLUMNS) {
    int64_t end = begin + ACCUMULATOR_COLUMNS < columns ? begin + ACCUMULATOR_COLUMNS : columns;
    __m512 sum = accumulate(rows, count, columns, input, begin, end, limit);
    total = add_accumulator(total, sum, begin == 0);
  }
  finish_rows(total, count, bias, output);
}

INLINE void multiply_chunk(const struct job *job, int64_t matrix, int64_t begin, int64_t end) {
  const uint16_t *weight = job->weights[matrix];
  const char *first = (const char *)(weight + begin * job->columns);
  const char *limit = (const char *)(weight + end * job->columns);
  for (int64_t at = 0; at < AHEAD_BYTES && first + at < limit; at += LINE_BYTES)
    _mm_prefetch(first + at, _MM_HINT_T1);
  for (int64_t row = begin; row < end; row += ROWS)
    multiply_rows((const char *)(weight + row * job->columns), end - row < ROWS ? end - row : ROWS,
                  job->columns, job->inputs + matrix * job->input_stride,
                  job->biases ? job->biases[matrix] + row : 0,
                  job->outputs + matrix * job->rows + row, limit);
}

__attribute__((target(TARGET))) static void work(void *data) {
  struct job *job = data;
  int64_t chunk;
  while ((chunk = take(&job->next)) < job->count * job->num_chunks) {
    int64_t begin = chunk % job->num_chunks * job->chunk_rows, end = begin + job->chunk_rows;
    multiply_chunk(job, chunk / job->num_chunks, begin, end < job->rows ? end : job->rows);
  }
}

/* outputs[i] = weights[i] times inputs[i], or times the same input where input_stride is 0.
 * columns: a multiple of 32. parallel: null for one thread. */
void gemv(const uint16_t *const *weights, const uint16_t *const *biases, int64_t count,
          const uint16_t *inputs, int64_t input_stride, uint16_t *outputs, int64_t rows,
          int64_t columns, parallel_function *parallel, int64_t threads) {
  int64_t chunk_rows = CHUNK_BYTES / (columns * 2) / ROWS * ROWS;
  struct job job = {weights, biases, inputs, outputs, count, input_stride, rows, columns, 0, 0, 0};
  job.chunk_rows = chunk_rows > ROWS ? chunk_rows : ROWS;
  job.num_chunks = (rows + job.chunk_rows - 1) / job.chunk_rows;
  if (parallel && threads > 1 && count * rows * columns * 2 >= PARALLEL_BYTES)
    parallel(work, &job, (unsigned)threads, 0);
  else
    work(&job);
}

/* output = weight times input; bias may be null. */
void gemv_one(const uint16_t *weight, const uint16_t *bias, const uint16_t *input,
              uint16_t *output, int64_t rows, int64_t columns, parallel_function *parallel,
              int64_t threads) {
  gemv(&weight, bias ? &bias : 0, 1, input, 0, output, rows, columns, parallel, threads);
}

#endif
