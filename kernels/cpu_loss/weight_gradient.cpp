// sum += Gᵀ·x in fp32, for gradients G of the logits and hidden states x in bf16; for processors that multiply pairs of
// bf16 and have no matrix unit.
//
// The library's product ends in bf16 and must be added to the sum in a pass of its own: a rounding more, and a buffer
// half as large as the sum.
#include <algorithm>

#include "crew.h"
#include "simd.h"

namespace {

using simd::Bf16;
using simd::Bits;
using simd::Halves;
using simd::Lanes;
using simd::LANES;
using simd::PARTS;
using simd::Words;

constexpr int ROWS = simd::TILE >= 16 ? 16 : 2;  // of the sum in a tile, one panel of columns wide
constexpr int BLOCK = 32;                        // rows of the sum in a piece: of a line of G, every byte is used

// Of two rows of bf16, the pairs of one column, as words.
INLINE Bits pairs(const uint16_t* even, const uint16_t* odd) {
    Bits words;
    EACH_PART {
        Halves low, high;
        std::memcpy(&low, even + i * (LANES / PARTS), sizeof low);
        std::memcpy(&high, odd + i * (LANES / PARTS), sizeof high);
        words.part[i] = __builtin_convertvector(low, Words) | (__builtin_convertvector(high, Words) << 16);
    }
    return words;
}

// Rows of the sum times a panel: one accumulator for each, over all pairs of tokens from first to last.
INLINE void tile(const uint32_t* block, const uint32_t* panel, int64_t words, float* sum, int64_t width, int count,
                 bool overwrite) {
    Lanes sums[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        sums[r] = simd::zero();
        __builtin_prefetch(sum + r * width, 1);
    }
    for (int64_t k = 0; k < words; k++) {
        const Bits columns = simd::load<Bits>(panel + k * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) sums[r] = Bf16::dot(sums[r], block[k * BLOCK + r], columns);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
        if (r < count) {
            float* const out = sum + r * width;
            simd::store(out, overwrite ? sums[r] : simd::load<Lanes>(out) + sums[r]);
        }
}

// Phase 0 packs x as panels [width / 16][pairs of tokens][16] of words; phase 1 takes a block of G's columns at a time.
struct WeightGradient : Job {
    const uint16_t *gradient, *x;  // (tokens, vocab) and (tokens, width)
    int64_t tokens, vocab, width;
    float* sum;  // (vocab, width)
    bool overwrite;
    uint32_t *panels, *blocks;  // room for the panels, and for a block per thread

    int64_t words() const { return (tokens + 1) / 2; }
    int phases() const override { return 2; }
    int pieces(int phase) const override { return phase == 0 ? width / LANES : (vocab + BLOCK - 1) / BLOCK; }

    void run(int phase, int piece, int thread) override {
        if (phase == 0) {
            pack(x + piece * LANES, width, LANES, panels + piece * words() * LANES, LANES);
            return;
        }
        const int64_t first = piece * (int64_t)BLOCK;
        const int count = std::min<int64_t>(BLOCK, vocab - first);
        uint32_t* const block = blocks + thread * words() * BLOCK;
        pack(gradient + first, vocab, count, block, BLOCK);
        for (int64_t column = 0; column < width; column += LANES)
            for (int row = 0; row < count; row += ROWS)
                tile(block + row, panels + column * words(), words(), sum + (first + row) * width + column, width,
                     count - row, overwrite);
    }

    // Pairs of tokens as words, `count` columns of them; what is missing of the columns or of the last pair is zero.
    void pack(const uint16_t* from, int64_t from_stride, int count, uint32_t* to, int64_t to_stride) const {
        static const uint16_t nothing[BLOCK] = {};
        for (int64_t k = 0; k < words(); k++) {
            const uint16_t* const even = from + 2 * k * from_stride;
            const uint16_t* const odd = 2 * k + 1 < tokens ? even + from_stride : nothing;
            for (int64_t i = 0; i < to_stride; i += LANES) {
                if (i + LANES <= count) {
                    const Bits both = pairs(even + i, odd + i);
                    std::memcpy(to + k * to_stride + i, &both, 64);
                    continue;
                }
                for (int64_t j = i; j < i + LANES; j++)
                    to[k * to_stride + j] = j < count ? even[j] | (uint32_t)odd[j] << 16 : 0;
            }
        }
    }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void cpu_loss_weight_gradient(
    void* crew, const void* gradient, const void* x, int64_t tokens, int64_t vocab, int64_t width,
    float* sum, int overwrite, void* panels, void* blocks) {
    WeightGradient job;
    job.gradient = (const uint16_t*)gradient, job.x = (const uint16_t*)x;
    job.tokens = tokens, job.vocab = vocab, job.width = width;
    job.sum = sum, job.overwrite = overwrite, job.panels = (uint32_t*)panels, job.blocks = (uint32_t*)blocks;
    ((Crew*)crew)->run(job);
}
