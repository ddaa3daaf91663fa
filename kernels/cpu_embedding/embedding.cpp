// Rows of an embedding table, and the sum of gradients into its rows.
#include <algorithm>

#include "crew.h"
#include "simd.h"

namespace {

using simd::Bf16;
using simd::Fp32;
using simd::Lanes;
using simd::LANES;

constexpr int64_t TOKENS_PER_PIECE = 64, COLUMNS_PER_PIECE = 32;
constexpr int64_t AHEAD = 8;  // tokens from the row that is summed to the one that is being fetched

// The table is (rows, width) fp32, values are (tokens, width); width is a multiple of 16.
struct Rows : Job {
    float* table;
    int64_t width, tokens;
    const int64_t* ids;
    void* values;

    int phases() const override { return 1; }
};

template <class T>
struct Gather : Rows {
    int pieces(int) const override { return (tokens + TOKENS_PER_PIECE - 1) / TOKENS_PER_PIECE; }
    void run(int, int piece, int) override {
        typename T::Element* const out = (typename T::Element*)values;
        const int64_t first = piece * TOKENS_PER_PIECE, last = std::min(tokens, first + TOKENS_PER_PIECE);
        for (int64_t token = first; token < last; token++)
            for (int64_t column = 0; column < width; column += LANES)
                T::write(out + token * width + column, simd::load<Lanes>(table + ids[token] * width + column));
    }
};

// A piece is some columns of all tokens, first to last: the order of a sum is that of the tokens, whoever computes it.
template <class T>
struct Scatter : Rows {
    int pieces(int) const override { return (width + COLUMNS_PER_PIECE - 1) / COLUMNS_PER_PIECE; }
    void run(int, int piece, int) override {
        const typename T::Element* const from = (const typename T::Element*)values;
        const int64_t first = piece * COLUMNS_PER_PIECE, last = std::min(width, first + COLUMNS_PER_PIECE);
        for (int64_t token = 0; token < tokens; token++) {
            const float* const soon = table + ids[std::min(token + AHEAD, tokens - 1)] * width;
            float* const row = table + ids[token] * width;
            for (int64_t column = first; column < last; column += LANES) {
                __builtin_prefetch(soon + column, 1);
                const Lanes more = T::read(from + token * width + column);
                simd::store(row + column, simd::load<Lanes>(row + column) + more);
            }
        }
    }
};

template <class J>
void run(Crew& crew, float* table, int64_t width, int64_t tokens, const int64_t* ids, void* values) {
    J job;
    job.table = table, job.width = width, job.tokens = tokens, job.ids = ids, job.values = values;
    crew.run(job);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void* cpu_embedding_crew(int threads) { return new Crew(threads); }

// values = rows of the table
EXPORT void cpu_embedding_gather(void* crew, int bf16, float* table, int64_t width, int64_t tokens, const int64_t* ids,
                                 void* values) {
    (bf16 ? run<Gather<Bf16>> : run<Gather<Fp32>>)(*(Crew*)crew, table, width, tokens, ids, values);
}

// rows of the table += values
EXPORT void cpu_embedding_scatter(void* crew, int bf16, float* table, int64_t width, int64_t tokens,
                                  const int64_t* ids, void* values) {
    (bf16 ? run<Scatter<Bf16>> : run<Scatter<Fp32>>)(*(Crew*)crew, table, width, tokens, ids, values);
}
