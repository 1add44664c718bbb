#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define ENTRIES portable_avx2_entries
#define LANES 8
#define TOKENS 6
#include "table.c"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
