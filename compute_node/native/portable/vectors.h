/* Registers of LANES float32 numbers, what becomes bf16 numbers in them, and sums of whole registers. */
#ifndef FLASHMOE_PORTABLE_VECTORS_H
#define FLASHMOE_PORTABLE_VECTORS_H

#if LANES > 4
#include <immintrin.h>
#endif

#include "numbers.h"

typedef float vector __attribute__((vector_size(LANES * 4)));
typedef uint32_t vector_bits __attribute__((vector_size(LANES * 4)));

/* sum + a * b, rounded once where the CPU can. Products of two bf16 numbers are exact in float32, so
 * this makes a difference for speed, and for bits near underflow only, where torch's are fused too. A
 * compiler's leave to contract is no way to ask for it: GCC drops that with every inlined function. */
INLINE vector add_product(vector sum, vector a, vector b) {
#if LANES == 16
  return (vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif LANES == 8
  return (vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}

/* The same number in every lane. */
INLINE vector splat(float number) { return number - (vector){0}; }

/* Of 2 * LANES bf16 numbers, a pair in each lane: the first, and the second of each pair. */
INLINE vector firsts(vector_bits pairs) { return (vector)(pairs << 16); }
INLINE vector seconds(vector_bits pairs) { return (vector)(pairs & 0xffff0000u); }

INLINE vector_bits load_pairs(const uint16_t *numbers) {
  vector_bits pairs;
  memcpy(&pairs, numbers, sizeof pairs);
  return pairs;
}

/* Two pairs of bf16 numbers, each pair in two neighbouring lanes, over and over. */
INLINE vector_bits load_two_pairs_twice(const uint16_t *numbers) {
#if LANES > 4
  int64_t both;
  memcpy(&both, numbers, sizeof both);
#endif
#if LANES == 16
  return (vector_bits)_mm512_shuffle_epi32(_mm512_set1_epi64(both), 0x50);
#elif LANES == 8
  return (vector_bits)_mm256_shuffle_epi32(_mm256_set1_epi64x(both), 0x50);
#else
  uint32_t pairs[2];
  memcpy(pairs, numbers, sizeof pairs);
  return (vector_bits){pairs[0], pairs[0], pairs[1], pairs[1]};
#endif
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vector_bits){__VA_ARGS__})
#endif

/* Every 2 * half lanes of `a`, then of `b`, become half of them: the second half added to the first.
 * half: a constant, at most LANES / 2 */
INLINE vector fold(const int half, vector a, vector b) {
#if LANES == 16
  if (half == 8)
    return SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  if (half == 4)
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  if (half == 2)
    return SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LANES == 8
  if (half == 4)
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  if (half == 2)
    return SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
  return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  if (half == 2) return SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7);
  return SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

#endif
