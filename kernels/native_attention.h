// Latent attention of the native operations: pages, and what reads them; see native.cpp.
//
// A page holds 64 tokens as [X / 16, rounded up][64 tokens][16 values]. A value is 32 bits: two
// bfloat16 numbers, the value rounded (low half) and what that misses (high half), within 2^-17 of
// it. So 16 tokens by 16 values are a tile as they lie, for both products of attention: of the
// pairs that AMX multiplies and adds up, one operand is (high, rest) and the other (y, y).
#pragma once

#include "native_fp8_page.h"

const long PAGE = 64;       // tokens
const long BLOCK = 64 * 16;  // words of 16 values of a page's tokens

static inline u16x halves(v16 x) {  // as in a page
    u16x high = ((u16x)x + 0x8000u) & 0xffff0000u;
    return high >> 16 | (((u16x)(x - (v16)high) + 0x8000u) & 0xffff0000u);
}
static inline v16 whole(u16x w) { return (v16)(w << 16) + (v16)(w & 0xffff0000u); }

static inline long page_words(long X) { return (X + 15) / 16 * BLOCK; }

// Rows are (token, head) pairs of one sequence; they walk its pages together, each with its own
// running softmax (reference score, sum, weighted values). C of the X values of a token are its
// value too.
struct Attention {
    const void* pages;
    const int32_t* table;
    long X, C, H;  // H: rows of one token
    float scale;
    bool fp8;

    // The page of tokens from `first` on, of which `valid` are wanted.
    const uint32_t* page(long first, long valid) const {
        long at = table[first / PAGE];
        if (!fp8) return (const uint32_t*)pages + at * page_words(X);
        Fp8Token token{C, X - C};
        uint32_t* words = scratch<uint32_t>(EXPANDED, page_words(X));
        expand_fp8((const uint8_t*)pages + at * PAGE * token.size(), token, valid, words);
        return words;
    }
};

// The reference that scores are taken against follows the best score only once it is this far
// behind: sums seldom have to be scaled again, and e^8 is nothing to a float32.
const float SLACK = 8;

#ifdef RS_AMX
static inline void transpose(__m512i* r) {  // 16 x 16 of 32 bits
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 8; i++) {  // t[i]: 128-bit lanes 0 and 2 of rows 0-3 and 4-7 ...
        int j = i % 4 + i / 4 * 8;
        t[i] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    }
}

static inline v16 lower(v16 a, v16 b) {  // the first halves of both
    return (v16)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44);
}
static inline v16 upper(v16 a, v16 b) {
    return (v16)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee);
}
static inline v16 swapped(v16 a) { return (v16)_mm512_shuffle_f32x4((__m512)a, (__m512)a, 0x4e); }

// What a page's words are multiplied by: high parts of 8 rows, then what they miss of the same 8,
// each in both halves of a word.
static inline void both_parts(v16 x, u16x& high, u16x& rest) {
    high = ((u16x)x + 0x8000u) & 0xffff0000u;
    rest = ((u16x)(x - (v16)high) + 0x8000u) & 0xffff0000u;
    high |= high >> 16, rest |= rest >> 16;
}

const long EIGHT = 8;  // rows in a tile: their two parts fill it

// Scores [64 keys][16] of one or two groups of 8 rows: a page times queries, 16 dimensions a turn.
// `ahead`: what memory is wanted two turns from now, if anything is.
template <int Q>
static inline void score_sweep(const u16* q, long q_step, const uint32_t* page, long blocks,
                               long keys, const uint32_t* next_page, v16* score) {
    stores_done();
    for (long key = 0; key < keys; key += Q == 1 ? 4 : 2) {
        long left = keys - key;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long b = 0; b < blocks; b++) {
            const uint32_t* k = page + b * BLOCK + key * 256;
            if (next_page && key == 0) {
                const uint32_t* p = b + 2 < blocks ? page + (b + 2) * BLOCK
                                                   : next_page + (b + 2 - blocks) * BLOCK;
                for (long i = 0; i < keys * 256; i += 16) __builtin_prefetch(p + i);
            }
            _tile_loadd(4, q + b * 512, 64);
            if (Q == 1) {
                _tile_loadd(6, k, 64);
                _tile_dpbf16ps(0, 6, 4);
                if (left > 1) {
                    _tile_loadd(7, k + 256, 64);
                    _tile_dpbf16ps(1, 7, 4);
                }
                if (left > 2) {
                    _tile_loadd(6, k + 512, 64);
                    _tile_dpbf16ps(2, 6, 4);
                    _tile_loadd(7, k + 768, 64);
                    _tile_dpbf16ps(3, 7, 4);
                }
            } else {
                _tile_loadd(6, k, 64);
                _tile_loadd(5, q + q_step + b * 512, 64);
                _tile_loadd(7, k + 256, 64);
                _tile_dpbf16ps(0, 6, 4);
                _tile_dpbf16ps(2, 6, 5);
                _tile_dpbf16ps(1, 7, 4);
                _tile_dpbf16ps(3, 7, 5);
            }
        }
        v16* to = score + key * 16;
        _tile_stored(0, to, 64);
        _tile_stored(1, to + 16, 64);
        if (Q == 1) {
            _tile_stored(2, to + 32, 64);
            _tile_stored(3, to + 48, 64);
        } else {
            _tile_stored(2, to + PAGE, 64);
            _tile_stored(3, to + PAGE + 16, 64);
        }
    }
}

// sums[b] += P[kt] values[kt][b] for Q groups of 8 rows and N blocks of 16 values.
template <int Q, int N>
static inline void value_sweep(const u16* p, const uint32_t* const* values, const long* step,
                               long b, long keys, bool fresh, v16* sums, long q_step) {
    v16* to[4];
    for (int i = 0; i < Q * N; i++) to[i] = sums + i / N * q_step + (b + i % N) * 16;
#define RS_EACH(DO) DO(0) if (Q * N > 1) DO(1) if (Q * N > 2) { DO(2) DO(3) }
#define RS_ZERO(T) _tile_zero(T);
#define RS_LOAD(T) _tile_loadd(T, to[T], 64);
#define RS_STORE(T) _tile_stored(T, to[T], 64);
    stores_done();
    if (fresh) { RS_EACH(RS_ZERO) }
    else { RS_EACH(RS_LOAD) }
    for (long k = 0; k < keys; k++) {
        const uint32_t* v = values[k] + b * step[k];
        _tile_loadd(4, p + k * 512, 64);
        _tile_loadd(6, v, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, v + step[k], 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (Q == 2) {
            _tile_loadd(5, p + (4 + k) * 512, 64);
            if (N > 1) {
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            } else {
                _tile_dpbf16ps(1, 5, 6);
            }
        } else if (N > 2) {
            _tile_loadd(6, v + 2 * step[k], 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, v + 3 * step[k], 64);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    RS_EACH(RS_STORE)
#undef RS_EACH
#undef RS_ZERO
#undef RS_LOAD
#undef RS_STORE
}

// One page's scores of 8 rows [64 keys][high 8, rest 8] to the left operand of P V, [key tile]
// [high 8, rest 8][16 keys]; state: reference and sum of each row, twice. Sums so far are scaled
// where the reference moves.
static inline void soften(v16* score, i16x position, long first, long keys, v16* state, v16* sums,
                          long blocks, u16* p) {
    v16 s[PAGE / 2], best = all(-INFINITY), total[4] = {};
    i16x key = (int32_t)first + i16x{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    long pairs = keys * 8;
    for (long j = 0; j < pairs; j++, key += 2) {
        v16 x = lower(score[2 * j], score[2 * j + 1]) + upper(score[2 * j], score[2 * j + 1]);
        s[j] = pick(key > position, all(-INFINITY), x);
        best = larger(best, s[j]);
    }
    best = larger(best, swapped(best));
    v16 old = state[0];
    i16x moves = best > old + SLACK;
    if (_mm512_movepi32_mask((__m512i)moves)) {
        state[0] = pick(moves, best, old);
        v16 shrink = vexp(old - state[0]);
        state[1] *= shrink;
        if (first)
            for (long i = 0; i < blocks; i++)
                for (int r = 0; r < 16; r++) sums[i * 16 + r] *= shrink[r];
    }
    for (long j = 0; j < pairs; j++) total[j % 4] += s[j] = vexp(s[j] - state[0]);
    v16 t = (total[0] + total[1]) + (total[2] + total[3]);
    state[1] += t + swapped(t);
    for (long k = 0; k < keys; k++, p += 512) {
        alignas(64) __m512i rows[16];
        for (int j = 0; j < 8; j++) {
            u16x high, rest;
            both_parts(s[k * 8 + j], high, rest);
            rows[2 * j] = (__m512i)lower((v16)high, (v16)rest);
            rows[2 * j + 1] = (__m512i)upper((v16)high, (v16)rest);
        }
        transpose(rows);
        memcpy(p, rows, 1024);
    }
}

// q: float32 [rows][X], rows of one token after the other; out: [rows][C].
static void amx_attention(const Attention& s, const float* q, const int32_t* token_position,
                          long rows, float* out) {
    long xb = (s.X + 15) / 16, cb = (s.C + 15) / 16, groups = (rows + EIGHT - 1) / EIGHT;
    u16* queries = scratch<u16>(QUERIES, groups * xb * 512);  // [group][X / 16][16 x][8 + 8 rows]
    v16* sums = scratch<v16>(OUTPUT, groups * cb * 16);       // [group][C / 16][8 + 8 rows][16]
    v16* state = scratch<v16>(STATE, groups * 2);
    uint32_t* partial = scratch<uint32_t>(VALUES, cb * 256);
    alignas(64) v16 score[2 * PAGE];
    alignas(64) u16 p[2][4][512];
    i16x* position = scratch<i16x>(POSITIONS, 2 * groups);
    int32_t *newest = (int32_t*)(position + groups), last = 0;
    for (long g = 0; g < groups; g++) {
        const float* row[EIGHT];
        newest[g] = 0;
        for (int r = 0; r < EIGHT; r++) {
            long i = std::min(g * EIGHT + r, rows - 1);  // spare rows repeat the last
            row[r] = q + i * s.X;
            position[g][r] = position[g][r + EIGHT] = token_position[i / s.H];
            newest[g] = std::max(newest[g], token_position[i / s.H]);
        }
        last = std::max(last, newest[g]);
        for (long b = 0; b < xb; b++) {
            alignas(64) __m512i part[16];
            for (int r = 0; r < EIGHT; r++) {
                u16x high, rest;
                both_parts(load_n(row[r] + b * 16, s.X - b * 16) * s.scale, high, rest);
                part[r] = (__m512i)high, part[r + EIGHT] = (__m512i)rest;
            }
            transpose(part);
            memcpy(queries + (g * xb + b) * 512, part, 1024);
        }
        state[2 * g] = all(-INFINITY), state[2 * g + 1] = v16{};
    }
    for (long first = 0; first <= last; first += PAGE) {
        long valid = std::min(PAGE, last + 1 - first), keys = (valid + 15) / 16;
        const uint32_t *page = s.page(first, valid), *next = page;
        if (s.fp8) next = nullptr;
        else if (first + PAGE <= last) next = s.page(first + PAGE, PAGE);
        const uint32_t* values[4];
        long step[4];
        for (long k = 0; k < keys; k++) values[k] = page + k * 256, step[k] = BLOCK;
        if (valid % 16) {  // nobody knows what lies beyond the last token; NaN times 0 is NaN
            for (long b = 0; b < cb; b++) {
                memcpy(partial + b * 256, values[keys - 1] + b * BLOCK, valid % 16 * 64);
                memset(partial + b * 256 + valid % 16 * 16, 0, (16 - valid % 16) * 64);
            }
            values[keys - 1] = partial, step[keys - 1] = 256;
        }
        bool asked = false;
        for (long g = 0; g < groups;) {
            if (newest[g] < first) {
                g++;
                continue;
            }
            long two = keys % 2 == 0 && g + 1 < groups && newest[g + 1] >= first ? 2 : 1;
            (two == 2 ? score_sweep<2> : score_sweep<1>)(queries + g * xb * 512, xb * 512, page, xb,
                                                         keys, asked ? nullptr : next, score);
            asked = true;
            v16* mine = sums + g * cb * 16;
            for (long i = 0; i < two; i++)
                soften(score + i * PAGE, position[g + i], first, keys, state + 2 * (g + i),
                       mine + i * cb * 16, cb, p[i][0]);
            long b = 0;
            if (two == 2) {
                for (; b + 2 <= cb; b += 2)
                    value_sweep<2, 2>(p[0][0], values, step, b, keys, !first, mine, cb * 16);
                for (; b < cb; b++)
                    value_sweep<2, 1>(p[0][0], values, step, b, keys, !first, mine, cb * 16);
            } else {
                for (; b + 4 <= cb; b += 4)
                    value_sweep<1, 4>(p[0][0], values, step, b, keys, !first, mine, 0);
                for (; b < cb; b++)
                    value_sweep<1, 1>(p[0][0], values, step, b, keys, !first, mine, 0);
            }
            g += two;
        }
    }
    for (long i = 0; i < rows; i++) {
        long g = i / EIGHT, r = i % EIGHT;
        v16 *from = sums + g * cb * 16 + r, inverse = all(1.f / state[2 * g + 1][r]);
        for (long b = 0; b < cb; b++, from += 16)
            store_n(out + i * s.C + b * 16, (from[0] + from[EIGHT]) * inverse, s.C - b * 16);
    }
}
#endif

template <int R>  // R rows in float32; `row` is the first
static void soft_rows(const Attention& s, const float* q, const int32_t* token_position, long row,
                      float* out) {
    long xb = (s.X + 15) / 16, cb = (s.C + 15) / 16;
    v16* sums = scratch<v16>(OUTPUT, R * cb);
    v16* query = scratch<v16>(QUERIES, R * xb);
    v16* page = scratch<v16>(VALUES, PAGE * xb);  // [X / 16][64 tokens][16]
    float m[R], l[R];
    int32_t position[R], last = 0;
    for (int r = 0; r < R; r++) {
        m[r] = -INFINITY, l[r] = 0;
        position[r] = token_position[(row + r) / s.H];
        last = std::max(last, position[r]);
        for (long b = 0; b < xb; b++)
            query[b * R + r] = load_n(q + (row + r) * s.X + b * 16, s.X - b * 16) * s.scale;
        for (long b = 0; b < cb; b++) sums[b * R + r] = v16{};
    }
    for (long first = 0; first <= last; first += PAGE) {
        long valid = std::min(PAGE, last + 1 - first);
        const uint32_t* words = s.page(first, valid);
        for (long b = 0; b < xb; b++)
            for (long j = 0; j < valid; j++)
                page[b * PAGE + j] = whole(*(const u16x*)(words + b * BLOCK + j * 16));
        alignas(64) float p[R][PAGE];
        for (long j = 0; j < valid; j++) {
            v16 dot[R] = {};
            for (long b = 0; b < xb; b++)
                for (int r = 0; r < R; r++)
                    dot[r] = madd(query[b * R + r], page[b * PAGE + j], dot[r]);
            for (int r = 0; r < R; r++) p[r][j] = sum(dot[r]);
        }
        long seen[R];
        for (int r = 0; r < R; r++) {
            seen[r] = std::min(valid, position[r] + 1 - first);
            if (seen[r] <= 0) continue;
            for (long j = seen[r]; j < PAGE; j++) p[r][j] = -INFINITY;
            float best = m[r];
            for (long j = 0; j < PAGE; j++) best = std::max(best, p[r][j]);
            float shrink = vexp(all(m[r] - best))[0];
            v16 total{};
            for (long j = 0; j < PAGE; j += 16) {
                v16 e = vexp(load(&p[r][j]) - best);
                store(&p[r][j], e);
                total += e;
            }
            m[r] = best, l[r] = l[r] * shrink + sum(total);
            for (long b = 0; b < cb; b++) sums[b * R + r] *= shrink;
        }
        for (long b = 0; b < cb; b++) {
            v16 acc[R];
            for (int r = 0; r < R; r++) acc[r] = sums[b * R + r];
            for (long j = 0; j < valid; j++)
                for (int r = 0; r < R; r++)
                    if (j < seen[r]) acc[r] = madd(all(p[r][j]), page[b * PAGE + j], acc[r]);
            for (int r = 0; r < R; r++) sums[b * R + r] = acc[r];
        }
    }
    for (int r = 0; r < R; r++)
        for (long b = 0; b < cb; b++)
            store_n(out + (row + r) * s.C + b * 16, sums[b * R + r] / l[r], s.C - b * 16);
}

static void attention(const Attention& s, const float* q, const int32_t* token_position, long rows,
                      float* out) {
#ifdef RS_AMX
    if (use_amx) return amx_attention(s, q, token_position, rows, out);
#endif
    long r = 0;
    for (; r + 4 <= rows; r += 4) soft_rows<4>(s, q, token_position, r, out);
    for (; r < rows; r++) soft_rows<1>(s, q, token_position, r, out);
}
