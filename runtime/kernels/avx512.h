/* What the sources that are compiled for AVX-512 share. */
#ifndef REWARDRT_AVX512_H
#define REWARDRT_AVX512_H

#include <immintrin.h>
#include <stddef.h>

#define INLINE static inline __attribute__((always_inline))

/* Loops over a tile are written out, so that it lies in registers. */
#define UNROLL _Pragma("GCC unroll 8")

/* A mask of the first `left` of 16 numbers. */
INLINE __mmask16 lanes(size_t left) { return left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1); }

#endif
