/* Chooses the entries for this CPU. */
#include "entries.h"
#include "version.h"

int64_t kernels_version(void) { return KERNELS_VERSION; }

#if defined(__x86_64__)
static int has_avx512bf16(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

static int has_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static int has_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static const struct entries *portable(void) {
  if (has_avx512()) return &portable_avx512_entries;
  return has_avx2() ? &portable_avx2_entries : &portable_entries;
}

/* only_portable: leaves out the entries that a CPU needs a certain instruction set for. */
const struct entries *kernels_entries(int64_t only_portable) {
  __builtin_cpu_init();
  return !only_portable && has_avx512bf16() ? &avx512bf16_entries : portable();
}
#else
const struct entries *kernels_entries(int64_t only_portable) {
  (void)only_portable;
  return &portable_entries;
}
#endif
