// Picks the instruction set and gives Python a C interface.
#include "kernels.h"

extern const Kernels kernels_plain;
#ifdef __x86_64__
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16;
#endif

#define API extern "C" __attribute__((visibility("default")))

// The kernels of the best instruction set that the processor has, or of the named one if it has it, else null.
API const Kernels* chorus_kernels(const char* wanted) {
  const Kernels* chosen = nullptr;
  auto offer = [&](const char* isa, const Kernels* kernels, bool has) {
    if (has && (wanted == nullptr || std::strcmp(wanted, isa) == 0)) {
      chosen = kernels;
    }
  };
  offer("plain", &kernels_plain, true);
#ifdef __x86_64__
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  offer("avx2", &kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
  offer("avx512", &kernels_avx512, avx512);
  // AMD multiplies a vector of bf16 pairs in the time of one of fp32; where Intel does not, it only costs precision.
  bool wins = wanted != nullptr || __builtin_cpu_is("amd");
  offer("avx512_bf16", &kernels_avx512_bf16, avx512 && wins && __builtin_cpu_supports("avx512bf16"));
#endif
  return chosen;
}

API const char* chorus_isa(const Kernels* kernels) { return kernels->isa; }
API int64_t chorus_panel(const Kernels* kernels) { return kernels->panel; }

#define SELF const Kernels* kernels
#define EXPORT(name, parameters, arguments) \
  API void chorus_##name parameters { kernels->name arguments; }

#define PACK(suffix, T) \
  EXPORT(pack_##suffix, (SELF, const T* w, int64_t sk, int64_t sn, int64_t K, int64_t N, T* out), \
         (w, sk, sn, K, N, out))
#define LINEAR(suffix, T, Y) \
  EXPORT(linear_##suffix, \
         (SELF, const T* x, int64_t ldx, const T* w, const float* b, Y* y, int64_t ldy, int64_t M, int64_t K, \
          int64_t N), \
         (x, ldx, w, b, y, ldy, M, K, N))
#define ATTEND(suffix, T) \
  EXPORT(attend_##suffix, \
         (SELF, const T* qkv, T* keys, T* values, const int64_t* rows, const int64_t* positions, T* out, \
          int64_t D, int64_t H, int64_t Dh, int64_t max_len, float scale), \
         (qkv, keys, values, rows, positions, out, D, H, Dh, max_len, scale))
#define NORM(suffix, T) \
  EXPORT(norm_##suffix, \
         (SELF, T* x, const T* delta, const float* w, const float* b, float eps, T* out, int64_t M, int64_t d), \
         (x, delta, w, b, eps, out, M, d))
#define GELU(suffix, T) EXPORT(gelu_##suffix, (SELF, T* x, int64_t n), (x, n))
#define LORA(suffix, T) \
  EXPORT(lora_##suffix, \
         (SELF, const T* x, int64_t ldx, T* y, int64_t ldy, const int64_t* rows, const T* const* a, const T* const* b, \
          const int64_t* ranks, const double* weights, int64_t M, int64_t K, int64_t N), \
         (x, ldx, y, ldy, rows, a, b, ranks, weights, M, K, N))

PACK(f32, float)
PACK(bf16, bf16)
LINEAR(f32, float, float)
LINEAR(bf16, bf16, bf16)
LINEAR(bf16_f32, bf16, float)
ATTEND(f32, float)
ATTEND(bf16, bf16)
NORM(f32, float)
NORM(bf16, bf16)
GELU(f32, float)
GELU(bf16, bf16)
LORA(f32, float)
LORA(bf16, bf16)
EXPORT(choose,
       (SELF, const float* raw, int64_t S, int64_t V, const float* penalty, const int64_t* seen, const int64_t* from,
        const float* t, const int64_t* k, const float* p, const float* typical, const int64_t* ids,
        const int64_t* ids_from, const float* added, const float* taken, const double* u, const int64_t* wanted,
        int64_t* tokens, double* logprobs),
       (raw, S, V, penalty, seen, from, t, k, p, typical, ids, ids_from, added, taken, u, wanted, tokens, logprobs))
EXPORT(logprobs,
       (SELF, const float* raw, int64_t S, int64_t V, const int64_t* tokens, const int64_t* count, int64_t most,
        double* at, int64_t* ids, double* best),
       (raw, S, V, tokens, count, most, at, ids, best))
