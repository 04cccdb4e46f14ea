#include "parallel.h"

#include <atomic>
#include <exception>
#include <new>

namespace flowkern {

#ifdef __linux__
// A team of threads from OpenMP's runtime, called by its name: what a pragma would compile to with gcc, and with clang, whose
// own OpenMP calls another runtime than the one that torch's wheels carry. Weak, so that a process without a runtime can
// load this module and be told what is missing. Nothing but this symbol is taken from the runtime, and no runtime is
// linked: torch has loaded one, and two would fight over the cores.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags);

bool openmp_built() { return true; }
bool openmp_loaded() { return &GOMP_parallel != nullptr; }
#else
bool openmp_built() { return false; }
bool openmp_loaded() { return false; }
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) {}
#endif

namespace {

// What the threads of a team share. Ranges are handed out by a counter, so that a team smaller than requested still covers
// all of them.
struct Team {
    int64_t items, ranges;
    void (*body)(const void*, int64_t, int64_t);
    const void* context;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure;

    static void work(void* self) {
        Team& team = *static_cast<Team*>(self);
        for (int64_t i; (i = team.next++) < team.ranges;) {
            try {
                team.body(team.context, team.items * i / team.ranges, team.items * (i + 1) / team.ranges);
            } catch (...) {
                if (!team.failed.exchange(true)) team.failure = std::current_exception();
            }
        }
    }
};

}  // namespace

void parallel_ranges(int threads, int64_t items, void (*body)(const void*, int64_t, int64_t), const void* context) {
    int64_t ranges = threads < items ? threads : items;
    if (ranges <= 1 || !openmp_loaded()) {
        if (items > 0) body(context, 0, items);
        return;
    }
    Team team{items, ranges, body, context};
    GOMP_parallel(Team::work, &team, unsigned(ranges), 0);
    if (team.failure) std::rethrow_exception(team.failure);
}

namespace {

constexpr std::align_val_t LINE{64};

std::atomic<int64_t> kept{0}, count{0};

struct Reserve {
    char* data = nullptr;
    int64_t used = 0, most = 0, counted = 0;  // most: of `used`, since this count began
    ~Reserve() {
        ::operator delete(data, LINE);
        if (counted == count) kept -= most;
    }
};
thread_local Reserve reserve;

}  // namespace

int64_t kept_scratch() { return kept; }
void count_scratch_afresh() {
    count++;
    kept = 0;
}

void* take_scratch(int64_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
#ifndef __SANITIZE_ADDRESS__  // which would not see one array's end run into the next
    if (bytes < RESERVE - reserve.used) {
        if (!reserve.data) reserve.data = static_cast<char*>(::operator new(RESERVE, LINE));
        char* memory = reserve.data + reserve.used;
        reserve.used += bytes;
        if (reserve.counted != count) {
            reserve.counted = count;
            reserve.most = 0;
        }
        if (reserve.used > reserve.most) {
            kept += reserve.used - reserve.most;
            reserve.most = reserve.used;
        }
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
