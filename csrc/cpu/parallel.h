// Threads and scratch memory for the CPU's loops. parallel.cpp is the only unit that knows OpenMP, so that the loops
// themselves are ordinary functions of a range, which compilers optimise better than outlined parallel regions.
#pragma once
#include <cstdint>

#include "vector.h"

namespace flowkern {

bool openmp_built();
bool openmp_loaded();  // whether the process holds a runtime; torch brings one

// Calls body(context, begin, end) for contiguous ranges that cover [0, items), on up to `threads` threads.
void parallel_ranges(int threads, int64_t items, void (*body)(const void*, int64_t, int64_t), const void* context);

// Memory for scratch arrays, aligned to 64 bytes. A thread gives it back in the opposite order. The first `RESERVE` bytes are
// the thread's own and stay its own: malloc takes microseconds for arrays of some kilobytes, and their lines stay in cache.
// Raises std::bad_alloc.
constexpr int64_t RESERVE = 2 << 20;
void* take_scratch(int64_t bytes);
void give_scratch(void* memory);

namespace FLOWKERN_ISA {

template <class F>
void parallel(int threads, int64_t items, const F& body) {
    auto call = [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); };
    parallel_ranges(threads, items, call, &body);
}

// Hands out 0, 1, ..., each once.
class Counter {
  public:
    int64_t take() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }

  private:
    int64_t next_ = 0;
};

// Calls body(next), on each of `threads` threads, for them to take [0, items) one by one from a Counter: where other
// work slows one thread down, the others take more. For results that don't depend on which thread did what.
template <class F>
void share_out(int threads, int64_t items, const F& body) {
    Counter next;
    parallel(threads, min(threads, items), [&](int64_t, int64_t) { body(next); });
}

// Items in ranges to be shared out where each range has sums of its own: a large one for each thread, then small ones for
// those that are done first. They depend on the number of threads alone, so that sums over them do.
struct Ranges {
    int64_t items, threads;
    bool even;  // large ones alone

    int64_t count() const { return even ? min(threads, items) : 2 * threads; }
    int64_t begin(int64_t range) const {
        if (even) return items * range / count();
        const int64_t large = items * 3 / 4;
        return range < threads ? large * range / threads : large + (items - large) * (range - threads) / threads;
    }
};

// Memory for one call. Raises std::bad_alloc.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t size) : size_(size), data_(static_cast<T*>(take_scratch(size * sizeof(T)))) {}
    ~Scratch() { give_scratch(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* data() const { return data_; }
    void clear() const { memset(data_, 0, size_ * sizeof(T)); }

  private:
    int64_t size_;
    T* data_;
};

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
