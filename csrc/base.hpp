// Words that the CPU engine, its kernels and the CUDA kernels share.
//
// Functions here are `static`, so that every file has its own copy. The linker keeps one copy of an
// `inline` function; if that were the one compiled for AVX-512, it would run on processors that
// lack it.
#pragma once
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define ITO_HOST_DEVICE __host__ __device__
#else
#define ITO_HOST_DEVICE
#endif

namespace ito {

constexpr float kInf = std::numeric_limits<float>::infinity();

// What is summed over the positives: nothing, their scores, or the exponentials of their scores.
enum class Positives : int { kNone, kLinear, kLse };

// Of a ≥ 0 and b > 0.
template <class T, class U>
ITO_HOST_DEVICE static constexpr T ceil_div(T a, U b) {
  return static_cast<T>((a + b - 1) / b);
}
template <class T, class U>
ITO_HOST_DEVICE static constexpr T round_up(T a, U b) {
  return static_cast<T>(ceil_div(a, b) * b);
}

}  // namespace ito
