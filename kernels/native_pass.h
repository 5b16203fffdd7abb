// A whole pass through a model in one call: the operations of native.cpp, one after another.
//
// With few rows an operation takes microseconds, and calling it from Python as many. Every row gets
// the bits that the operations give when they are called one by one.
#pragma once

#include "native_matrix.h"

struct Moe {
    const Packed *gate, *gate_up, *down;  // the router; of the routed experts, one after another
    const float* bias;
    int64_t experts, groups, keep, top_k, normalise;
    int64_t* rows;  // [experts] to count the rows of each in, or null
    float factor;
};
struct Layer {
    const float *input_norm, *q_norm, *kv_norm, *norm;
    const Packed *q_and_kv_a, *q_b;  // without q_b the first projection gives the queries
    const Packed *w_uk, *w_uv, *o;
    const Packed *gate_up, *down;  // of the dense MLP, or of the shared experts
    const Moe* moe;                // null: dense
};
struct Pass {
    const void* embedding;  // [vocabulary][width], bfloat16 or (wide) float32
    const Packed* join;     // of (token, hidden state), both normed; null: of tokens alone
    const float *token_norm, *hidden_norm, *final_norm, *cos_sin;
    const Packed* head;
    const Layer* layers;
    int64_t count, width, rope, wide, fp8;  // count: of layers; fp8: their pages
    float eps, scale;
};
struct Input_rows {
    const int64_t *ids, *slots, *out;
    const int32_t *positions, *sequence, *table;
    int64_t count, outs, table_width;
};

// One allocation, kept from pass to pass, for all that lies between the operations.
class Carved {
    std::vector<std::pair<void**, size_t>> parts;
    size_t total = 0;
    Slot slot;

public:
    explicit Carved(Slot slot) : slot(slot) {}
    template <class T> void want(T*& at, size_t count) {
        parts.push_back({(void**)&at, total});
        total += (count * sizeof(T) + 63) / 64 * 64;
    }
    void give() {
        char* memory = scratch<char>(slot, total);
        for (auto& [at, offset] : parts) *at = memory + offset;
    }
};

static void embed(const Pass& p, const int64_t* ids, long T, float* out) {
    for (long t = 0; t < T; t++, out += p.width)
        if (p.wide) memcpy(out, (const float*)p.embedding + ids[t] * p.width, p.width * 4);
        else
            for (long i = 0; i < p.width; i++)
                ((uint32_t*)out)[i] = (uint32_t)((const u16*)p.embedding)[ids[t] * p.width + i] << 16;
}

static void gather(const float* x, const int64_t* rows, long R, long width, float* out) {
    for (long r = 0; r < R; r++) memcpy(out + r * width, x + rows[r] * width, width * 4);
}

// logits [outs][V] and normed states: of all rows; with `join`, whose states nobody else needs, of
// the out rows alone, the others only write their latents; a pass with `join` has one layer.
extern "C" void rs_pass(const Pass& p, const Input_rows& in, const float* hidden,
                        void* const* pages, float* logits, float* normed) {
    long T = in.count, D = p.width, R = p.rope, a_width = 0, q_width = 0, o_width = 0, E = 0, K = 0;
    for (const Layer* l = p.layers; l < p.layers + p.count; l++) {
        a_width = std::max<long>(a_width, l->q_and_kv_a->n);
        q_width = std::max<long>(q_width, l->w_uk->heads * (l->w_uk->k + R));
        o_width = std::max<long>(o_width, l->w_uv->heads * l->w_uv->n);
        if (l->moe) E = std::max<long>(E, l->moe->experts), K = std::max<long>(K, l->moe->top_k);
    }
    float *x, *all, *a, *q, *heads, *y, *both, *scores, *weights;
    int32_t *chosen, *positions, *sequence;
    Carved room(PASS);
    room.want(x, T * D), room.want(all, T * D), room.want(y, T * D), room.want(both, 2 * T * D);
    a_width = q_width = std::max(q_width, a_width);  // they change places
    room.want(a, T * a_width), room.want(q, T * q_width);
    room.want(heads, T * o_width), room.want(scores, T * E), room.want(weights, T * K);
    room.want(chosen, T * K), room.want(positions, T), room.want(sequence, T);
    room.give();
    memcpy(positions, in.positions, T * 4), memcpy(sequence, in.sequence, T * 4);

    embed(p, in.ids, T, x);
    if (p.join) {
        for (long t = 0; t < T; t++) {
            rs_rms_norm(x + t * D, D, 1, D, p.token_norm, p.eps, both + 2 * t * D);
            rs_rms_norm(hidden + t * D, D, 1, D, p.hidden_norm, p.eps, both + (2 * t + 1) * D);
        }
        rs_linear(both, 2 * D, T, p.join, nullptr, 0, nullptr, 0, x);
    }
    for (long i = 0; i < p.count; i++) {
        const Layer& l = p.layers[i];
        long C = l.w_uk->n, QW = l.q_and_kv_a->n - C - R, stride = l.q_and_kv_a->n;
        rs_linear(x, D, T, l.q_and_kv_a, l.input_norm, p.eps, nullptr, 0, a);
        rs_store_latents(a + QW, stride, T, C, R, l.kv_norm, p.eps, p.cos_sin, positions,
                         in.slots, pages[i], (int)p.fp8);
        if (p.join && in.outs < T) {
            T = in.outs;
            gather(x, in.out, T, D, all), std::swap(x, all);
            gather(a, in.out, T, stride, q), std::swap(a, q);
            for (long t = 0; t < T; t++)
                positions[t] = in.positions[in.out[t]], sequence[t] = in.sequence[in.out[t]];
        }
        if (l.q_b) rs_linear(a, stride, T, l.q_b, l.q_norm, p.eps, nullptr, 0, q);
        else
            for (long t = 0; t < T; t++) memcpy(q + t * QW, a + t * stride, QW * 4);
        rs_attend(q, T, R, l.w_uk, l.w_uv, p.cos_sin, positions, sequence, pages[i], in.table,
                  in.table_width, p.scale, heads, (int)p.fp8);
        rs_linear(heads, l.o->k, T, l.o, nullptr, 0, x, D, x);
        rs_rms_norm(x, D, T, D, l.norm, p.eps, y);
        const Moe* m = l.moe;
        if (m) {
            rs_linear(y, D, T, m->gate, nullptr, 0, nullptr, 0, scores);
            rs_route(scores, m->experts, T, m->experts, m->bias, m->groups, m->keep, m->top_k,
                     (int)m->normalise, m->factor, chosen, weights);
            for (long j = 0; m->rows && j < T * m->top_k; j++) m->rows[chosen[j]]++;
        }
        for_chunks(T, [&](long first, long m) {
            gated({y, D, nullptr}, first, m, *l.gate_up, *l.down, {x, D, nullptr, x, D});
        });
        if (m) rs_experts(y, D, T, m->top_k, chosen, weights, m->experts, m->gate_up, m->down, x, D);
    }
    rs_rms_norm(x, D, T, D, p.final_norm, p.eps, normed);
    if (in.outs < T) gather(normed, in.out, in.outs, D, y);
    rs_linear(in.outs < T ? y : normed, D, in.outs, p.head, nullptr, 0, nullptr, 0, logits);
}

// Drafts of a module, a pass for each: row i of the out rows gets as many tokens as most[i] says,
// each drawn as `draws[i]` does, but at positions one further ahead, and fed to the next pass with
// the state before it. tokens: [outs][ahead], -1 where there is none.
extern "C" void rs_drafts(const Pass& p, const Input_rows& in, const float* hidden,
                          void* const* pages, const Draw* draws, const int64_t* most, long ahead,
                          int32_t* tokens) {
    long B = in.outs, D = p.width, V = p.head->n;
    float *logits, *normed, *state;
    int64_t *ids, *slots, *out, *row;  // row: of `tokens`, of those that go on
    int32_t *positions, *sequence;
    Carved room(AHEAD);
    room.want(logits, B * V), room.want(normed, B * D), room.want(state, B * D);
    room.want(ids, B), room.want(slots, B), room.want(out, B), room.want(row, B);
    room.want(positions, B), room.want(sequence, B);
    room.give();
    std::fill(tokens, tokens + B * ahead, -1);
    for (long i = 0; i < B; i++) {
        out[i] = row[i] = i;
        positions[i] = in.positions[in.out[i]], sequence[i] = in.sequence[in.out[i]];
    }
    Input_rows now = in;
    for (long number = 0; number < ahead && (now.outs || !number); number++) {
        rs_pass(p, now, hidden, pages, logits, normed);
        long on = 0;
        for (long i = 0; i < now.outs; i++) {
            Draw draw = draws[row[i]];
            draw.position += number;
            int32_t token = tokens[row[i] * ahead + number] = draw_row(logits + i * V, V, draw);
            if (token < 0 || number + 1 >= most[row[i]]) continue;
            long at = positions[i] + 1, page = in.table[sequence[i] * in.table_width + at / PAGE];
            memcpy(state + on * D, normed + i * D, D * sizeof(float));
            ids[on] = token, row[on] = row[i], sequence[on] = sequence[i];
            positions[on] = (int32_t)at, slots[on++] = page * PAGE + at % PAGE;
        }
        now = {ids, slots, out, positions, sequence, in.table, on, on, in.table_width};
        hidden = state;
    }
}
