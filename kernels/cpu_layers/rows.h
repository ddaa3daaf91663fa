// What is done to each token on its own: norms, rotation, squared ReLU; forward and backward, in fp32.
//
// A row is a token's numbers, or a head's of them, a multiple of 16. The gradient of a norm is made of its result and
// of 1/RMS: y = x·s, dx = s·(dy − y·mean(dy·y)).
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace rows {

using simd::Lanes;
using simd::LANES;

constexpr float EPSILON = 1.1920929e-7f;  // of fp32, which torch's norm takes for bf16 as well

// Σ a·b over a row.
template <class T>
INLINE float dot(const typename T::Element* a, const typename T::Element* b, int width) {
    Lanes even = simd::zero(), odd = simd::zero();
    int i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        even = simd::multiply_add(T::read(a + i), T::read(b + i), even);
        odd = simd::multiply_add(T::read(a + i + LANES), T::read(b + i + LANES), odd);
    }
    if (i < width) even = simd::multiply_add(T::read(a + i), T::read(b + i), even);
    return simd::sum(even + odd);
}

// x → y = x / RMS; returns 1 / RMS.
template <class T>
INLINE float norm(const typename T::Element* x, int width, typename T::Element* y) {
    const float inverse = 1.0f / std::sqrt(dot<T>(x, x, width) / (float)width + EPSILON);
    for (int i = 0; i < width; i += LANES) T::write(y + i, T::read(x + i) * simd::broadcast(inverse));
    return inverse;
}

template <class T>
INLINE void norm_backward(const typename T::Element* y, float inverse, const typename T::Element* dy, int width,
                          typename T::Element* dx) {
    const Lanes mean = simd::broadcast(-dot<T>(dy, y, width) / (float)width), scale = simd::broadcast(inverse);
    for (int i = 0; i < width; i += LANES)
        T::write(dx + i, simd::multiply_add(T::read(y + i), mean, T::read(dy + i)) * scale);
}

// Of (count, width): mix = a·x + b·y, rounded, and its norm.
struct Mix {
    int width;
    float x_weight, y_weight;
    const void *x, *y;
    void *mix, *normed;
    float* inverse;               // (count)
    const void *dmix, *dnormed;   // either may be null: zeros
    void *dx, *dy;                // dy may be null: equal to dx
    float *x_sums, *y_sums;       // of gradient·x and gradient·y in each piece; null: not wanted
};

template <class T>
void mix(const Mix& m, int64_t row) {
    typedef typename T::Element Element;
    const size_t at = (size_t)row * m.width;
    const Element *const x = (const Element*)m.x + at, *const y = (const Element*)m.y + at;
    Element* const mixed = (Element*)m.mix + at;
    const Lanes a = simd::broadcast(m.x_weight), b = simd::broadcast(m.y_weight);
    for (int i = 0; i < m.width; i += LANES)
        T::write(mixed + i, simd::multiply_add(T::read(x + i), a, T::read(y + i) * b));
    m.inverse[row] = norm<T>(mixed, m.width, (Element*)m.normed + at);
}

template <class T>
void mix_backward(const Mix& m, int64_t row, Lanes& x_sum, Lanes& y_sum) {
    typedef typename T::Element Element;
    const size_t at = (size_t)row * m.width;
    const Element *const x = (const Element*)m.x + at, *const y = (const Element*)m.y + at;
    const Element *const dmix = m.dmix ? (const Element*)m.dmix + at : nullptr;
    const Element *const dnormed = m.dnormed ? (const Element*)m.dnormed + at : nullptr;
    const Element* const normed = (const Element*)m.normed + at;
    Element *const dx = (Element*)m.dx + at, *const dy = m.dy ? (Element*)m.dy + at : nullptr;
    const Lanes a = simd::broadcast(m.x_weight), b = simd::broadcast(m.y_weight);
    const Lanes mean = simd::broadcast(dnormed ? -dot<T>(dnormed, normed, m.width) / (float)m.width : 0.0f);
    const Lanes inverse = simd::broadcast(m.inverse[row]);
    for (int i = 0; i < m.width; i += LANES) {
        Lanes gradient = dmix ? T::read(dmix + i) : simd::zero();
        if (dnormed) {
            const Lanes inner = simd::multiply_add(T::read(normed + i), mean, T::read(dnormed + i));
            gradient = simd::multiply_add(inner, inverse, gradient);
        }
        if (m.x_sums) x_sum = simd::multiply_add(gradient, T::read(x + i), x_sum);
        if (m.y_sums) y_sum = simd::multiply_add(gradient, T::read(y + i), y_sum);
        T::write(dx + i, gradient * a);
        if (dy) T::write(dy + i, gradient * b);
    }
}

// Of (count, heads, size): each pair of channels (c, c + size / 2) turned by minus its angle, normed, times `scale`.
struct Rotation {
    int heads, size;
    float scale;
    int64_t table_rows;  // token n stands in row n modulo this
    const void *cosines, *sines;  // (table rows, size / 2)
    const void* x;
    int64_t x_stride;  // numbers from one token to the next
    void* y;
    float* inverse;  // (count, heads)
    const void* dy;
    void* dx;
};

template <class T>
void rotate(const Rotation& r, int64_t token) {
    typedef typename T::Element Element;
    const int half = r.size / 2;
    const size_t table = (size_t)(token % r.table_rows) * half;
    const Element *const cosines = (const Element*)r.cosines + table, *const sines = (const Element*)r.sines + table;
    for (int head = 0; head < r.heads; head++) {
        const Element* const x = (const Element*)r.x + (size_t)token * r.x_stride + head * r.size;
        Element* const y = (Element*)r.y + ((size_t)token * r.heads + head) * r.size;
        Lanes squares = simd::zero(), more = simd::zero();
        for (int i = 0; i < half; i += LANES) {  // of what is turned: rounded cosines and sines do not keep lengths
            const Lanes a = T::read(x + i), b = T::read(x + half + i);
            const Lanes cosine = T::read(cosines + i), sine = T::read(sines + i);
            const Lanes first = simd::multiply_add(a, cosine, b * sine), second = b * cosine - a * sine;
            squares = simd::multiply_add(first, first, squares), more = simd::multiply_add(second, second, more);
        }
        const float inverse = 1.0f / std::sqrt(simd::sum(squares + more) / (float)r.size + EPSILON);
        const Lanes scale = simd::broadcast(inverse * r.scale);
        for (int i = 0; i < half; i += LANES) {
            const Lanes a = T::read(x + i), b = T::read(x + half + i);
            const Lanes cosine = T::read(cosines + i), sine = T::read(sines + i);
            T::write(y + i, simd::multiply_add(a, cosine, b * sine) * scale);
            T::write(y + half + i, (b * cosine - a * sine) * scale);
        }
        r.inverse[token * r.heads + head] = inverse;
    }
}

template <class T>
void rotate_backward(const Rotation& r, int64_t token) {
    typedef typename T::Element Element;
    const int half = r.size / 2;
    const size_t table = (size_t)(token % r.table_rows) * half;
    const Element *const cosines = (const Element*)r.cosines + table, *const sines = (const Element*)r.sines + table;
    for (int head = 0; head < r.heads; head++) {
        const size_t at = ((size_t)token * r.heads + head) * r.size;
        const Element *const y = (const Element*)r.y + at, *const dy = (const Element*)r.dy + at;
        Element* const dx = (Element*)r.dx + at;
        const float share = dot<T>(dy, y, r.size) / ((float)r.size * r.scale * r.scale);
        const Lanes mean = simd::broadcast(-share);
        const Lanes scale = simd::broadcast(r.inverse[token * r.heads + head] * r.scale);
        for (int i = 0; i < half; i += LANES) {
            const Lanes a = simd::multiply_add(T::read(y + i), mean, T::read(dy + i)) * scale;
            const Lanes b = simd::multiply_add(T::read(y + half + i), mean, T::read(dy + half + i)) * scale;
            const Lanes cosine = T::read(cosines + i), sine = T::read(sines + i);
            T::write(dx + i, a * cosine - b * sine);
            T::write(dx + half + i, simd::multiply_add(a, sine, b * cosine));
        }
    }
}

INLINE Lanes square_root(Lanes x) {
#if defined(PORTABLE) || !(defined(__AVX512F__) || defined(__AVX__))
    float lane[LANES];
    simd::store(lane, x);
    for (int i = 0; i < LANES; i++) lane[i] = std::sqrt(lane[i]);
    return simd::load<Lanes>(lane);
#elif defined(__AVX512F__)
    x.part[0] = _mm512_sqrt_ps(x.part[0]);
    return x;
#else
    for (int i = 0; i < simd::PARTS; i++) x.part[i] = _mm256_sqrt_ps(x.part[i]);
    return x;
#endif
}

// x → max(x, 0)², in place; NaN stays.
template <class T>
void squared_relu(typename T::Element* x, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const Lanes value = T::read(x + i);
        const Lanes positive = simd::select(simd::less(value, simd::zero()), simd::zero(), value);
        T::write(x + i, positive * positive);
    }
}

// The root of the result is the ReLU itself, so nothing else need be kept: in bf16 the square is off by 2⁻⁹ at most,
// its root by 2⁻¹⁰, which is less than half a step, so rounding it finds the number that was squared.
template <class T>
void squared_relu_backward(const typename T::Element* y, const typename T::Element* dy, typename T::Element* dx,
                           int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        alignas(64) typename T::Element relu[LANES];
        T::write(relu, square_root(T::read(y + i)));
        T::write(dx + i, T::read(dy + i) * T::read(relu) * simd::broadcast(2.0f));
    }
}

}  // namespace rows
