// The one matrix product of these kernels, 16 rows times 16 columns at once, and the arrangements of memory it reads.
//
// A *word* is 32 bits of consecutive numbers along the axis that is summed over: two of bf16, one of fp32. The left
// factor has a row of words per row, the right one is a *panel*: [words][16 columns]. Every output is one accumulator
// that runs over the words from first to last.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace tiles {

using simd::Bits;
using simd::Lanes;
using simd::LANES;
using simd::PARTS;

constexpr int SIDE = LANES;
constexpr int STRIDE_PADDING = 16;  // words; rows a power of two apart would share few sets of the cache

template <class T>
constexpr int WORD = 4 / (int)sizeof(typename T::Element);  // numbers in one

INLINE int round_up(int count) { return (count + SIDE - 1) / SIDE * SIDE; }

template <class T, int ROWS, bool ADD>
INLINE void some_rows(const uint32_t* rows, size_t stride, const uint32_t* panel, int words, float* out) {
    Lanes sums[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) sums[r] = ADD ? simd::load<Lanes>(out + r * LANES) : simd::zero();
    for (int k = 0; k < words; k++) {
        const Bits columns = simd::load<Bits>(panel + (size_t)k * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) sums[r] = T::dot(sums[r], rows[r * stride + k], columns);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) simd::store(out + r * LANES, sums[r]);
}

// 16 rows × one panel → out[16][16], or added to it; in as many accumulators as there are registers for.
template <class T, bool ADD>
inline void multiply(const uint32_t* rows, size_t stride, const uint32_t* panel, int words, float* out) {
    constexpr int MOST = std::min(simd::TILE, SIDE);
    int row = 0;
    for (; row + MOST <= SIDE; row += MOST)
        some_rows<T, MOST, ADD>(rows + row * stride, stride, panel, words, out + row * LANES);
    if constexpr (SIDE % MOST != 0)
        some_rows<T, SIDE % MOST, ADD>(rows + row * stride, stride, panel, words, out + row * LANES);
}

template <class T>
inline void multiply(bool add, const uint32_t* rows, size_t stride, const uint32_t* panel, int words, float* out) {
    add ? multiply<T, true>(rows, stride, panel, words, out) : multiply<T, false>(rows, stride, panel, words, out);
}

#if defined(__AVX512F__) && !defined(PORTABLE)
// to[c][r] = from[r][c] of 16 × 16 words; in registers.
inline void transpose(const uint32_t* from, size_t stride, uint32_t* to, size_t to_stride) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) a[r] = _mm512_loadu_si512(from + r * stride);
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
        a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
        a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
        a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
        a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {  // a[4g + c] holds columns c, 4 + c, 8 + c, 12 + c of rows 4g … 4g + 3
        const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        _mm512_storeu_si512(to + c * to_stride, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(to + (8 + c) * to_stride, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(to + (4 + c) * to_stride, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(to + (12 + c) * to_stride, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}
#else
inline void transpose(const uint32_t* from, size_t stride, uint32_t* to, size_t to_stride) {
    for (int r = 0; r < SIDE; r++)
        for (int c = 0; c < SIDE; c++) to[c * to_stride + r] = from[r * stride + c];
}
#endif

// The word whose numbers are those of two rows, for 16 columns; of fp32 the first row alone.
INLINE Bits pair(simd::Fp32, Lanes a, Lanes) {
    Bits x;
    EACH_PART x.part[i] = simd::as_words(a.part[i]);
    return x;
}

INLINE Bits pair(simd::Bf16, Lanes a, Lanes b) {
    Bits x;
    EACH_PART {
        simd::Words low = simd::as_words(a.part[i]), high = simd::as_words(b.part[i]);
        low += 0x7fff + ((low >> 16) & 1);
        high += 0x7fff + ((high >> 16) & 1);
        x.part[i] = (low >> 16) | (high & 0xffff0000u);
    }
    return x;
}

INLINE void store(uint32_t* to, Bits x) { std::memcpy(to, &x, 64); }

// Rows of `size` numbers, a multiple of 16, `stride` numbers apart → contiguous rows, and zeros up to a multiple of 16.
template <class T>
void copy_rows(const typename T::Element* from, size_t stride, int count, int size, uint32_t* to) {
    const int words = size / WORD<T>;
    for (int r = 0; r < count; r++) std::memcpy(to + (size_t)r * words, from + r * stride, words * 4);
    std::fill(to + (size_t)count * words, to + (size_t)round_up(count) * words, 0);
}

// Contiguous rows → for each 16 of them the panel [words][16] whose columns they are.
template <class T>
void rows_to_columns(const uint32_t* rows, int count, int size, uint32_t* to) {
    const int words = size / WORD<T>;
    for (int r = 0; r < count; r += SIDE)
        for (int w = 0; w < words; w += SIDE) {
            if (words - w >= SIDE) {
                transpose(rows + (size_t)r * words + w, words, to + (size_t)r * words + w * SIDE, SIDE);
                continue;
            }
            for (int i = 0; i < SIDE; i++)  // half a tile: an odd number of 16 channels in bf16
                for (int k = w; k < words; k++)
                    to[(size_t)r * words + k * SIDE + i] = rows[(size_t)(r + i) * words + k];
        }
}

// Contiguous rows → for each 16 channels the panel [rows / WORD][16], to be summed over rows; panels `stride` apart.
template <class T>
void rows_to_pairs(const uint32_t* rows, int count, int size, uint32_t* to, size_t stride) {
    typedef typename T::Element Element;
    const Element* const from = (const Element*)rows;
    for (int r = 0; r < count; r += WORD<T>)
        for (int c = 0; c < size; c += SIDE) {
            const Element *const first = from + (size_t)r * size + c, *const last = first + (WORD<T> - 1) * size;
            store(to + c / SIDE * stride + (size_t)r / WORD<T> * SIDE, pair(T(), T::read(first), T::read(last)));
        }
}

// Contiguous rows → a row of words along them for each channel, `stride` words apart. `scratch`: a panel.
template <class T>
void rows_to_channels(const uint32_t* rows, int count, int size, uint32_t* to, size_t stride, uint32_t* scratch) {
    typedef typename T::Element Element;
    const Element* const from = (const Element*)rows;
    const int words = count / WORD<T>;
    for (int c = 0; c < size; c += SIDE) {
        for (int w = 0; w < words; w++) {
            const Element* const first = from + (size_t)w * WORD<T> * size + c;
            const Element* const last = first + (WORD<T> - 1) * size;
            store(scratch + (size_t)w * SIDE, pair(T(), T::read(first), T::read(last)));
        }
        int w = 0;
        for (; w + SIDE <= words; w += SIDE) transpose(scratch + (size_t)w * SIDE, SIDE, to + c * stride + w, stride);
        for (; w < words; w++)
            for (int i = 0; i < SIDE; i++) to[(c + i) * stride + w] = scratch[(size_t)w * SIDE + i];
    }
}

// A tile [16 channels][16 rows] of floats, each row of the result times its lane of `scale` → row r at to + r · stride.
template <class T>
void write_rows(const float* tile, Lanes scale, int rows, typename T::Element* to, size_t stride) {
    alignas(64) float scaled[SIDE * SIDE], turned[SIDE * SIDE];
    for (int c = 0; c < SIDE; c++) simd::store(scaled + c * SIDE, simd::load<Lanes>(tile + c * SIDE) * scale);
    transpose((const uint32_t*)scaled, SIDE, (uint32_t*)turned, SIDE);
    for (int r = 0; r < rows; r++) T::write(to + r * stride, simd::load<Lanes>(turned + r * SIDE));
}

}  // namespace tiles
