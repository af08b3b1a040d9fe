/* What the operators of int8 graphs compute: each function a range of independent rows or tiles.
 *
 * A number of the result depends on its own token's inputs alone, and is computed in the same order whichever rows and
 * tiles are asked for with it: bits do not depend on the batch, on threads or on what came as a prefix.
 */
#ifndef REWARDRT_KERNELS_H
#define REWARDRT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define PANEL 64 /* columns of a weight that lie together: [ceil(columns / PANEL)][channels / 4][PANEL][4] */
#define MIXED 64 /* channels of a block that is multiplied with a Hadamard matrix */

/* Rounds tokens: values [tokens][channels] to one or two planes of uint8 around 128, and the step [tokens] of each. */
typedef struct {
    const float *values;
    const float *gates; /* [tokens][channels]: values are multiplied with silu(gate) before all else; or NULL */
    const float *gain; /* [channels]: each token is multiplied with this; or NULL */
    int norm;          /* it is divided by its root mean square before */
    float epsilon;     /* that is added to the mean square */
    uint8_t *plane;
    uint8_t *rest; /* NULL: one plane */
    float *steps;
    size_t channels;
    int mixed;
} Rounding;

/* scratch [channels + MIXED] */
void round_tokens(const Rounding *task, float *scratch, size_t first, size_t end);

/* Multiplies planes [tokens][channels] with a weight in panels; results [tokens][columns]. */
typedef struct {
    const uint8_t *plane;
    const uint8_t *rest; /* NULL: one plane */
    const float *steps;
    const int8_t *weight;
    const int32_t *starts; /* [panels][PANEL]: what a column's sums start from, as planes lie around 128 */
    const float *column_steps;
    const float *added; /* [tokens][columns], or NULL */
    float *result;
    size_t channels, columns;
} Product;

void panel_starts(const int8_t *panel, size_t channels, int32_t starts[PANEL]); /* -128 times a column's sum */
/* One panel of columns; each result is multiplied with silu(gate's) where there is a gate, of as many columns. `ahead` is
 * the panel, of as many channels, that this thread will likely want next: it is fetched from memory meanwhile.
 */
void multiply(const Product *task, const Product *gate, size_t first, size_t end, size_t panel, const int8_t *ahead);

/* Causal attention of new tokens to a past and each other.
 *
 * query, result [batch][tokens][heads][size]; key, value [batch][tokens][kv_heads][size];
 * past_*, present_* float16 [batch][kv_heads][past (+ tokens)][size]; cosines, sines [batch][tokens][size / 2] or NULL.
 * Keys and values are what float16 holds of them. `size` is at most LARGEST_HEAD.
 */
typedef struct {
    const float *query, *key, *value, *cosines, *sines;
    const uint16_t *past_key, *past_value;
    uint16_t *present_key, *present_value;
    float *result;
    float scale;
    size_t batch, heads, kv_heads, tokens, past, size;
    int16_t *packed_key; /* `packed_size` */
    uint16_t *packed_value; /* `packed_size` */
    float *key_units; /* `packed_size` / `size` */
} Attention;

#define KEYS 64 /* that are packed together; a multiple of what PANEL is */
#define ROWS 6  /* queries of a tile */
#define LARGEST_HEAD 256

size_t packed_size(const Attention *task); /* elements, for all heads of the batch */
size_t pack_tasks(const Attention *task);
void pack(const Attention *task, size_t index);
size_t attend_tasks(const Attention *task);
size_t attend_scratch(const Attention *task); /* bytes */
void attend(const Attention *task, size_t index, void *scratch);

#endif
