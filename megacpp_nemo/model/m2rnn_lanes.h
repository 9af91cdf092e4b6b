/* As many floats at once as the machine's vectors hold: loads, sums over lanes, 2^x and tanh. */

#include <string.h>

/* Wider vectors than the target's are split by some compilers into single floats. */
#if defined(__AVX512F__)
#define LANES 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX2__)
#define LANES 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define LANES 4
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int bits __attribute__((vector_size(4 * LANES)));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (bits){__VA_ARGS__})
#endif

static inline vec load(const float *from) { return *(const loose *)from; }
static inline void store(float *to, vec x) { *(loose *)to = x; }
static inline vec all(float x) { return (vec){0} + x; }
static inline vec choose(bits mask, vec yes, vec no) {
    return (vec)((mask & (bits)yes) | (~mask & (bits)no));
}

/* Write the sums over lanes of `count` vectors, LANES at a time: each round adds neighbours. */
static inline void sums(const vec *x, int count, float *to) {
    for (int first = 0; first < count; first += LANES) {
        vec left[LANES];
        int here = count - first < LANES ? count - first : LANES;
        for (int i = 0; i < LANES; i++) left[i] = i < here ? x[first + i] : all(0);
        for (int width = LANES / 2; width; width /= 2)
            for (int i = 0; i < width; i++)
                left[i] = PICK(left[2 * i], left[2 * i + 1], EVEN) + PICK(left[2 * i], left[2 * i + 1], ODD);
        memcpy(to + first, left, here * sizeof(float));
    }
}

/* 2^x for x <= 0, to 3e-9 before rounding; below 2^-126 it is 2^-126. */
static inline vec power_of_two(vec x) {
    x = choose(x < -126.0f, all(-126), x);
    bits whole = __builtin_convertvector(x - 0.5f, bits);
    vec r = x - __builtin_convertvector(whole, vec);
    vec y = 1.54697320e-4f * r + 1.34004322e-3f;
    y = y * r + 9.61802560e-3f;
    y = y * r + 5.55032721e-2f;
    y = y * r + 2.40226512e-1f;
    y = y * r + 6.93147207e-1f;
    y = y * r + 1.0f;
    return (vec)((bits)y + (whole << 23));
}

/* tanh to fp32's relative precision: near zero 1 - exp(-2x) would cancel. */
static inline vec hyperbolic_tangent(vec x) {
    vec square = x * x;
    vec near = -5.66478e-3f * square + 2.059568e-2f;
    near = near * square - 5.372268e-2f;
    near = near * square + 1.3331150e-1f;
    near = near * square - 3.3333262e-1f;
    near = x + x * square * near;
    bits sign = (bits)x & ~0x7fffffff;
    vec size = (vec)((bits)x ^ sign);
    vec decay = power_of_two(-2.88539008f * size);
    vec far = (1.0f - decay) / (1.0f + decay);
    return choose(square < 0.390625f, near, (vec)((bits)far | sign));
}
