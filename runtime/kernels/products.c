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

/* A tile of results [rows][PANEL] of one plane, in steps of `finer` times the task's, added to what there is.
 *
 * `rows` is a constant where this is called: the sums lie in registers, and stay there until they are scaled only because
 * they are said to be needed there.
 */
typedef struct {
    const Product *task;
    const uint8_t *plane;
    size_t token, panel;
    const int8_t *ahead; /* a part of the panel that is wanted next */
    const float *added;  /* rows of `added_stride` numbers, or NULL */
    float *to;           /* rows of `stride` numbers */
    size_t added_stride, stride;
    float finer;
} Tile;

INLINE void multiply_rows(int rows, const Tile *t) {
    const size_t channels = t->task->channels, column = t->panel * PANEL, left = t->task->columns - column;
    const uint8_t *plane = t->plane + t->token * channels;
    const int8_t *weight = t->task->weight + column * channels, *ahead = t->ahead;
    __m512i sums[ROWS][4];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_loadu_si512(t->task->starts + column + 16 * c);
    for (size_t i = 0; i < channels; i += 4, weight += 4 * PANEL, ahead += PANEL) {
        _mm_prefetch(ahead, _MM_HINT_T1);
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
        for (int c = 0; c < 4; c++) __asm__ volatile("" : "+v"(sums[r][c]));
    UNROLL
    for (size_t c = 0; c < 4; c++) {
        const __mmask16 some = 16 * c < left ? lanes(left - 16 * c) : 0;
        const __m512 steps = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, t->task->column_steps + column + 16 * c),
                                           _mm512_set1_ps(t->finer));
        UNROLL
        for (int r = 0; r < rows; r++) {
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), steps);
            y = _mm512_mul_ps(y, _mm512_set1_ps(t->task->steps[t->token + r]));
            if (t->added) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(some, t->added + r * t->added_stride + 16 * c));
            _mm512_mask_storeu_ps(t->to + r * t->stride + 16 * c, some, y);
        }
    }
}

#define MULTIPLY(rows) \
    static __attribute__((noinline)) void multiply_##rows(const Tile *tile) { multiply_rows(rows, tile); }
MULTIPLY(1)
MULTIPLY(2)
MULTIPLY(3)
MULTIPLY(4)
MULTIPLY(5)
MULTIPLY(6)
static void (*const MULTIPLIERS[])(const Tile *) = {multiply_1, multiply_2, multiply_3,
                                                    multiply_4, multiply_5, multiply_6};

/* Both planes' tiles, if there are two. */
INLINE void multiply_tile(size_t rows, Tile tile) {
    tile.plane = tile.task->plane;
    tile.finer = 1;
    MULTIPLIERS[rows - 1](&tile);
    if (!tile.task->rest) return;
    tile.plane = tile.task->rest;
    tile.finer = FINER;
    tile.added = tile.to;
    tile.added_stride = tile.stride;
    MULTIPLIERS[rows - 1](&tile);
}

void multiply(const Product *task, const Product *gate, size_t first, size_t end, size_t panel, const int8_t *ahead) {
    const size_t columns = task->columns, column = panel * PANEL;
    const size_t quarter = task->channels * PANEL / 4; /* of a panel is what a tile fetches ahead */
    size_t rows, tiles = (end - first + ROWS - 1) / ROWS, fetched = 0;
    for (size_t token = first; token < end; token += rows, tiles--) {
        rows = (end - token + tiles - 1) / tiles; /* as even as can be: a tile of few rows waits for the weight */
        const size_t at = token * columns + column;
        const int8_t *then = gate ? gate->weight + column * gate->channels : ahead;
        Tile tile = {.task = task, .token = token, .panel = panel, .ahead = then + fetched, .to = task->result + at,
                     .stride = columns, .added = task->added ? task->added + at : NULL, .added_stride = columns};
        multiply_tile(rows, tile);
        if (gate) {
            float gates[ROWS * PANEL];
            multiply_tile(rows, (Tile){.task = gate, .token = token, .panel = panel, .ahead = ahead + fetched,
                                       .to = gates, .stride = PANEL});
            for (size_t r = 0; r < rows; r++)
                for (size_t i = 0; i < PANEL && column + i < columns; i += 16) {
                    const __mmask16 some = lanes(columns - column - i);
                    const __m512 x = _mm512_maskz_loadu_ps(some, tile.to + r * columns + i);
                    const __m512 opened = silu(_mm512_maskz_loadu_ps(some, gates + r * PANEL + i));
                    _mm512_mask_storeu_ps(tile.to + r * columns + i, some, _mm512_mul_ps(opened, x));
                }
        }
        if (fetched < 3 * quarter) fetched += quarter;
    }
}
