// The operations of `kernels/ops.py` for one CPU, behind a plain C interface.
//
// Two rules shape everything here.
//  * Batch invariance: an element of a result is computed by one fixed sequence of roundings,
//    whatever other rows share the call. So there is one algorithm per operation, not one per
//    batch size; blocking only decides which independent elements are computed side by side.
//    (Compiled with -ffp-contract=off: a product and a sum fuse only where `madd` says so.)
//  * float32 results from bfloat16 hardware: a float32 is exactly the sum of three bfloat16
//    numbers. AMX multiplies bfloat16 tiles and adds in float32, so a row of activations becomes
//    three rows of a tile, and one pass over the (bfloat16) weights serves all three.
// Where there is no AMX the same layouts are read by vector code in float32.

#include "native_attention.h"
#include "native_matrix.h"
#include "native_rows.h"
#include "native_sample.h"

// ---------------------------------------------------------------- routed experts

// y[i] = expert ids[i] applied to row i / K of x, or to row index[i] if x has one. Id `lowest` may
// be -1: no expert, zeros. 1 if an id is out of range.
static int expert_products(const Input& x, long count, long K, const int32_t* ids, int lowest,
                           long E, const Packed* gate_up, const Packed* down, bool share,
                           float* y) {
    long D = down->n;
    int32_t* start = scratch<int32_t>(PAIRS, E + 1 + 2 * count);
    int32_t *pair = start + E + 1, *row = pair + count;
    std::fill(start, start + E + 1, 0);
    for (long i = 0; i < count; i++) {
        if (ids[i] < lowest || ids[i] >= E) return 1;
        if (ids[i] < 0) memset(y + i * D, 0, D * sizeof(float));
        else start[ids[i] + 1]++;
    }
    for (long e = 0; e < E; e++) start[e + 1] += start[e];
    for (long i = 0; i < count; i++)
        if (ids[i] >= 0) pair[start[ids[i]]++] = (int32_t)i;
    for (long i = 0, end = E ? start[E - 1] : 0; i < end; i++)  // start[e] is now the end of e
        row[i] = x.index ? x.index[pair[i]] : pair[i] / (int32_t)K;
    struct Task { long expert, first, rows; };
    std::vector<Task> tasks;
    for (long e = 0, first = 0; e < E; first = start[e++])
        for (long at = first; at < start[e]; at += CHUNK)
            tasks.push_back({e, at, std::min(CHUNK, start[e] - at)});
    auto multiply_task = [&](long i) {
        const Task& task = tasks[i];
        gated({x.at, x.stride, row}, task.first, task.rows, gate_up[task.expert],
              down[task.expert], {y, D, pair, nullptr, 0});
    };
    if (share) pool().run((long)tasks.size(), multiply_task);
    else {
        Tiles tiles;
        for (long i = 0; i < (long)tasks.size(); i++) multiply_task(i);
    }
    return 0;
}

// ---------------------------------------------------------------- the C interface

extern "C" {

// Whether AMX is there and this process may use it (Linux asks for permission once). Also keeps
// freed memory in the process: a prompt's tensors in pages that are fresh each time cost a quarter
// of its time in page faults.
int rs_init() {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
#ifdef RS_AMX
    use_amx = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#endif
    return use_amx;
}
int rs_narrow() {
#ifdef RS_NARROW
    return 1;
#else
    return 0;
#endif
}
void rs_set_amx(int on) { use_amx = on && rs_init(); }
void rs_set_threads(int n) { pool().resize(n); }

void rs_linear(const float* x, long ldx, long T, const Packed* w, const float* norm, float eps,
               const float* residual, long ldr, float* out) {
    Norm n{norm, eps};
    for_chunks(T, [&](long first, long m) {
        split_rows({x, ldx, nullptr}, first, m, w->k, &n);
        multiply(*w, 0, first, m, {out, w->n, nullptr, residual, ldr});
    });
}

void rs_rms_norm(const float* x, long ldx, long T, long D, const float* weight, float eps,
                 float* out) {
    Norm n{weight, eps};
    for (long t = 0; t < T; t++) memcpy(out + t * D, read_row(x + t * ldx, D, &n), D * 4);
}

// The latent half of a token's words comes from ckr, normalised; the rest is rotated.
void rs_store_latents(const float* ckr, long ld, long T, long C, long R, const float* weight,
                      float eps, const float* cos_sin, const int32_t* position,
                      const int64_t* slot, void* pages, int fp8) {
    Norm n{weight, eps};
    long X = C + R, padded = (X + 15) / 16 * 16;
    std::vector<float> row(padded);
    for (long t = 0; t < T; t++) {
        memcpy(row.data(), read_row(ckr + t * ld, C, &n), C * 4);
        rotate(ckr + t * ld + C, cos_sin + position[t] * R, R, row.data() + C);
        if (fp8) {
            Fp8Token token{C, R};
            store_fp8(row.data(), token, (uint8_t*)pages + slot[t] * token.size());
            continue;
        }
        uint32_t* to = (uint32_t*)pages + slot[t] / PAGE * page_words(X) + slot[t] % PAGE * 16;
        for (long i = 0; i < padded; i += 16, to += BLOCK) *(u16x*)to = halves(load(&row[i]));
    }
}

void rs_prefer_huge(void* at, long bytes) { prefer_huge(at, bytes); }

void rs_read_latents(const uint32_t* page, long X, float* out) {  // one page -> [64][X]
    for (long b = 0; b < (X + 15) / 16; b++)
        for (long j = 0; j < PAGE; j++)
            store_n(out + j * X + b * 16, whole(*(const u16x*)(page + b * BLOCK + j * 16)),
                    X - b * 16);
}

// Queries into latent space, attention, and back, for some rows and some heads at a time: what
// lies between is as wide as a page's tokens and stays in the L2 cache. Prompts take few heads, so
// that one sequence's tokens fill the tiles; a decode step takes all, for it has one token of each.
void rs_attend(const float* q, long T, long R, const Packed* w_uk, const Packed* w_uv,
               const float* cos_sin, const int32_t* position, const int32_t* sequence,
               const void* pages, const int32_t* table, long table_width, float scale,
               float* out, int fp8) {
    long H = w_uk->heads, N = w_uk->k, C = w_uk->n, W = N + R, X = C + R, V = w_uv->n;
    struct Task { long t0, m, h0, heads; };
    std::vector<Task> tasks;
    const long threads = pool().threads(), rows = 128;
    const long most = threads == 1 ? 32 : std::min(32l, std::max(8l, T / (2 * threads)));
    for (long t0 = 0; t0 < T; t0 += most) {
        long m = std::min(most, T - t0), runs = 1;
        for (long t = t0 + 1; t < t0 + m; t++) runs += sequence[t] != sequence[t - 1];
        long heads = std::min(H, std::max(1l, rows * runs / m));
        for (long h = 0; h < H; h += heads) tasks.push_back({t0, m, h, std::min(heads, H - h)});
    }
    auto one = [&](long i) {
        auto [t0, m, h0, heads] = tasks[i];
        float* x = scratch<float>(LATENT_Q, m * heads * X);
        float* u = scratch<float>(LATENT_OUT, m * heads * C);
        for (long h = 0; h < heads; h++) {
            split_rows({q + (h0 + h) * W, H * W, nullptr}, t0, m, N, nullptr);
            multiply(*w_uk, h0 + h, 0, m, {x + h * X, heads * X, nullptr, nullptr, 0});
            for (long t = 0; t < m; t++)
                rotate(q + ((t0 + t) * H + h0 + h) * W + N, cos_sin + position[t0 + t] * R, R,
                       x + (t * heads + h) * X + C);
        }
        for (long t = 0, end; t < m; t = end) {
            for (end = t; end < m && sequence[t0 + end] == sequence[t0 + t];) end++;
            const int32_t* mine = table + sequence[t0 + t] * table_width;
            attention({pages, mine, X, C, heads, scale, fp8 != 0}, x + t * heads * X, position + t0 + t,
                      (end - t) * heads, u + t * heads * C);
        }
        for (long h = 0; h < heads; h++) {
            split_rows({u + h * C, heads * C, nullptr}, 0, m, C, nullptr);
            multiply(*w_uv, h0 + h, t0, m, {out + (h0 + h) * V, H * V, nullptr, nullptr, 0});
        }
    };
    if (T >= 16) return pool().run((long)tasks.size(), one);
    Tiles tiles;
    for (long i = 0; i < (long)tasks.size(); i++) one(i);
}

// Spec 1.6. Equal scores go to the lower id; a row of NaN still gets valid, distinct ids.
void rs_route(const float* logits, long ld, long T, long E, const float* bias, long groups,
              long keep, long top_k, int normalise, float factor, int32_t* ids, float* weights) {
    long padded = (E + 15) / 16 * 16, size = E / groups;
    std::vector<float> score(padded), biased(padded), best(groups);
    std::vector<char> kept(groups), chosen(E);
    for (long t = 0; t < T; t++) {
        for (long e = 0; e < E; e += 16) {
            v16 s = sigmoid(load_n(logits + t * ld + e, E - e));
            store(&score[e], s), store(&biased[e], s + load_n(bias + e, E - e));
        }
        for (long g = 0; g < groups; g++) {
            float one = -INFINITY, two = -INFINITY;
            for (long e = g * size; e < (g + 1) * size; e++)
                if (biased[e] > one) two = one, one = biased[e];
                else if (biased[e] > two) two = biased[e];
            best[g] = size > 1 ? one + two : one;
        }
        std::fill(kept.begin(), kept.end(), 0), std::fill(chosen.begin(), chosen.end(), 0);
        for (long i = 0; i < keep; i++) {
            long at = -1;
            for (long g = 0; g < groups; g++)
                if (!kept[g] && (at < 0 || best[g] > best[at])) at = g;
            kept[at] = 1;
        }
        for (long i = 0; i < top_k; i++) {
            long at = -1;
            for (long e = 0; e < E; e++)
                if (kept[e / size] && !chosen[e] && (at < 0 || biased[e] > biased[at])) at = e;
            chosen[at] = 1;
        }
        float total = 0;
        int32_t* id = ids + t * top_k;
        for (long e = 0, i = 0; e < E; e++)
            if (chosen[e]) id[i++] = (int32_t)e, total += score[e];
        for (long i = 0; i < top_k; i++)
            weights[t * top_k + i] = score[id[i]] / (normalise ? total + 1e-20f : 1.f) * factor;
    }
}

void rs_mlp(const float* x, long ldx, long T, const Packed* gate_up, const Packed* down,
            float* out) {
    for_chunks(T, [&](long first, long m) {
        gated({x, ldx, nullptr}, first, m, *gate_up, *down, {out, down->n, nullptr, nullptr, 0});
    });
}

// into[t] += weights[t, k] * y[index[t, k]], k ascending; without an index, of row t * K + k.
int rs_combine(const float* y, long M, long T, long K, const int32_t* index, const float* weights,
               long D, float* into, long ldi) {
    for (long i = 0; index && i < T * K; i++)
        if (index[i] < 0 || index[i] >= M) return 1;
    for (long t = 0; t < T; t++)
        for (long d = 0; d < D; d += 16) {
            float* to = into + t * ldi + d;
            v16 total = load_n(to, D - d);
            for (long i = t * K; i < (t + 1) * K; i++)
                total += load_n(y + (index ? index[i] : i) * D + d, D - d) * weights[i];
            store_n(to, total, D - d);
        }
    return 0;
}

// An expert multiplies its rows together, and every token adds its own in ascending order, product
// and sum rounded apart: the same whether the products are made here or come from other ranks.
int rs_experts(const float* x, long ldx, long T, long K, const int32_t* ids, const float* weights,
               long E, const Packed* gate_up, const Packed* down, float* into, long ldi) {
    float* y = scratch<float>(EXPERT_OUT, T * K * down->n);
    if (expert_products({x, ldx, nullptr}, T * K, K, ids, 0, E, gate_up, down, T >= 16, y)) return 1;
    return rs_combine(y, T * K, T, K, nullptr, weights, down->n, into, ldi);
}
int rs_expert_rows(const float* x, long ldx, long N, const int32_t* rows, const int32_t* ids,
                   long E, const Packed* gate_up, const Packed* down, float* y) {
    return expert_products({x, ldx, rows}, N, 1, ids, -1, E, gate_up, down, N >= 64, y);
}

// Tokens of R rows, their log-probabilities, and of the `most` likely ids of each. A draw may stand
// for several rows.
void rs_draw(const float* logits, long ld, long R, long V, const Draw* draws, long most,
             int32_t* token, float* logprob, int32_t* top_id, float* top) {
    std::vector<Draw> each;
    for (; (long)each.size() < R; draws++)
        for (long i = 0; i <= draws->more; i++) each.push_back(*draws), each.back().position += i;
    auto one = [&](long r) {
        token[r] = draw_row(logits + r * ld, V, each[r]);
        if (token[r] >= 0 && each[r].logprobs >= 0)
            logprobs_of(logits + r * ld, V, token[r], each[r].logprobs, logprob + r,
                        top_id + r * most, top + r * most);
    };
    if (R * V >= 1 << 18) return pool().run(R, one);
    for (long r = 0; r < R; r++) one(r);
}
}

#include "native_pass.h"  // last, for it calls the above
