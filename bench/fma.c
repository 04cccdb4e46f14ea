// Multiplications and additions without memory: what the arithmetic units give. Compiled once per instruction set.
#ifndef WIDTH
#define WIDTH 4
#endif
#define CHAINS 12
typedef float vector __attribute__((vector_size(4 * WIDTH)));

// Runs `rounds` rounds of 2 * WIDTH * CHAINS operations; returns something, so that nothing is optimised away.
float fma_rounds(long rounds) {
    vector factor = {}, term = {};
    factor += 0.999f;
    term += 0.001f;
    // Named one by one: an array would live in memory.
    vector a = term, b = term, c = term, d = term, e = term, f = term, g = term, h = term, i = term, j = term, k = term,
           l = term;
#define STEP(v) v = v * factor + term; __asm__ volatile("" : "+x"(v));
    for (long r = 0; r < rounds; r++) {
        STEP(a) STEP(b) STEP(c) STEP(d) STEP(e) STEP(f) STEP(g) STEP(h) STEP(i) STEP(j) STEP(k) STEP(l)
    }
    const vector total = a + b + c + d + e + f + g + h + i + j + k + l;
    return total[0];
}

long fma_operations(void) { return 2L * WIDTH * CHAINS; }
