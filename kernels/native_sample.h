// Drawing tokens; kernels/sample.py and sampler.py are the definition in PyTorch.
#pragma once

#include "native_matrix.h"

typedef uint8_t u8x16 __attribute__((vector_size(16), aligned(1), may_alias));

struct Edit { const int64_t* ids; const float* values; int64_t count, penalty; };
struct Draw {
    uint64_t seed;
    int64_t position;
    const float* banned;     // [V] 0 or -inf
    const uint8_t* allowed;  // [V] 0: not by the grammar; null: no grammar
    const Edit* edits;
    int64_t num_edits;
    float temperature, top_p, min_p;
    int32_t top_k, greedy, logprobs;  // logprobs: how many of the most likely; -1: none at all
    int32_t more;  // rows behind this one that are drawn likewise, each one position further on
};

static inline bool any(i16x where) {
    const uint64_t* half = (const uint64_t*)&where;
    uint64_t found = 0;
    for (int i = 0; i < 8; i++) found |= half[i];
    return found;
}

static inline v16 vlog(v16 x) {  // 1 ulp or so, for positive normal x
    u16x e = (u16x)((i16x)((u16x)x - 0x3f3504f3u) >> 23);  // the rest is within sqrt(1/2)..sqrt(2)
    v16 n = __builtin_convertvector((i16x)e, v16), f = (v16)((u16x)x - (e << 23)) - 1.f, z = f * f;
    v16 p = all(7.0376836292e-2f);
    for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                    -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
        p = madd(p, f, all(c));
    p = madd(n, all(-2.12194440e-4f), p * f * z);
    return madd(n, all(0.693359375f), f + madd(z, all(-0.5f), p));
}

struct NoiseKey { uint32_t first, second; };

static uint64_t splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
static NoiseKey noise_key(const Draw& d) {
    uint64_t mixed = splitmix64(splitmix64(d.seed) ^ (uint64_t)d.position);
    return {(uint32_t)(mixed >> 32), (uint32_t)mixed};
}

// Standard Gumbel noise: -log(-log1p(-u)) of a hash of (key, id), of the same u as in sample.py.
const float MOST_NOISE = 23;  // -log(2^-33), rounded up
static inline v16 gumbel(i16x id, NoiseKey key) {
    u16x x = (u16x)id * 0x9E3779B9u + key.first;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu + key.second;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
    v16 high = __builtin_convertvector((i16x)(x >> 16), v16);
    v16 low = __builtin_convertvector((i16x)(x & 0xffffu), v16);
    v16 u = (high * 65536.f + low + 0.5f) * 0x1p-32f, most = all(1 - 0x1p-24f);
    u = pick(u > most, most, u);
    v16 rest = 1.f - u;  // its rounding error is taken out again by the quotient
    return -vlog(pick(rest == 1.f, u, -vlog(rest) * (u / (1.f - rest))));
}

struct Best {  // the largest of each lane, and the first id that has it
    v16 value = all(-INFINITY);
    i16x id = {};
    void meet(v16 x, i16x ids) {
        i16x more = x > value;
        value = pick(more, x, value), id = (ids & more) | (id & ~more);
    }
    int32_t winner(float* most = nullptr) const {
        int at = 0;
        for (int i = 1; i < 16; i++)
            if (value[i] > value[at] || (value[i] == value[at] && id[i] < id[at])) at = i;
        if (most) *most = value[at];
        return id[at];
    }
};

const i16x LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// An order of (value, id) as whole numbers: by value, equal ones from the lowest id on.
static uint64_t rank_of(float x, uint32_t id) {
    x += 0.f;  // -0 is 0
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~id;
}
static int32_t id_of(uint64_t rank) { return (int32_t)~(uint32_t)rank; }

static void sort_next(uint64_t* ranks, long& sorted, long want, long n) {  // highest first
    want = std::min(want, n);
    auto from = ranks + sorted, to = ranks + want;
    if (want < n) std::nth_element(from, to, ranks + n, std::greater<>());
    std::sort(from, to, std::greater<>());
    sorted = want;
}

// What is this far below the best value weighs nothing beside it and is never drawn.
const float NOTHING = 40;

// top-k, top-p, min-p: a filter keeps the first of the ranks. Returns how many, in `ranks`.
static long keep(const float* x, long V, float top, const Draw& d, uint64_t* ranks) {
    long n = 0, sorted = 0, kept = 0;
    double total = 0, before = 0;
    for (long i = 0; i < V; i += 16) {
        v16 chunk = *(v16*)(x + i);
        if (!any(chunk >= top - NOTHING)) continue;
        if (d.top_p < 1) total += sum(vexp(chunk - top));
        for (int j = 0; j < 16; j++)
            if (chunk[j] >= top - NOTHING) ranks[n++] = rank_of(chunk[j], (uint32_t)(i + j));
    }
    auto weight = [&](long i) { return (double)vexp(all(x[id_of(ranks[i])] - top))[0]; };
    if (d.top_k > 0 && d.top_k < n) {
        sort_next(ranks, sorted, d.top_k, n);
        n = sorted, total = 0;
        for (long i = 0; i < n; i++) total += weight(i);
    }
    for (; kept < n; kept++) {
        if (kept == sorted) sort_next(ranks, sorted, std::max(64l, sorted * 8), n);
        double w = weight(kept);
        if (kept && ((d.top_p < 1 && before >= d.top_p * total) || w < d.min_p)) break;
        before += w;
    }
    return kept;
}

static int32_t draw_kept(const float* x, const uint64_t* ranks, long n, NoiseKey key) {
    float best = -INFINITY;
    int32_t found = id_of(ranks[0]);
    for (long i = 0; i < n; i += 16) {
        v16 value = all(-INFINITY);
        i16x id{};
        for (int j = 0; j < 16 && i + j < n; j++) id[j] = id_of(ranks[i + j]), value[j] = x[id[j]];
        value += gumbel(id, key);
        for (int j = 0; j < 16 && i + j < n; j++)
            if (value[j] > best || (value[j] == best && id[j] < found))
                best = value[j], found = id[j];
    }
    return found;
}

// log softmax of unmodified logits: of `token`, and of the `count` most likely.
static void logprobs_of(const float* logits, long V, int32_t token, long count, float* logprob,
                        int32_t* top_id, float* top) {
    float* x = scratch<float>(LOGITS, V + 15);
    v16 lanes = all(-INFINITY);
    for (long i = 0; i < V; i += 16) {
        *(v16*)(x + i) = pick(LANES < (int32_t)(V - i), load_n(logits + i, V - i), all(-INFINITY));
        lanes = larger(lanes, *(v16*)(x + i));
    }
    float most = lanes[0];
    for (int i = 1; i < 16; i++) most = std::max(most, lanes[i]);
    double total = 0;
    for (long i = 0; i < V; i += 16) total += sum(vexp(*(v16*)(x + i) - most));
    float rest = (float)std::log(total);
    for (long i = 0; i < V; i += 16) *(v16*)(x + i) = *(v16*)(x + i) - most - rest;
    *logprob = x[token];
    if (!count) return;
    uint64_t* ranks = scratch<uint64_t>(RANKS, V);
    for (long i = 0; i < V; i++) ranks[i] = rank_of(x[i], (uint32_t)i);
    long sorted = 0;
    sort_next(ranks, sorted, count, V);
    for (long i = 0; i < sorted; i++) top_id[i] = id_of(ranks[i]), top[i] = x[top_id[i]];
}

// The token of one row; -1 if a logit is not finite.
static int32_t draw_row(const float* logits, long V, const Draw& d) {
    float* x = scratch<float>(LOGITS, V + 15);
    i16x bad{};
    for (long i = 0; i < V; i += 16) {
        v16 chunk = load_n(logits + i, V - i);
        bad |= ((i16x)chunk & 0x7f800000) == 0x7f800000;
        *(v16*)(x + i) = chunk;
    }
    if (any(bad)) return -1;
    for (const Edit* e = d.edits; e < d.edits + d.num_edits; e++)
        for (long i = 0; i < e->count; i++) {
            float &at = x[e->ids[i]], value = e->values[i];
            at = !e->penalty ? at + value : at > 0 ? at / value : at * value;
        }
    Best best;
    for (long i = 0; i < V; i += 16) {
        v16 chunk = *(v16*)(x + i) + load_n(d.banned + i, V - i);
        i16x use = LANES < (int32_t)(V - i);
        if (d.allowed) {
            u8x16 bytes{};
            memcpy(&bytes, d.allowed + i, std::min(16l, V - i));
            use &= __builtin_convertvector(bytes, i16x) != 0;
        }
        chunk = pick(use, chunk, all(-INFINITY));
        if (!d.greedy) chunk /= d.temperature;
        best.meet(*(v16*)(x + i) = chunk, LANES + (int32_t)i);
    }
    float top;
    int32_t likely = best.winner(&top);
    if (d.greedy || top == -INFINITY) return likely;
    NoiseKey key = noise_key(d);
    if (d.top_k > 0 || d.top_p < 1 || d.min_p > 0) {
        uint64_t* ranks = scratch<uint64_t>(RANKS, V);
        return draw_kept(x, ranks, keep(x, V, top, d, ranks), key);
    }
    float reached = top + gumbel(i16x{} + likely, key)[0];
    best = {};
    for (long i = 0; i < V; i += 16) {
        v16 chunk = *(v16*)(x + i);
        i16x ids = LANES + (int32_t)i;
        if (any(chunk + MOST_NOISE >= reached)) best.meet(chunk + gumbel(ids, key), ids);
    }
    return best.winner();
}
