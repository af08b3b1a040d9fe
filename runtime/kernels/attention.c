/* Causal attention with AVX-512 VNNI and bf16: a tile of queries with all their keys, softmax, the sum of values.
 *
 * A tile's scores lie in a buffer of its own, [ROWS][keys], so that what is needed at once grows with the text and not
 * with its square, and what lies after a token is hardly ever computed. Keys count from the text's first token.
 *
 * Scores are products of 16-bit integers, each vector scaled by its own largest number: as fast as bfloat16, whose 8
 * bits are too few where a few channels make a score large (a 135M model's rewards lay 0.028 standard deviations off).
 */
#include "avx512.h"
#include "kernels.h"

#include <math.h>
#include <string.h>

INLINE size_t up(size_t count, size_t to) { return (count + to - 1) / to * to; }
INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

INLINE void bits_of(__m256bh x, uint16_t *at) { memcpy(at, &x, 32); }

/* 16 numbers of a head's vector, from channel i on, rotated where there are angles. */
INLINE __m512 rotated(const float *row, size_t i, size_t size, const float *cosines, const float *sines) {
    const __m512 x = _mm512_loadu_ps(row + i);
    if (!cosines) return x;
    const size_t half = size / 2, angle = i < half ? i : i - half;
    const __m512 other = _mm512_loadu_ps(row + (i < half ? i + half : i - half));
    const __m512 turned = _mm512_mul_ps(other, _mm512_loadu_ps(sines + angle));
    const __m512 kept = _mm512_mul_ps(x, _mm512_loadu_ps(cosines + angle));
    return i < half ? _mm512_sub_ps(kept, turned) : _mm512_add_ps(kept, turned);
}

/* The most that an integer may be, so that `size` products add up to less than 2^31: 5791 for 64, 4095 for 128. */
INLINE float largest_integer(size_t size) { return __builtin_floorf(sqrtf(2147483648.0f / (float)size)) - 1; }

/* Turns a vector into integers up to `limit` and returns their unit; a NaN where numbers are not finite. */
INLINE float in_integers(const float *vector, size_t size, float limit, int16_t *integers) {
    __m512 largest = _mm512_set1_ps(1e-30f);
    __mmask16 bad = 0;
    for (size_t i = 0; i < size; i += 16) {
        const __m512 x = _mm512_abs_ps(_mm512_loadu_ps(vector + i));
        bad |= _mm512_cmp_ps_mask(x, _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ);
        largest = _mm512_max_ps(largest, x);
    }
    const float unit = _mm512_reduce_max_ps(largest) / limit;
    const __m512 in_units = _mm512_set1_ps(1.0f / unit);
    for (size_t i = 0; i < size; i += 16) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(vector + i), in_units));
        _mm256_storeu_si256((__m256i *)(integers + i), _mm512_cvtsepi32_epi16(rounded));
    }
    return bad ? __builtin_nanf("") : unit;
}

/* Packed keys: [batch][kv_heads][blocks of KEYS][size / 2][KEYS][2], and their units [batch][kv_heads][blocks of KEYS]
 * [KEYS]. Packed values: [batch][kv_heads][blocks of KEYS][KEYS / 2][size][2]. All are zero after the last key. */
size_t packed_size(const Attention *t) {
    return t->batch * t->kv_heads * up(t->past + t->tokens, KEYS) * t->size;
}

size_t pack_tasks(const Attention *t) { return t->batch * t->kv_heads * (up(t->past + t->tokens, KEYS) / KEYS); }

/* 16 channels, from i on, of the key and the value at a place of one head, as float16; zeros after the last place: they
 * are masked, but must not be infinite. A new token's go into the present here, and a past one's are copied there.
 */
INLINE void take(const Attention *t, size_t lane, size_t place, size_t i, __m256i *key, __m256i *value) {
    const size_t total = t->past + t->tokens, size = t->size, to = (lane * total + place) * size + i;
    if (place >= total) {
        *key = *value = _mm256_setzero_si256();
        return;
    }
    if (place < t->past) {
        const size_t from = (lane * t->past + place) * size + i;
        *key = _mm256_loadu_si256((const __m256i *)(t->past_key + from));
        *value = _mm256_loadu_si256((const __m256i *)(t->past_value + from));
    } else {
        const size_t batch = lane / t->kv_heads, token = batch * t->tokens + place - t->past;
        const size_t from = (token * t->kv_heads + lane % t->kv_heads) * size;
        const float *cosines = t->cosines ? t->cosines + token * (size / 2) : NULL;
        const float *sines = t->sines ? t->sines + token * (size / 2) : NULL;
        const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        *key = _mm512_cvtps_ph(rotated(t->key + from, i, size, cosines, sines), nearest);
        *value = _mm512_cvtps_ph(_mm512_loadu_ps(t->value + from + i), nearest);
    }
    _mm256_storeu_si256((__m256i *)(t->present_key + to), *key);
    _mm256_storeu_si256((__m256i *)(t->present_value + to), *value);
}

/* Writes 16 numbers of two places, so that those of a pair of channels and both places lie together. */
INLINE void interleave_places(const int16_t *first, const int16_t *second, int16_t *to, size_t stride) {
    static const int ORDER[8] = {0, 1, 4, 5, 2, 3, 6, 7}; /* where in `both` the channels 0, 2, 4, ... are */
    const __m256i one = _mm256_loadu_si256((const __m256i *)first), two = _mm256_loadu_si256((const __m256i *)second);
    uint64_t both[8];
    _mm256_storeu_si256((__m256i *)both, _mm256_unpacklo_epi32(one, two));
    _mm256_storeu_si256((__m256i *)(both + 4), _mm256_unpackhi_epi32(one, two));
    for (int j = 0; j < 8; j++) memcpy(to + j * stride, both + ORDER[j], 8);
}

/* Writes 16 numbers of two places, so that those of a channel lie together. */
INLINE void interleave_channels(__m256i first, __m256i second, uint16_t *to) {
    /* Within each half of a register: channels 0 to 3 and 4 to 7, then 8 to 11 and 12 to 15. */
    const __m256i low = _mm256_unpacklo_epi16(first, second), high = _mm256_unpackhi_epi16(first, second);
    _mm256_storeu_si256((__m256i *)to, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256((__m256i *)to + 1, _mm256_permute2x128_si256(low, high, 0x31));
}

/* One block of keys and values of one head, two places at a time. */
void pack(const Attention *t, size_t index) {
    const size_t blocks = up(t->past + t->tokens, KEYS) / KEYS, size = t->size, lane = index / blocks;
    int16_t *keys = t->packed_key + index * KEYS * size;
    uint16_t *values = t->packed_value + index * KEYS * size;
    float *units = t->key_units + index * KEYS;
    const float limit = largest_integer(size);
    for (size_t inside = 0; inside < KEYS; inside += 2) {
        const size_t place = index % blocks * KEYS + inside;
        float numbers[2][LARGEST_HEAD];
        int16_t integers[2][LARGEST_HEAD];
        for (size_t i = 0; i < size; i += 16) {
            __m256i key, value[2];
            for (int k = 0; k < 2; k++) {
                take(t, lane, place + k, i, &key, value + k);
                _mm512_storeu_ps(numbers[k] + i, _mm512_cvtph_ps(key));
                value[k] = (__m256i)_mm512_cvtneps_pbh(_mm512_cvtph_ps(value[k]));
            }
            interleave_channels(value[0], value[1], values + (inside / 2 * size + i) * 2);
        }
        for (int k = 0; k < 2; k++) units[inside + k] = in_integers(numbers[k], size, limit, integers[k]);
        for (size_t i = 0; i < size; i += 16)
            interleave_places(integers[0] + i, integers[1] + i, keys + (i / 2 * KEYS + inside) * 2, KEYS * 2);
    }
}

INLINE __m512bh pair(const uint16_t *at) {
    int32_t two;
    memcpy(&two, at, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}

INLINE __m512bh pairs(const uint16_t *at) { return (__m512bh)_mm512_loadu_si512(at); }

/* sums [ROWS][16 columns] += left [ROWS][count] right [count / 2][stride][2] */
INLINE void add_products(int columns, const uint16_t *left, size_t left_stride, const uint16_t *right, size_t stride,
                         size_t count, __m512 sums[ROWS][4]) {
    for (size_t i = 0; i < count; i += 2) {
        __m512bh w[4];
        UNROLL
        for (int c = 0; c < columns; c++) w[c] = pairs(right + i * stride + 32 * c);
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            const __m512bh x = pair(left + r * left_stride + i);
            UNROLL
            for (int c = 0; c < columns; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], x, w[c]);
        }
    }
}

/* scores [ROWS][16 columns] of queries [ROWS][size], in their units, with keys of a block. `columns` is a constant where
 * this is called: the sums lie in registers, and stay there only because they are said to be needed there.
 */
INLINE void score(int columns, const int16_t *queries, const int16_t *keys, const float *units, size_t size,
                  float *scores, size_t stride) {
    __m512i sums[ROWS][4];
    UNROLL
    for (int r = 0; r < ROWS; r++)
        UNROLL
        for (int c = 0; c < columns; c++) sums[r][c] = _mm512_setzero_si512();
    for (size_t i = 0; i < size; i += 2) {
        __m512i w[4];
        UNROLL
        for (int c = 0; c < columns; c++) w[c] = _mm512_loadu_si512(keys + i * KEYS + 32 * c);
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            int32_t two;
            memcpy(&two, queries + r * size + i, 4);
            const __m512i x = _mm512_set1_epi32(two);
            UNROLL
            for (int c = 0; c < columns; c++) sums[r][c] = _mm512_dpwssd_epi32(sums[r][c], x, w[c]);
        }
    }
    UNROLL
    for (int r = 0; r < ROWS; r++)
        UNROLL
        for (int c = 0; c < columns; c++) __asm__ volatile("" : "+v"(sums[r][c]));
    UNROLL
    for (int c = 0; c < columns; c++) {
        const __m512 unit = _mm512_loadu_ps(units + 16 * c);
        UNROLL
        for (int r = 0; r < ROWS; r++)
            _mm512_storeu_ps(scores + r * stride + 16 * c, _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), unit));
    }
}

#define SCORE(columns)                                                                                              \
    static __attribute__((noinline)) void score_##columns(const int16_t *queries, const int16_t *keys,              \
                                                          const float *units, size_t size, float *scores,           \
                                                          size_t stride) {                                          \
        score(columns, queries, keys, units, size, scores, stride);                                                 \
    }
SCORE(1)
SCORE(2)
SCORE(3)
SCORE(4)
static void (*const SCORERS[])(const int16_t *, const int16_t *, const float *, size_t, float *, size_t) = {
    score_1, score_2, score_3, score_4};

INLINE void clear(__m512 sums[ROWS][4]) {
    UNROLL
    for (int r = 0; r < ROWS; r++)
        UNROLL
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
}

INLINE void weigh(int columns, const Attention *t, const uint16_t *weights, size_t stride, const uint16_t *values,
                  size_t count, const float *totals, float *const *rows, size_t used, size_t channel) {
    __m512 sums[ROWS][4];
    clear(sums);
    for (size_t start = 0; start < count; start += KEYS)
        add_products(columns, weights + start, stride, values + start * t->size + 2 * channel, t->size,
                     least(KEYS, up(count - start, 2)), sums);
    for (size_t r = 0; r < used; r++)
        UNROLL
        for (int c = 0; c < columns; c++)
            _mm512_storeu_ps(rows[r] + channel + 16 * c, _mm512_div_ps(sums[r][c], _mm512_set1_ps(totals[r])));
}

/* Rows of a key's head: its query heads' tokens, the heads of one token together. */
size_t attend_tasks(const Attention *t) {
    return t->batch * t->kv_heads * (up(t->tokens * (t->heads / t->kv_heads), ROWS) / ROWS);
}

size_t attend_scratch(const Attention *t) {
    return ROWS * (up(t->past + t->tokens, KEYS) * (sizeof(float) + sizeof(uint16_t)) + t->size * sizeof(int16_t));
}

void attend(const Attention *t, size_t index, void *scratch) {
    const size_t group = t->heads / t->kv_heads, count = t->tokens * group, tiles = up(count, ROWS) / ROWS;
    const size_t size = t->size, stride = up(t->past + t->tokens, KEYS);
    const size_t lane = index / tiles, batch = lane / t->kv_heads, head = lane % t->kv_heads;
    const size_t first = (tiles - 1 - index % tiles) * ROWS; /* the longest first: they end together */
    const size_t used = least(ROWS, count - first);
    const int16_t *keys = t->packed_key + lane * stride * size;
    const uint16_t *values = t->packed_value + lane * stride * size;
    const float *units = t->key_units + lane * stride;
    float *scores = scratch;
    uint16_t *weights = (uint16_t *)(scores + ROWS * stride);
    int16_t *queries = (int16_t *)(weights + ROWS * stride);
    const float limit = largest_integer(size);
    float *results[ROWS], totals[ROWS], factors[ROWS], query[LARGEST_HEAD];
    size_t seen[ROWS];
    for (size_t r = 0; r < ROWS; r++) {
        const size_t row = first + least(r, used - 1), token = row / group;
        const size_t at = ((batch * t->tokens + token) * t->heads + head * group + row % group) * size;
        const float *cosines = t->cosines ? t->cosines + (batch * t->tokens + token) * (size / 2) : NULL;
        const float *sines = t->sines ? t->sines + (batch * t->tokens + token) * (size / 2) : NULL;
        for (size_t i = 0; i < size; i += 16)
            _mm512_storeu_ps(query + i, rotated(t->query + at, i, size, cosines, sines));
        factors[r] = in_integers(query, size, limit, queries + r * size) * (t->scale * LOG2E);
        results[r] = t->result + at;
        seen[r] = t->past + token + 1;
    }
    const size_t longest = seen[ROWS - 1];
    for (size_t start = 0; start < longest; start += KEYS)
        SCORERS[up(least(KEYS, longest - start), 16) / 16 - 1](queries, keys + start * size, units + start, size,
                                                               scores + start, stride);
    for (size_t r = 0; r < used; r++) {
        const float *row = scores + r * stride;
        const __m512 factor = _mm512_set1_ps(factors[r]);
        __m512 largest = _mm512_set1_ps(-__builtin_inff()), total = _mm512_setzero_ps();
        for (size_t i = 0; i < seen[r]; i += 16)
            largest = _mm512_mask_max_ps(largest, lanes(seen[r] - i), largest, _mm512_loadu_ps(row + i));
        const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
        for (size_t i = 0; i < longest; i += 16) {
            const __mmask16 some = i < seen[r] ? lanes(seen[r] - i) : 0;
            const __m512 below = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + i), peak), factor);
            const __m512 weight = _mm512_maskz_mov_ps(some, power_of_2(below));
            total = _mm512_add_ps(total, weight);
            bits_of(_mm512_cvtneps_pbh(weight), weights + r * stride + i);
        }
        totals[r] = _mm512_reduce_add_ps(total);
    }
    for (size_t r = used; r < ROWS; r++) memset(weights + r * stride, 0, up(longest, 16) * sizeof(uint16_t));
    size_t channel = 0;
    for (; channel + 64 <= size; channel += 64)
        weigh(4, t, weights, stride, values, longest, totals, results, used, channel);
    if (size - channel >= 32) {
        weigh(2, t, weights, stride, values, longest, totals, results, used, channel);
        channel += 32;
    }
    if (channel < size) weigh(1, t, weights, stride, values, longest, totals, results, used, channel);
}
