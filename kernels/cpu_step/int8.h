// Matrices of eight bits: weights with a factor per column, rows that enter with a factor per row. A word is four channels.
//
// A number is factor · q with q in −127 … 127. Weights are stored as q + 128, because the machine's instruction multiplies
// unsigned numbers by signed ones. Sums are integers: exact, so that they are the same in any order and on any machine.
// They are taken modulo 2³²; a true one would need 133,000 channels to be larger than 2³¹.
#pragma once

#include "simd.h"

namespace simd {

typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES)));
typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES / 4)));

struct Int8 {
    typedef int8_t Element;
    static constexpr bool SCALED = true;

    // What stands behind the numbers of a row.
    struct Row {
        float factor;
        uint32_t surplus;  // by which its sums are too large: 128 times the sum of its numbers
    };

    static INLINE Row row(const uint32_t* behind) {
        Row row;
        std::memcpy(&row, behind, sizeof row);
        return row;
    }

    static INLINE Lanes dot(Lanes sum, uint32_t row_word, Bits columns) {
        EACH_PART sum.part[i] = as_floats(dot(as_words(sum.part[i]), row_word, columns.part[i]));
        return sum;
    }

    static INLINE Words dot(Words sum, uint32_t row_word, Words columns) {
#if defined(__AVX512VNNI__) && !defined(PORTABLE)
        return (Words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)columns, (__m512i)broadcast_word(row_word));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__) && !defined(PORTABLE)
        return (Words)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)columns, (__m256i)broadcast_word(row_word));
#else
        // In 16 bits: the older instruction that multiplies bytes cuts off the sum of two products.
        const Shorts row = (Shorts)broadcast_word(row_word);
        sum += pairs((Shorts)(columns & 0x00ff00ff), row << 8 >> 8);
        return sum + pairs((Shorts)(columns >> 8 & 0x00ff00ff), row >> 8);
#endif
    }

    // a₀·b₀ + a₁·b₁ of each word's two numbers.
    static INLINE Words pairs(Shorts a, Shorts b) {
#if defined(__AVX512BW__) && !defined(PORTABLE)
        return (Words)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__) && !defined(PORTABLE)
        return (Words)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
        const Integers x = (Integers)a, y = (Integers)b;
        return (Words)((x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16));
#endif
    }

    // The numbers that sums stand for.
    static INLINE Lanes scaled(Lanes sums, Row row, Lanes column_factors) {
        const Lanes row_factor = broadcast(row.factor);
        EACH_PART {
            const Integers exact = (Integers)(as_words(sums.part[i]) - row.surplus);
            sums.part[i] = __builtin_convertvector(exact, Floats) * row_factor.part[i] * column_factors.part[i];
        }
        return sums;
    }

    // Rounds a row to multiples of the factor with which its largest number is 127. If one of its numbers is not finite,
    // neither is the factor, and no sum.
    static Row write_row(Element* to, const float* from, int count) {
        Row row{largest(from, count) / 127.0f, 0};
        const Lanes inverse = broadcast(row.factor > 1e-36f ? 1.0f / row.factor : 0.0f);
        const Lanes magic = broadcast(12582912.0f);  // as in `exp`: leaves the nearest integer in the low bits
        Words totals = broadcast_word(0);
        for (int channel = 0; channel < count; channel += LANES) {
            const Lanes shifted = load<Lanes>(from + channel) * inverse + magic;
            EACH_PART {
                const Words q = as_words(shifted.part[i]) - 0x4b400000;
                totals += q;
                const Bytes bytes = __builtin_convertvector(q, Bytes);
                std::memcpy(to + channel + i * sizeof bytes, &bytes, sizeof bytes);
            }
        }
        for (int i = 0; i < LANES / PARTS; i++) row.surplus += 128 * totals[i];
        return row;
    }

    // The largest magnitude; NaN if there is one. As integers floats have the same order, with NaN above all.
    static float largest(const float* from, int count) {
        Bits most{};
        for (int channel = 0; channel < count; channel += LANES) {
            const Bits numbers = load<Bits>(from + channel);
            EACH_PART {
                const Words magnitude = numbers.part[i] & 0x7fffffff;
                most.part[i] = magnitude > most.part[i] ? magnitude : most.part[i];
            }
        }
        uint32_t lane[LANES];
        std::memcpy(lane, &most, sizeof lane);
        for (int i = 1; i < LANES; i++) lane[0] = lane[0] < lane[i] ? lane[i] : lane[0];
        float result;
        std::memcpy(&result, lane, sizeof result);
        return result;
    }
};

}  // namespace simd
