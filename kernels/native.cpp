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

enum Slot { ROW, TILES, HIDDEN, EXPERT_OUT, PAIRS, QUERIES, KEYS, VALUES, STATE, OUTPUT, SLOTS };

struct Buffers {  // grown once, reused by every call of this thread
    void* at[SLOTS] = {};
    size_t size[SLOTS] = {};
    ~Buffers() { for (void* p : at) free(p); }
};
static thread_local Buffers buffers;

template <class T> static T* scratch(Slot slot, size_t count) {
    size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (buffers.size[slot] < bytes) {
        free(buffers.at[slot]);
        buffers.at[slot] = aligned_alloc(4096, bytes);
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
// sum over each 128 values of k: [heads][k / 128][n padded to 16].
struct Packed {
    const u16* data;
    const float* scale;
    int32_t n, k, planes, heads;
    long ntiles() const { return (n + 15) / 16; }
    long ktiles() const { return (k + 31) / 32; }
    const u16* head(long h) const { return data + h * ntiles() * ktiles() * planes * 512; }
    const float* head_scale(long h) const {
        return scale ? scale + h * ((k + 127) / 128) * ntiles() * 16 : nullptr;
    }
};

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
// that far on are asked for now: from beyond L2 this doubles what a core reads per second.
template <int MB, int NB>
static inline void amx_sweep(const u16* a, long a_step, const u16* b, long b_step, int planes,
                             long k0, long k1, long ahead, v16 (*c)[16]) {
    stores_done();
    _tile_zero(0);
    if (NB > 1) _tile_zero(1);
    if (MB > 1) _tile_zero(2);
    if (MB > 1 && NB > 1) _tile_zero(3);
    for (long k = k0; k < k1; k++) {
        _tile_loadd(4, a + k * 512, 64);
        if (MB > 1) _tile_loadd(5, a + a_step + k * 512, 64);
        for (long p = k * planes; p < (k + 1) * planes; p++) {
            for (long i = 0; ahead && i < NB * 512; i += 32)
                __builtin_prefetch(b + (i < 512 ? i : b_step + i - 512) + p * 512 + ahead);
            _tile_loadd(6, b + p * 512, 64);
            if (NB > 1) _tile_loadd(7, b + b_step + p * 512, 64);
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

// One block of tiles (T is a sweep bound to its operands), with scales folded in every 128 of k.
template <int ROWS, int NB, class T>
static inline void scaled(T sweep, long ktiles, const float* scale, long scale_step, v16* c) {
    if (!scale) return sweep(0, ktiles, c);
    alignas(64) v16 part[ROWS * NB];
    for (int i = 0; i < ROWS * NB; i++) c[i] = v16{};
    for (long k = 0; k < ktiles; k += 4, scale += scale_step) {
        sweep(k, std::min(k + 4, ktiles), part);
        for (int i = 0; i < ROWS * NB; i++)
            c[i] = madd(part[i], load(scale + i / 16 % NB * 16), c[i]);
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
template <int MB, int NB>
static void amx_block(const u16* a, const u16* b, const float* scale, const Packed& w, long row,
                      long m, long col, long ahead, const Output& out) {
    long kt = w.ktiles();
    alignas(64) v16 c[MB * NB][16];
    scaled<MB * 16, NB>([&](long k0, long k1, v16* to) {
        amx_sweep<MB, NB>(a, kt * 512, b, kt * w.planes * 512, w.planes, k0, k1, ahead,
                          (v16(*)[16])to);
    }, kt, scale, w.ntiles() * 16, c[0]);
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
    v16 c[R];
    scaled<R, 1>([&](long k0, long k1, v16* to) {
        soft_sweep<R>(a, kt * 32, b, w.planes, k0, k1, to);
    }, kt, scale, w.ntiles() * 16, c);
    for (int r = 0; r < R; r++) finish(out, row + r, col, w.n, c[r]);
}

// out[first + i] = rows[first + i] @ head h of w, for the m rows that split_rows has prepared.
static void multiply(const Packed& w, long h, long first, long m, const Output& out) {
    const u16* data = w.head(h);
    const float* scale = w.head_scale(h);
    long kt = w.ktiles(), nt = w.ntiles();
#ifdef RS_AMX
    if (use_amx) {
        const u16* a = scratch<u16>(TILES, 0);
        long panel = kt * w.planes * 512, ahead = panel > 64 * 512 ? 8 * 512 : 2 * panel;
        long some = std::max(2l, 128 * 1024 / panel / 2 * 2);  // tile columns: 256 KiB, kept in L2
        for (long n0 = 0; n0 < nt; n0 += some)
            for (long i = 0; i < m; i += 2 * TOKENS)
                for (long n = n0; n < std::min(n0 + some, nt); n += 2) {
                    const u16 *ai = a + i / TOKENS * kt * 512, *b = data + n * panel;
                    const float* s = scale ? scale + n * 16 : nullptr;
                    bool tall = m - i > TOKENS, wide = n + 1 < nt;
                    auto block = tall ? (wide ? amx_block<2, 2> : amx_block<2, 1>)
                                      : (wide ? amx_block<1, 2> : amx_block<1, 1>);
                    block(ai, b, s, w, first + i, m - i, n * 16, i ? 0 : ahead, out);
                }
        return;
    }
#endif
    const float* a = scratch<float>(TILES, 0);
    for (long n = 0; n < nt; n++) {
        const u16* b = data + n * kt * w.planes * 512;
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

// ---------------------------------------------------------------- attention

// Rows are (token, head) pairs; all rows of a sequence read the same pages, so up to 256 of them
// walk the pages together, each with its own running softmax (max, sum, weighted values).
struct Attention {
    const float *q, *pages;
    long H, X, C, table_width;
    const int32_t *table, *sequence, *position;
    float scale;
    float* out;
};
const long PAGE = 64, GROUP = 16;  // tokens of a page; tiles of 16 rows that walk together

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

static inline void zero_four() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
static inline void store_four(v16* c) {
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 16, 64);
    _tile_stored(2, c + 32, 64);
    _tile_stored(3, c + 48, 64);
}

// Four tiles of results += products of float32 operands, each as high + middle bfloat16 parts:
// hi.mid + mid.hi + hi.hi, within 2^-16 of float32. The four share the operand `fixed` and have a
// `moving` one of their own; FIXED_LEFT says which is which.
template <bool FIXED_LEFT>
static inline void amx_three(const u16* fixed_hi, const u16* fixed_mid, const u16* moving_hi,
                             const u16* moving_mid, long step) {
    stores_done();
    _tile_loadd(4, fixed_hi, 64);
    _tile_loadd(5, fixed_mid, 64);
#define RS_THREE(T)                            \
    _tile_loadd(6, moving_hi + T * step, 64);  \
    _tile_loadd(7, moving_mid + T * step, 64); \
    if (FIXED_LEFT) {                          \
        _tile_dpbf16ps(T, 4, 7);               \
        _tile_dpbf16ps(T, 5, 6);               \
        _tile_dpbf16ps(T, 4, 6);               \
    } else {                                   \
        _tile_dpbf16ps(T, 7, 4);               \
        _tile_dpbf16ps(T, 6, 5);               \
        _tile_dpbf16ps(T, 6, 4);               \
    }
    RS_THREE(0) RS_THREE(1) RS_THREE(2) RS_THREE(3)
#undef RS_THREE
}

// The same parts for operands made here: each the upper half of 32 bits, rounded to nearest.
static inline void two_parts(v16 x, u16x* parts) {
    u16x high = ((u16x)x + 0x8000u) & 0xffff0000u;
    parts[0] = high, parts[1] = (u16x)(x - (v16)high) + 0x8000u;
}
static inline __m512i pairs(u16x even, u16x odd) {  // upper halves of two vectors, interleaved
    return (__m512i)((even >> 16) | (odd & 0xffff0000u));
}
static inline __m512i in_a_row(u16x first, u16x second) {  // upper halves, one after the other
    static const struct Odd { alignas(64) u16 at[32]; } odd = [] {
        Odd o{};
        for (int i = 0; i < 32; i++) o.at[i] = (u16)(2 * i + 1);
        return o;
    }();
    return _mm512_permutex2var_epi16((__m512i)first, _mm512_load_si512(odd.at), (__m512i)second);
}

// A page as the left operand of scores = K Q' (keys: [part][4 of 16 keys][X / 32][16][32]) and as
// the right one of P V (values: [part][2 of 32 keys][C / 16][16 pairs of keys][16][2]). Only the
// first `used` keys, zero from `valid` on.
static void amx_page(const float* page, long X, long C, long valid, long used, u16* keys,
                     u16* values) {
    long xt = (X + 31) / 32, ct = (C + 63) / 64 * 4;
    for (long t = 0; t < xt; t++)  // this order, asking for the next columns: twice as fast
        for (long j = 0; j < used; j += 2) {
            u16x parts[2][2][2];  // [key][half of 32 dimensions][part]
            for (long i = 0; i < 2; i++) {
                const float* x = page + (j + i) * X + t * 32;
                long n = j + i < valid ? X - t * 32 : 0;
                __builtin_prefetch(x + 32);
                __builtin_prefetch(x + 48);
                two_parts(n > 0 ? load_n(x, n) : v16{}, parts[i][0]);
                two_parts(n > 16 ? load_n(x + 16, n - 16) : v16{}, parts[i][1]);
            }
            for (long part = 0; part < 2; part++) {
                u16* k = keys + ((part * 4 + j / 16) * xt + t) * 512 + j % 16 * 32;
                _mm512_store_si512(k, in_a_row(parts[0][0][part], parts[0][1][part]));
                _mm512_store_si512(k + 32, in_a_row(parts[1][0][part], parts[1][1][part]));
                u16* v = values + ((part * 2 + j / 32) * ct + 2 * t) * 512 + j % 32 * 16;
                for (long half = 0; half < 2 && 2 * t + half < ct; half++, v += 512)
                    _mm512_store_si512(v, pairs(parts[0][half][part], parts[1][half][part]));
            }
        }
}

static void amx_attention(const Attention& s, const int32_t* table, long row0, long rows) {
    long xt = (s.X + 31) / 32, ct = (s.C + 63) / 64 * 4, tiles = (rows + 15) / 16;
    u16* q = scratch<u16>(QUERIES, tiles * 2 * xt * 512);  // [tile][part][X / 32][pair][16 rows][2]
    u16 *keys = scratch<u16>(KEYS, 2 * 4 * xt * 512), *values = scratch<u16>(VALUES, 2 * 2 * ct * 512);
    v16* state = scratch<v16>(STATE, tiles * 2);
    v16* added = scratch<v16>(OUTPUT, (tiles + 1) * 16 * ct);  // of one page: [C / 16][16 rows]
    v16* o = added + 16 * ct;                                  // so far: [tile][C / 16][16 rows]
    alignas(64) v16 score[PAGE];
    alignas(64) u16 p[2][2][512];  // [part][32 keys][16 rows][32]
    i16x position[GROUP];
    int32_t last = 0;
    for (long t = 0; t < tiles; t++) {
        for (int r = 0; r < 16; r++) {
            long row = std::min(t * 16 + r, rows - 1) + row0;  // spare rows repeat the last
            position[t][r] = s.position[row / s.H];
            last = std::max(last, (int32_t)position[t][r]);
        }
        for (long k = 0; k < xt; k++) {
            alignas(64) __m512i part[2][16];
            for (int r = 0; r < 16; r++) {
                const float* x = s.q + (std::min(t * 16 + r, rows - 1) + row0) * s.X + k * 32;
                long n = s.X - k * 32;
                u16x a[2], b[2];
                two_parts(load_n(x, n) * s.scale, a);
                two_parts(n > 16 ? load_n(x + 16, n - 16) * s.scale : v16{}, b);
                for (int i = 0; i < 2; i++) part[i][r] = in_a_row(a[i], b[i]);
            }
            for (int i = 0; i < 2; i++) {
                transpose(part[i]);
                memcpy(q + ((t * 2 + i) * xt + k) * 512, part[i], 1024);
            }
        }
        state[2 * t] = all(-INFINITY), state[2 * t + 1] = v16{};
        memset(o + t * 16 * ct, 0, 16 * ct * sizeof(v16));
    }
    for (long first = 0; first <= last; first += PAGE) {
        const float* page = s.pages + (long)table[first / PAGE] * PAGE * s.X;
        long valid = std::min(PAGE, last + 1 - first), used = (valid + 31) / 32 * 32;
        amx_page(page, s.X, s.C, valid, used, keys, values);
        for (long t = 0; t < tiles; t++) {
            int32_t newest = position[t][0], oldest = position[t][0];
            for (int r = 1; r < 16; r++) {
                newest = std::max(newest, (int32_t)position[t][r]);
                oldest = std::min(oldest, (int32_t)position[t][r]);
            }
            if (newest < first) continue;
            const u16* qt = q + t * 2 * xt * 512;
            zero_four();
            for (long k = 0; k < xt; k++)
                amx_three<false>(qt + k * 512, qt + (xt + k) * 512, keys + k * 512,
                                 keys + (4 * xt + k) * 512, xt * 512);
            store_four(score);
            if (oldest < first + PAGE - 1)
                for (int j = 0; j < used; j++)
                    score[j] = pick((int32_t)first + j > position[t], all(-INFINITY), score[j]);
            v16 &m = state[2 * t], &l = state[2 * t + 1], best = m, total[4] = {};
            for (int j = 0; j < used; j++) best = larger(best, score[j]);
            v16 shrink = vexp(m - best);
            for (int j = 0; j < used; j++) total[j % 4] += score[j] = vexp(score[j] - best);
            m = best, l = madd(l, shrink, (total[0] + total[1]) + (total[2] + total[3]));
            for (int half = 0; half < used / 32; half++) {  // P', keys down, to rows of key pairs
                alignas(64) __m512i part[2][16];
                for (int j = 0; j < 16; j++) {
                    u16x a[2], b[2];
                    two_parts(score[half * 32 + 2 * j], a);
                    two_parts(score[half * 32 + 2 * j + 1], b);
                    for (int i = 0; i < 2; i++) part[i][j] = pairs(a[i], b[i]);
                }
                for (int i = 0; i < 2; i++) {
                    transpose(part[i]);
                    memcpy(p[i][half], part[i], 1024);
                }
            }
            for (long c = 0; c < ct; c += 4) {
                zero_four();
                for (int half = 0; half < used / 32; half++)
                    amx_three<true>(p[0][half], p[1][half], values + (half * ct + c) * 512,
                                    values + ((2 + half) * ct + c) * 512, 512);
                store_four(added + c * 16);
            }
            for (v16 *to = o + t * 16 * ct, *from = added; from < added + 16 * ct; from += 16)
                for (int r = 0; r < 16; r++, to++) *to = madd(*to, all(shrink[r]), from[r]);
        }
    }
    for (long i = 0; i < rows; i++) {
        v16 *from = o + i / 16 * 16 * ct + i % 16, inverse = all(1.f / state[i / 16 * 2 + 1][i % 16]);
        for (long c = 0; c < s.C; c += 16)
            store_n(s.out + (row0 + i) * s.C + c, from[c] * inverse, s.C - c);
    }
}
#endif

template <int R>  // R rows in float32; keys four at a time
static void soft_rows(const Attention& s, const int32_t* table, const long* row) {
    float* o = scratch<float>(OUTPUT, R * (s.C + 16));
    memset(o, 0, R * (s.C + 16) * sizeof(float));
    float m[R], l[R];
    int32_t last = 0;
    for (int r = 0; r < R; r++) {
        m[r] = -INFINITY, l[r] = 0;
        last = std::max(last, s.position[row[r] / s.H]);
    }
    for (long first = 0; first <= last; first += PAGE) {
        const float* page = s.pages + (long)table[first / PAGE] * PAGE * s.X;
        long valid = std::min(PAGE, last + 1 - first);
        alignas(64) float p[R][PAGE];
        for (long j = 0; j < valid; j++) {
            v16 dot[R] = {};
            for (long x = 0; x < s.X; x += 16) {
                v16 key = load_n(page + j * s.X + x, s.X - x);
                for (int r = 0; r < R; r++)
                    dot[r] = madd(load_n(s.q + row[r] * s.X + x, s.X - x), key, dot[r]);
            }
            for (int r = 0; r < R; r++) p[r][j] = sum(dot[r]) * s.scale;
        }
        long seen[R];
        for (int r = 0; r < R; r++) {
            seen[r] = std::min(valid, s.position[row[r] / s.H] + 1 - first);
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
            for (long c = 0; c < s.C; c += 16)
                store(o + r * (s.C + 16) + c, load(o + r * (s.C + 16) + c) * shrink);
        }
        for (long c = 0; c < s.C; c += 16) {
            v16 acc[R];
            for (int r = 0; r < R; r++) acc[r] = load(o + r * (s.C + 16) + c);
            for (long j = 0; j < valid; j++) {
                v16 value = load_n(page + j * s.X + c, s.C - c);
                for (int r = 0; r < R; r++)
                    if (j < seen[r]) acc[r] = madd(all(p[r][j]), value, acc[r]);
            }
            for (int r = 0; r < R; r++) store(o + r * (s.C + 16) + c, acc[r]);
        }
    }
    for (int r = 0; r < R; r++)
        for (long c = 0; c < s.C; c += 16)
            store_n(s.out + row[r] * s.C + c, load(o + r * (s.C + 16) + c) / l[r], s.C - c);
}

static void attend(const Attention& s, long T) {
    struct Task { const int32_t* table; long row, rows; };
    std::vector<Task> tasks;
    long most = GROUP * 16;
    for (long t = 0, end; t < T; t = end) {
        for (end = t; end < T && s.sequence[end] == s.sequence[t];) end++;
        for (long row = t * s.H; row < end * s.H; row += most)
            tasks.push_back({s.table + s.sequence[t] * s.table_width, row,
                             std::min(most, end * s.H - row)});
    }
    pool().run((long)tasks.size(), [&](long i) {
        const Task& task = tasks[i];
#ifdef RS_AMX
        if (use_amx) return amx_attention(s, task.table, task.row, task.rows);
#endif
        for (long r = task.row, end = task.row + task.rows; r < end;) {
            long rows[4] = {r, r + 1, r + 2, r + 3};
            if (r + 4 <= end) soft_rows<4>(s, task.table, rows), r += 4;
            else soft_rows<1>(s, task.table, rows), r++;
        }
    });
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

void rs_store_latents(const float* ckr, long ld, long T, long C, long R, const float* weight,
                      float eps, const float* cos_sin, const int32_t* position,
                      const int64_t* slot, float* pages) {
    Norm n{weight, eps};
    for (long t = 0; t < T; t++) {
        float* to = pages + slot[t] * (C + R);
        memcpy(to, read_row(ckr + t * ld, C, &n), C * 4);
        rotate(ckr + t * ld + C, cos_sin + position[t] * R, R, to + C);
    }
}

void rs_absorb(const float* q, long T, long R, const Packed* w, const float* cos_sin,
               const int32_t* position, float* out) {
    long H = w->heads, W = w->k + R, X = w->n + R;
    for_chunks(T, [&](long first, long m) {
        for (long h = 0; h < H; h++) {
            split_rows({q + h * W, H * W, nullptr}, first, m, w->k, nullptr);
            multiply(*w, h, first, m, {out + h * X, H * X, nullptr, nullptr, 0});
        }
        for (long i = first * H; i < (first + m) * H; i++)
            rotate(q + i * W + w->k, cos_sin + position[i / H] * R, R, out + i * X + w->n);
    });
}

void rs_attention(const float* q, long T, long H, long X, long C, const float* pages,
                  const int32_t* table, long table_width, const int32_t* sequence,
                  const int32_t* position, float scale, float* out) {
    attend({q, pages, H, X, C, table_width, table, sequence, position, scale, out}, T);
}

void rs_unabsorb(const float* u, long T, const Packed* w, float* out) {
    long H = w->heads, C = w->k, V = w->n;
    for_chunks(T, [&](long first, long m) {
        for (long h = 0; h < H; h++) {
            split_rows({u + h * C, H * C, nullptr}, first, m, C, nullptr);
            multiply(*w, h, first, m, {out + h * V, H * V, nullptr, nullptr, 0});
        }
    });
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

// Each expert multiplies its rows together; then every token adds its own in ascending order,
// product and sum rounded apart, as a rank that receives the products from elsewhere does.
int rs_experts(const float* x, long ldx, long T, long K, const int32_t* ids, const float* weights,
               long E, const Packed* gate_up, const Packed* down, float* into, long ldi) {
    long D = down->n, pairs = T * K;
    float* y = scratch<float>(EXPERT_OUT, pairs * D);
    int32_t* start = scratch<int32_t>(PAIRS, E + 1 + 2 * pairs);
    int32_t *pair = start + E + 1, *token = pair + pairs;
    std::fill(start, start + E + 1, 0);
    for (long i = 0; i < pairs; i++) {
        if (ids[i] < 0 || ids[i] >= E) return 1;
        start[ids[i] + 1]++;
    }
    for (long e = 0; e < E; e++) start[e + 1] += start[e];
    for (long i = 0; i < pairs; i++) pair[start[ids[i]]++] = (int32_t)i;
    for (long i = 0; i < pairs; i++) token[i] = pair[i] / (int32_t)K;
    struct Task { long expert, first, rows; };
    std::vector<Task> tasks;
    for (long e = 0, first = 0; e < E; first = start[e++])  // start[e] is now the end of e
        for (long at = first; at < start[e]; at += CHUNK)
            tasks.push_back({e, at, std::min(CHUNK, start[e] - at)});
    auto multiply_task = [&](long i) {
        const Task& task = tasks[i];
        gated({x, ldx, token}, task.first, task.rows, gate_up[task.expert], down[task.expert],
              {y, D, pair, nullptr, 0});
    };
    if (T >= 16) pool().run((long)tasks.size(), multiply_task);
    else {
        Tiles tiles;
        for (long i = 0; i < (long)tasks.size(); i++) multiply_task(i);
    }
    for (long t = 0; t < T; t++)
        for (long d = 0; d < D; d += 16) {
            float* to = into + t * ldi + d;
            v16 total = load_n(to, D - d);
            for (long k = 0; k < K; k++)
                total += load_n(y + (t * K + k) * D + d, D - d) * weights[t * K + k];
            store_n(to, total, D - d);
        }
    return 0;
}
}
