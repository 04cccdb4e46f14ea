// The scheduler behind the emulated cuda_runtime.h: fibers, barriers, shuffles.
#include "cuda_runtime.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t MOST_SHARED = 163 * 1024;  // what a block may have on sm_80, the smallest of our targets
__align__(1024) unsigned char shared_arena[MOST_SHARED + 1024];

namespace {

constexpr size_t STACK = 256 * 1024;
constexpr int MOST_THREADS = 1024, WARP = 32;

// Where a fiber that doesn't run goes on: a stack pointer, or what the operating system offers instead.
#if defined(__x86_64__)
struct Context {
    void* stack_pointer;
};

extern "C" void emulation_switch(Context* from, Context* to);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

void prepare(Context& context, char* stack, void (*entry)()) {
    // Six registers, the address that `ret` takes, and one word that keeps the stack aligned as after a call.
    void** top = reinterpret_cast<void**>(stack + STACK) - 8;
    memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(entry);
    context.stack_pointer = top;
}
#else
struct Context {
    ucontext_t context;
};

void emulation_switch(Context* from, Context* to) { swapcontext(&from->context, &to->context); }

void prepare(Context& context, char* stack, void (*entry)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = STACK;
    context.context.uc_link = nullptr;
    makecontext(&context.context, entry, 0);
}
#endif

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
    Context context;
    State state;
    const char* file;
    int line;
    // A shuffle's operands.
    unsigned mask;
    void* value;
    size_t size;
    int source;
    void* fake_stack;
};

Fiber fibers[MOST_THREADS];
Context scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
char* stacks;
int current, threads;
const std::function<void()>* body;
std::map<const void*, size_t> allowed;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::fputs("CUDA emulation: ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fprintf(stderr, " (block %u of %u, %d threads)\n", blockIdx.x, gridDim.x, threads);
    std::abort();
}

void to_fiber(int thread) {
    current = thread;
    threadIdx = dim3(thread, 0, 0);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, stacks + thread * STACK, STACK);
#endif
    emulation_switch(&scheduler, &fibers[thread].context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void to_scheduler(bool for_good) {
    Fiber& fiber = fibers[current];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_stack_size);
#endif
    emulation_switch(&fiber.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
    (void)for_good;
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    (*body)();
    fibers[current].state = State::done;
    to_scheduler(true);
    std::abort();  // a finished fiber is never run again
}

void wait(State state, const char* file, int line) {
    Fiber& fiber = fibers[current];
    fiber.state = state;
    fiber.file = file;
    fiber.line = line;
    to_scheduler(false);
}

// Completes the shuffles of a warp whose threads all stopped. Returns whether there was one.
bool exchange(int first) {
    unsigned waiting = 0;
    for (int i = 0; i < WARP && first + i < threads; i++) {
        if (fibers[first + i].state == State::at_shuffle) waiting |= 1u << i;
    }
    for (int i = 0; i < WARP; i++) {
        if (!(waiting >> i & 1)) continue;
        const Fiber& fiber = fibers[first + i];
        if (!(fiber.mask >> i & 1)) {
            fail("shuffle at %s:%d: thread %d is not in its own mask %08x", fiber.file, fiber.line, first + i, fiber.mask);
        }
        for (int other = 0; other < WARP; other++) {
            if (!(fiber.mask >> other & 1)) continue;
            const Fiber& peer = fibers[first + other];
            const bool there = waiting >> other & 1;
            if (!there || peer.line != fiber.line || std::strcmp(peer.file, fiber.file) || peer.mask != fiber.mask) {
                fail("shuffle at %s:%d: thread %d waits for thread %d, which does not take part", fiber.file, fiber.line,
                     first + i, first + other);
            }
        }
        if (!(fiber.mask >> fiber.source & 1)) {
            fail("shuffle at %s:%d: thread %d reads lane %d, outside the mask %08x", fiber.file, fiber.line, first + i,
                 fiber.source, fiber.mask);
        }
    }
    unsigned char values[WARP][16];
    for (int i = 0; i < WARP; i++) {
        if (waiting >> i & 1) std::memcpy(values[i], fibers[first + i].value, fibers[first + i].size);
    }
    for (int i = 0; i < WARP; i++) {
        if (!(waiting >> i & 1)) continue;
        Fiber& fiber = fibers[first + i];
        std::memcpy(fiber.value, values[fiber.source], fiber.size);
        fiber.state = State::ready;
    }
    return waiting != 0;
}

// Lets the block's threads go on from a barrier, all of which must have reached it. Returns false when none is left.
bool release() {
    const Fiber* met = nullptr;
    int one = 0;
    for (int i = 0; i < threads; i++) {
        if (fibers[i].state != State::at_barrier) continue;
        if (!met) {
            met = &fibers[i];
            one = i;
        }
        if (fibers[i].line != met->line || std::strcmp(fibers[i].file, met->file)) {
            fail("divergent barrier: thread %d waits at %s:%d and thread %d at %s:%d", one, met->file, met->line, i,
                 fibers[i].file, fibers[i].line);
        }
    }
    if (!met) return false;
    for (int i = 0; i < threads; i++) {
        if (fibers[i].state == State::done) {
            fail("divergent barrier: thread %d waits at %s:%d and thread %d has ended", one, met->file, met->line, i);
        }
        fibers[i].state = State::ready;
    }
    return true;
}

void run_block(bool reverse) {
    for (int i = 0; i < threads; i++) {
        fibers[i] = {};
        prepare(fibers[i].context, stacks + i * STACK, entry);
    }
    for (;;) {
        bool ran = true;
        while (ran) {
            ran = false;
            for (int i = 0; i < threads; i++) {
                const int thread = reverse ? threads - 1 - i : i;
                if (fibers[thread].state == State::ready) to_fiber(thread);
            }
            for (int first = 0; first < threads; first += WARP) ran |= exchange(first);
        }
        if (!release()) return;
    }
}

}  // namespace

namespace emulation {

int lane() { return current % WARP; }

void barrier(const char* file, int line) { wait(State::at_barrier, file, line); }

void shuffle(unsigned mask, void* value, size_t size, int source, const char* file, int line) {
    Fiber& fiber = fibers[current];
    fiber.mask = mask;
    fiber.value = value;
    fiber.size = size;
    fiber.source = source;
    wait(State::at_shuffle, file, line);
}

cudaError_t allow_shared(const void* kernel, int bytes) {
    if (bytes < 0 || size_t(bytes) > MOST_SHARED) return cudaErrorInvalidValue;
    allowed[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
    const dim3 &grid = config.gridDim, &block = config.blockDim;
    const size_t shared = config.dynamicSmemBytes;
    if (!grid.x || grid.x > 0x7FFFFFFF || grid.y != 1 || grid.z != 1 || !block.x || block.x > MOST_THREADS ||
        block.y != 1 || block.z != 1) {
        return cudaErrorInvalidConfiguration;
    }
    if (shared > 48 * 1024 && (!allowed.count(kernel) || shared > allowed[kernel])) return cudaErrorInvalidValue;
    if (!stacks) {
        void* memory = mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for the stacks of threads");
        stacks = static_cast<char*>(memory);
    }
    if (const char* log = std::getenv("FLOWKERN_EMULATE_LOG")) {  // which kernels ran, by their place in this file
        Dl_info place;
        std::FILE* file = std::fopen(log, "a");
        if (file && dladdr(kernel, &place)) {
            const size_t offset = static_cast<const char*>(kernel) - static_cast<const char*>(place.dli_fbase);
            std::fprintf(file, "%zx %u %zu\n", offset, block.x, shared);
        }
        if (file) std::fclose(file);
    }
    const char* order = std::getenv("FLOWKERN_EMULATE");
    const bool reverse = order && !std::strcmp(order, "reverse");
    gridDim = grid;
    blockDim = block;
    body = &thread;
    threads = block.x;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(shared_arena, sizeof shared_arena);
    ASAN_UNPOISON_MEMORY_REGION(shared_arena, shared);
#endif
    for (unsigned b = 0; b < grid.x; b++) {
        blockIdx = dim3(b, 0, 0);
        std::memset(shared_arena, 0xFF, shared);
        run_block(reverse);
    }
    return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorMisalignedAddress: return "cudaErrorMisalignedAddress";
        default: return "cudaErrorInvalidValue";
    }
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorMisalignedAddress: return "misaligned address";
        default: return "invalid argument";
    }
}
