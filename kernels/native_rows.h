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
extern "C" void rs_row_places(const int32_t* slot, long N, const int64_t* table, long entries,
                              long M, int32_t* place, int64_t* count) {
    std::fill(count, count + M, 0);
    for (long i = 0; i < N; i++) count[member_of(slot[i], table, entries)]++;
    std::vector<int64_t> next(M, 0);
    for (long m = 1; m < M; m++) next[m] = next[m - 1] + count[m - 1];
    for (long i = 0; i < N; i++) place[i] = (int32_t)next[member_of(slot[i], table, entries)]++;
}

// Rows grouped by the members that hold one of their slots, each once a member; how many in all.
extern "C" long rs_wanted_rows(const int32_t* slot, long stride, long R, long K,
                               const int64_t* table, long entries, long M, int32_t* row,
                               int64_t* count) {
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

// Where rows of one member go: expert e of row t is in slot table[e * replicas + t % count[e]], and
// the row is sent to member[slot]; its last entry is that of slot -1.
struct Route {
    const int32_t *table, *count;
    const int64_t* member;
    long replicas, entries, members, home;
};

// Rows as they travel: W words of a row, its K slots, its home. `all` < 0: each once to every member
// that one of its slots is at; else `all` rows to every member, and from T on one that wants nothing.
// slot: [T, K]; out has room for all; sent: rows by member. How many in all.
extern "C" long rs_pack_rows(const Route& to, const int32_t* word, long stride, long T, long W,
                             const int32_t* expert, long K, long all, int32_t* slot, int32_t* out,
                             int64_t* sent) {
    for (long i = 0; i < T * K; i++)
        slot[i] = to.table[expert[i] * to.replicas + i / K % to.count[expert[i]]];
    std::vector<int32_t> row;
    if (all < 0) {
        row.resize(T * std::min(K, to.members));
        row.resize(
            rs_wanted_rows(slot, K, T, K, to.member, to.entries, to.members, row.data(), sent));
    } else {
        std::fill(sent, sent + to.members, 0);
        for (long i = 0; i + 1 < to.entries; i++)
            if (to.member[i] < to.members) sent[to.member[i]] = all;
        for (long m = 0; m < to.members; m++)
            for (long r = 0; r < sent[m]; r++) row.push_back((int32_t)r);
    }
    for (int32_t r : row) {
        if (r < T) {
            memcpy(out, word + r * stride, W * sizeof *out);
            memcpy(out + W, slot + r * K, K * sizeof *out);
        } else {
            std::fill(out, out + W, 0), std::fill(out + W, out + W + K, -1);
        }
        out[W + K] = (int32_t)to.home;
        out += W + K + 1;
    }
    return (long)row.size();
}

// Of R packed rows, `width` words each, the (row, slot) pairs of `slots` slots from `first` on, in
// order; how many. count: by home. seen: grows by the rows of each slot.
extern "C" long rs_picked_slots(const int32_t* packed, long width, long R, long K, int32_t first,
                                int32_t slots, long M, int32_t* row, int32_t* local,
                                int64_t* count, int64_t* seen) {
    long n = 0;
    std::fill(count, count + M, 0);
    for (long r = 0; r < R; r++) {
        const int32_t* end = packed + (r + 1) * width - 1;
        for (const int32_t* slot = end - K; slot < end; slot++) {
            int32_t s = *slot - first;
            if (*slot < 0 || s < 0 || s >= slots) continue;
            row[n] = (int32_t)r, local[n++] = s, count[*end]++, seen[s]++;
        }
    }
    return n;
}
