// The whole forward pass as phases for a crew of threads. The network itself is described in nanochat_ray/model/gpt.py.
//
// The residual stream, norms, rotary positions and softmax are fp32; what enters a matrix is rounded to the dtype of its
// weights; keys, values and queries to bf16, or fp32 if that is the weights' dtype.

#include "step.h"

#include <new>

#include "attention.h"
#include "crew.h"
#include "matmul.h"
#include "rows.h"

namespace {

using simd::Lanes;
using simd::LANES;

constexpr int SMEAR_CHANNELS = 24, GATE_CHANNELS = 12;
constexpr float EPSILON = 1.1920929e-7f, GATE_RANGE = 3.0f, SOFTCAP = 15.0f;
constexpr int TILE_TOKENS = 16;       // of one sequence, in a piece of attention
constexpr int TOKENS_PER_PIECE = 8;   // in phases that work token by token, if there are many

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

float dot(const float* a, const float* b, int count) {
    float total = 0;
    for (int i = 0; i < count; i++) total += a[i] * b[i];
    return total;
}

// 1 / RMS of count numbers, a multiple of 32.
float inverse_rms(const float* x, int count) {
    Lanes even = simd::zero(), odd = simd::zero();
    for (int i = 0; i < count; i += 2 * LANES) {
        const Lanes a = simd::load<Lanes>(x + i), b = simd::load<Lanes>(x + i + LANES);
        even = simd::multiply_add(a, a, even);
        odd = simd::multiply_add(b, b, odd);
    }
    return 1.0f / std::sqrt(simd::sum(even + odd) / (float)count + EPSILON);
}

// 15·tanh(z/15)
Lanes softcap(Lanes z) {
    const Lanes most = simd::broadcast(40.0f), x = z * simd::broadcast(2.0f / SOFTCAP);
    const Lanes e = simd::exp(simd::select(simd::less(most, x), most, x));  // tanh is 1 long before exp overflows
    return simd::broadcast(SOFTCAP) - simd::broadcast(2.0f * SOFTCAP) / (e + simd::broadcast(1.0f));
}

struct Step : Job {
    virtual void forward(const Batch& batch) = 0;
};

// M: how matrices are stored; T: keys, values, queries and embeddings.
template <class M, class T = M>
class StepOf final : public Step {
    typedef typename T::Element Element;
    typedef matmul::Linear<M> Linear;

  public:
    StepOf(const Shape& shape, const Weights& weights)
        : s_(shape),
          w_(weights),
          layers_(weights.layers, weights.layers + shape.layers),
          group_heads_(shape.heads / shape.kv_heads),
          kv_width_(shape.kv_heads * shape.head_size),
          qkv_width_(shape.width + 2 * kv_width_),
          input_(shape.width),
          hidden_(4 * shape.width),
          crew_(shape.threads) {
        score_stride_ = (shape.context + 2 * LANES) / LANES * LANES;
        scores_.reserve((size_t)shape.threads * attention::ROWS * score_stride_);
        sums_.reserve((size_t)shape.threads * attention::ROWS * shape.head_size);
    }

    void forward(const Batch& batch) override {
        b_ = batch;
        const size_t tokens = batch.tokens, width = s_.width;
        x_.reserve(tokens * width);
        x0_.reserve(tokens * width);
        middle_.reserve(tokens * width);
        qkv_.reserve(tokens * qkv_width_);
        queries_.reserve(tokens * width);
        gates_.reserve(tokens * s_.kv_heads);
        input_.reserve(tokens);
        hidden_.reserve(tokens);
        cut_into_tiles();
        crew_.run(*this);
    }

    int phases() const override { return EMBED_PHASES + s_.layers * LAYER_PHASES + FINAL_PHASES; }

    int pieces(int phase) const override {
        const Place at = place(phase);
        const int rows = rows_left(at.layer);
        switch (at.kind) {
            case EMBED:
            case MIX:
            case ROTATE: return token_pieces(b_.tokens);
            case QKV: return qkv(0).cut(b_.tokens).pieces;
            case ATTEND: return (int)tiles(at.layer).size() * s_.kv_heads;
            case CLOSE_ATTENDED:
            case CLOSE_HIDDEN: return M::SCALED ? token_pieces(rows) : 0;
            case OUT: return out(0).cut(rows).pieces;
            case UP: return up(0).cut(rows).pieces;
            case DOWN: return down(0).cut(rows).pieces;
            case NORM:
            case LAST_NORM: return token_pieces(rows);
            case HEAD: return head().cut(rows).pieces;
        }
        return 0;
    }

    void run(int phase, int piece, int thread) override {
        const Place at = place(phase);
        const int layer = at.layer, rows = rows_left(layer);
        switch (at.kind) {
            case EMBED: return each_token(b_.tokens, piece, [&](int t) { embed(t); });
            case MIX: return each_token(b_.tokens, piece, [&](int t) { mix(layer, t); });
            case ROTATE: return each_token(b_.tokens, piece, [&](int t) { rotate(layer, t); });
            case NORM: return each_token(rows, piece, [&](int row) { normalise(x(token(layer, row)), row); });
            case LAST_NORM: return each_token(rows, piece, [&](int row) { last_norm(token(layer, row), row); });
            case CLOSE_ATTENDED: return each_token(rows, piece, [&](int row) { input_.close(row); });
            case CLOSE_HIDDEN: return each_token(rows, piece, [&](int row) { hidden_.close(row); });
            case ATTEND: return attend(layer, piece, thread);
            case QKV:
                return multiply(qkv(layer), b_.tokens, piece, input_, [&](int t, int panel, Lanes sums) {
                    simd::store(qkv_.at((size_t)t * qkv_width_ + panel * LANES), sums);
                });
            case OUT:
                return multiply(out(layer), rows, piece, input_, [&](int row, int panel, Lanes sums) {
                    add_to_residual(token(layer, row), panel, sums);
                });
            case UP:
                return multiply(up(layer), rows, piece, input_, [&](int row, int panel, Lanes sums) {
                    const Lanes positive = simd::maximum(sums, simd::zero());
                    hidden_.write(row, panel * LANES, positive * positive);
                });
            case DOWN:
                return multiply(down(layer), rows, piece, hidden_, [&](int row, int panel, Lanes sums) {
                    add_to_residual(token(layer, row), panel, sums);
                });
            case HEAD:
                return multiply(head(), rows, piece, input_, [&](int row, int panel, Lanes sums) {
                    const int column = panel * LANES;
                    float* const to = b_.logits + (size_t)row * s_.vocab + column;
                    const Lanes capped = softcap(sums);
                    if (column + LANES <= s_.vocab)
                        simd::store(to, capped);
                    else
                        std::memcpy(to, &capped, (s_.vocab - column) * sizeof(float));
                });
        }
    }

  private:
    enum Kind { EMBED, MIX, QKV, ROTATE, ATTEND, CLOSE_ATTENDED, OUT, NORM, UP, CLOSE_HIDDEN, DOWN, LAST_NORM, HEAD };
    static constexpr int EMBED_PHASES = 1, LAYER_PHASES = DOWN - MIX + 1, FINAL_PHASES = 2;
    static constexpr int WORD = 4 / sizeof(Element);  // elements in a word

    struct Place {
        Kind kind;
        int layer;
    };

    // Consecutive tokens of a sequence whose attention is one piece per head; its output goes to rows row, row + 1, …
    struct Tile {
        int sequence, token, count, row;
    };

    Place place(int phase) const {
        if (phase < EMBED_PHASES) return {EMBED, 0};
        phase -= EMBED_PHASES;
        const int layer = phase / LAYER_PHASES;
        if (layer < s_.layers) return {(Kind)(MIX + phase % LAYER_PHASES), layer};
        return {(Kind)(LAST_NORM + phase - s_.layers * LAYER_PHASES), s_.layers - 1};
    }

    // After the last keys and values are stored, only the wanted tokens go on: as rows 0 … of what follows.
    bool is_last(int layer) const { return layer == s_.layers - 1; }
    int rows_left(int layer) const { return is_last(layer) ? b_.wanted_count : b_.tokens; }
    int token(int layer, int row) const { return is_last(layer) ? b_.wanted[row] : row; }
    const std::vector<Tile>& tiles(int layer) const { return is_last(layer) ? wanted_tiles_ : tiles_; }

    void cut_into_tiles() {
        tiles_.clear();
        wanted_tiles_.clear();
        for (int sequence = 0, row = 0; sequence < b_.sequences; sequence++) {
            const int stop = b_.starts[sequence + 1];
            for (int t = b_.starts[sequence]; t < stop; t += TILE_TOKENS)
                tiles_.push_back({sequence, t, std::min(TILE_TOKENS, stop - t), t});
            while (row < b_.wanted_count && b_.wanted[row] < stop) {
                Tile tile{sequence, b_.wanted[row], 0, row};
                while (tile.count < TILE_TOKENS && row < b_.wanted_count && b_.wanted[row] < stop &&
                       b_.wanted[row] == tile.token + tile.count)
                    row++, tile.count++;
                wanted_tiles_.push_back(tile);
            }
        }
    }

    static int per_piece(int tokens) { return tokens < 4 * TOKENS_PER_PIECE ? 1 : TOKENS_PER_PIECE; }
    static int token_pieces(int tokens) { return (tokens + per_piece(tokens) - 1) / per_piece(tokens); }

    template <class Work>
    static void each_token(int tokens, int piece, Work work) {
        const int stop = std::min(tokens, (piece + 1) * per_piece(tokens));
        for (int token = piece * per_piece(tokens); token < stop; token++) work(token);
    }

    Linear qkv(int layer) const { return linear(layers_[layer].qkv, s_.width, qkv_width_); }
    Linear out(int layer) const { return linear(layers_[layer].out, s_.width, s_.width); }
    Linear up(int layer) const { return linear(layers_[layer].up, s_.width, 4 * s_.width); }
    Linear down(int layer) const { return linear(layers_[layer].down, 4 * s_.width, s_.width); }
    Linear head() const { return linear(w_.head, s_.width, s_.vocab); }

    static Linear linear(const uint32_t* weights, int inputs, int outputs) {
        return {weights, (outputs + LANES - 1) / LANES, inputs / Rows<M>::WORD};
    }

    template <class Finish>
    static void multiply(const Linear& linear, int rows, int piece, const Rows<M>& input, Finish finish) {
        linear.run(linear.cut(rows), piece, input.words(), input.stride(), finish);
    }

    float* x(int token) const { return x_.at((size_t)token * s_.width); }

    // Queries of the heads that share a key head lie together: [kv_heads][tokens][heads / kv_heads][head_size].
    Element* queries(int kv_head, int token) const {
        return queries_.at(((size_t)kv_head * b_.tokens + token) * group_heads_ * s_.head_size);
    }

    attention::Blocks<T> blocks(int layer, int sequence, int kv_head) const {
        const LayerWeights& l = layers_[layer];
        const Storage& group = b_.groups[l.group];
        const size_t part = (size_t)attention::BLOCK * s_.head_size, block = 2 * part * s_.kv_heads;
        return {(Element*)group.data + l.place * group.blocks * block, block, 2 * part * kv_head, part,
                group.table + (size_t)sequence * group.table_width};
    }

    // The normed embedding and a gated part of the one before it.
    void embed(int t) {
        float* const own = x(t);
        read_embedding(b_.ids[t], own);
        const float gate = w_.smear_lambda * sigmoid(dot(own, w_.smear_gate, SMEAR_CHANNELS));
        float* const start = x0_.at((size_t)t * s_.width);
        if (b_.previous[t] < 0) {
            std::memcpy(start, own, s_.width * sizeof(float));
        } else {
            read_embedding(b_.previous[t], start);
            for (int i = 0; i < s_.width; i += LANES)
                simd::store(start + i, simd::multiply_add(simd::broadcast(gate), simd::load<Lanes>(start + i),
                                                          simd::load<Lanes>(own + i)));
            std::memcpy(own, start, s_.width * sizeof(float));
        }
    }

    void read_embedding(int id, float* to) {
        const Element* const from = (const Element*)w_.embedding + (size_t)id * s_.width;
        for (int i = 0; i < s_.width; i += LANES) simd::store(to + i, T::read(from + i));
        const Lanes scale = simd::broadcast(inverse_rms(to, s_.width));
        for (int i = 0; i < s_.width; i += LANES) simd::store(to + i, simd::load<Lanes>(to + i) * scale);
    }

    void mix(int layer, int t) {
        const LayerWeights& l = layers_[layer];
        float* const own = x(t);
        if (layer == s_.layers / 2 + 1) std::memcpy(middle_.at((size_t)t * s_.width), own, s_.width * sizeof(float));
        const float* const start = x0_.at((size_t)t * s_.width);
        const Lanes resid = simd::broadcast(l.resid_lambda), x0 = simd::broadcast(l.x0_lambda);
        for (int i = 0; i < s_.width; i += LANES) {
            const Lanes kept = simd::load<Lanes>(own + i) * resid;
            simd::store(own + i, simd::multiply_add(simd::load<Lanes>(start + i), x0, kept));
        }
        const float scale = normalise(own, t);
        if (!l.value_embedding) return;
        float channels[GATE_CHANNELS];
        for (int i = 0; i < GATE_CHANNELS; i++) channels[i] = own[i] * scale;
        for (int head = 0; head < s_.kv_heads; head++)
            gates_.at((size_t)t * s_.kv_heads)[head] =
                GATE_RANGE * sigmoid(dot(channels, l.gate + head * GATE_CHANNELS, GATE_CHANNELS));
    }

    // The normed row, rounded, becomes a row of the next matrix's input; returns 1 / RMS.
    float normalise(const float* from, int to) {
        const float scale = inverse_rms(from, s_.width);
        for (int i = 0; i < s_.width; i += LANES)
            input_.write(to, i, simd::load<Lanes>(from + i) * simd::broadcast(scale));
        input_.close(to);
        return scale;
    }

    // Queries, keys and values as they go into attention; keys and values into the token's block.
    void rotate(int layer, int t) {
        const LayerWeights& l = layers_[layer];
        const int size = s_.head_size, position = b_.positions[t], sequence = sequence_of(t);
        float* const q = qkv_.at((size_t)t * qkv_width_);
        for (int head = 0; head < s_.heads; head++) {
            float* const from = q + head * size;
            rotate_and_norm(from, position);
            Element* const to = queries(head / group_heads_, t) + head % group_heads_ * size;
            for (int i = 0; i < size; i += LANES) T::write(to + i, simd::load<Lanes>(from + i));
        }
        const int slot = position % attention::BLOCK;
        for (int head = 0; head < s_.kv_heads; head++) {
            const auto place = blocks(layer, sequence, head);
            float* const k = q + s_.width + head * size;
            rotate_and_norm(k, position);
            uint32_t* const keys = (uint32_t*)place.keys(position / attention::BLOCK);
            for (int i = 0; i < size; i += LANES) {
                alignas(64) Element part[LANES];
                T::write(part, simd::load<Lanes>(k + i));
                const int first = i / WORD;
                for (int word = 0; word < LANES / WORD; word++)
                    std::memcpy(keys + (first + word) * attention::BLOCK + slot, part + word * WORD, 4);
            }
            const float* const v = q + s_.width + kv_width_ + head * size;
            Element* const values = (Element*)place.values(position / attention::BLOCK) + slot * size;
            for (int i = 0; i < size; i += LANES) {
                Lanes value = simd::load<Lanes>(v + i);
                if (l.value_embedding) {
                    const Element* const extra =
                        (const Element*)l.value_embedding + (size_t)b_.ids[t] * kv_width_ + head * size + i;
                    value = simd::multiply_add(simd::broadcast(gates_.at((size_t)t * s_.kv_heads)[head]),
                                               T::read(extra), value);
                }
                T::write(values + i, value);
            }
        }
    }

    void rotate_and_norm(float* head, int position) {
        const int half = s_.head_size / 2;
        const float *const cosines = w_.cosines + (size_t)position * half, *const sines = w_.sines + (size_t)position * half;
        for (int i = 0; i < half; i += LANES) {
            const Lanes a = simd::load<Lanes>(head + i), b = simd::load<Lanes>(head + half + i);
            const Lanes cosine = simd::load<Lanes>(cosines + i), sine = simd::load<Lanes>(sines + i);
            simd::store(head + i, simd::multiply_add(a, cosine, b * sine));
            simd::store(head + half + i, b * cosine - a * sine);
        }
        const Lanes scale = simd::broadcast(w_.query_key_scale * inverse_rms(head, s_.head_size));
        for (int i = 0; i < s_.head_size; i += LANES) simd::store(head + i, simd::load<Lanes>(head + i) * scale);
    }

    int sequence_of(int token) const {
        return int(std::upper_bound(b_.starts, b_.starts + b_.sequences, token) - b_.starts) - 1;
    }

    void attend(int layer, int piece, int thread) {
        const int kv_head = piece % s_.kv_heads, size = s_.head_size;
        const Tile tile = tiles(layer)[piece / s_.kv_heads];
        const auto place = blocks(layer, tile.sequence, kv_head);
        float* const scores = scores_.at((size_t)thread * attention::ROWS * score_stride_);
        float* const sums = sums_.at((size_t)thread * attention::ROWS * size);
        const int rows = tile.count * group_heads_;
        for (int first = 0; first < rows; first += attention::ROWS) {
            const int count = std::min(attention::ROWS, rows - first);
            attention::Query query[attention::ROWS];
            for (int q = 0; q < count; q++) {
                const int position = b_.positions[tile.token + (first + q) / group_heads_];
                query[q] = {std::max(0, position - layers_[layer].window), position};
            }
            attention::attend<T>(queries(kv_head, tile.token) + (size_t)first * size, query, count, place, size, scores,
                                 score_stride_, sums);
            for (int q = 0; q < count; q++) {
                const int head = kv_head * group_heads_ + (first + q) % group_heads_;
                const int row = tile.row + (first + q) / group_heads_;
                for (int i = 0; i < size; i += LANES)
                    input_.write(row, head * size + i, simd::load<Lanes>(sums + q * size + i));
            }
        }
    }

    void add_to_residual(int t, int panel, Lanes sums) {
        float* const at = x(t) + panel * LANES;
        simd::store(at, simd::load<Lanes>(at) + sums);
    }

    void last_norm(int t, int to) {
        float* const own = x(t);
        const bool passed = s_.layers / 2 + 1 < s_.layers;  // else the middle layer is the last
        const float* const middle = passed ? middle_.at((size_t)t * s_.width) : own;
        for (int i = 0; i < s_.width; i += LANES)
            simd::store(own + i, simd::multiply_add(simd::broadcast(-w_.backout_lambda), simd::load<Lanes>(middle + i),
                                                    simd::load<Lanes>(own + i)));
        normalise(own, to);
    }

    const Shape s_;
    const Weights w_;
    const std::vector<LayerWeights> layers_;
    const int group_heads_, kv_width_, qkv_width_;
    Batch b_{};
    std::vector<Tile> tiles_, wanted_tiles_;
    Buffer<float> x_, x0_, middle_, qkv_, gates_, scores_, sums_;
    Buffer<Element> queries_;
    Rows<M> input_, hidden_;
    size_t score_stride_;
    Crew crew_;  // last: its threads end before what they work on
};

}  // namespace

void* cpu_step_new(const Shape* shape, const Weights* weights) {
    switch (shape->matrices) {
        case FP32: return new StepOf<simd::Fp32>(*shape, *weights);
        case BF16: return new StepOf<simd::Bf16>(*shape, *weights);
        case INT8: return new StepOf<simd::Int8, simd::Bf16>(*shape, *weights);
    }
    return nullptr;
}

int cpu_step_forward(void* step, const Batch* batch) {
    try {
        ((Step*)step)->forward(*batch);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

void cpu_step_free(void* step) { delete (Step*)step; }
