// What Python calls: kernels/cpu_layers.py declares the same structures. Each call is cut into pieces for the crew.

#include <memory>
#include <vector>

#include "attention.h"
#include "crew.h"
#include "rows.h"

#define PUBLIC __attribute__((visibility("default")))

namespace {

// Threads and the memory each works in.
struct Team {
    explicit Team(int threads) : arenas(threads), crew(threads) {}

    // Calls work(piece, arena) for each piece.
    template <class Work>
    int each(int pieces, Work work) {
        struct Pieces : Job {
            Pieces(int count, Work& work, std::vector<Arena>& arenas) : count(count), work(work), arenas(arenas) {}
            int phases() const override { return 1; }
            int pieces(int) const override { return count; }
            void run(int, int piece, int thread) override {
                try {
                    work(piece, arenas[thread]);
                } catch (const std::bad_alloc&) {
                    failed = true;
                }
            }
            int count;
            Work& work;
            std::vector<Arena>& arenas;
            std::atomic<bool> failed{false};
        } job(pieces, work, arenas);
        crew.run(job);
        return job.failed;
    }

    std::vector<Arena> arenas;
    Crew crew;  // last: its threads end before what they work on
};

constexpr int TOKENS = 32;         // in a piece of what is done to tokens
constexpr int64_t NUMBERS = 65536;  // in a piece of what is done to numbers

int64_t pieces_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Calls work(index) for each of count tokens.
template <class Work>
int each_token(void* team, int64_t count, Work work) {
    return ((Team*)team)->each((int)pieces_of(count, TOKENS), [&](int piece, Arena&) {
        const int64_t last = std::min(count, (int64_t)(piece + 1) * TOKENS);
        for (int64_t token = (int64_t)piece * TOKENS; token < last; token++) work(token);
    });
}

// Calls work(first, size) for parts of count numbers.
template <class Work>
int each_part(void* team, int64_t count, Work work) {
    return ((Team*)team)->each((int)pieces_of(count, NUMBERS), [&](int piece, Arena&) {
        const int64_t first = piece * NUMBERS;
        work(first, std::min(NUMBERS, count - first));
    });
}

template <class T>
void mix_backward(const rows::Mix& call, int64_t count, int piece) {
    simd::Lanes x_sum = simd::zero(), y_sum = simd::zero();
    const int64_t last = std::min(count, (int64_t)(piece + 1) * TOKENS);
    for (int64_t row = (int64_t)piece * TOKENS; row < last; row++) rows::mix_backward<T>(call, row, x_sum, y_sum);
    if (call.x_sums) call.x_sums[piece] = simd::sum(x_sum);
    if (call.y_sums) call.y_sums[piece] = simd::sum(y_sum);
}

}  // namespace

extern "C" {

PUBLIC void* cpu_layers_new(int threads) { return new Team(threads); }

// All return 0, or 1 when there is no memory.

PUBLIC int cpu_layers_attention(void* team, int bf16, const attention::Call* call) {
    return ((Team*)team)->each(call->rows * call->heads, [&](int piece, Arena& arena) {
        const int row = piece / call->heads, head = piece % call->heads;
        if (bf16) attention::Forward<simd::Bf16>(*call, arena, row, head);
        else attention::Forward<simd::Fp32>(*call, arena, row, head);
    });
}

PUBLIC int cpu_layers_attention_backward(void* team, int bf16, const attention::Call* call) {
    return ((Team*)team)->each(call->rows * call->kv_heads, [&](int piece, Arena& arena) {
        const int row = piece / call->kv_heads, head = piece % call->kv_heads;
        if (bf16) attention::Backward<simd::Bf16>(*call, arena, row, head);
        else attention::Backward<simd::Fp32>(*call, arena, row, head);
    });
}

PUBLIC int cpu_layers_norm(void* team, int bf16, int64_t count, int width, const void* x, void* y, float* inverse) {
    return each_token(team, count, [&](int64_t row) {
        const size_t at = (size_t)row * width;
        inverse[row] = bf16 ? rows::norm<simd::Bf16>((const uint16_t*)x + at, width, (uint16_t*)y + at)
                            : rows::norm<simd::Fp32>((const float*)x + at, width, (float*)y + at);
    });
}

PUBLIC int cpu_layers_norm_backward(void* team, int bf16, int64_t count, int width, const void* y, const float* inverse,
                                    const void* dy, void* dx) {
    return each_token(team, count, [&](int64_t row) {
        const size_t at = (size_t)row * width;
        if (bf16)
            rows::norm_backward<simd::Bf16>((const uint16_t*)y + at, inverse[row], (const uint16_t*)dy + at, width,
                                            (uint16_t*)dx + at);
        else
            rows::norm_backward<simd::Fp32>((const float*)y + at, inverse[row], (const float*)dy + at, width,
                                            (float*)dx + at);
    });
}

PUBLIC int cpu_layers_mix(void* team, int bf16, int64_t count, const rows::Mix* call) {
    return each_token(team, count, [&](int64_t row) {
        bf16 ? rows::mix<simd::Bf16>(*call, row) : rows::mix<simd::Fp32>(*call, row);
    });
}

PUBLIC int cpu_layers_mix_backward(void* team, int bf16, int64_t count, const rows::Mix* call) {
    return ((Team*)team)->each((int)pieces_of(count, TOKENS), [&](int piece, Arena&) {
        bf16 ? mix_backward<simd::Bf16>(*call, count, piece) : mix_backward<simd::Fp32>(*call, count, piece);
    });
}

PUBLIC int cpu_layers_rotate(void* team, int bf16, int64_t count, const rows::Rotation* call) {
    return each_token(team, count, [&](int64_t token) {
        bf16 ? rows::rotate<simd::Bf16>(*call, token) : rows::rotate<simd::Fp32>(*call, token);
    });
}

PUBLIC int cpu_layers_rotate_backward(void* team, int bf16, int64_t count, const rows::Rotation* call) {
    return each_token(team, count, [&](int64_t token) {
        bf16 ? rows::rotate_backward<simd::Bf16>(*call, token) : rows::rotate_backward<simd::Fp32>(*call, token);
    });
}

PUBLIC int cpu_layers_squared_relu(void* team, int bf16, int64_t count, void* x) {
    return each_part(team, count, [&](int64_t first, int64_t size) {
        bf16 ? rows::squared_relu<simd::Bf16>((uint16_t*)x + first, size)
             : rows::squared_relu<simd::Fp32>((float*)x + first, size);
    });
}

PUBLIC int cpu_layers_squared_relu_backward(void* team, int bf16, int64_t count, const void* y, const void* dy,
                                            void* dx) {
    return each_part(team, count, [&](int64_t first, int64_t size) {
        if (bf16)
            rows::squared_relu_backward<simd::Bf16>((const uint16_t*)y + first, (const uint16_t*)dy + first,
                                                    (uint16_t*)dx + first, size);
        else
            rows::squared_relu_backward<simd::Fp32>((const float*)y + first, (const float*)dy + first,
                                                    (float*)dx + first, size);
    });
}
}
