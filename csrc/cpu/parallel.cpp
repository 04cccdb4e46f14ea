#include "parallel.h"

#include <atomic>
#include <exception>

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

}  // namespace flowkern
