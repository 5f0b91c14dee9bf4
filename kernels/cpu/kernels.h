// What every instruction set offers. All matrices are row-major; ld* are strides between rows, in elements.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

struct bf16 {
  uint16_t bits;
};
typedef int32_t unaligned_int __attribute__((aligned(2), may_alias));

// Static, so that no instruction set's copy is linked into another's.
static inline float to_float(float v) { return v; }
static inline float to_float(bf16 v) {
  uint32_t bits = (uint32_t)v.bits << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
static inline void put(float& out, float v) { out = v; }
static inline void put(bf16& out, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  out.bits = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

template <typename T>
using Pack = void (*)(const T* w, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N, T* out);
template <typename T, typename Y>
using Linear = void (*)(const T* x, int64_t ldx, const T* packed, const float* bias, Y* y, int64_t ldy, int64_t M,
                        int64_t K, int64_t N);
template <typename T>
using Attend = void (*)(const T* qkv, T* keys, T* values, const int64_t* rows, const int64_t* positions, T* out,
                        int64_t D, int64_t H, int64_t Dh, int64_t max_len, float scale);
template <typename T>
using Norm = void (*)(T* x, const T* delta, const float* w, const float* b, float eps, T* out, int64_t M, int64_t d);
template <typename T>
using Gelu = void (*)(T* x, int64_t n);
template <typename T>
using Lora = void (*)(const T* x, int64_t ldx, T* y, int64_t ldy, const int64_t* rows, const T* const* a,
                      const T* const* b, const int64_t* ranks, const double* weights, int64_t M, int64_t K, int64_t N);

using Choose = void (*)(const float* raw, int64_t S, int64_t V, const float* penalty, const int64_t* seen,
                        const int64_t* seen_from, const float* temperature, const int64_t* top_k, const float* top_p,
                        const float* typical_p, const int64_t* ids, const int64_t* ids_from, const float* added,
                        const float* taken, const double* uniform, const int64_t* wanted, int64_t* tokens,
                        double* logprobs);
using Logprobs = void (*)(const float* raw, int64_t S, int64_t V, const int64_t* tokens, const int64_t* count,
                          int64_t most, double* at, int64_t* ids, double* best);

struct Kernels {
  const char* isa;
  int64_t panel;
  Pack<float> pack_f32;
  Pack<bf16> pack_bf16;
  Linear<float, float> linear_f32;
  Linear<bf16, bf16> linear_bf16;
  Linear<bf16, float> linear_bf16_f32;
  Attend<float> attend_f32;
  Attend<bf16> attend_bf16;
  Norm<float> norm_f32;
  Norm<bf16> norm_bf16;
  Gelu<float> gelu_f32;
  Gelu<bf16> gelu_bf16;
  Lora<float> lora_f32;
  Lora<bf16> lora_bf16;
  Choose choose;
  Logprobs logprobs;
};

#define STRING_OF(text) #text
#define STRING(text) STRING_OF(text)
#define KERNELS_OF(isa) kernels_##isa
#define KERNELS(isa) KERNELS_OF(isa)
