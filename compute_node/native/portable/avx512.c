#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif

#define ENTRIES portable_avx512_entries
#define LANES 16
#define TOKENS 12
#include "table.c"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
