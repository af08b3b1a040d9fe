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

/* gcc's address sanitizer does not see loads and stores under a mask, where the ends of rows are: each lane is touched. */
#ifdef __SANITIZE_ADDRESS__
INLINE void touch(const void *from, size_t size, __mmask64 some) {
    for (size_t i = 0; i < 64; i++)
        if (some >> i & 1) (void)((const volatile char *)from)[i * size];
}
#define _mm512_maskz_loadu_ps(some, from) (touch(from, 4, some), _mm512_maskz_loadu_ps(some, from))
#define _mm512_mask_storeu_ps(to, some, x) (touch(to, 4, some), _mm512_mask_storeu_ps(to, some, x))
#define _mm512_mask_storeu_epi8(to, some, x) (touch(to, 1, some), _mm512_mask_storeu_epi8(to, some, x))
#endif

#define LOG2E 1.44269504088896340736f

/* 2^x for a finite x < 128; a relative error of 2e-7 (the polynomial is 2^f's minimax one over [-1/2, 1/2]) */
INLINE __m512 power_of_2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.326472615e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.671512991e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550733581e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402224243e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931470037e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1));
    return _mm512_scalef_ps(p, whole);
}

#endif
