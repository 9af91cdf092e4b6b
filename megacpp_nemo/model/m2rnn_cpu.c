/* M2RNN's scan on a CPU: forward, and backward by hand through time.

   The rows of a state never meet but in what is read from it, so LANES of them are worked on at
   once: a state is [blocks][VALUES] vectors of LANES rows. Compiled for the machine and for one
   VALUES, the width V of a head; `m2rnn_build.py` does so, and `m2rnn_compiled.py` calls.

   All arrays are fp32 and contiguous, K a multiple of 16:
     q, k, dq, dk [batch, seq, groups, K]       v, y, dy, dv [batch, seq, heads, V]
     f, df [batch, seq, heads]                  W [heads, V, V]   dW [batch, heads, V, V]
     initial, final [batch, heads, K, V]        starts [batch, seq] bytes, or null
     entering [batch, heads, chunks, K, V], in the order of the lanes
   A unit of work is a sequence and one q/k head, with the value heads that share it. */

#include <string.h>

#include "m2rnn_lanes.h"

#ifndef VALUES
#define VALUES 16
#endif
/* Sums of products kept in registers at once. */
#ifdef __AVX512F__
#define TILE 16
#else
#define TILE 4
#endif
/* Rows of stored states, in fours because dW is summed in tiles of 4 x 4. */
#define PADDED ((VALUES + 3) / 4 * 4)

typedef struct {
    long batch, seq, heads, groups, key_dim, chunk;
    float clip; /* below zero for none */
} Sizes;

/* In the order in which they are handed over. */
typedef struct {
    const float *q, *k, *v, *f, *W;
    const unsigned char *starts;
    float *entering;
    const float *initial; /* from here forward only */
    float *y, *final;
    const float *dy, *dfinal; /* from here backward only */
    float *dq, *dk, *dv, *df, *dW, *dinitial;
} Arrays;

/* sum += x W, for a block of rows; several sums at once, because each waits for itself. */
static inline void add_product(const vec *x, const float *W, vec *sum) {
    int v = 0;
    for (; v + TILE <= VALUES; v += TILE) {
        vec own[TILE];
        for (int i = 0; i < TILE; i++) own[i] = sum[v + i];
        for (int u = 0; u < VALUES; u++)
            for (int i = 0; i < TILE; i++) own[i] += x[u] * W[u * VALUES + v + i];
        for (int i = 0; i < TILE; i++) sum[v + i] = own[i];
    }
    for (; v < VALUES; v++)
        for (int u = 0; u < VALUES; u++) sum[v] += x[u] * W[u * VALUES + v];
}

/* Z = tanh(H W + k v^T) for one block of rows. */
static inline void update_of(const vec *H, const float *W, vec key, const float *value, vec *Z) {
    for (int v = 0; v < VALUES; v++) Z[v] = key * value[v];
    add_product(H, W, Z);
    for (int v = 0; v < VALUES; v++) Z[v] = hyperbolic_tangent(Z[v]);
}

/* Between [K, V] and lanes. */
static void to_lanes(const float *from, vec *H, long blocks) {
    for (long i = 0; i < blocks * VALUES * LANES; i++) {
        long block = i / (VALUES * LANES), v = i / LANES % VALUES, lane = i % LANES;
        ((float *)H)[i] = from[(block * LANES + lane) * VALUES + v];
    }
}

static void from_lanes(const vec *H, float *to, long blocks) {
    for (long i = 0; i < blocks * VALUES * LANES; i++) {
        long block = i / (VALUES * LANES), v = i / LANES % VALUES, lane = i % LANES;
        to[(block * LANES + lane) * VALUES + v] = ((const float *)H)[i];
    }
}

/* dW += H_{t-1}^T P_t over `count` blocks, lane by lane. */
static void add_products(const vec *H, const vec *P, long count, vec *dW) {
    for (int u = 0; u < PADDED; u += 4)
        for (int v = 0; v < PADDED; v += 4) {
            vec sum[4][4], *to = dW + u * PADDED + v;
            for (int i = 0; i < 16; i++) sum[i / 4][i % 4] = to[i / 4 * PADDED + i % 4];
            for (const vec *h = H + u, *p = P + v; h < H + count * PADDED; h += PADDED, p += PADDED)
                for (int i = 0; i < 16; i++) sum[i / 4][i % 4] += h[i / 4] * p[i % 4];
            for (int i = 0; i < 16; i++) to[i / 4 * PADDED + i % 4] = sum[i / 4][i % 4];
        }
}

/* What one job, a head of a sequence, reads at token t. */
typedef struct {
    const float *query, *key, *value, *W;
    float gate;
    int begins;
    long row, cell; /* where q and k, and v and f, have this token; v's by VALUES */
} Token;

static inline Token token_of(const Sizes *sizes, const Arrays *arrays, long job, long t) {
    long heads = sizes->heads, h = job % heads, at = job / heads * sizes->seq + t;
    long row = (at * sizes->groups + h / (heads / sizes->groups)) * sizes->key_dim;
    long cell = at * heads + h;
    return (Token){
        .query = arrays->q + row, .key = arrays->k + row, .value = arrays->v + cell * VALUES,
        .W = arrays->W + h * VALUES * VALUES, .gate = arrays->f[cell],
        .begins = arrays->starts && arrays->starts[at], .row = row, .cell = cell,
    };
}

static long chunks_of(const Sizes *sizes) {
    return (sizes->seq + sizes->chunk - 1) / sizes->chunk;
}

/* Scratch of one thread: a state. */
void forward(long first, long last, const Sizes *sizes, const Arrays *arrays, float *scratch) {
    const long sharing = sizes->heads / sizes->groups, state = sizes->key_dim * VALUES;
    const long blocks = sizes->key_dim / LANES;
    vec *H = (vec *)scratch;
    for (long job = first * sharing; job < last * sharing; job++) {
        float *entering = arrays->entering + job * chunks_of(sizes) * state;
        to_lanes(arrays->initial + job * state, H, blocks);
        for (long t = 0; t < sizes->seq; t++) {
            Token now = token_of(sizes, arrays, job, t);
            vec read[VALUES] = {0}, Z[VALUES];
            if (t % sizes->chunk == 0) memcpy(entering + t / sizes->chunk * state, H, 4 * state);
            if (now.begins) memset(H, 0, 4 * state);
            for (long block = 0; block < blocks; block++) {
                vec *own = H + block * VALUES, query = load(now.query + block * LANES);
                update_of(own, now.W, load(now.key + block * LANES), now.value, Z);
                for (int i = 0; i < VALUES; i++) {
                    own[i] = now.gate * own[i] + (1 - now.gate) * Z[i];
                    read[i] += query * own[i];
                }
            }
            sums(read, VALUES, arrays->y + now.cell * VALUES);
        }
        from_lanes(H, arrays->final + job * state, blocks);
    }
}

/* Fill H_{t-1} and Z_t of `n` tokens from the state that entered their chunk. */
static void recompute(const Sizes *sizes, const Arrays *arrays, long job, long start, long n,
                      const float *entered, vec *seen, vec *updates) {
    const long blocks = sizes->key_dim / LANES, kept = blocks * PADDED;
    float gate = 0;
    for (long t = 0; t < n; t++) {
        Token now = token_of(sizes, arrays, job, start + t);
        for (long block = 0; block < blocks; block++) {
            vec *H = seen + t * kept + block * PADDED, *Z = updates + t * kept + block * PADDED;
            for (int i = 0; i < VALUES; i++) {
                vec state = t ? gate * H[i - kept] + (1 - gate) * Z[i - kept]
                              : load(entered + (block * VALUES + i) * LANES);
                H[i] = now.begins ? all(0) : state;
            }
            update_of(H, now.W, load(now.key + block * LANES), now.value, Z);
        }
        gate = now.gate;
    }
}

/* Carry G back over one block of rows at one token. Z becomes P, the gradient by the argument of
   tanh; what is summed over blocks is added to. */
static inline void retreat(const Sizes *sizes, const Arrays *arrays, const Token *now, long block,
                           const vec *H, vec *Z, vec *G, vec *by_value, vec *by_gate) {
    const float *slope = arrays->dy + now->cell * VALUES;
    const vec query = load(now->query + block * LANES), key = load(now->key + block * LANES);
    float *dq = arrays->dq + now->row + block * LANES, *dk = arrays->dk + now->row + block * LANES;
    vec by_query = load(dq), by_key = load(dk);
    for (int i = 0; i < VALUES; i++) {
        vec update = Z[i], grad = G[i] + query * slope[i];
        if (sizes->clip >= 0) {
            grad = choose(grad > sizes->clip, all(sizes->clip), grad);
            grad = choose(grad < -sizes->clip, all(-sizes->clip), grad);
        }
        by_query += (now->gate * H[i] + (1 - now->gate) * update) * slope[i];
        *by_gate += grad * (H[i] - update);
        Z[i] = (1 - now->gate) * (1.0f - update * update) * grad;
        by_key += Z[i] * now->value[i];
        by_value[i] += Z[i] * key;
        G[i] = now->gate * grad;
    }
    store(dq, by_query);
    store(dk, by_key);
}

/* Scratch of one thread: H_{t-1} and Z_t of a chunk, with PADDED rows, then G, then dW's lanes.
   dq and dk begin as zero: the heads of a group add to them. */
void backward(long first, long last, const Sizes *sizes, const Arrays *arrays, float *scratch) {
    const long blocks = sizes->key_dim / LANES, chunk = sizes->chunk, kept = blocks * PADDED;
    const long sharing = sizes->heads / sizes->groups, state = sizes->key_dim * VALUES;
    vec *seen = (vec *)scratch, *Z = seen + chunk * kept, *G = Z + chunk * kept;
    vec *by_W = G + blocks * VALUES;
    memset(seen, 0, 2 * chunk * kept * sizeof(vec));
    for (long job = first * sharing; job < last * sharing; job++) {
        float turned[VALUES * VALUES];
        for (int i = 0; i < VALUES * VALUES; i++)
            turned[i] = token_of(sizes, arrays, job, 0).W[i % VALUES * VALUES + i / VALUES];
        to_lanes(arrays->dfinal + job * state, G, blocks);
        memset(by_W, 0, PADDED * PADDED * sizeof(vec));
        for (long part = chunks_of(sizes) - 1; part >= 0; part--) {
            long start = part * chunk, n = sizes->seq - start < chunk ? sizes->seq - start : chunk;
            const float *entered = arrays->entering + (job * chunks_of(sizes) + part) * state;
            recompute(sizes, arrays, job, start, n, entered, seen, Z);
            for (long t = n - 1; t >= 0; t--) {
                Token now = token_of(sizes, arrays, job, start + t);
                vec by_value[VALUES] = {0}, by_gate = all(0);
                for (long block = 0; block < blocks; block++) {
                    long here = t * kept + block * PADDED;
                    vec *own = G + block * VALUES;
                    retreat(sizes, arrays, &now, block, seen + here, Z + here, own, by_value,
                            &by_gate);
                    add_product(Z + here, turned, own);
                }
                if (now.begins) memset(G, 0, 4 * state);
                sums(by_value, VALUES, arrays->dv + now.cell * VALUES);
                sums(&by_gate, 1, arrays->df + now.cell);
            }
            add_products(seen, Z, n * blocks, by_W);
        }
        from_lanes(G, arrays->dinitial + job * state, blocks);
        for (int u = 0; u < VALUES; u++)
            sums(by_W + u * PADDED, VALUES, arrays->dW + (job * VALUES + u) * VALUES);
    }
}
