// Vectors, memory, threads and matrix products of the native operations; see native.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__linux__)
#define RS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// ---------------------------------------------------------------- vectors of 16 floats

typedef uint16_t u16;
typedef float v16 __attribute__((vector_size(64), may_alias));
typedef int32_t i16x __attribute__((vector_size(64), may_alias));
typedef uint32_t u16x __attribute__((vector_size(64), may_alias));
typedef float v16u __attribute__((vector_size(64), aligned(4), may_alias));

static inline v16 all(float x) { return v16{} + x; }
static inline v16 load(const float* p) { return *(const v16u*)p; }
static inline void store(float* p, v16 x) { *(v16u*)p = x; }
static inline v16 pick(i16x where, v16 yes, v16 no) {
    return (v16)(((i16x)yes & where) | ((i16x)no & ~where));
}
static inline v16 larger(v16 a, v16 b) { return pick(a > b, a, b); }

static inline v16 load_n(const float* p, long n) {  // the first n of 16, zeros after
    if (n >= 16) return load(p);
    v16 x{};
    memcpy(&x, p, n * sizeof(float));
    return x;
}
static inline void store_n(float* p, v16 x, long n) {
    if (n >= 16) store(p, x);
    else memcpy(p, &x, n * sizeof(float));
}

static inline v16 madd(v16 a, v16 b, v16 c) {  // a * b + c, rounded once where the CPU can
#if defined(__AVX512F__)
    return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    v16 r;
    for (int i = 0; i < 16; i += 8)
        _mm256_storeu_ps((float*)&r + i, _mm256_fmadd_ps(_mm256_loadu_ps((float*)&a + i),
            _mm256_loadu_ps((float*)&b + i), _mm256_loadu_ps((float*)&c + i)));
    return r;
#elif defined(__ARM_NEON)
    v16 r;
    for (int i = 0; i < 16; i += 4)
        vst1q_f32((float*)&r + i, vfmaq_f32(vld1q_f32((float*)&c + i), vld1q_f32((float*)&a + i),
            vld1q_f32((float*)&b + i)));
    return r;
#else
    return a * b + c;
#endif
}

static inline float sum(v16 x) {  // a fixed tree
    for (int w = 8; w; w /= 2)
        for (int i = 0; i < w; i++) x[i] += x[i + w];
    return x[0];
}

static inline v16 vexp(v16 x) {  // 1 ulp or so; exactly 1 at 0, exactly 0 below -87
    const v16 magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    v16 y = larger(pick(x > all(88.f), all(88.f), x), all(-87.f));
    v16 shifted = madd(y, all(1.44269504f), magic), n = shifted - magic;
    v16 r = madd(n, all(-0.693145752f), y);
    r = madd(n, all(-1.42860677e-6f), r);
    v16 p = all(1.98412698e-4f);
    p = madd(p, r, all(1.38888889e-3f));
    p = madd(p, r, all(8.33333333e-3f));
    p = madd(p, r, all(4.16666667e-2f));
    p = madd(p, r, all(1.66666667e-1f));
    p = madd(p, r, all(0.5f));
    p = madd(p * r, r, r) + 1.f;
    p = (v16)((i16x)p + (((i16x)shifted) << 23));
    return pick(x < all(-87.f), v16{}, p);
}
static inline v16 sigmoid(v16 x) { return 1.f / (1.f + vexp(-x)); }

// ---------------------------------------------------------------- memory and threads

enum Slot {
    ROW, TILES, HIDDEN, EXPERT_OUT, PAIRS, LATENT_Q, LATENT_OUT, QUERIES, POSITIONS, VALUES, STATE,
    OUTPUT, LOGITS, RANKS, PASS, AHEAD, WIDE, FP8_ROW, EXPANDED, SLOTS
};

struct Buffers {  // grown once, reused by every call of this thread
    void* at[SLOTS] = {};
    size_t size[SLOTS] = {};
    ~Buffers() { for (void* p : at) free(p); }
};
static thread_local Buffers buffers;

const size_t HUGE_PAGE = 2 << 20;

// Asks for large memory pages before memory is first touched: fewer translations to look up.
static void prefer_huge(void* at, size_t bytes) {
#ifdef __linux__
    uintptr_t first = ((uintptr_t)at + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    uintptr_t end = ((uintptr_t)at + bytes) & ~(HUGE_PAGE - 1);
    if (first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);
#endif
}

template <class T> static T* scratch(Slot slot, size_t count) {
    size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (buffers.size[slot] < bytes) {
        free(buffers.at[slot]);
        size_t unit = bytes < HUGE_PAGE / 8 ? 4096 : HUGE_PAGE;
        bytes = (bytes + unit - 1) / unit * unit;
        buffers.at[slot] = aligned_alloc(unit, bytes);
        prefer_huge(buffers.at[slot], bytes);
        memset(buffers.at[slot], 0, bytes);
        buffers.size[slot] = bytes;
    }
    return (T*)buffers.at[slot];
}

static bool use_amx = false;

#ifdef RS_AMX
alignas(64) static const struct {
    uint8_t palette, start, unused[14];
    u16 row_bytes[16];
    uint8_t rows[16];
} SHAPE = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
#endif

// While this object lives, the eight tiles hold 16 rows of 64 bytes each, and denormals (the low
// parts of numbers below 2^-100) count as zero, as in AMX itself: they would cost an assist each.
struct Tiles {
#ifdef __SSE2__
    unsigned saved = _mm_getcsr();
    Tiles() {
        _mm_setcsr(saved | 0x8040);
#ifdef RS_AMX
        if (use_amx) _tile_loadconfig(&SHAPE);
#endif
    }
    ~Tiles() {
#ifdef RS_AMX
        if (use_amx) _tile_release();
#endif
        _mm_setcsr(saved);
    }
#else
    Tiles() {}
    ~Tiles() {}
#endif
};

// GCC does not know that a tile load reads memory: stores must be finished before one.
static inline void stores_done() { asm volatile("" ::: "memory"); }

class Pool {  // threads that sleep until a call has enough independent work to share
    std::vector<std::thread> workers;
    std::mutex busy, lock;
    std::condition_variable wake, idle;
    const std::function<void(long)>* job = nullptr;
    std::atomic<long> next{0};
    long tasks = 0, generation = 0, running = 0;
    bool stopping = false;

    void drain() {
        Tiles tiles;
        for (long i; (i = next.fetch_add(1)) < tasks;) (*job)(i);
    }
    void work(long seen) {  // seen: the generation when it was made, maybe long before it runs
        std::unique_lock<std::mutex> hold(lock);
        for (;;) {
            wake.wait(hold, [&] { return stopping || generation != seen; });
            if (stopping) return;
            seen = generation;
            hold.unlock();
            drain();
            hold.lock();
            if (--running == 0) idle.notify_one();
        }
    }

public:
    ~Pool() { resize(1); }
    long threads() const { return (long)workers.size() + 1; }
    void resize(int n) {
        std::lock_guard<std::mutex> mine(busy);
        {
            std::lock_guard<std::mutex> hold(lock);
            stopping = true;
        }
        wake.notify_all();
        for (auto& w : workers) w.join();
        workers.clear();
        stopping = false;
        for (int i = 1; i < n; i++) workers.emplace_back([this, now = generation] { work(now); });
    }
    void run(long count, const std::function<void(long)>& fn) {
        std::unique_lock<std::mutex> mine(busy, std::defer_lock);
        if (count < 2 || workers.empty() || !mine.try_lock()) {
            Tiles tiles;
            for (long i = 0; i < count; i++) fn(i);
            return;
        }
        {
            std::lock_guard<std::mutex> hold(lock);
            job = &fn, tasks = count, next = 0, running = (long)workers.size(), generation++;
        }
        wake.notify_all();
        drain();
        std::unique_lock<std::mutex> hold(lock);
        idle.wait(hold, [&] { return running == 0; });
    }
};
static Pool& pool() {
    static Pool* p = new Pool;  // never destroyed: joining threads at exit can hang a fork
    return *p;
}

const long CHUNK = 160;  // rows multiplied together: their tiles stay in the L2 cache

template <class F> static void for_chunks(long rows, F fn) {  // fn(first row, number of rows)
    long size = CHUNK, threads = pool().threads();
    if (threads > 1 && rows >= 64) size = std::min(size, (rows / threads + 9) / 10 * 10);
    pool().run((rows + size - 1) / size,
               [&](long i) { fn(i * size, std::min(size, rows - i * size)); });
}

// ---------------------------------------------------------------- matrix products

// [n, k] packed as [heads][n / 16][k / 32][planes][16 pairs of k][16 n][2] bfloat16. More than one
// plane (a float32 matrix as a sum of bfloat16 ones) are summed. scale, if any, multiplies the
// sum over each 128 values of k: [heads][k / 128][n padded to 16]. A narrow matrix has a byte a
// value, e4m3 as `widen` takes them: half of what a step of few rows waits for is then not read.
struct Packed {
    const u16* data;
    const float* scale;
    int32_t n, k, planes, heads, narrow;
    long ntiles() const { return (n + 15) / 16; }
    long ktiles() const { return (k + 31) / 32; }
    long values() const { return ntiles() * ktiles() * planes * 512; }  // of a head
    const u16* head(long h) const { return data + h * values(); }
    const uint8_t* narrow_head(long h) const {
        return narrow ? (const uint8_t*)data + h * values() : nullptr;
    }
    const float* head_scale(long h) const {
        return scale ? scale + h * ((k + 127) / 128) * ntiles() * 16 : nullptr;
    }
};

#if defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__GFNI__)
#define RS_NARROW 1
struct Subnormal {  // halves of the bfloat16 of m * 2^-9
    alignas(64) uint8_t low[64] = {}, high[64] = {};
    Subnormal() {
        for (int m = 1; m < 8; m++) {
            float x = std::ldexp((float)m, -9);
            uint32_t bits;
            memcpy(&bits, &x, 4);
            low[m] = (uint8_t)(bits >> 16), high[m] = (uint8_t)(bits >> 24);
        }
    }
};
static const Subnormal SUBNORMAL;

// `count` times 64 e4m3 values, none of them NaN: in each 128 bits 8 of the first half, then 8 of
// the second. What is `ahead` bytes further on is asked for. Of a normal number s eeee mmm, the
// bits of the bfloat16 are affine ones: s e !e !e !e !e eee mmm 0000, for its exponent is 120 more.
static inline void widen(const uint8_t* from, long count, long ahead, u16* to) {
    const __m512i high_bits = _mm512_set1_epi64(0x1020404040404080);
    const __m512i low_bits = _mm512_set1_epi64(0x0000000001020408);
    const __m512i sign = _mm512_set1_epi8((char)0x80), exponent = _mm512_set1_epi8(0x78);
    for (long i = 0; i < count; i++, from += 64, to += 64) {
        __builtin_prefetch(from + ahead);
        __m512i x = _mm512_loadu_si512(from);
        __m512i low = _mm512_gf2p8affine_epi64_epi8(x, low_bits, 0);
        __m512i high = _mm512_gf2p8affine_epi64_epi8(x, high_bits, 0x3c);
        __mmask64 small = _mm512_testn_epi8_mask(x, exponent);
        if (__builtin_expect(small != 0, 0)) {
            low = _mm512_mask_permutexvar_epi8(low, small, x, _mm512_load_si512(SUBNORMAL.low));
            high = _mm512_mask_permutexvar_epi8(high, small, x, _mm512_load_si512(SUBNORMAL.high));
            high = _mm512_ternarylogic_epi64(high, x, sign, 0xf8);  // high | (x & sign)
        }
        _mm512_store_si512(to, _mm512_unpacklo_epi8(low, high));
        _mm512_store_si512(to + 32, _mm512_unpackhi_epi8(low, high));
    }
}
#else
static inline void widen(const uint8_t*, long, long, u16*) {}  // nothing is packed so
#endif

struct Norm { const float* weight; float eps; };
struct Input { const float* at; long stride; const int32_t* index; };  // row i: index[i] or i
struct Output { float* at; long stride; const int32_t* index; const float* residual; long rstride; };

const int TOKENS = 5;  // rows of activations in one tile: three parts of each, one row unused

static const float* read_row(const float* x, long k, const Norm* norm) {  // padded, normalised
    long padded = (k + 31) / 32 * 32;
    float* row = scratch<float>(ROW, padded);
    for (long i = 0; i < padded; i += 16) *(v16*)(row + i) = i < k ? load_n(x + i, k - i) : v16{};
    if (norm && norm->weight) {
        v16 a{}, b{};
        for (long i = 0; i < padded; i += 32) {
            a = madd(*(v16*)(row + i), *(v16*)(row + i), a);
            b = madd(*(v16*)(row + i + 16), *(v16*)(row + i + 16), b);
        }
        v16 r = all(1.f / sqrtf(sum(a + b) / k + norm->eps));
        for (long i = 0; i < k; i += 16)
            *(v16*)(row + i) = *(v16*)(row + i) * r * load_n(norm->weight + i, k - i);
    }
    return row;
}

#ifdef RS_AMX
static inline void split(v16& a, v16& b, void* out) {  // 32 bf16 of (a, b); leaves what they miss
    __m512bh h = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    __m512i bits = (__m512i)h;
    _mm512_store_si512(out, bits);
    a -= (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16);
    b -= (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16);
}

// MB x NB tiles of the product over k tiles [k0, k1), into c[m * NB + n]. With `ahead`, weights
// that far on are asked for now: from beyond L2 this doubles what a core reads per second. `make`
// makes what tiles further on are loaded from.
template <int MB, int NB, class F>
static inline void amx_sweep(const u16* a, long a_step, const u16* b, long b_step, int planes,
                             long ring, long k0, long k1, long ahead, F make, v16 (*c)[16]) {
    stores_done();
    _tile_zero(0);
    if (NB > 1) _tile_zero(1);
    if (MB > 1) _tile_zero(2);
    if (MB > 1 && NB > 1) _tile_zero(3);
    for (long k = k0; k < k1; k++) {
        make(k);
        _tile_loadd(4, a + k * 512, 64);
        if (MB > 1) _tile_loadd(5, a + a_step + k * 512, 64);
        const u16* at = b + (k & ring) * planes * 512;
        for (long p = 0; p < planes; p++, at += 512) {
            for (long j = 0; ahead && j < NB; j++)
                for (long i = 0; i < 512; i += 32) __builtin_prefetch(at + j * b_step + i + ahead);
            _tile_loadd(6, at, 64);
            if (NB > 1) _tile_loadd(7, at + b_step, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (NB > 1) _tile_dpbf16ps(1, 4, 7);
            if (MB > 1) _tile_dpbf16ps(2, 5, 6);
            if (MB > 1 && NB > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c[0], 64);
    if (NB > 1) _tile_stored(1, c[1], 64);
    if (MB > 1) _tile_stored(2, c[NB], 64);
    if (MB > 1 && NB > 1) _tile_stored(3, c[NB + 1], 64);
}
#endif

template <int R>  // the same for R rows of float32 and one tile column, without AMX
static inline void soft_sweep(const float* a, long a_step, const u16* b, int planes, long k0,
                              long k1, v16* c) {
    for (int r = 0; r < R; r++) c[r] = v16{};
    for (long k = k0; k < k1; k++)
        for (long p = 0; p < planes; p++) {
            const i16x* pairs = (const i16x*)(b + (k * planes + p) * 512);
            for (int j = 0; j < 16; j++) {
                v16 even = (v16)(pairs[j] << 16), odd = (v16)(pairs[j] & (int32_t)0xffff0000);
                for (int r = 0; r < R; r++) {
                    const float* x = a + r * a_step + k * 32 + 2 * j;
                    c[r] = madd(all(x[1]), odd, madd(all(x[0]), even, c[r]));
                }
            }
        }
}

static inline void finish(const Output& out, long row, long col, long n, v16 y) {
    if (out.residual) y += load_n(out.residual + row * out.rstride + col, n - col);
    store_n(out.at + (out.index ? out.index[row] : row) * out.stride + col, y, n - col);
}

static void split_rows(const Input& x, long first, long m, long k, const Norm* norm) {
    long ktiles = (k + 31) / 32;
#ifdef RS_AMX
    u16* tiles = scratch<u16>(TILES, (m + 4) / TOKENS * ktiles * 512);
#endif
    float* rows = use_amx ? nullptr : scratch<float>(TILES, m * ktiles * 32);
    for (long i = 0; i < m; i++) {
        long at = x.index ? x.index[first + i] : first + i;
        const float* row = read_row(x.at + at * x.stride, k, norm);
        if (i + 2 < m)
            for (long j = 0, next = x.index ? x.index[first + i + 2] : first + i + 2; j < k; j += 16)
                __builtin_prefetch(x.at + next * x.stride + j);
        if (rows) {
            memcpy(rows + i * ktiles * 32, row, ktiles * 32 * sizeof(float));
            continue;
        }
#ifdef RS_AMX
        u16* to = tiles + i / TOKENS * ktiles * 512 + i % TOKENS * 32;
        for (long t = 0; t < ktiles; t++, to += 512) {
            v16 a = *(v16*)(row + t * 32), b = *(v16*)(row + t * 32 + 16);
            for (int part = 0; part < 3; part++) split(a, b, to + part * TOKENS * 32);
        }
#endif
    }
}

#ifdef RS_AMX
// With `narrow`, b is made of it, each tile while the one before it is multiplied: all of b if it
// is used `again`, else a ring of four tiles for each column, which stays in L1.
template <int MB, int NB>
static void amx_block(const u16* a, u16* b, const uint8_t* narrow, bool again, const float* scale,
                      const Packed& w, long row, long m, long col, long ahead, const Output& out) {
    const long kt = w.ktiles();
    const long ring = narrow && !again ? 3 : -1, step = ring > 0 ? (ring + 1) * 512 : kt * 512;
    auto make = [&](long k) {
        for (long j = 0; k < kt && j < NB; j++)
            widen(narrow + (j * kt + k) * 512, 8, ahead, b + j * step + (k & ring) * 512);
    };
    auto sweep = [&](long k0, long k1, v16 (*to)[16]) {
        if (narrow)
            amx_sweep<MB, NB>(a, kt * 512, b, step, 1, ring, k0, k1, 0,
                              [&](long k) { make(k + 1), stores_done(); }, to);
        else
            amx_sweep<MB, NB>(a, kt * 512, b, step * w.planes, w.planes, ring, k0, k1, ahead,
                              [](long) {}, to);
    };
    alignas(64) v16 c[MB * NB][16], part[MB * NB][16];
    if (narrow) make(0);
    if (!scale) sweep(0, kt, c);
    for (long k = 0; scale && k < kt; k += 4, scale += w.ntiles() * 16) {
        sweep(k, std::min(k + 4, kt), part);
        for (int i = 0; i < MB * NB; i++)
            for (long t = 0; t < std::min<long>(m, TOKENS); t++)
                for (long r = t; r < 3 * TOKENS; r += TOKENS)
                    c[i][r] = madd(part[i][r], load(scale + i % NB * 16), k ? c[i][r] : v16{});
    }
    for (int i = 0; i < MB; i++)
        for (int t = 0; t < TOKENS && i * TOKENS + t < m; t++)
            for (int j = 0; j < NB; j++) {
                v16* parts = c[i * NB + j];
                finish(out, row + i * TOKENS + t, col + j * 16, w.n,
                       parts[t + 2 * TOKENS] + parts[t + TOKENS] + parts[t]);
            }
}
#endif

template <int R>
static void soft_block(const float* a, const u16* b, const float* scale, const Packed& w, long row,
                       long col, const Output& out) {
    long kt = w.ktiles();
    v16 c[R], part[R];
    if (!scale) soft_sweep<R>(a, kt * 32, b, w.planes, 0, kt, c);
    for (long k = 0; scale && k < kt; k += 4, scale += w.ntiles() * 16) {
        soft_sweep<R>(a, kt * 32, b, w.planes, k, std::min(k + 4, kt), part);
        for (int r = 0; r < R; r++) c[r] = madd(part[r], load(scale), k ? c[r] : v16{});
    }
    for (int r = 0; r < R; r++) finish(out, row + r, col, w.n, c[r]);
}

// out[first + i] = rows[first + i] @ head h of w, for the m rows that split_rows has prepared.
static void multiply(const Packed& w, long h, long first, long m, const Output& out) {
    const u16* data = w.head(h);
    const uint8_t* narrow = w.narrow_head(h);
    const float* scale = w.head_scale(h);
    long kt = w.ktiles(), nt = w.ntiles();
#ifdef RS_AMX
    if (use_amx) {
        const u16* a = scratch<u16>(TILES, 0);
        long panel = kt * w.planes * 512, ahead = panel > 64 * 512 ? 8 * 512 : 4 * 512;
        long some = std::max(2l, 128 * 1024 / panel / 2 * 2);  // tile columns: 256 KiB, kept in L2
        const bool again = m > 2 * TOKENS;  // what was made of a narrow one is used more than once
        u16* made = narrow ? scratch<u16>(WIDE, again ? some * panel : 2 * 4 * 512) : nullptr;
        for (long n0 = 0; n0 < nt; n0 += some)
            for (long i = 0; i < m; i += 2 * TOKENS)
                for (long n = n0; n < std::min(n0 + some, nt); n += 2) {
                    const u16* ai = a + i / TOKENS * kt * 512;
                    u16* b = narrow ? made + (again ? n - n0 : 0) * panel : (u16*)data + n * panel;
                    const uint8_t* from = narrow && !i ? narrow + n * panel : nullptr;
                    const float* s = scale ? scale + n * 16 : nullptr;
                    bool tall = m - i > TOKENS, wide = n + 1 < nt;
                    auto block = tall ? (wide ? amx_block<2, 2> : amx_block<2, 1>)
                                      : (wide ? amx_block<1, 2> : amx_block<1, 1>);
                    block(ai, b, from, again, s, w, first + i, m - i, n * 16, i ? 0 : ahead, out);
                }
        return;
    }
#endif
    const float* a = scratch<float>(TILES, 0);
    for (long n = 0; n < nt; n++) {
        const u16* b = data + n * kt * w.planes * 512;
        if (narrow) {
            u16* all = scratch<u16>(WIDE, kt * 512);
            widen(narrow + n * kt * 512, kt * 8, 0, all);
            b = all;
        }
        const float* s = scale ? scale + n * 16 : nullptr;
        long i = 0;
        for (; i + 4 <= m; i += 4) soft_block<4>(a + i * kt * 32, b, s, w, first + i, n * 16, out);
        for (; i < m; i++) soft_block<1>(a + i * kt * 32, b, s, w, first + i, n * 16, out);
    }
}

// down(silu(gate x) * up x) for rows [first, first + m).
static void gated(const Input& x, long first, long m, const Packed& gate_up, const Packed& down,
                  const Output& out) {
    long f = down.k;
    split_rows(x, first, m, gate_up.k, nullptr);
    float* hidden = scratch<float>(HIDDEN, m * 2 * f + 16);
    multiply(gate_up, 0, 0, m, {hidden, 2 * f, nullptr, nullptr, 0});
    for (long i = 0; i < m; i++) {
        float *g = hidden + i * 2 * f, *u = g + f;
        for (long j = 0; j < f; j += 16) {
            v16 a = load_n(g + j, f - j);
            store_n(g + j, a * sigmoid(a) * load_n(u + j, f - j), f - j);
        }
    }
    split_rows({hidden, 2 * f, nullptr}, 0, m, f, nullptr);
    multiply(down, 0, first, m, out);
}

static void rotate(const float* x, const float* cos_sin, long r, float* out) {
    const float *cosine = cos_sin, *sine = cos_sin + r / 2;
    for (long i = 0; i < r / 2; i++) {
        float even = x[2 * i], odd = x[2 * i + 1];
        out[2 * i] = even * cosine[i] - odd * sine[i];
        out[2 * i + 1] = even * sine[i] + odd * cosine[i];
    }
}
