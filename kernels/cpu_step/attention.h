// Attention of a few queries to the keys and values of one head, which lie in blocks of 16 positions.
//
// Keys of a block are stored like a panel of weights, [head size][16 positions] in words, so the scores of a block come
// out of the matrix kernel with a position in each lane. Values are [16][head size]. Each query walks its own visible
// positions in ascending order with the same operations, whoever else is in the tile; what it may not see is not
// touched, so stale or absent positions of a block cannot show.
#pragma once

#include <limits>

#include "matmul.h"

namespace attention {

using simd::Lanes;
using simd::LANES;

constexpr int BLOCK = 16;
constexpr int VALUES_AHEAD = 4;  // blocks from the values that are being added to those that are being fetched
constexpr int ROWS = std::min(4, matmul::MOST_ROWS);  // queries that share a walk over the keys

struct Query {
    int first, last;  // visible positions
};

// The blocks of a sequence: of head `head` in layer storage `base`, where a block holds keys then values of each head.
template <class T>
struct Blocks {
    const typename T::Element* base;
    size_t block_size, head_offset, values_offset;
    const int32_t* table;

    const typename T::Element* keys(int block) const { return base + table[block] * block_size + head_offset; }
    const typename T::Element* values(int block) const { return keys(block) + values_offset; }
};

inline Lanes lane_numbers() {
    static const float numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return simd::load<Lanes>(numbers);
}

// Scores of blocks first … last → weights exp(scale · (score − highest)), in place; returns their sum.
inline float to_weights(float* scores, int first_block, Query query, float scale) {
    const int from = query.first / BLOCK, to = query.last / BLOCK;
    float* const own = scores + (from - first_block) * LANES;
    const Lanes lowest = simd::broadcast(-std::numeric_limits<float>::infinity());
    Lanes highest = lowest;
    for (int block = from; block <= to; block++) {
        float* const at = own + (block - from) * LANES;
        Lanes score = simd::load<Lanes>(at);
        if (block == from) {
            const Lanes hidden = simd::broadcast((float)(query.first - block * BLOCK));
            score = simd::select(simd::less(lane_numbers(), hidden), lowest, score);
        }
        if (block == to) {
            const Lanes seen = simd::broadcast((float)(query.last - block * BLOCK) + 0.5f);
            score = simd::select(simd::less(lane_numbers(), seen), score, lowest);
        }
        simd::store(at, score);
        highest = simd::maximum(highest, score);
    }
    highest = simd::broadcast(simd::maximum(highest));
    Lanes total = simd::zero();
    for (int block = from; block <= to; block++) {
        float* const at = own + (block - from) * LANES;
        const Lanes weight = simd::exp((simd::load<Lanes>(at) - highest) * simd::broadcast(scale));
        simd::store(at, weight);
        total = total + weight;
    }
    return simd::sum(total);
}

// sums[q][channel] += weight · value over positions from … to − 1 of one block, CHUNKS · 16 channels.
template <class T, int QUERIES, int CHUNKS>
void add_values(const float* weights, size_t stride, const typename T::Element* values,
                const typename T::Element* soon, int head_size, int from, int to, float* sums) {
    Lanes sum[QUERIES][CHUNKS];
#pragma GCC unroll 16
    for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 16
        for (int c = 0; c < CHUNKS; c++) sum[q][c] = simd::load<Lanes>(sums + q * head_size + c * LANES);
    for (int position = from; position < to; position++) {
        Lanes weight[QUERIES];
#pragma GCC unroll 16
        for (int q = 0; q < QUERIES; q++) weight[q] = simd::broadcast(weights[q * stride + position]);
#pragma GCC unroll 16
        for (int c = 0; c < CHUNKS; c++) {
            const Lanes value = T::read(values + position * head_size + c * LANES);
            if (c * LANES * sizeof(typename T::Element) % 64 == 0)
                matmul::fetch(soon + position * head_size + c * LANES);
#pragma GCC unroll 16
            for (int q = 0; q < QUERIES; q++) sum[q][c] = simd::multiply_add(weight[q], value, sum[q][c]);
        }
    }
#pragma GCC unroll 16
    for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 16
        for (int c = 0; c < CHUNKS; c++) simd::store(sums + q * head_size + c * LANES, sum[q][c]);
}

// The same for all channels of a head, in chunks that fit the registers.
template <class T, int QUERIES>
void add_values_of_head(const float* weights, size_t stride, const typename T::Element* values,
                        const typename T::Element* soon, int head_size, int from, int to, float* sums) {
    constexpr int CHUNKS = simd::TILE >= 16 ? (QUERIES > 2 ? 4 : 8) : 2;
    int channel = 0;
    for (; channel + CHUNKS * LANES <= head_size; channel += CHUNKS * LANES)
        add_values<T, QUERIES, CHUNKS>(weights, stride, values + channel, soon + channel, head_size, from, to,
                                       sums + channel);
    for (; channel < head_size; channel += 2 * LANES)
        add_values<T, QUERIES, 2>(weights, stride, values + channel, soon + channel, head_size, from, to,
                                  sums + channel);
}

// Up to ROWS queries with ascending positions; `scores` has room for ROWS · stride floats, stride ≥ 16 · their blocks.
// sums: (count, head size) floats, the attention output.
template <class T>
void attend(const typename T::Element* queries, const Query* query, int count, const Blocks<T>& blocks, int head_size,
            float* scores, size_t stride, float* sums) {
    const int words = head_size * (int)sizeof(typename T::Element) / 4;
    const int first_block = query[0].first / BLOCK, last_block = query[count - 1].last / BLOCK;
    for (int block = first_block; block <= last_block; block += matmul::MOST_PANELS) {
        const uint32_t *panels[matmul::MOST_PANELS], *soon[matmul::MOST_PANELS];
        const int some = std::min(matmul::MOST_PANELS, last_block + 1 - block);
        for (int p = 0; p < some; p++) {
            const int later = block + p + matmul::MOST_PANELS;
            panels[p] = (const uint32_t*)blocks.keys(block + p);
            soon[p] = (const uint32_t*)(later <= last_block ? blocks.keys(later)
                                                            : blocks.values(std::min(first_block + p, last_block)));
        }
        matmul::rows_by_panels<T>((const uint32_t*)queries, words, count, panels, soon, some, words,
                                  scores + (block - first_block) * LANES, stride);
    }
    const float scale = 1.0f / std::sqrt((float)head_size);
    float total[ROWS];
    for (int q = 0; q < count; q++) total[q] = to_weights(scores + q * stride, first_block, query[q], scale);
    std::fill(sums, sums + count * head_size, 0.0f);
    for (int block = first_block; block <= last_block; block++) {
        const auto *values = blocks.values(block), *soon = blocks.values(std::min(block + VALUES_AHEAD, last_block));
        const float* const weights = scores + (block - first_block) * LANES;
        int from[ROWS], to[ROWS];
        for (int q = 0; q < count; q++) {
            from[q] = std::max(query[q].first - block * BLOCK, 0);
            to[q] = std::min(query[q].last + 1 - block * BLOCK, BLOCK);
        }
        for (int q = 0, same; q < count; q += same) {  // queries that see the same positions go together
            same = 1;
            while (q + same < count && from[q + same] == from[q] && to[q + same] == to[q]) same++;
            const auto add = same >= 4 ? add_values_of_head<T, 4> : same >= 2 ? add_values_of_head<T, 2>
                                                                                : add_values_of_head<T, 1>;
            same = same >= 4 ? 4 : same >= 2 ? 2 : 1;
            add(weights + q * stride, stride, values, soon, head_size, from[q], to[q], sums + q * head_size);
        }
    }
    for (int q = 0; q < count; q++)
        for (int channel = 0; channel < head_size; channel += LANES) {
            float* const at = sums + q * head_size + channel;
            simd::store(at, simd::load<Lanes>(at) * simd::broadcast(1.0f / total[q]));
        }
}

}  // namespace attention
