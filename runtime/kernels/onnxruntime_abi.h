/* The part of onnxruntime's C interface that operators.c calls, as its binary interface fixes it: a table of functions
 * by place, which only ever grows at its end, and a structure that an operator is described with. Version 17 of it,
 * which came with onnxruntime 1.17.
 */
#ifndef REWARDRT_ONNXRUNTIME_ABI_H
#define REWARDRT_ONNXRUNTIME_ABI_H

#include <stddef.h>
#include <stdint.h>

#define ABI_VERSION 17

typedef void *Status; /* NULL: all is well */
typedef void *const *Api;

typedef struct {
    Api (*get_api)(uint32_t version); /* NULL where the version is not known */
    const char *(*version)(void);
} ApiBase;

#define CALL(api, place, type) ((type)(api)[place])
#define CREATE_STATUS(api, code, message) CALL(api, 0, Status(*)(int, const char *))(code, message)
#define CREATE_DOMAIN(api, name, out) CALL(api, 26, Status(*)(const char *, void **))(name, out)
#define ADD_OPERATOR(api, domain, op) CALL(api, 27, Status(*)(void *, const void *))(domain, op)
#define ADD_DOMAIN(api, options, domain) CALL(api, 28, Status(*)(void *, void *))(options, domain)
#define TENSOR_DATA(api, value, out) CALL(api, 51, Status(*)(const void *, void **))(value, out)
#define DIMENSIONS_COUNT(api, info, out) CALL(api, 61, Status(*)(const void *, size_t *))(info, out)
#define DIMENSIONS(api, info, out, count) CALL(api, 62, Status(*)(const void *, int64_t *, size_t))(info, out, count)
#define TENSOR_SHAPE(api, value, out) CALL(api, 65, Status(*)(const void *, void **))(value, out)
#define ATTRIBUTE_FLOAT(api, info, name, out) \
    CALL(api, 85, Status(*)(const void *, const char *, float *))(info, name, out)
#define INPUT(api, context, index, out) CALL(api, 90, Status(*)(const void *, size_t, void **))(context, index, out)
#define OUTPUT(api, context, index, dimensions, count, out) \
    CALL(api, 91, Status(*)(void *, size_t, const int64_t *, size_t, void **))(context, index, dimensions, count, out)
#define RELEASE_SHAPE(api, info) CALL(api, 99, void (*)(void *))(info)
#define CONSTANT_INPUT(api, info, index, constant, out) \
    CALL(api, 249, Status(*)(const void *, size_t, int *, void **))(info, index, constant, out)
/* `function` for each index below `total`, each by itself, on the session's threads */
#define PARALLEL(api, context, function, total, data)                                          \
    CALL(api, 274, Status(*)(const void *, void (*)(void *, size_t), size_t, size_t, void *)) \
    (context, function, total, 0, data)

enum { FAIL = 1, INVALID_ARGUMENT = 2 };                       /* OrtErrorCode */
enum { FLOAT = 1, UINT8 = 2, INT8 = 3, FLOAT16 = 10 };         /* ONNXTensorElementDataType */

typedef struct CustomOp CustomOp;
struct CustomOp {
    uint32_t version;
    void *(*create_v1)(const CustomOp *, Api, const void *info);
    const char *(*name)(const CustomOp *);
    const char *(*provider)(const CustomOp *);
    int (*input_type)(const CustomOp *, size_t);
    size_t (*input_count)(const CustomOp *);
    int (*output_type)(const CustomOp *, size_t);
    size_t (*output_count)(const CustomOp *);
    void (*compute_v1)(void *, void *);
    void (*destroy)(void *kernel);
    int (*input_presence)(const CustomOp *, size_t); /* 0: required */
    int (*output_presence)(const CustomOp *, size_t);
    int (*input_memory)(const CustomOp *, size_t); /* 0: where the operator runs */
    void *variadic[4];
    Status (*create)(const CustomOp *, Api, const void *info, void **kernel);
    Status (*compute)(void *kernel, void *context);
    void *infer_shape;
    int (*first_version)(const CustomOp *);
    int (*last_version)(const CustomOp *);
    void *later[4]; /* members of version 18, which is not asked for */
};

#endif
