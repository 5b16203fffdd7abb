// FP8 pages: [64 tokens][latent in e4m3, float32 scales of 128 values, rotary key in bfloat16], each
// token filled up to 16 bytes; kv_format.py. Scales are powers of two: values are exact in bfloat16.
#pragma once

#include "native_matrix.h"

typedef uint8_t u8x __attribute__((vector_size(16), aligned(1), may_alias));
const long GROUP = 128;  // values that share a scale

struct Fp8Token {
    long C, R;
    long scales_at() const { return (C + 3) / 4 * 4; }
    long keys_at() const { return (scales_at() + (C + GROUP - 1) / GROUP * 4 + 15) / 16 * 16; }
    long size() const { return (keys_at() + 2 * R + 15) / 16 * 16; }
};

static inline v16 from_e4m3(u16x code) {
    u16x magnitude = code & 127, sign = (code & 128) << 24;
    v16 normal = (v16)((magnitude << 20) + (120u << 23));
    v16 small = __builtin_convertvector((i16x)magnitude, v16) * 0x1p-9f;
    v16 x = pick((i16x)magnitude < 8, small, normal);
    return (v16)((u16x)pick((i16x)magnitude == 127, all(NAN), x) | sign);
}

static inline u16x to_e4m3(v16 x) {  // to the nearest, ties to even, 448 at most; NaN stays NaN
    u16x bits = (u16x)x & 0x7fffffff, sign = (u16x)x >> 24 & 128;
    v16 magnitude = (v16)bits, capped = pick(magnitude > all(448.f), all(448.f), magnitude);
    const v16 magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    u16x small = (u16x)(magnitude * 512.f + magic) - (u16x)magic;
    u16x normal = (((u16x)capped + 0x7ffffu + ((u16x)capped >> 20 & 1u)) >> 20) - 120u * 8;
    u16x code = (u16x)pick(magnitude < all(0x1p-6f), (v16)small, (v16)normal);
    return (u16x)pick(magnitude == magnitude, (v16)code, (v16)(u16x{} + 127u)) | sign;
}

// row: latent, then rotated key; readable up to the next 16 values.
static void store_fp8(const float* row, Fp8Token f, uint8_t* to) {
    memset(to, 0, f.size());
    for (long first = 0; first < f.C; first += GROUP) {
        long n = std::min(GROUP, f.C - first);
        uint32_t largest = 0;  // of the magnitudes' bits, which are in the order of the magnitudes
        for (long i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, row + first + i, 4);
            largest = std::max(largest, bits & 0x7fffffffu);
        }
        // 448 is 1.75 * 2^8: above that mantissa, the exponent is one more.
        uint32_t exponent = std::max((largest + 0x1fffffu) >> 23, 71u) - 8;
        float scale[2];
        uint32_t bits[2] = {exponent << 23, (254 - exponent) << 23};
        memcpy(scale, bits, 8);
        memcpy(to + f.scales_at() + first / GROUP * 4, scale, 4);
        for (long i = 0; i < n; i += 16) {
            u8x code = __builtin_convertvector(to_e4m3(load(row + first + i) * scale[1]), u8x);
            memcpy(to + first + i, &code, std::min(16l, n - i));
        }
    }
    for (long i = 0; i < f.R; i++) {
        uint32_t x;
        memcpy(&x, row + f.C + i, 4);
        bool nan = (x & 0x7fffffff) > 0x7f800000;
        u16 half = nan ? 0x7fc0 : (u16)((x + 0x7fff + (x >> 16 & 1)) >> 16);
        memcpy(to + f.keys_at() + 2 * i, &half, 2);
    }
}

// The first `valid` tokens as the words of a page of the other kind; see native_attention.h.
static void expand_fp8(const uint8_t* page, Fp8Token f, long valid, uint32_t* words) {
    long X = f.C + f.R, blocks = (X + 15) / 16, block = 64 * 16;
    uint32_t* row = scratch<uint32_t>(FP8_ROW, X + 32);
    for (long j = 0; j < valid; j++, page += f.size()) {
        for (long c = 0; c < f.C; c += 16) {
            float scale;
            memcpy(&scale, page + f.scales_at() + c / GROUP * 4, 4);
            u16x code = __builtin_convertvector(*(const u8x*)(page + c), u16x);
            store((float*)row + c, (v16)((u16x)(from_e4m3(code) * scale) >> 16));
        }
        for (long i = 0; i < f.R; i++) {
            u16 half;
            memcpy(&half, page + f.keys_at() + 2 * i, 2);
            row[f.C + i] = half;
        }
        memset(row + X, 0, (blocks * 16 - X) * 4);
        for (long b = 0; b < blocks; b++) memcpy(words + b * block + j * 16, row + b * 16, 64);
    }
}
