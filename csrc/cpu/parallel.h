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
constexpr int64_t RESERVE = 4 << 20;
void* take_scratch(int64_t bytes);
void give_scratch(void* memory);

// Bytes of the threads' own that they have used at most since the last `count_scratch_afresh`, all threads together.
int64_t kept_scratch();
void count_scratch_afresh();

namespace FLOWKERN_ISA {

template <class F>
void parallel(int threads, int64_t items, const F& body) {
    auto call = [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); };
    parallel_ranges(threads, items, call, &body);
}

// Items that threads share. Each takes its own part's from the front, which are the ones whose data its caches have from the
// op before, and then from the back of the others'. For results that don't depend on which thread did what.
class Shared {
  public:
    // parts: of each thread, the first item that is left and the end, 32 bits each.
    Shared(uint64_t* parts, int64_t count, int64_t own) : parts_(parts), count_(count), own_(own) {}

    // The next item for this thread, or -1.
    int64_t take() {
        for (int64_t i = 0; i < count_; i++) {
            uint64_t* part = parts_ + (own_ + i) % count_;
            uint64_t left = __atomic_load_n(part, __ATOMIC_RELAXED);
            while (left >> 32 < (left & LOW)) {
                const uint64_t rest = i == 0 ? left + (uint64_t(1) << 32) : left - 1;
                if (__atomic_compare_exchange_n(part, &left, rest, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
                    return i == 0 ? int64_t(left >> 32) : int64_t(rest & LOW);
                }
            }
        }
        return -1;
    }
    int64_t own() const { return own_; }

    static constexpr uint64_t LOW = 0xFFFFFFFF;

  private:
    uint64_t* parts_;
    int64_t count_, own_;
};

// Ranges of items that have sums of their own: a thread's part in pieces, of which others that are done early may take the
// later and smaller ones. Sums over them don't depend on which thread took which.
struct Ranges {
    int64_t items, threads;
    bool undivided;  // one piece a part

    int64_t pieces() const { return undivided ? 1 : items < 8 * threads ? 2 : 3; }
    int64_t count() const { return undivided ? min(threads, items) : pieces() * threads; }
    int64_t begin(int64_t range) const {
        if (undivided) return items * range / count();
        constexpr int64_t EIGHTHS[2][3] = {{0, 6}, {0, 5, 7}};
        const int64_t part = range / pieces(), first = items * part / threads, size = items * (part + 1) / threads - first;
        return first + size * EIGHTHS[pieces() - 2][range % pieces()] / 8;
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
    int64_t size() const { return size_; }
    void clear() const { memset(data_, 0, size_ * sizeof(T)); }

  private:
    int64_t size_;
    T* data_;
};

// Calls body(items) on each of so many threads, for them to take [0, items) one by one: where other work slows a thread down,
// the others do more.
template <class F>
void share_out(int threads, int64_t items, const F& body) {
    const int64_t count = min(threads, items);
    const Scratch<uint64_t> parts(count);
    for (int64_t i = 0; i < count; i++) parts.data()[i] = uint64_t(items * i / count) << 32 | uint64_t(items * (i + 1) / count);
    parallel(threads, count, [&](int64_t begin, int64_t end) {
        for (int64_t own = begin; own < end; own++) {
            Shared left(parts.data(), count, own);
            body(left);
        }
    });
}

}  // namespace FLOWKERN_ISA
}  // namespace flowkern
