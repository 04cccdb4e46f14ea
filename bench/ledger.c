/* A ledger of every heap allocation, preloaded in front of glibc's allocator.
 *
 * PyTorch can report what its own allocator holds only on a GPU, and even there not what a library allocates by itself:
 * oneDNN, MKL and our extension call malloc directly. So count at the one place that all of them pass. Between
 * ledger_start and ledger_stop each allocation is written down as (address, +usable bytes), each release as (address,
 * -usable bytes), in an order that is right for every single address; bench/memory.py replays the list.
 *
 * glibc's own caching of freed blocks does not matter, because calls are counted and not pages. Anonymous mappings that a
 * library requests by itself would escape; they are summed, and bench/memory.py refuses a measurement that has any.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

typedef struct {
    uint64_t address;
    int64_t bytes; /* > 0: allocated; < 0: released; 0: a mark, whose number is the address */
} entry;

static entry *entries;
static int64_t capacity;
static atomic_llong used, mapped;
static atomic_bool recording;

static void note(void *address, int64_t bytes) {
    if (!atomic_load_explicit(&recording, memory_order_relaxed)) return;
    int64_t i = atomic_fetch_add(&used, 1);
    if (i < capacity) entries[i] = (entry){(uint64_t)address, bytes};
}

static void *allocated(void *p) {
    if (p) note(p, (int64_t)malloc_usable_size(p));
    return p;
}

/* Noted before the block goes back: afterwards another thread could be given it, and note that first. */
static void releasing(void *p) {
    if (p) note(p, -(int64_t)malloc_usable_size(p));
}

void *malloc(size_t n) { return allocated(__libc_malloc(n)); }
void *calloc(size_t n, size_t size) { return allocated(__libc_calloc(n, size)); }
void *memalign(size_t alignment, size_t n) { return allocated(__libc_memalign(alignment, n)); }
void *aligned_alloc(size_t alignment, size_t n) { return allocated(__libc_memalign(alignment, n)); }
void *valloc(size_t n) { return allocated(__libc_memalign((size_t)getpagesize(), n)); }

void free(void *p) {
    releasing(p);
    __libc_free(p);
}

void *realloc(void *p, size_t n) {
    releasing(p);
    void *q = __libc_realloc(p, n);
    if (!q && n && p) allocated(p); /* failed: the old block is still there */
    return allocated(q);
}

void *reallocarray(void *p, size_t n, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(n, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    return realloc(p, bytes);
}

int posix_memalign(void **out, size_t alignment, size_t n) {
    if (alignment % sizeof(void *) || (alignment & (alignment - 1)) || !alignment) return EINVAL;
    int saved = errno; /* posix_memalign reports through its result alone */
    void *p = allocated(__libc_memalign(alignment, n));
    errno = saved;
    if (!p) return ENOMEM;
    *out = p;
    return 0;
}

void *mmap(void *hint, size_t n, int protection, int flags, int fd, off_t offset) {
    if ((flags & MAP_ANONYMOUS) && atomic_load_explicit(&recording, memory_order_relaxed)) atomic_fetch_add(&mapped, (long long)n);
    return (void *)syscall(SYS_mmap, hint, n, protection, flags, fd, offset);
}

void *mmap64(void *hint, size_t n, int protection, int flags, int fd, off_t offset) {
    return mmap(hint, n, protection, flags, fd, offset);
}

/* Returns 0 when there is no room for a ledger of that many entries. */
int ledger_start(int64_t entry_count) {
    if (entries) syscall(SYS_munmap, entries, (size_t)capacity * sizeof(entry));
    long address = syscall(SYS_mmap, NULL, (size_t)entry_count * sizeof(entry), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0L);
    if (address == -1) {
        entries = NULL;
        return 0;
    }
    entries = (entry *)address;
    capacity = entry_count;
    atomic_store(&used, 0);
    atomic_store(&mapped, 0);
    atomic_store(&recording, 1);
    return 1;
}

void ledger_mark(int64_t number) { note((void *)number, 0); }
void ledger_stop(void) { atomic_store(&recording, 0); }
int64_t ledger_used(void) { return atomic_load(&used); }
int64_t ledger_mapped(void) { return atomic_load(&mapped); }
const entry *ledger_entries(void) { return entries; }
