/* Rounding of tokens and products of integers, with AVX-512 VNNI. See quantize.py for the formulas. */
#include "avx512.h"
#include "kernels.h"

#include <math.h>
#include <string.h>

static const float TINY = 1e-30f;        /* of a token whose channels are all 0: it is divided by */
static const float FINER = 1.0f / 254.0f; /* a step of the second plane in those of the first */

/* Lane i with lane i ^ distance: the sum in the lower of the two, the difference in the higher. */
#define BUTTERFLY(x, swapped, distance) _mm512_fmadd_ps(x, signs(distance), swapped)

INLINE __m512 signs(int distance) {
    const __mmask16 higher = distance == 1 ? 0xAAAA : distance == 2 ? 0xCCCC : distance == 4 ? 0xF0F0 : 0xFF00;
    return _mm512_mask_blend_ps(higher, _mm512_set1_ps(1), _mm512_set1_ps(-1));
}

/* The product of MIXED numbers with a matrix of 1 and -1, Hadamard's: butterflies within the four registers, then between
 * them. What it lacks, a factor of 1 / sqrt(MIXED), is left to the step.
 */
INLINE void mix(__m512 x[4]) {
    UNROLL
    for (int r = 0; r < 4; r++) {
        x[r] = BUTTERFLY(x[r], _mm512_permute_ps(x[r], 0xB1), 1);
        x[r] = BUTTERFLY(x[r], _mm512_permute_ps(x[r], 0x4E), 2);
        x[r] = BUTTERFLY(x[r], _mm512_shuffle_f32x4(x[r], x[r], 0xB1), 4);
        x[r] = BUTTERFLY(x[r], _mm512_shuffle_f32x4(x[r], x[r], 0x4E), 8);
    }
    const __m512 sums[2] = {_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3])};
    const __m512 differences[2] = {_mm512_sub_ps(x[0], x[1]), _mm512_sub_ps(x[2], x[3])};
    x[0] = _mm512_add_ps(sums[0], sums[1]);
    x[1] = _mm512_add_ps(differences[0], differences[1]);
    x[2] = _mm512_sub_ps(sums[0], sums[1]);
    x[3] = _mm512_sub_ps(differences[0], differences[1]);
}

/* 64 integers as bytes around 128; the least of them all goes into `least`, in 16 bits. */
INLINE __m512i around_128(const __m512i integers[4], __m512i *least) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i zero = _mm512_set1_epi16(128);
    const __m512i low = _mm512_packs_epi32(integers[0], integers[1]), high = _mm512_packs_epi32(integers[2], integers[3]);
    *least = _mm512_min_epi16(*least, _mm512_min_epi16(low, high));
    const __m512i bytes = _mm512_packus_epi16(_mm512_add_epi16(low, zero), _mm512_add_epi16(high, zero));
    return _mm512_permutexvar_epi32(order, bytes); /* they were packed within each 128 bits */
}

/* 1 / x for x >= 1, a relative error of 2^-23: the processor's guess of 14 bits, and a step of Newton's */
INLINE __m512 reciprocal(__m512 x) {
    const __m512 guess = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(2)));
}

INLINE __m512 silu(__m512 x) {
    __m512 minus = _mm512_mul_ps(x, _mm512_set1_ps(-LOG2E));
    minus = _mm512_max_ps(_mm512_set1_ps(-126), _mm512_min_ps(_mm512_set1_ps(126), minus));
    const __m512 power = power_of_2(minus);
    return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(power, _mm512_set1_ps(1))));
}

/* Writes a token, gated, normalised, scaled and mixed where that is asked for, and returns its largest value. */
INLINE __m512 prepare(const Rounding *task, size_t token, float *out) {
    const size_t channels = task->channels;
    const float *row = task->values + token * channels, *gates = task->gates ? task->gates + token * channels : NULL;
    __m512 factor = _mm512_set1_ps(1), largest = _mm512_set1_ps(TINY);
    if (task->norm) {
        __m512 sums[4] = {0};
        for (size_t i = 0; i < channels; i += 64)
            UNROLL
            for (size_t r = 0; r < 4; r++) {
                const size_t at = i + 16 * r;
                const __m512 x = _mm512_maskz_loadu_ps(at < channels ? lanes(channels - at) : 0, row + at);
                sums[r] = _mm512_fmadd_ps(x, x, sums[r]);
            }
        const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
        factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)channels + task->epsilon));
    }
    for (size_t i = 0; i < channels; i += MIXED) {
        __m512 x[4];
        UNROLL
        for (size_t r = 0; r < 4; r++) {
            const size_t at = i + 16 * r;
            const __mmask16 some = at < channels ? lanes(channels - at) : 0;
            x[r] = _mm512_maskz_loadu_ps(some, row + at);
            if (gates) x[r] = _mm512_mul_ps(silu(_mm512_maskz_loadu_ps(some, gates + at)), x[r]);
            if (task->gain)
                x[r] = _mm512_mul_ps(_mm512_mul_ps(x[r], factor), _mm512_maskz_loadu_ps(some, task->gain + at));
        }
        if (task->mixed) mix(x);
        UNROLL
        for (size_t r = 0; r < 4; r++) { /* scratch has room for what is over */
            _mm512_storeu_ps(out + i + 16 * r, x[r]);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(x[r])); /* a NaN may be lost here: it is looked for below */
        }
    }
    return largest;
}

void round_tokens(const Rounding *task, float *scratch, size_t first, size_t end) {
    const size_t channels = task->channels;
    for (size_t token = first; token < end; token++) {
        const float step = _mm512_reduce_max_ps(prepare(task, token, scratch)) * (1.0f / 127.0f);
        const __m512 steps = _mm512_set1_ps(step), in_steps = _mm512_set1_ps(1.0f / step);
        const __m512 in_finer = _mm512_set1_ps(254.0f / step);
        __m512i least = _mm512_setzero_si512();
        for (size_t i = 0; i < channels; i += 64) {
            const __mmask64 some = channels - i >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (channels - i)) - 1;
            __m512 x[4];
            __m512i integers[4];
            UNROLL
            for (size_t r = 0; r < 4; r++) {
                x[r] = _mm512_loadu_ps(scratch + i + 16 * r);
                integers[r] = _mm512_cvtps_epi32(_mm512_mul_ps(x[r], in_steps));
            }
            _mm512_mask_storeu_epi8(task->plane + token * channels + i, some, around_128(integers, &least));
            if (!task->rest) continue;
            UNROLL
            for (size_t r = 0; r < 4; r++) {
                const __m512 rest = _mm512_sub_ps(x[r], _mm512_mul_ps(_mm512_cvtepi32_ps(integers[r]), steps));
                integers[r] = _mm512_cvtps_epi32(_mm512_mul_ps(rest, in_finer));
            }
            _mm512_mask_storeu_epi8(task->rest + token * channels + i, some, around_128(integers, &least));
        }
        /* What is not a number became the least integer there is; integers cannot say that there was none. */
        const int bad = _mm512_cmpeq_epi16_mask(least, _mm512_set1_epi16(-32768)) != 0;
        task->steps[token] = bad ? __builtin_nanf("") : task->mixed ? step * 0.125f : step; /* 1 / sqrt(MIXED) */
    }
}

void panel_starts(const int8_t *panel, size_t channels, int32_t starts[PANEL]) {
    __m512i sums[PANEL / 16] = {0};
    for (size_t i = 0; i < channels * PANEL; i += 4 * PANEL)
        for (size_t c = 0; c < PANEL / 16; c++) {
            const __m512i four = _mm512_loadu_si512(panel + i + 64 * c);
            sums[c] = _mm512_dpbusd_epi32(sums[c], _mm512_set1_epi8((char)128), four);
        }
    for (size_t c = 0; c < PANEL / 16; c++)
        _mm512_storeu_si512(starts + 16 * c, _mm512_sub_epi32(_mm512_setzero_si512(), sums[c]));
}

/* Sums of rows x PANEL products; `rows` is a constant where this is called. Functions of their own: where a tile's sums
 * were stored and scaled in the loop's function, compilers kept them in memory all along.
 */
typedef int32_t Sums[ROWS][PANEL];

INLINE void add_up(int rows, const uint8_t *plane, const int8_t *weight, size_t channels, const int32_t *starts,
                   const int8_t *ahead, Sums stored) {
    __m512i sums[ROWS][4];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_loadu_si512(starts + 16 * c);
    for (size_t i = 0; i < channels; i += 4, weight += 4 * PANEL) {
        _mm_prefetch(ahead + i * PANEL / 4, _MM_HINT_T1);
        const __m512i w[4] = {_mm512_loadu_si512(weight), _mm512_loadu_si512(weight + 64),
                              _mm512_loadu_si512(weight + 128), _mm512_loadu_si512(weight + 192)};
        UNROLL
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, plane + r * channels + i, 4);
            const __m512i x = _mm512_set1_epi32(four);
            UNROLL
            for (int c = 0; c < 4; c++) sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], x, w[c]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < 4; c++) _mm512_storeu_si512(stored[r] + 16 * c, sums[r][c]);
}

#define ADD_UP(rows)                                                                                                  \
    static __attribute__((noinline)) void add_up_##rows(const uint8_t *plane, const int8_t *weight, size_t channels, \
                                                        const int32_t *starts, const int8_t *ahead, Sums stored) {  \
        add_up(rows, plane, weight, channels, starts, ahead, stored);                                               \
    }
ADD_UP(1)
ADD_UP(2)
ADD_UP(3)
ADD_UP(4)
ADD_UP(5)
ADD_UP(6)
static void (*const ADDERS[])(const uint8_t *, const int8_t *, size_t, const int32_t *, const int8_t *, Sums) = {
    add_up_1, add_up_2, add_up_3, add_up_4, add_up_5, add_up_6};

/* All of the result, from one plane; the first of two parts; or the second, and with it the result. */
typedef enum { ALL, FIRST, SECOND } Part;

/* A tile of results [rows][PANEL], at `to` with `stride` numbers from row to row. */
INLINE void product_tile(Part part, const Product *task, size_t rows, size_t token, size_t panel, const int8_t *ahead,
                         float *to, size_t stride) {
    const size_t columns = task->columns, column = panel * PANEL;
    const uint8_t *plane = part == SECOND ? task->rest : task->plane;
    Sums sums;
    ADDERS[rows - 1](plane + token * task->channels, task->weight + column * task->channels, task->channels,
                     task->starts + column, ahead, sums);
    for (size_t at = 0; at < PANEL && column + at < columns; at += 16) {
        const __mmask16 some = lanes(columns - column - at);
        __m512 steps = _mm512_maskz_loadu_ps(some, task->column_steps + column + at);
        if (part == SECOND) steps = _mm512_mul_ps(steps, _mm512_set1_ps(FINER));
        for (size_t r = 0; r < rows; r++) {
            float *result = to + r * stride + at;
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums[r] + at)), steps);
            if (part == SECOND) y = _mm512_add_ps(_mm512_maskz_loadu_ps(some, result), y);
            if (part != FIRST) y = _mm512_mul_ps(y, _mm512_set1_ps(task->steps[token + r]));
            if (part != FIRST && task->added) {
                const float *added = task->added + (token + r) * columns + column + at;
                y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(some, added));
            }
            _mm512_mask_storeu_ps(result, some, y);
        }
    }
}

INLINE void tile(const Product *task, size_t rows, size_t token, size_t panel, const int8_t *ahead, float *to,
                 size_t stride) {
    if (task->rest) {
        product_tile(FIRST, task, rows, token, panel, ahead, to, stride);
        product_tile(SECOND, task, rows, token, panel, ahead, to, stride);
    } else {
        product_tile(ALL, task, rows, token, panel, ahead, to, stride);
    }
}

void multiply(const Product *task, const Product *gate, size_t first, size_t end, size_t panel, const int8_t *ahead) {
    const size_t columns = task->columns, column = panel * PANEL;
    const int8_t *gate_panel = gate ? gate->weight + column * gate->channels : NULL;
    const size_t quarter = task->channels * PANEL / 4; /* of a panel is what a tile fetches ahead */
    size_t rows, tiles = (end - first + ROWS - 1) / ROWS, fetched = 0;
    for (size_t token = first; token < end; token += rows, tiles--) {
        rows = (end - token + tiles - 1) / tiles; /* as even as can be: a tile of few rows waits for the weight */
        float *to = task->result + token * columns + column;
        tile(task, rows, token, panel, (gate ? gate_panel : ahead) + fetched, to, columns);
        if (gate) {
            float gates[ROWS * PANEL];
            tile(gate, rows, token, panel, ahead + fetched, gates, PANEL);
            for (size_t r = 0; r < rows; r++)
                for (size_t at = 0; at < PANEL && column + at < columns; at += 16) {
                    const __mmask16 some = lanes(columns - column - at);
                    const __m512 x = _mm512_maskz_loadu_ps(some, to + r * columns + at);
                    const __m512 opened = silu(_mm512_maskz_loadu_ps(some, gates + r * PANEL + at));
                    _mm512_mask_storeu_ps(to + r * columns + at, some, _mm512_mul_ps(opened, x));
                }
        }
        if (fetched < 3 * quarter) fetched += quarter;
    }
}
