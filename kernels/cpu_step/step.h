// What Python hands to the step; kernels/cpu_step.py declares the same structures. Plain C.
#pragma once

#include <stdint.h>

extern "C" {

enum Dtype { FP32, BF16, INT8 };

struct Shape {
    int32_t matrices;  // a Dtype
    int32_t threads, layers, heads, kv_heads, head_size, width, vocab, context;
};

// Matrices are packed: [columns / 16][words][16] words of one fp32, two bf16 or four int8 (q + 128; 16 fp32 factors
// stand behind each [words][16]). Embeddings are plain rows of fp32 if the matrices are, else of bf16.
struct LayerWeights {
    const uint32_t *qkv, *out, *up, *down;
    const void* value_embedding;  // null: none
    const float* gate;            // (kv_heads, 12)
    float resid_lambda, x0_lambda;
    int32_t window, group, place;  // `place`: which layer of its group
};

struct Weights {
    const LayerWeights* layers;
    const void* embedding;
    const uint32_t* head;
    const float *cosines, *sines;  // (context, head_size / 2)
    const float* smear_gate;       // (24)
    float smear_lambda, backout_lambda, query_key_scale;
};

// Blocks of a group: [layers of the group][blocks][kv_heads][keys, values][16 · head_size].
struct Storage {
    void* data;
    int64_t blocks;
    const int32_t* table;  // (sequences, table_width)
    int32_t table_width;
};

// Everything has been checked: ids, positions and the table entries that are needed lie in their ranges.
struct Batch {
    int32_t tokens, sequences, wanted_count;
    const int32_t *ids, *previous, *positions, *starts, *wanted;
    const Storage* groups;
    float* logits;  // (wanted_count, vocab)
};

#define PUBLIC __attribute__((visibility("default")))

// A step for one model, with its threads. Weights are copied but for what their pointers point to.
PUBLIC void* cpu_step_new(const Shape* shape, const Weights* weights);
// 0, or 1 when there is no memory for this many tokens.
PUBLIC int cpu_step_forward(void* step, const Batch* batch);
PUBLIC void cpu_step_free(void* step);
}
