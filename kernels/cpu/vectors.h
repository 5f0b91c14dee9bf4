// Vectors of VL floats. Included inside the namespace of one instruction set.

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(VL * 2), aligned(2), may_alias));

static inline vec load(const float* p) { return *(const vec*)p; }
static inline vec load(const bf16* p) { return (vec)(__builtin_convertvector(*(const hvec*)p, ivec) << 16); }
static inline ivec pairs(const bf16* p) { return *(const ivec*)p; }
static inline void store(float* p, vec v) { *(vec*)p = v; }
static inline void store(bf16* p, vec v) {
  ivec bits = (ivec)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  *(hvec*)p = __builtin_convertvector(bits, hvec);
}
// Halves until four are left: the compiler makes a few shuffles of it.
template <int N>
static inline float sum_of(const float* v) {
  typedef float half __attribute__((vector_size(N * 2), aligned(4), may_alias));
  float out[N / 2];
  *(half*)out = *(const half*)v + *(const half*)(v + N / 2);
  if constexpr (N > 4) return sum_of<N / 2>(out);
  return out[0] + out[1];
}
static inline float sum(vec v) { return sum_of<VL>((const float*)&v); }

#ifdef __AVX512BF16__
// acc + w.lo * x.lo + w.hi * x.hi, each a pair of bf16.
static inline vec add_products(vec acc, ivec w, ivec x) {
  return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
}
#else
static inline vec add_products(vec acc, ivec, ivec) { return acc; }  // never called
#endif

// exp(x) for x <= 0, relative error below 3e-7 (the polynomial of the Cephes library); 0 below -87.
static inline vec exp_of_nonpositive(vec x) {
  ivec tiny = x < -87.0f;
  x = tiny ? vec{} - 87.0f : x;
  ivec n = __builtin_convertvector(x * 1.44269504f - 0.5f, ivec);
  vec f = __builtin_convertvector(n, vec);
  x = x - f * 0.693359375f + f * 2.12194440e-4f;
  vec y = x * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * (x * x) + x + 1.0f;
  y = y * (vec)((n + 127) << 23);
  return tiny ? vec{} : y;
}

static inline void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
}
