/* The operators of int8 graphs as custom operators of onnxruntime.
 *
 * Each is a function in the graph too, of standard nodes. Where this library is not loaded, or a processor lacks what a
 * kernel needs, onnxruntime puts that function in its place. What an operator takes may never change under its name.
 * Which operators there are, and what is told of each, is in table.h.
 */
#include "kernels.h"
#include "onnxruntime_abi.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include <cpuid.h>

#define AXES 4
#define INPUTS 9
#define OUTPUTS 3
#define NUMBERS 10240 /* that a task of rounding takes, or one token */
#define BLOCK 96      /* most tokens of a task of products: a panel and they stay in a core's cache */
#define TASKS 16      /* fewest tasks of products, where there are tokens enough: threads then end together */
#define HELPERS 64    /* most threads that share one operator's work */
#define EXPORTED __attribute__((visibility("default")))

#define TRY(call)                  \
    do {                           \
        Status failed_ = (call);   \
        if (failed_) return failed_; \
    } while (0)

typedef struct Operator Operator;

/* One node of a graph. */
typedef struct {
    const Operator *op;
    Api api;
    float number;    /* attention's scale, a norm's epsilon */
    int32_t *starts; /* products: of all weights' panels */
} Kernel;

typedef struct {
    float *data;
    int64_t sizes[AXES];
    size_t axes;
} Tensor;

struct Operator {
    CustomOp base;
    const char *name;
    int inputs[INPUTS], outputs[OUTPUTS]; /* types; 0 after the last */
    Status (*compute)(Kernel *kernel, void *context, Tensor *inputs);
    int mixed, twice; /* rounding, and twice: products too */
    enum { NOTHING, SCALE, NORM, GATE } before; /* rounding; but for NOTHING it has a second input */
    size_t products; /* of one activation */
    int added;       /* products: to a last input */
    int gated;       /* products: the first is the gate of the second, and no result of its own */
};

/* ---- work on the session's threads ---- */

/* Tasks that do not depend on each other. `then` is the one that the thread will likely take next. */
typedef struct {
    void (*run)(const void *work, size_t index, size_t then, void *scratch);
    const void *work;
    size_t count;
} Phase;

/* One phase, or two, the second of which needs all of the first to be done. */
typedef struct {
    Phase first, second;
    size_t scratch;
    atomic_size_t next, done, threads;
    atomic_int failed;
} Work;

static void help(void *data, size_t helper) {
    Work *work = data;
    const Phase *first = &work->first, *second = &work->second;
    const size_t count = first->count + second->count;
    void *scratch = NULL;
    (void)helper;
    if (atomic_load(&work->next) >= count) return;
    if (work->scratch && !(scratch = aligned_alloc(64, (work->scratch + 63) / 64 * 64))) {
        atomic_store(&work->failed, 1);
        return;
    }
    atomic_fetch_add(&work->threads, 1);
    for (size_t i; (i = atomic_fetch_add(&work->next, 1)) < count;) {
        const size_t threads = atomic_load(&work->threads);
        if (i < first->count) {
            first->run(first->work, i, i + threads, scratch);
            atomic_fetch_add(&work->done, 1);
        } else { /* tasks are given out in order: what is not done yet of the first phase is under way elsewhere */
            while (atomic_load(&work->done) < first->count) __builtin_ia32_pause();
            second->run(second->work, i - first->count, i - first->count + threads, scratch);
        }
    }
    free(scratch);
}

static Status share(Kernel *kernel, void *context, Phase first, Phase second, size_t scratch) {
    Work work = {.first = first, .second = second, .scratch = scratch};
    const size_t count = first.count + second.count;
    if (count == 1) help(&work, 0);
    if (count > 1) TRY(PARALLEL(kernel->api, context, help, count < HELPERS ? count : HELPERS, &work));
    return work.failed ? CREATE_STATUS(kernel->api, FAIL, "out of memory") : NULL;
}

/* ---- tensors ---- */

static Status read_shape(Api api, void *value, Tensor *tensor) {
    void *info;
    TRY(TENSOR_SHAPE(api, value, &info));
    Status status = DIMENSIONS_COUNT(api, info, &tensor->axes);
    if (!status && tensor->axes > AXES) status = CREATE_STATUS(api, INVALID_ARGUMENT, "expected at most 4 axes");
    if (!status) status = DIMENSIONS(api, info, tensor->sizes, tensor->axes);
    RELEASE_SHAPE(api, info);
    return status;
}

static Status read_input(Api api, void *context, size_t index, Tensor *tensor) {
    void *value;
    TRY(INPUT(api, context, index, &value));
    TRY(TENSOR_DATA(api, value, (void **)&tensor->data));
    return read_shape(api, value, tensor);
}

static Status make_output(Kernel *kernel, void *context, size_t index, const int64_t *sizes, size_t axes, void *data) {
    void *value;
    TRY(OUTPUT(kernel->api, context, index, sizes, axes, &value));
    return TENSOR_DATA(kernel->api, value, data);
}

static size_t elements(const Tensor *tensor, size_t axes) {
    size_t count = 1;
    for (size_t i = 0; i < axes; i++) count *= (size_t)tensor->sizes[i];
    return count;
}

static Status refuse(Kernel *kernel, const char *expected) {
    return CREATE_STATUS(kernel->api, INVALID_ARGUMENT, expected);
}

/* ---- the operators ---- */

typedef struct {
    Rounding rounding;
    size_t tokens, each; /* of a task */
} Roundings;

static void round_some(const void *work, size_t index, size_t then, void *scratch) {
    const Roundings *all = work;
    const size_t first = index * all->each, end = first + all->each < all->tokens ? first + all->each : all->tokens;
    (void)then;
    round_tokens(&all->rounding, scratch, first, end);
}

static Phase rounding_phase(const Roundings *all) {
    return (Phase){round_some, all, (all->tokens + all->each - 1) / all->each};
}

static size_t rounding_scratch(const Roundings *all) { return (all->rounding.channels + MIXED) * sizeof(float); }

/* All but where the planes and steps go. */
static Status read_rounding(Kernel *kernel, Tensor *inputs, Roundings *all) {
    const Operator *op = kernel->op;
    Tensor *x = inputs, *second = inputs + 1;
    if (x->axes < 1) return refuse(kernel, "rounding: expected values [..., channels]");
    const size_t channels = (size_t)x->sizes[x->axes - 1];
    *all = (Roundings){.tokens = elements(x, x->axes - 1), .each = channels < NUMBERS ? NUMBERS / (channels + !channels) : 1};
    all->rounding = (Rounding){
        .values = x->data, .norm = op->before == NORM, .epsilon = kernel->number, .channels = channels, .mixed = op->mixed};
    if (op->mixed && channels % MIXED) return refuse(kernel, "rounding: expected channels in blocks of 64");
    if (op->before == GATE) {
        if (elements(second, second->axes) != elements(x, x->axes))
            return refuse(kernel, "rounding: gates and values do not fit each other");
        all->rounding.gates = x->data;
        all->rounding.values = second->data;
    } else if (op->before != NOTHING) {
        if (elements(second, second->axes) != channels) return refuse(kernel, "rounding: expected a gain per channel");
        all->rounding.gain = second->data;
    }
    return NULL;
}

static Status compute_rounding(Kernel *kernel, void *context, Tensor *inputs) {
    Roundings all;
    size_t output = 0;
    TRY(read_rounding(kernel, inputs, &all));
    TRY(make_output(kernel, context, output++, inputs->sizes, inputs->axes, &all.rounding.plane));
    if (kernel->op->twice)
        TRY(make_output(kernel, context, output++, inputs->sizes, inputs->axes, &all.rounding.rest));
    inputs->sizes[inputs->axes - 1] = 1;
    TRY(make_output(kernel, context, output, inputs->sizes, inputs->axes, &all.rounding.steps));
    return share(kernel, context, rounding_phase(&all), (Phase){0}, rounding_scratch(&all));
}

typedef struct {
    Product products[OUTPUTS], gate; /* without a weight: there is none */
    size_t panels[OUTPUTS], tokens, block, blocks, count; /* tasks: a panel times `block` tokens */
} Products;

/* Which product and, in `panel`, which of its panels a task is for. */
static const Product *product_of(const Products *all, size_t index, size_t *panel) {
    const Product *product = all->products;
    *panel = index / all->blocks;
    for (const size_t *panels = all->panels; *panel >= *panels; product++) *panel -= *panels++;
    return product;
}

static void multiply_some(const void *work, size_t index, size_t then, void *scratch) {
    const Products *all = work;
    const size_t first = index % all->blocks * all->block, end = first + all->block;
    size_t panel, next;
    const Product *product = product_of(all, index, &panel);
    const Product *other = product_of(all, then < all->count ? then : index, &next);
    (void)scratch;
    multiply(product, all->gate.weight ? &all->gate : NULL, first, end < all->tokens ? end : all->tokens, panel,
             other->weight + next * PANEL * other->channels);
}

static Phase products_phase(const Products *all) { return (Phase){multiply_some, all, all->count}; }

/* The products of an activation of `x`'s shape with weights and what follows them; makes the results. */
static Status read_products(Kernel *kernel, void *context, const Tensor *x, const Product *planes, const Tensor *weights,
                            Products *all) {
    const Operator *op = kernel->op;
    const size_t channels = (size_t)x->sizes[x->axes - 1];
    size_t panels = 0, starts = 0;
    *all = (Products){.tokens = elements(x, x->axes - 1)};
    if (channels % 4) return refuse(kernel, "product: expected channels in fours");
    for (size_t i = 0, output = 0; i < op->products; i++) {
        const Tensor *weight = weights + 2 * i, *columns = weight + 1, *added = op->added ? columns + 1 : NULL;
        Product *product = op->gated && i == 0 ? &all->gate : all->products + output;
        *product = *planes;
        product->weight = (int8_t *)weight->data;
        product->starts = kernel->starts + starts;
        product->column_steps = columns->data;
        product->added = added ? added->data : NULL;
        product->channels = channels;
        product->columns = elements(columns, columns->axes);
        const size_t own = (product->columns + PANEL - 1) / PANEL;
        starts += own * PANEL;
        if (elements(weight, weight->axes) != own * PANEL * channels)
            return refuse(kernel, "product: planes, weight and its steps do not fit each other");
        if (product == &all->gate) continue;
        int64_t sizes[AXES];
        memcpy(sizes, x->sizes, sizeof sizes);
        sizes[x->axes - 1] = (int64_t)product->columns;
        if (added && (added->axes != x->axes || memcmp(added->sizes, sizes, x->axes * sizeof *sizes)))
            return refuse(kernel, "product: what is added does not have the result's shape");
        TRY(make_output(kernel, context, output, sizes, x->axes, &product->result));
        panels += all->panels[output++] = own;
    }
    if (op->gated && all->gate.columns != all->products->columns)
        return refuse(kernel, "product: gates and values do not fit each other");
    const size_t least = (all->tokens + BLOCK - 1) / BLOCK, many = panels ? (TASKS + panels - 1) / panels : 1;
    const size_t blocks = many > least ? many : least;
    all->block = all->tokens ? (all->tokens + blocks - 1) / blocks : 1;
    all->blocks = (all->tokens + all->block - 1) / all->block;
    all->count = panels * all->blocks;
    return NULL;
}

static Status compute_products(Kernel *kernel, void *context, Tensor *inputs) {
    const int twice = kernel->op->twice;
    const Tensor *plane = inputs, *rest = twice ? inputs + 1 : NULL, *steps = inputs + 1 + twice;
    Products all;
    if (plane->axes < 1) return refuse(kernel, "product: expected planes [..., channels]");
    if (elements(steps, steps->axes) != elements(plane, plane->axes - 1) ||
        (rest && elements(rest, rest->axes) != elements(plane, plane->axes)))
        return refuse(kernel, "product: planes and steps do not fit each other");
    const Product planes = {
        .plane = (uint8_t *)plane->data, .rest = rest ? (uint8_t *)rest->data : NULL, .steps = steps->data};
    TRY(read_products(kernel, context, plane, &planes, steps + 1, &all));
    return share(kernel, context, products_phase(&all), (Phase){0}, 0);
}

/* Rounding, and the products of its planes, which nothing else reads. */
static Status compute_rounded_products(Kernel *kernel, void *context, Tensor *inputs) {
    const Operator *op = kernel->op;
    Roundings roundings;
    Products products;
    TRY(read_rounding(kernel, inputs, &roundings));
    const size_t numbers = elements(inputs, inputs->axes), steps = roundings.tokens * sizeof(float);
    float *buffer = malloc(steps + numbers * (op->twice ? 2 : 1) + 1);
    if (!buffer) return CREATE_STATUS(kernel->api, FAIL, "out of memory");
    Rounding *rounding = &roundings.rounding;
    rounding->steps = buffer;
    rounding->plane = (uint8_t *)(buffer + roundings.tokens);
    rounding->rest = op->twice ? rounding->plane + numbers : NULL;
    const Product planes = {.plane = rounding->plane, .rest = rounding->rest, .steps = rounding->steps};
    const Tensor *weights = inputs + (op->before == NOTHING ? 1 : 2);
    Status status = read_products(kernel, context, inputs, &planes, weights, &products);
    if (!status)
        status = share(kernel, context, rounding_phase(&roundings), products_phase(&products),
                       rounding_scratch(&roundings));
    free(buffer);
    return status;
}

static void pack_some(const void *work, size_t index, size_t then, void *scratch) {
    (void)then, (void)scratch;
    pack(work, index);
}

static void attend_some(const void *work, size_t index, size_t then, void *scratch) {
    (void)then;
    attend(work, index, scratch);
}

static Status compute_attention(Kernel *kernel, void *context, Tensor *inputs) {
    const Tensor *query = inputs, *key = inputs + 1, *value = inputs + 2;
    const Tensor *past_key = inputs + 3, *past_value = inputs + 4;
    const int rotary = kernel->op->inputs[5] != 0;
    for (size_t i = 0; i < 5; i++)
        if (inputs[i].axes != 4) return refuse(kernel, "attention: expected 4 axes");
    Attention task = {.query = query->data,
                      .key = key->data,
                      .value = value->data,
                      .cosines = rotary ? inputs[5].data : NULL,
                      .sines = rotary ? inputs[6].data : NULL,
                      .past_key = (uint16_t *)past_key->data,
                      .past_value = (uint16_t *)past_value->data,
                      .scale = kernel->number,
                      .batch = (size_t)query->sizes[0],
                      .tokens = (size_t)query->sizes[1],
                      .heads = (size_t)query->sizes[2],
                      .size = (size_t)query->sizes[3],
                      .kv_heads = (size_t)key->sizes[2],
                      .past = (size_t)past_key->sizes[2]};
    const size_t angles = task.batch * task.tokens * (task.size / 2);
    const int64_t news[] = {query->sizes[0], query->sizes[1], key->sizes[2], query->sizes[3]};
    const int64_t olds[] = {query->sizes[0], key->sizes[2], past_key->sizes[2], query->sizes[3]};
    if (!task.size || task.size % (rotary ? 32 : 16) || task.size > LARGEST_HEAD || !task.kv_heads ||
        task.heads % task.kv_heads ||
        memcmp(key->sizes, news, sizeof news) || memcmp(value->sizes, news, sizeof news) ||
        memcmp(past_key->sizes, olds, sizeof olds) || memcmp(past_value->sizes, olds, sizeof olds) ||
        (rotary && (elements(inputs + 5, inputs[5].axes) != angles || elements(inputs + 6, inputs[6].axes) != angles)))
        return refuse(kernel, "attention: queries, keys, values, past and angles do not fit each other");
    const int64_t present[] = {olds[0], olds[1], olds[2] + query->sizes[1], olds[3]};
    TRY(make_output(kernel, context, 0, query->sizes, 4, &task.result));
    TRY(make_output(kernel, context, 1, present, 4, &task.present_key));
    TRY(make_output(kernel, context, 2, present, 4, &task.present_value));
    const size_t packed = packed_size(&task);
    const size_t bytes = packed * 2 * sizeof(uint16_t) + packed / task.size * sizeof(float);
    float *buffer = aligned_alloc(64, bytes / 64 * 64 + 64);
    if (!buffer) return CREATE_STATUS(kernel->api, FAIL, "out of memory");
    task.key_units = buffer;
    task.packed_value = (uint16_t *)(buffer + packed / task.size);
    task.packed_key = (int16_t *)(task.packed_value + packed);
    const Phase packing = {pack_some, &task, pack_tasks(&task)}, attending = {attend_some, &task, attend_tasks(&task)};
    Status status = share(kernel, context, packing, attending, attend_scratch(&task));
    free(buffer);
    return status;
}

/* ---- what onnxruntime asks of an operator ---- */

static const Operator *operator_of(const CustomOp *base) { return (const Operator *)base; }

static size_t count_types(const int *types, size_t most) {
    size_t count = 0;
    while (count < most && types[count]) count++;
    return count;
}

static const char *get_name(const CustomOp *base) { return operator_of(base)->name; }
static const char *get_provider(const CustomOp *base) { return (void)base, NULL; } /* the CPU's */
static int get_input_type(const CustomOp *base, size_t index) { return operator_of(base)->inputs[index]; }
static size_t get_input_count(const CustomOp *base) { return count_types(operator_of(base)->inputs, INPUTS); }
static int get_output_type(const CustomOp *base, size_t index) { return operator_of(base)->outputs[index]; }
static size_t get_output_count(const CustomOp *base) { return count_types(operator_of(base)->outputs, OUTPUTS); }
static int get_zero(const CustomOp *base, size_t index) { return (void)base, (void)index, 0; }
static int get_version(const CustomOp *base) { return (void)base, 1; }

static Status create(const CustomOp *base, Api api, const void *info, void **out) {
    const Operator *op = operator_of(base);
    Kernel *kernel = calloc(1, sizeof *kernel);
    if (!kernel) return CREATE_STATUS(api, FAIL, "out of memory");
    *kernel = (Kernel){.op = op, .api = api};
    Status status = NULL;
    if (op->compute == compute_attention) status = ATTRIBUTE_FLOAT(api, info, "scale", &kernel->number);
    if (op->before == NORM) status = ATTRIBUTE_FLOAT(api, info, "epsilon", &kernel->number);
    size_t panels = 0;
    for (size_t i = 0; i < op->products && !status; i++) {
        int constant = 0;
        void *value = NULL;
        Tensor weight = {0};
        const size_t before = op->compute == compute_products ? 2 + op->twice : op->before == NOTHING ? 1 : 2;
        status = CONSTANT_INPUT(api, info, before + 2 * i, &constant, &value);
        if (!status && !constant) status = CREATE_STATUS(api, INVALID_ARGUMENT, "product: expected a constant weight");
        if (!status) status = read_shape(api, value, &weight);
        if (!status) status = TENSOR_DATA(api, value, (void **)&weight.data);
        if (!status && (weight.axes != 4 || weight.sizes[2] != PANEL || weight.sizes[3] != 4))
            status = CREATE_STATUS(api, INVALID_ARGUMENT, "product: expected a weight [panels, channels / 4, 64, 4]");
        if (!status) {
            const size_t channels = (size_t)weight.sizes[1] * 4, first = panels;
            panels += (size_t)weight.sizes[0];
            int32_t *starts = realloc(kernel->starts, panels * PANEL * sizeof *starts);
            if (starts) kernel->starts = starts;
            for (size_t panel = first; starts && panel < panels; panel++)
                panel_starts((int8_t *)weight.data + (panel - first) * PANEL * channels, channels, starts + panel * PANEL);
            if (!starts) status = CREATE_STATUS(api, FAIL, "out of memory");
        }
    }
    if (status) {
        free(kernel->starts);
        free(kernel);
        return status;
    }
    *out = kernel;
    return NULL;
}

static void destroy(void *data) {
    Kernel *kernel = data;
    free(kernel->starts);
    free(kernel);
}

static Status compute(void *data, void *context) {
    Kernel *kernel = data;
    Tensor inputs[INPUTS];
    const size_t count = count_types(kernel->op->inputs, INPUTS);
    for (size_t i = 0; i < count; i++) TRY(read_input(kernel->api, context, i, inputs + i));
    return kernel->op->compute(kernel, context, inputs);
}

#define BASE                                                                                                    \
    {                                                                                                           \
        .version = ABI_VERSION, .name = get_name, .provider = get_provider, .input_type = get_input_type,       \
        .input_count = get_input_count, .output_type = get_output_type, .output_count = get_output_count,       \
        .input_presence = get_zero, .output_presence = get_zero, .input_memory = get_zero, .create = create,    \
        .compute = compute, .destroy = destroy, .first_version = get_version, .last_version = get_version       \
    }
#define COUNT(table) (sizeof(table) / sizeof *(table))

#include "table.h"

enum { VNNI = 1, BF16 = 2, AMX = 4 };
#ifndef ASK_FOR_AMX
#define ASK_FOR_AMX 1 /* 0: products too where there is AMX, for `make sanitize` */
#endif

static int products_anyway; /* whether sessions that are set up from now on get them where there is AMX, too */

static int features(void) {
    unsigned a, b, c, d;
    int found = 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) /* and the operating system does */
        return 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        found |= c >> 11 & 1 ? VNNI : 0;
        found |= d >> 25 & ASK_FOR_AMX & !products_anyway ? AMX : 0;
    }
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) found |= a >> 5 & 1 ? BF16 : 0;
    return found & VNNI ? found : 0;
}

/* Which kernels run on this processor, in words. onnxruntime's own products are faster where there is AMX. */
EXPORTED const char *rewardrt_kernels(void) {
    const int found = features();
    if (!found) return "";
    if (found & AMX) return found & BF16 ? "rounding, attention" : "rounding";
    return found & BF16 ? "rounding, products, attention" : "rounding, products";
}

static Status add(Api api, void *domain, const Operator *operators, size_t count) {
    for (size_t i = 0; i < count; i++) TRY(ADD_OPERATOR(api, domain, &operators[i].base));
    return NULL;
}

/* onnxruntime's products copy their weights; these read them where the file is mapped, for all processes at once. */
EXPORTED void rewardrt_products_anyway(int wanted) { products_anyway = wanted; }

EXPORTED Status RegisterCustomOps(void *options, const ApiBase *base) {
    const int found = features();
    Api api = base->get_api(ABI_VERSION);
    void *domain;
    if (!found) return NULL;
    TRY(CREATE_DOMAIN(api, "rewardrt", &domain)); /* sessions need it as long as they live: it is never given back */
    TRY(add(api, domain, ROUNDINGS, COUNT(ROUNDINGS)));
    if (!(found & AMX)) TRY(add(api, domain, PRODUCTS, COUNT(PRODUCTS)));
    if (found & BF16) TRY(add(api, domain, ATTENTIONS, COUNT(ATTENTIONS)));
    return ADD_DOMAIN(api, options, domain);
}
