#include "parallel.h"

#include <atomic>
#include <exception>
#include <new>

namespace flowkern {

#ifdef _OPENMP
// Weak, so that a process without a runtime can load this module and be told what is missing. Nothing but this symbol
// is taken from the runtime, and no runtime is linked: torch has loaded one, and two would fight over the cores.
#pragma weak GOMP_parallel
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

bool openmp_built() { return true; }
bool openmp_loaded() { return &GOMP_parallel != nullptr; }
#else
bool openmp_built() { return false; }
bool openmp_loaded() { return false; }
#endif

void parallel_ranges(int threads, int64_t items, void (*body)(const void*, int64_t, int64_t), const void* context) {
    int64_t ranges = threads < items ? threads : items;
    if (ranges <= 1 || !openmp_loaded()) {
        if (items > 0) body(context, 0, items);
        return;
    }
    // Ranges are handed out by a counter, so that a team smaller than requested still covers all of them.
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(int(ranges))
    {
        for (int64_t i; (i = next++) < ranges;) {
            try {
                body(context, items * i / ranges, items * (i + 1) / ranges);
            } catch (...) {
                if (!failed.exchange(true)) failure = std::current_exception();
            }
        }
    }
    if (failure) std::rethrow_exception(failure);
}

namespace {

constexpr std::align_val_t LINE{64};

struct Reserve {
    char* data = nullptr;
    int64_t used = 0;
    ~Reserve() { ::operator delete(data, LINE); }
};
thread_local Reserve reserve;

}  // namespace

void* take_scratch(int64_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
#ifndef __SANITIZE_ADDRESS__  // which would not see one array's end run into the next
    if (bytes < RESERVE - reserve.used) {
        if (!reserve.data) reserve.data = static_cast<char*>(::operator new(RESERVE, LINE));
        char* memory = reserve.data + reserve.used;
        reserve.used += bytes;
        return memory;
    }
#endif
    return ::operator new(bytes, LINE);
}

void give_scratch(void* memory) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(memory) - reinterpret_cast<uintptr_t>(reserve.data);
    if (reserve.data && offset < uintptr_t(RESERVE)) {
        reserve.used = offset;
    } else {
        ::operator delete(memory, LINE);
    }
}

}  // namespace flowkern
