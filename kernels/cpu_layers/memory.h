// Memory that a thread works in: grows to what was asked for at most, and is used again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

class Arena {
  public:
    // Room for so many words in all; what was taken before is lost.
    void reset(size_t words) {
        next_ = 0;
        if (words <= size_) return;
        data_.reset();
        size_ = 0;
        void* const data = std::aligned_alloc(64, (words * 4 + 63) / 64 * 64);
        if (!data) throw std::bad_alloc();
        data_.reset((uint32_t*)data);
        size_ = words;
    }

    // A multiple of 16 words each, so that all begin at cache lines.
    uint32_t* words(size_t count) {
        uint32_t* const at = data_.get() + next_;
        next_ += count;
        return at;
    }

    float* floats(size_t count) { return (float*)words(count); }

  private:
    struct Free {
        void operator()(uint32_t* data) const { std::free(data); }
    };
    std::unique_ptr<uint32_t, Free> data_;
    size_t size_ = 0, next_ = 0;
};
