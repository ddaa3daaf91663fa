// The elementwise part of the softcapped cross-entropy: one row of logits at a time, while it is in a core's cache.
//
// With s = sigmoid(2z/15) the softcapped logit 15·tanh(z/15) is 30·s − 15, and its derivative 4·s·(1 − s). A row is
// one thread's from first to last, so no bit depends on the number of threads.
#include <algorithm>

#include "crew.h"
#include "simd.h"

namespace {

using simd::as_floats;
using simd::as_words;
using simd::Bf16;
using simd::broadcast;
using simd::Fp32;
using simd::Lanes;
using simd::LANES;
using simd::PARTS;

constexpr float SOFTCAP = 15.0f, LOG2_E = 1.44269504f;
constexpr int CHAINS = 4;  // sums of a row that do not wait for each other
constexpr int ROWS_PER_PIECE = 2;
constexpr int64_t ELEMENTS_PER_PIECE = 1 << 16;

// 2ʸ for y within ±120, relative error 1.5e-7. Half as long as the general exponential of simd.h, which matters here.
INLINE Lanes power_of_two(Lanes y) {
    // Adding 1.5·2²³ rounds to the nearest integer n and leaves it in the low bits, whence it enters the exponent.
    const Lanes magic = broadcast(12582912.0f);
    const Lanes shifted = y + magic;
    const Lanes r = y - (shifted - magic);
    Lanes power = broadcast(0.0013264727f);  // minimax for |r| ≤ ½
    for (float coefficient : {0.009671513f, 0.055507336f, 0.24022242f, 0.693147f, 1.0f})
        power = simd::multiply_add(power, r, broadcast(coefficient));
    EACH_PART power.part[i] = as_floats(as_words(power.part[i]) + (as_words(shifted.part[i]) << 23));
    return power;
}

INLINE Lanes reciprocal(Lanes x) {
#if defined(__AVX512F__) && !defined(PORTABLE)
    const __m512 guess = _mm512_rcp14_ps(x.part[0]);
    x.part[0] = _mm512_fmadd_ps(_mm512_fnmadd_ps(x.part[0], guess, _mm512_set1_ps(1.0f)), guess, guess);
    return x;
#else
    return broadcast(1.0f) / x;
#endif
}

// Within ±limit; what is not a number stays so.
INLINE Lanes clamp(Lanes x, float limit) {
#if defined(__AVX512F__) && !defined(PORTABLE)
    x.part[0] = _mm512_min_ps(_mm512_set1_ps(limit), _mm512_max_ps(_mm512_set1_ps(-limit), x.part[0]));
    return x;
#else
    x = simd::select(simd::less(broadcast(limit), x), broadcast(limit), x);
    return simd::maximum(x, broadcast(-limit));
#endif
}

struct Softcapped {
    Lanes exponential;  // of the softcapped logit; at most e¹⁵, so that no maximum must be subtracted
    Lanes slope;        // d softcapped / d raw
};

INLINE Softcapped softcapped(Lanes z) {
    const Lanes u = power_of_two(clamp(z * broadcast(-2 * LOG2_E / SOFTCAP), 115.0f));
    const Lanes s = reciprocal(broadcast(1.0f) + u);
    const Lanes capped = simd::multiply_add(s, broadcast(2 * SOFTCAP * LOG2_E), broadcast(-SOFTCAP * LOG2_E));
    return {power_of_two(capped), u * s * s * broadcast(4.0f)};
}

float first(Lanes x) {
    float lane[LANES];
    simd::store(lane, x);
    return lane[0];
}

template <class T>
float read_one(const typename T::Element* from) {
    typename T::Element padded[LANES] = {*from};
    return first(T::read(padded));
}

template <class T>
void write_one(typename T::Element* to, float value) {
    typename T::Element padded[LANES];
    T::write(padded, broadcast(value));
    *to = padded[0];
}

// The loss of one row of raw logits. With `gradient`, scratch must hold `vocab` floats rounded up to whole lanes, and
// the logits become the gradient of scale·loss.
template <class T, bool gradient>
float row_loss(typename T::Element* z, int64_t vocab, int64_t target, float scale, float* scratch) {
    Lanes sums[CHAINS];
    for (Lanes& sum : sums) sum = simd::zero();
    const auto at = [&](const typename T::Element* from, int64_t v, Lanes& sum) {
        const Softcapped each = softcapped(T::read(from));
        if (gradient) simd::store(scratch + v, each.exponential * each.slope);
        return sum + each.exponential;
    };
    int64_t v = 0;
    for (; v + CHAINS * LANES <= vocab; v += CHAINS * LANES)
        for (int chain = 0; chain < CHAINS; chain++) {
            const int64_t here = v + chain * LANES;
            sums[chain] = at(z + here, here, sums[chain]);
        }
    for (; v < vocab; v += LANES) {
        const int count = std::min<int64_t>(LANES, vocab - v);
        typename T::Element padded[LANES] = {};
        std::copy(z + v, z + v + count, padded);
        Lanes none = simd::zero();
        float lane[LANES];
        simd::store(lane, at(padded, v, none));
        std::fill(lane + count, lane + LANES, 0.0f);
        sums[0] = sums[0] + simd::load<Lanes>(lane);
    }
    const float sum = simd::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const float z_target = read_one<T>(z + target);
    const Softcapped of_target = softcapped(broadcast(z_target));
    const float loss = std::log(sum) - SOFTCAP * std::tanh(z_target / SOFTCAP);
    if (gradient) {
        const Lanes factor = broadcast(scale / sum);
        for (v = 0; v + LANES <= vocab; v += LANES) T::write(z + v, simd::load<Lanes>(scratch + v) * factor);
        for (; v < vocab; v++) write_one<T>(z + v, scratch[v] * (scale / sum));
        write_one<T>(z + target, scale * (first(of_target.exponential) / sum - 1) * first(of_target.slope));
    }
    return loss;
}

template <class T>
struct Rows : Job {
    typename T::Element* z;
    int64_t rows, vocab;
    const int64_t* targets;  // −1: ignored
    const float* scale;      // of each row's loss, or null: no gradients are wanted
    float *losses, *scratch;

    int phases() const override { return 1; }
    int pieces(int) const override { return (rows + ROWS_PER_PIECE - 1) / ROWS_PER_PIECE; }
    void run(int, int piece, int thread) override {
        float* const own = scratch ? scratch + thread * ((vocab + LANES - 1) / LANES * LANES) : nullptr;
        const int64_t last = std::min<int64_t>(rows, (piece + 1) * (int64_t)ROWS_PER_PIECE);
        for (int64_t row = piece * (int64_t)ROWS_PER_PIECE; row < last; row++) {
            typename T::Element* const of_row = z + row * vocab;
            if (targets[row] < 0) {
                losses[row] = 0;
                if (scale) std::fill(of_row, of_row + vocab, 0);
                continue;
            }
            losses[row] = scale ? row_loss<T, true>(of_row, vocab, targets[row], scale[row], own)
                                : row_loss<T, false>(of_row, vocab, targets[row], 0, own);
        }
    }
};

// sum = part or sum += part, part in bf16 and sum in fp32.
struct Accumulate : Job {
    float* sum;
    const uint16_t* part;
    int64_t count;
    bool overwrite;

    int phases() const override { return 1; }
    int pieces(int) const override { return (count + ELEMENTS_PER_PIECE - 1) / ELEMENTS_PER_PIECE; }
    void run(int, int piece, int) override {
        int64_t i = piece * ELEMENTS_PER_PIECE;
        const int64_t last = std::min(count, i + ELEMENTS_PER_PIECE);
        for (; i + LANES <= last; i += LANES) {
            const Lanes more = Bf16::read(part + i);
            simd::store(sum + i, overwrite ? more : simd::load<Lanes>(sum + i) + more);
        }
        for (; i < last; i++) sum[i] = (overwrite ? 0.0f : sum[i]) + read_one<Bf16>(part + i);
    }
};

template <class T>
void run_rows(Crew& crew, void* z, int64_t rows, int64_t vocab, const int64_t* targets, const float* scale,
              float* losses, float* scratch) {
    Rows<T> job;
    job.z = (typename T::Element*)z, job.rows = rows, job.vocab = vocab;
    job.targets = targets, job.scale = scale, job.losses = losses, job.scratch = scratch;
    crew.run(job);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void* cpu_loss_crew(int threads) { return new Crew(threads); }

EXPORT void cpu_loss_rows(void* crew, int bf16, void* z, int64_t rows, int64_t vocab, const int64_t* targets,
                          const float* scale, float* losses, float* scratch) {
    (bf16 ? run_rows<Bf16> : run_rows<Fp32>)(*(Crew*)crew, z, rows, vocab, targets, scale, losses, scratch);
}

EXPORT void cpu_loss_accumulate(void* crew, float* sum, const void* part, int64_t count, int overwrite) {
    Accumulate job;
    job.sum = sum, job.part = (const uint16_t*)part, job.count = count, job.overwrite = overwrite;
    ((Crew*)crew)->run(job);
}
