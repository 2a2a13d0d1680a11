// The tile instructions of AMX as vector code, for tests where there are none: include it before
// gemm_amx.hpp. A product is what Intel's manual writes down: the even and the odd elements of a
// row have sums of their own, which start at 0 and are made of fused multiply-adds, in order; both
// are added to the result. Subnormal numbers are 0, as in the engine's threads (threads.cpp).
//
// All tiles are whole here, 16 rows of 64 bytes. Anything else stops the program, and so does a
// tile that is used without a configuration.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct EmulatedTiles {
  bool configured = false;
  alignas(64) uint8_t tiles[8][16][64];

  static EmulatedTiles& here() {  // every thread has registers of its own
    static thread_local EmulatedTiles registers;
    return registers;
  }
  static void require(bool ok) {
    if (!ok) __builtin_trap();
  }
  uint8_t (*tile(int t))[64] {
    require(configured && t >= 0 && t < 8);
    return tiles[t];
  }

  void configure(const void* config) {
    uint8_t bytes[64];
    std::memcpy(bytes, config, sizeof bytes);
    require(bytes[0] == 1 && bytes[1] == 0);  // palette, start row
    for (int t = 0; t < 16; ++t) {
      uint16_t row_bytes;
      std::memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
      require(row_bytes == (t < 8 ? 64 : 0) && bytes[48 + t] == (t < 8 ? 16 : 0));
    }
    configured = true;
    std::memset(tiles, 0, sizeof tiles);
  }
  void release() { configured = false; }
  void zero(int t) { std::memset(tile(t), 0, sizeof tiles[0]); }
  void load(int t, const void* from, int64_t stride) {
    uint8_t(*to)[64] = tile(t);
    for (int r = 0; r < 16; ++r)
      std::memcpy(to[r], static_cast<const char*>(from) + r * stride, 64);
  }
  void store(int t, void* to, int64_t stride) {
    const uint8_t(*from)[64] = tile(t);
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, from[r], 64);
  }

  // c[m][n] += Σ_k a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1]
  void multiply(int c, int a, int b) {
    __m512 even[16], odd[16];  // of b
    for (int k = 0; k < 16; ++k) {
      const __m512i pairs = _mm512_load_si512(tile(b)[k]);
      even[k] = first(pairs);
      odd[k] = second(pairs);
    }
    for (int m = 0; m < 16; ++m) {
      uint32_t left[16];
      std::memcpy(left, tile(a)[m], sizeof left);
      __m512 sum_even = _mm512_setzero_ps(), sum_odd = _mm512_setzero_ps();
      for (int k = 0; k < 16; ++k) {
        const __m512i pair = _mm512_set1_epi32(static_cast<int>(left[k]));
        sum_even = _mm512_fmadd_ps(first(pair), even[k], sum_even);
        sum_odd = _mm512_fmadd_ps(second(pair), odd[k], sum_odd);
      }
      float* const result = reinterpret_cast<float*>(tile(c)[m]);
      _mm512_store_ps(result,
                      _mm512_add_ps(_mm512_load_ps(result), _mm512_add_ps(sum_even, sum_odd)));
    }
  }
  static __m512 first(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static __m512 second(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
  }
};

}  // namespace

// Some compilers have functions of these names, others macros.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) EmulatedTiles::here().configure(config)
#define _tile_release() EmulatedTiles::here().release()
#define _tile_zero(tile) EmulatedTiles::here().zero(tile)
#define _tile_loadd(tile, from, stride) EmulatedTiles::here().load(tile, from, stride)
#define _tile_stored(tile, to, stride) EmulatedTiles::here().store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) EmulatedTiles::here().multiply(c, a, b)
