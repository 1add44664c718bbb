/* Several tokens times a bf16 matrix, with the bits of oneDNN's matmul and no kernel generated.
 *
 * oneDNN generates code for every number of tokens, which takes longer than a small product, and
 * keeps it in memory. Its order of additions is that of gemv.c, but for where it starts a new
 * accumulator: compute_node/kernels/gemm.py finds out where, for each shape and number of tokens.
 *
 * 16 rows are transposed once, or unpacked where they are lossless, a panel of columns at a time, and
 * multiplied with all tokens.
 */
#if defined(__x86_64__)
#include "lossless.h"

enum {
  PANEL_TILES = 16, /* 16 KiB: half of the first cache */
  TOKENS = 12,      /* at once: an accumulator a register */
  GROUP_TOKENS = 256 /* that go through a panel before the next is made */
};

struct job {
  const void *const *weight;     /* one array [rows, columns], or PARTS of them */
  int64_t lossless;              /* the latter */
  const uint16_t *bias, *inputs; /* [rows], or null; [tokens, columns] */
  uint16_t *outputs;             /* [tokens, rows] */
  int64_t tokens, rows, columns, accumulator_columns;
  int64_t next; /* block of 16 rows; threads take one after the other */
};

/* Sums of the tokens over 16 rows: of the accumulator in use, and of those before it. */
struct sums {
  float present[GROUP_TOKENS][ROWS], total[GROUP_TOKENS][ROWS];
};

/* Where a block of 16 rows comes from. */
struct source {
  const uint16_t *rows; /* 16 of them, or `count`, the last of which stands for those missing */
  int64_t count, columns;
  struct matrix matrix; /* of a lossless one, and what of its block is to come */
  struct cursor cursor;
  __m512i bases;
  int64_t block;
};

INLINE struct source source_of(const struct job *job, int64_t block) {
  int64_t left = job->rows - block * ROWS;
  struct source source = {.count = left < ROWS ? left : ROWS, .columns = job->columns, .block = block};
  if (job->lossless) {
    source.matrix = matrix_of(job->weight);
    source.cursor = cursor_of(&source.matrix, block);
    source.bases = bases_of(&source.matrix, block);
  } else
    source.rows = (const uint16_t *)job->weight[0] + block * ROWS * job->columns;
  return source;
}

/* Tiles `begin` to `end` of a block's rows, register by register as they are multiplied; called for
 * one range after the other. */
INLINE void fill_panel(struct source *source, int64_t lossless, int64_t begin, int64_t end,
                       __m512i *panel) {
  for (int64_t tile = begin; tile < end; tile++, panel += ROWS) {
    if (lossless) {
      int64_t at = (source->block * (source->columns / COLUMNS) + tile) * TILE;
      unpack_tile(&source->matrix, at, tile, source->bases, &source->cursor, panel);
      continue;
    }
    const uint16_t *rows = source->rows + tile * COLUMNS;
    for (int r = 0; r < ROWS; r++)
      panel[r] =
          _mm512_loadu_si512(rows + (r < source->count ? r : source->count - 1) * source->columns);
    transpose(panel);
  }
}

INLINE void multiply_tokens(const __m512i *panel, int64_t tiles, const uint16_t *inputs,
                            int64_t stride, const int tokens, float (*present)[ROWS]) {
  __m512 sum[TOKENS];
  for (int t = 0; t < tokens; t++) sum[t] = _mm512_loadu_ps(present[t]);
  for (int64_t c = 0; c < tiles * ROWS; c++)
    for (int t = 0; t < tokens; t++) {
      int32_t pair;
      memcpy(&pair, inputs + t * stride + 2 * c, sizeof pair);
      sum[t] = _mm512_dpbf16_ps(sum[t], (__m512bh)panel[c], (__m512bh)_mm512_set1_epi32(pair));
    }
  for (int t = 0; t < tokens; t++) _mm512_storeu_ps(present[t], sum[t]);
}

/* Constant numbers of tokens, so that accumulators are registers. */
INLINE void multiply_panel(const __m512i *panel, int64_t tiles, const uint16_t *inputs,
                           int64_t stride, int64_t tokens, float (*present)[ROWS]) {
  for (int64_t at = 0; at < tokens;) {
    const uint16_t *input = inputs + at * stride;
    int64_t left = tokens - at;
    if (left >= TOKENS) {
      multiply_tokens(panel, tiles, input, stride, TOKENS, present + at);
      at += TOKENS;
    } else if (left >= 8) {
      multiply_tokens(panel, tiles, input, stride, 8, present + at);
      at += 8;
    } else if (left >= 4) {
      multiply_tokens(panel, tiles, input, stride, 4, present + at);
      at += 4;
    } else if (left >= 2) {
      multiply_tokens(panel, tiles, input, stride, 2, present + at);
      at += 2;
    } else {
      multiply_tokens(panel, tiles, input, stride, 1, present + at);
      at += 1;
    }
  }
}

INLINE void multiply_block(const struct job *job, int64_t block, __m512i *panel,
                           struct sums *sums) {
  int64_t row = block * ROWS;
  struct source source = source_of(job, block);
  const int64_t panel_columns = PANEL_TILES * COLUMNS;
  for (int64_t begin = 0; begin < job->columns; begin += job->accumulator_columns) {
    int64_t end = begin + job->accumulator_columns;
    if (end > job->columns) end = job->columns;
    memset(sums->present, 0, (size_t)job->tokens * sizeof sums->present[0]);
    for (int64_t column = begin; column < end; column += panel_columns) {
      int64_t width = end - column < panel_columns ? end - column : panel_columns;
      int64_t tile = column / COLUMNS;
      fill_panel(&source, job->lossless, tile, tile + width / COLUMNS, panel);
      multiply_panel(panel, width / COLUMNS, job->inputs + column, job->columns, job->tokens,
                     sums->present);
    }
    for (int64_t t = 0; t < job->tokens; t++) {
      __m512 total = _mm512_loadu_ps(sums->total[t]), sum = _mm512_loadu_ps(sums->present[t]);
      _mm512_storeu_ps(sums->total[t], add_accumulator(total, sum, begin == 0));
    }
  }
  for (int64_t t = 0; t < job->tokens; t++)
    finish_rows(_mm512_loadu_ps(sums->total[t]), source.count, job->bias ? job->bias + row : 0,
                job->outputs + t * job->rows + row);
}

__attribute__((target(TARGET))) static void work(void *data) {
  struct job *job = data;
  struct sums sums;
  __m512i panel[PANEL_TILES * ROWS];
  int64_t block, num_blocks = (job->rows + ROWS - 1) / ROWS;
  while ((block = take(&job->next)) < num_blocks) multiply_block(job, block, panel, &sums);
}

/* outputs [tokens, rows] = inputs [tokens, columns] times the matrix [rows, columns]: one array of bf16,
 * or the arrays of a lossless one.
 * columns, accumulator_columns: multiples of 32. parallel: null for one thread. */
void gemm(const void *const *weight, int64_t lossless, const uint16_t *bias, const uint16_t *inputs,
          uint16_t *outputs, int64_t tokens, int64_t rows, int64_t columns,
          int64_t accumulator_columns, parallel_function *parallel, int64_t threads) {
  for (; tokens > 0; tokens -= GROUP_TOKENS) {
    int64_t group = tokens < GROUP_TOKENS ? tokens : GROUP_TOKENS;
    struct job job = {weight, lossless, bias, inputs, outputs, group,
                      rows,   columns,  accumulator_columns,   0};
    if (parallel && threads > 1 && group * rows * columns * 2 >= PARALLEL_BYTES)
      parallel(work, &job, (unsigned)threads, 0);
    else
      work(&job);
    inputs += group * columns;
    outputs += group * rows;
  }
}

#endif
