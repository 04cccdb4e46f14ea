// Arrays of exactly the size that a native loop or kernel may touch, for programs that sanitizers watch.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "../csrc/params.h"

namespace flowkern {

// An array of its own, so that the sanitizer guards both ends. It may begin `skipped` elements after an address that
// suits every access.
class Array {
  public:
    Array(int64_t count, Type type, int64_t skipped = 0)
        : start_(skipped * size(type)), bytes_(start_ + count * size(type)), data_(new char[bytes_]) {
        const int64_t all = skipped + count;
        for (int64_t i = 0; i < all; i++) {
            if (type == Type::f64) reinterpret_cast<double*>(data_.get())[i] = number();
            if (type == Type::f32) reinterpret_cast<float*>(data_.get())[i] = float(number());
            if (size(type) == 2) reinterpret_cast<uint16_t*>(data_.get())[i] = uint16_t(std::rand());  // any bits
        }
    }
    void* get() const { return data_.get() + start_; }
    int64_t bytes() const { return bytes_ - start_; }

  private:
    static int64_t size(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }
    static double number() { return std::rand() / double(RAND_MAX) - 0.5; }
    int64_t start_, bytes_;
    std::unique_ptr<char[]> data_;
};

}  // namespace flowkern
