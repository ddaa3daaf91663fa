// Rows of numbers on their way into a matrix.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "int8.h"
#include "simd.h"

// Memory aligned to cache lines, which grows and forgets.
template <class E>
class Buffer {
  public:
    E* at(size_t index = 0) const { return data_.get() + index; }

    void reserve(size_t count) {
        if (count <= count_) return;
        data_.reset();
        count_ = 0;
        void* data = std::aligned_alloc(64, (count * sizeof(E) + 63) / 64 * 64);
        if (!data) throw std::bad_alloc();
        data_.reset((E*)data);
        count_ = count;
    }

  private:
    struct Free {
        void operator()(E* data) const { std::free(data); }
    };
    std::unique_ptr<E, Free> data_;
    size_t count_ = 0;
};

// `write` the parts of a row, from any thread, then `close` it. A row is [words][padding]; the factor of one that is
// SCALED, which is not known before the whole row is, lies in the padding.
template <class M>
class Rows {
  public:
    static constexpr int WORD = 4 / sizeof(typename M::Element);  // channels in a word

    explicit Rows(int channels) : channels_(channels) {}

    void reserve(size_t rows) {
        rows_.reserve(rows * stride());
        if constexpr (M::SCALED) open_.reserve(rows * channels_);
    }

    size_t stride() const { return channels_ / WORD + PADDING; }  // words from one row to the next
    const uint32_t* words() const { return rows_.at(); }

    void write(int row, int channel, simd::Lanes x) {
        if constexpr (M::SCALED)
            simd::store(open(row) + channel, x);
        else
            M::write(elements(row) + channel, x);
    }

    void close(int row) {
        if constexpr (M::SCALED) {
            const auto behind = M::write_row(elements(row), open(row), channels_);
            std::memcpy(rows_.at(row * stride() + channels_ / WORD), &behind, sizeof behind);
        }
    }

  private:
    static constexpr int PADDING = 16;  // rows a power of two apart would share few sets of the cache

    typename M::Element* elements(int row) const { return (typename M::Element*)rows_.at(row * stride()); }
    float* open(int row) const { return open_.at((size_t)row * channels_); }

    int channels_;
    Buffer<uint32_t> rows_;
    Buffer<float> open_;
};
