// Causal attention with a sliding window, forward and backward, of one head at a time.
//
// Scores exist for 16 queries and the keys their window reaches (forward), or for 64 keys and 256 queries (backward).
// They are made with a query in each lane, so the softmax and its gradient need no work across lanes: S = K·Qᵀ,
// Y = Vᵀ·P; backward S again, dP = V·dYᵀ, dV = P·dY, dK = dS·Q, dQ = Kᵀ·dS. Tiles of 16 × 16 in which no query sees a
// key are skipped. Every sum is made by one thread in one order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "memory.h"
#include "tiles.h"

namespace attention {

using simd::Lanes;
using tiles::SIDE;
using tiles::WORD;

constexpr int BLOCK_TILES = 4;   // of keys: what dQ sums over at once
constexpr int CHUNK_TILES = 16;  // of queries: what dK and dV sum over at once
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Of (rows, length, heads, size) each; results and gradients are contiguous, inputs have contiguous heads in a token.
struct Call {
    int rows, length, heads, kv_heads, size, window;
    const void *q, *k, *v;
    size_t q_stride, k_stride, v_stride;  // numbers from one token to the next
    void* y;
    float* log_sums;  // (rows, heads, length): of exp(score / √size)
    const void* dy;
    void *dq, *dk, *dv;

    int tiles() const { return tiles::round_up(length) / SIDE; }
    float scale() const { return 1.0f / std::sqrt((float)size); }
    bool sees(int query_tile, int key_tile) const {
        return key_tile <= query_tile && SIDE * (query_tile - key_tile) < SIDE + (int64_t)window;
    }
    int first_seen(int query_tile) const { return std::max(0, query_tile * SIDE - window) / SIDE; }
    // Whether each query of a tile sees each key of another.
    bool sees_all(int query_tile, int key_tile) const {
        return key_tile < query_tile && SIDE * (query_tile - key_tile) + SIDE - 1 <= (int64_t)window;
    }
};

inline Lanes lane_numbers() {
    static const float numbers[simd::LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return simd::load<Lanes>(numbers);
}

// Of queries first … first + 15: `x` where they see a key, else `hidden`.
INLINE Lanes visible(int first, int key, int window, Lanes x, Lanes hidden) {
    const Lanes from = simd::broadcast((float)(key - first) - 0.5f);
    const Lanes to = simd::broadcast((float)std::min<int64_t>((int64_t)key - first + window, SIDE) + 0.5f);
    x = simd::select(simd::less(from, lane_numbers()), x, hidden);
    return simd::select(simd::less(lane_numbers(), to), x, hidden);
}

template <class T>
struct Head {
    typedef typename T::Element Element;

    Head(const Call& call, Arena& arena)
        : c(call),
          arena(arena),
          padded(tiles::round_up(call.length)),
          words(call.size / WORD<T>),
          stride(padded / WORD<T> + tiles::STRIDE_PADDING) {}

    // Rows of one head of a tensor whose tokens are `token` numbers apart.
    const Element* rows(const void* tensor, size_t token, int row, int head) const {
        return (const Element*)tensor + (size_t)row * c.length * token + (size_t)head * c.size;
    }

    size_t row_words() const { return (size_t)padded * words; }
    size_t channel_words() const { return c.size * stride; }
    size_t scratch_words() const { return (size_t)padded / WORD<T> * SIDE; }

    const Call& c;
    Arena& arena;
    const int padded, words;
    const size_t stride;  // of rows of words along the positions
};

template <class T>
struct Forward : Head<T> {
    typedef typename T::Element Element;
    using Head<T>::c, Head<T>::words, Head<T>::stride, Head<T>::padded, Head<T>::arena;

    Forward(const Call& call, Arena& arena, int row, int head) : Head<T>(call, arena) {
        const size_t query = (size_t)SIDE * words;
        arena.reset(2 * this->row_words() + this->channel_words() + (size_t)padded * SIDE + 2 * query + SIDE * SIDE);
        uint32_t* const keys = arena.words(this->row_words());
        uint32_t* const values = arena.words(this->row_words());
        uint32_t* const channels = arena.words(this->channel_words());
        scores = arena.floats((size_t)padded * SIDE);
        query_rows = arena.words(query), query_columns = arena.words(query), tile = arena.floats(SIDE * SIDE);
        const int kv_head = head / (c.heads / c.kv_heads);
        tiles::copy_rows<T>(this->rows(c.k, c.k_stride, row, kv_head), c.k_stride, c.length, c.size, keys);
        tiles::copy_rows<T>(this->rows(c.v, c.v_stride, row, kv_head), c.v_stride, c.length, c.size, values);
        tiles::rows_to_channels<T>(values, padded, c.size, channels, stride, (uint32_t*)scores);
        const size_t token = (size_t)c.heads * c.size;
        const Element* const q = this->rows(c.q, c.q_stride, row, head);
        Element* const y = const_cast<Element*>(this->rows(c.y, token, row, head));
        float* const log_sums = c.log_sums + ((size_t)row * c.heads + head) * c.length;
        for (int t = 0; t < c.tiles(); t++) {
            const int first = t * SIDE;
            attend(q + first * c.q_stride, t, keys, channels, y + first * token, token, log_sums + first);
        }
    }

    void attend(const Element* q, int t, const uint32_t* keys, const uint32_t* channels, Element* y, size_t token,
                float* log_sums) {
        const int first = t * SIDE, count = std::min(SIDE, c.length - first);
        const int first_tile = c.first_seen(t), seen = (t + 1 - first_tile) * SIDE;
        tiles::copy_rows<T>(q, c.q_stride, count, c.size, query_rows);
        tiles::rows_to_columns<T>(query_rows, SIDE, c.size, query_columns);
        Lanes highest = simd::broadcast(-INFINITE);
        for (int key_tile = first_tile; key_tile <= t; key_tile++) {
            float* const at = scores + (key_tile - first_tile) * SIDE * SIDE;
            tiles::multiply<T, false>(keys + (size_t)key_tile * SIDE * words, words, query_columns, words, at);
            if (!c.sees_all(t, key_tile))
                for (int r = 0; r < SIDE; r++)
                    simd::store(at + r * SIDE, visible(first, key_tile * SIDE + r, c.window,
                                                       simd::load<Lanes>(at + r * SIDE), simd::broadcast(-INFINITE)));
            for (int r = 0; r < SIDE; r++) highest = simd::maximum(highest, simd::load<Lanes>(at + r * SIDE));
        }
        const Lanes scale = simd::broadcast(c.scale()), most = highest * scale;
        Lanes total = simd::zero();
        for (int key = 0; key < seen; key += WORD<T>) {  // weights take the place of scores, in words
            Lanes weight[WORD<T>];
            for (int i = 0; i < WORD<T>; i++) {
                weight[i] = simd::exp(simd::load<Lanes>(scores + (key + i) * SIDE) * scale - most);
                total = total + weight[i];
            }
            tiles::store((uint32_t*)scores + key / WORD<T> * SIDE, tiles::pair(T(), weight[0], weight[WORD<T> - 1]));
        }
        const Lanes share = simd::broadcast(1.0f) / total;
        for (int channel = 0; channel < c.size; channel += SIDE) {
            tiles::multiply<T, false>(channels + channel * stride + first_tile * SIDE / WORD<T>, stride,
                                      (const uint32_t*)scores, seen / WORD<T>, tile);
            tiles::write_rows<T>(tile, share, count, y + channel, token);
        }
        alignas(64) float highest_of[SIDE], total_of[SIDE];
        simd::store(highest_of, most);
        simd::store(total_of, total);
        for (int i = 0; i < count; i++) log_sums[i] = highest_of[i] + std::log(total_of[i]);
    }

    float *scores, *tile;
    uint32_t *query_rows, *query_columns;
};

// The gradients of a key/value head and of the queries that read it.
template <class T>
struct Backward : Head<T> {
    typedef typename T::Element Element;
    using Head<T>::c, Head<T>::words, Head<T>::stride, Head<T>::padded, Head<T>::arena;

    static constexpr int CHUNK_WORDS = CHUNK_TILES * SIDE / WORD<T> + tiles::STRIDE_PADDING;  // a row of a chunk

    Backward(const Call& call, Arena& arena, int row, int kv_head) : Head<T>(call, arena) {
        const size_t rows = this->row_words(), sums = (size_t)padded * c.size;
        const size_t block = (size_t)BLOCK_TILES * SIDE;
        arena.reset(7 * rows + this->channel_words() + this->scratch_words() + 3 * sums + 2 * padded +
                    2 * block * CHUNK_WORDS + block * SIDE);
        keys = arena.words(rows), values = arena.words(rows), some_rows = arena.words(rows);
        query_columns = arena.words(rows), query_pairs = arena.words(rows);
        dy_columns = arena.words(rows), dy_pairs = arena.words(rows);
        key_channels = arena.words(this->channel_words());
        uint32_t* const scratch = arena.words(this->scratch_words());
        dq = arena.floats(sums), dk = arena.floats(sums), dv = arena.floats(sums);
        log_sums = arena.floats(padded), dots = arena.floats(padded);
        weights = arena.words(block * CHUNK_WORDS), gradients = arena.words(block * CHUNK_WORDS);
        gradient_pairs = arena.words(block * SIDE);

        tiles::copy_rows<T>(this->rows(c.k, c.k_stride, row, kv_head), c.k_stride, c.length, c.size, keys);
        tiles::copy_rows<T>(this->rows(c.v, c.v_stride, row, kv_head), c.v_stride, c.length, c.size, values);
        tiles::rows_to_channels<T>(keys, padded, c.size, key_channels, stride, scratch);
        const int group = c.heads / c.kv_heads, last_head = (kv_head + 1) * group - 1;
        for (int head = kv_head * group; head <= last_head; head++) {
            take_queries(row, head);
            for (int block = 0; block < c.tiles(); block += BLOCK_TILES) {
                const int keys_end = std::min(block + BLOCK_TILES, c.tiles());
                int queries_end = c.tiles();
                while (!c.sees(queries_end - 1, keys_end - 1)) queries_end--;
                for (int chunk = block; chunk < queries_end; chunk += CHUNK_TILES)
                    meet(block, keys_end, chunk, std::min(chunk + CHUNK_TILES, queries_end),
                         head > kv_head * group || chunk > block);
                write_query_gradients(row, head, block, keys_end);  // later keys they do not see
                if (head < last_head) continue;
                write_sums(dk, c.scale(), c.dk, row, kv_head, block, keys_end);
                write_sums(dv, 1.0f, c.dv, row, kv_head, block, keys_end);
            }
        }
    }

    void take_queries(int row, int head) {
        const size_t token = (size_t)c.heads * c.size, panels = (size_t)padded / WORD<T> * SIDE;
        tiles::copy_rows<T>(this->rows(c.q, c.q_stride, row, head), c.q_stride, c.length, c.size, some_rows);
        tiles::rows_to_columns<T>(some_rows, padded, c.size, query_columns);
        tiles::rows_to_pairs<T>(some_rows, padded, c.size, query_pairs, panels);
        tiles::copy_rows<T>(this->rows(c.dy, token, row, head), token, c.length, c.size, some_rows);
        tiles::rows_to_columns<T>(some_rows, padded, c.size, dy_columns);
        tiles::rows_to_pairs<T>(some_rows, padded, c.size, dy_pairs, panels);
        std::memcpy(log_sums, c.log_sums + ((size_t)row * c.heads + head) * c.length, c.length * sizeof(float));
        std::fill(log_sums + c.length, log_sums + padded, INFINITE);  // absent queries give no weight to any key
        const Element* const y = this->rows(c.y, token, row, head);
        for (int t = 0; t < padded; t++) {
            Lanes total = simd::zero();
            for (int channel = 0; t < c.length && channel < c.size; channel += SIDE)
                total = simd::multiply_add(T::read(y + t * token + channel),
                                           T::read((const Element*)some_rows + (size_t)t * c.size + channel), total);
            dots[t] = simd::sum(total);
        }
    }

    // What a block of keys and a chunk of queries (tiles from … to − 1) have to do with each other; `more`: is added to
    // the keys' sums, which are begun otherwise.
    void meet(int keys_from, int keys_to, int queries_from, int queries_to, bool more) {
        for (int t = queries_from; t < queries_to; t++) {
            const int from = std::max(keys_from, c.first_seen(t)), to = std::min(keys_to, t + 1);
            if (from >= to) continue;
            for (int key_tile = from; key_tile < to; key_tile++)
                weigh(t, key_tile, key_tile - keys_from, t - queries_from);
            for (int channel = 0; channel < c.size; channel += SIDE)
                tiles::multiply<T>(from > c.first_seen(t), key_channels + channel * stride + from * SIDE / WORD<T>,
                                   stride, gradient_pairs + (from - keys_from) * SIDE / WORD<T> * SIDE,
                                   (to - from) * SIDE / WORD<T>, dq + ((size_t)t * c.size + channel) * SIDE);
        }
        for (int key_tile = keys_from; key_tile < keys_to; key_tile++) {
            const int from = std::max(queries_from, key_tile);
            int to = queries_to;
            while (to > from && !c.sees(to - 1, key_tile)) to--;
            if (from >= to) continue;
            const size_t column = (from - queries_from) * SIDE / WORD<T>;
            const size_t rows = (size_t)(key_tile - keys_from) * SIDE * CHUNK_WORDS + column;
            const int count = (to - from) * SIDE / WORD<T>;
            for (int channel = 0; channel < c.size; channel += SIDE) {
                const size_t panel = ((size_t)channel / SIDE * padded + (size_t)from * SIDE) / WORD<T> * SIDE;
                const size_t sum = ((size_t)key_tile * c.size + channel) * SIDE;
                tiles::multiply<T>(more, weights + rows, CHUNK_WORDS, dy_pairs + panel, count, dv + sum);
                tiles::multiply<T>(more, gradients + rows, CHUNK_WORDS, query_pairs + panel, count, dk + sum);
            }
        }
    }

    // The weights of a tile and the gradients of its scores, as the three products want them.
    void weigh(int t, int key_tile, int place, int column) {
        alignas(64) float score[SIDE * SIDE], dweight[SIDE * SIDE];
        const size_t panel = (size_t)t * SIDE * words, rows = (size_t)key_tile * SIDE * words;
        tiles::multiply<T, false>(keys + rows, words, query_columns + panel, words, score);
        tiles::multiply<T, false>(values + rows, words, dy_columns + panel, words, dweight);
        const Lanes scale = simd::broadcast(c.scale());
        const Lanes log_sum = simd::load<Lanes>(log_sums + t * SIDE), dot = simd::load<Lanes>(dots + t * SIDE);
        const bool whole = c.sees_all(t, key_tile);
        const size_t own = (size_t)place * SIDE * CHUNK_WORDS + (size_t)column * SIDE / WORD<T>;
        for (int r = 0; r < SIDE; r += WORD<T>) {
            Lanes gradient[WORD<T>];
            for (int i = 0; i < WORD<T>; i++) {
                Lanes weight = simd::exp(simd::load<Lanes>(score + (r + i) * SIDE) * scale - log_sum);
                if (!whole) weight = visible(t * SIDE, key_tile * SIDE + r + i, c.window, weight, simd::zero());
                gradient[i] = weight * (simd::load<Lanes>(dweight + (r + i) * SIDE) - dot);
                T::write((Element*)(weights + own + (r + i) * CHUNK_WORDS), weight);
                T::write((Element*)(gradients + own + (r + i) * CHUNK_WORDS), gradient[i]);
            }
            tiles::store(gradient_pairs + (place * SIDE + r) / WORD<T> * SIDE,
                         tiles::pair(T(), gradient[0], gradient[WORD<T> - 1]));
        }
    }

    // Of tiles first … last − 1, as all that follow.
    void write_query_gradients(int row, int head, int first, int last) {
        const size_t token = (size_t)c.heads * c.size;
        Element* const to = const_cast<Element*>(this->rows(c.dq, token, row, head));
        for (int t = first; t < last; t++)
            for (int channel = 0; channel < c.size; channel += SIDE)
                tiles::write_rows<T>(dq + ((size_t)t * c.size + channel) * SIDE, simd::broadcast(c.scale()),
                                     std::min(SIDE, c.length - t * SIDE),
                                     to + (size_t)t * SIDE * token + channel, token);
    }

    void write_sums(const float* sums, float scale, void* tensor, int row, int kv_head, int first, int last) {
        const size_t token = (size_t)c.kv_heads * c.size;
        Element* const to = const_cast<Element*>(this->rows(tensor, token, row, kv_head));
        for (int key = first * SIDE; key < std::min(c.length, last * SIDE); key++)
            for (int channel = 0; channel < c.size; channel += SIDE) {
                const float* const sum = sums + ((size_t)(key / SIDE) * c.size + channel) * SIDE + key % SIDE * SIDE;
                T::write(to + key * token + channel, simd::load<Lanes>(sum) * simd::broadcast(scale));
            }
    }

    uint32_t *keys, *values, *some_rows, *query_columns, *query_pairs, *dy_columns, *dy_pairs, *key_channels;
    uint32_t *weights, *gradients, *gradient_pairs;
    float *dq, *dk, *dv, *log_sums, *dots;
};

}  // namespace attention
