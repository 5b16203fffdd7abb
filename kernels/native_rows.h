// Which rows go where when experts are spread over members; see row_places.py for the definitions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

static long member_of(int32_t slot, const int64_t* table, long entries) {
    return table[slot < 0 ? entries - 1 : slot];
}

// Stable counting sort: place[i] is where slot i lands when slots are grouped by member.
static void row_places(const int32_t* slot, long N, const int64_t* table, long entries, long M,
                       int32_t* place, int64_t* count) {
    std::fill(count, count + M, 0);
    for (long i = 0; i < N; i++) count[member_of(slot[i], table, entries)]++;
    std::vector<int64_t> next(M, 0);
    for (long m = 1; m < M; m++) next[m] = next[m - 1] + count[m - 1];
    for (long i = 0; i < N; i++) place[i] = (int32_t)next[member_of(slot[i], table, entries)]++;
}

// Rows grouped by the members that hold one of their slots, each once a member; how many in all.
static long wanted_rows(const int32_t* slot, long stride, long R, long K, const int64_t* table,
                        long entries, long M, int32_t* row, int64_t* count) {
    std::vector<int32_t> last(M + 1, -1);
    std::fill(count, count + M, 0);
    auto each = [&](auto found) {
        std::fill(last.begin(), last.end(), -1);
        last[M] = INT32_MAX;  // the entry of nobody
        for (long r = 0; r < R; r++)
            for (long k = 0; k < K; k++) {
                long m = member_of(slot[r * stride + k], table, entries);
                if (last[m] < r) last[m] = (int32_t)r, found(m, r);
            }
    };
    each([&](long m, long) { count[m]++; });
    std::vector<int64_t> next(M, 0);
    for (long m = 1; m < M; m++) next[m] = next[m - 1] + count[m - 1];
    each([&](long m, long r) { row[next[m]++] = (int32_t)r; });
    return M ? next[M - 1] : 0;
}

// Rows as they travel: W words of row[i], its K slots, its home; from T on, one that wants nothing.
static void pack_rows(const int32_t* word, long stride, long T, long W, const int32_t* slot, long K,
                      int32_t home, const int32_t* row, long N, int32_t* out) {
    for (long i = 0; i < N; i++, out += W + K + 1) {
        if (row[i] < T) {
            memcpy(out, word + row[i] * stride, W * sizeof *out);
            memcpy(out + W, slot + row[i] * K, K * sizeof *out);
        } else {
            std::fill(out, out + W, 0), std::fill(out + W, out + W + K, -1);
        }
        out[W + K] = home;
    }
}

// The (row, slot) pairs of `slots` slots from `first` on, in order; how many. count: by home.
// seen: grows by the rows of each slot.
static long picked_slots(const int32_t* slot, long stride, long R, long K, int32_t first,
                         int32_t slots, const int32_t* home, long home_stride, long M,
                         int32_t* row, int32_t* local, int64_t* count, int64_t* seen) {
    long n = 0;
    std::fill(count, count + M, 0);
    for (long r = 0; r < R; r++)
        for (long k = 0; k < K; k++) {
            int32_t s = slot[r * stride + k] - first;
            if (slot[r * stride + k] < 0 || s < 0 || s >= slots) continue;
            row[n] = (int32_t)r, local[n++] = s, count[home[r * home_stride]]++, seen[s]++;
        }
    return n;
}
