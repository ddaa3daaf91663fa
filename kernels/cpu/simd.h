// Sixteen floats at a time, on whatever vectors the machine has: one AVX-512 register, two of AVX, or four of SSE/NEON.
//
// Bit-exactness is the point of everything here. Each operation below is one fixed sequence of IEEE operations per lane,
// fused multiply-adds are written out, and the build forbids the compiler to make its own (-ffp-contract=off). So a
// value does not depend on the loop, the tile or the function it was computed in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(PORTABLE)  // for tests: no intrinsics, as on a machine we know nothing about
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace simd {

#if defined(__AVX512F__) && !defined(PORTABLE)
constexpr int VECTOR_BYTES = 64;
constexpr int TILE = 24;  // accumulators of 16 lanes that fit the registers beside their operands
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
constexpr int TILE = 6;
#elif defined(__ARM_NEON)
constexpr int VECTOR_BYTES = 16;
constexpr int TILE = 6;
#else
constexpr int VECTOR_BYTES = 16;
constexpr int TILE = 3;
#endif
constexpr int LANES = 16;
constexpr int PARTS = 64 / VECTOR_BYTES;

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

INLINE Floats as_floats(Words x) { return (Floats)x; }
INLINE Words as_words(Floats x) { return (Words)x; }

// a·b + c of each lane; in one rounding where the machine can.
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(PORTABLE)
    return a * b + c;
#elif defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

struct Lanes {
    Floats part[PARTS];
};

struct Bits {  // sixteen 32-bit words: masks, or packed weights
    Words part[PARTS];
};

#define EACH_PART for (int i = 0; i < PARTS; i++)

template <class V>
INLINE V load(const void* from) {
    V x;
    std::memcpy(&x, from, 64);
    return x;
}

INLINE void store(float* to, Lanes x) { std::memcpy(to, &x, 64); }

// Of integers: adding a float to a vector of zeros would be an addition indeed, for the sake of −0.
INLINE Words broadcast_word(uint32_t word) { return Words{} + word; }

INLINE Lanes broadcast(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    Lanes x;
    EACH_PART x.part[i] = as_floats(broadcast_word(word));
    return x;
}

INLINE Lanes zero() { return broadcast(0.0f); }

INLINE Lanes operator+(Lanes a, Lanes b) {
    EACH_PART a.part[i] += b.part[i];
    return a;
}

INLINE Lanes operator-(Lanes a, Lanes b) {
    EACH_PART a.part[i] -= b.part[i];
    return a;
}

INLINE Lanes operator*(Lanes a, Lanes b) {
    EACH_PART a.part[i] *= b.part[i];
    return a;
}

INLINE Lanes operator/(Lanes a, Lanes b) {
    EACH_PART a.part[i] /= b.part[i];
    return a;
}

INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    EACH_PART c.part[i] = multiply_add(a.part[i], b.part[i], c.part[i]);
    return c;
}

INLINE Lanes select(Bits mask, Lanes yes, Lanes no) {
    EACH_PART yes.part[i] =
        as_floats((as_words(yes.part[i]) & mask.part[i]) | (as_words(no.part[i]) & ~mask.part[i]));
    return yes;
}

INLINE Bits less(Lanes a, Lanes b) {
    Bits mask;
    EACH_PART mask.part[i] = (Words)(a.part[i] < b.part[i]);
    return mask;
}

INLINE Lanes maximum(Lanes a, Lanes b) { return select(less(a, b), b, a); }

// Horizontal sum and maximum, always in the same order.
inline float sum(Lanes x) {
    float lane[LANES];
    store(lane, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

inline float maximum(Lanes x) {
    float lane[LANES];
    store(lane, x);
    for (int i = 1; i < LANES; i++) lane[0] = lane[0] < lane[i] ? lane[i] : lane[0];
    return lane[0];
}

// eˣ within 2 ulp for x in [−87, 88]; 0 below, also for −inf.
INLINE Lanes exp(Lanes x) {
    const Lanes least = broadcast(-87.0f);
    const Bits tiny = less(x, least);
    x = maximum(x, least);
    // Adding 1.5·2²³ rounds to the nearest integer n and leaves it in the low bits, whence it enters the exponent.
    const Lanes magic = broadcast(12582912.0f);
    const Lanes shifted = multiply_add(x, broadcast(1.44269504f), magic);
    const Lanes n = shifted - magic;
    const Lanes r = multiply_add(n, broadcast(-1.42860682e-6f), multiply_add(n, broadcast(-0.693145752f), x));
    Lanes y = broadcast(1.0f / 720);  // Taylor is enough for |r| ≤ ln 2 / 2
    for (float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        y = multiply_add(y, r, broadcast(coefficient));
    EACH_PART y.part[i] = as_floats(as_words(y.part[i]) + (as_words(shifted.part[i]) << 23));
    return select(tiny, zero(), y);
}

// How a dtype is stored and multiplied. A *word* is 32 bits of consecutive channels: one fp32 number or two of bf16.
// `dot` adds to each of 16 columns the product of the same word of a row with that column's word of the weights. Where
// a type is SCALED, numbers are integers times a factor of their row or column.

struct Fp32 {
    typedef float Element;
    static constexpr bool SCALED = false;

    static INLINE Lanes read(const Element* from) { return load<Lanes>(from); }
    static INLINE void write(Element* to, Lanes x) { store(to, x); }

    static INLINE Lanes dot(Lanes sum, uint32_t row_word, Bits columns) {
        const Floats row = as_floats(broadcast_word(row_word));
        EACH_PART sum.part[i] = multiply_add(row, as_floats(columns.part[i]), sum.part[i]);
        return sum;
    }
};

struct Bf16 {
    typedef uint16_t Element;
    static constexpr bool SCALED = false;

    static INLINE Lanes read(const Element* from) {
        Lanes x;
        EACH_PART {
            Halves half;
            std::memcpy(&half, from + i * (LANES / PARTS), sizeof half);
            x.part[i] = as_floats(__builtin_convertvector(half, Words) << 16);
        }
        return x;
    }

    // Rounds to nearest, ties to even.
    static INLINE void write(Element* to, Lanes x) {
        EACH_PART {
            Words word = as_words(x.part[i]);
            word += 0x7fff + ((word >> 16) & 1);
            Halves half = __builtin_convertvector(word >> 16, Halves);
            std::memcpy(to + i * (LANES / PARTS), &half, sizeof half);
        }
    }

    static INLINE Lanes dot(Lanes sum, uint32_t row_word, Bits columns) {
#if defined(__AVX512BF16__) && !defined(PORTABLE)
        sum.part[0] = _mm512_dpbf16_ps(
            sum.part[0], (__m512bh)broadcast_word(row_word), (__m512bh)columns.part[0]);
#else
        EACH_PART {
            const Words row = broadcast_word(row_word), high = broadcast_word(0xffff0000u);
            sum.part[i] = multiply_add(as_floats(row << 16), as_floats(columns.part[i] << 16), sum.part[i]);
            sum.part[i] = multiply_add(as_floats(row & high), as_floats(columns.part[i] & high), sum.part[i]);
        }
#endif
        return sum;
    }
};

}  // namespace simd
