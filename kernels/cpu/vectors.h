// Vectors of VL floats. Included inside the namespace of one instruction set.

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(VL * 2), aligned(2), may_alias));

static inline vec load(const float* p) { return *(const vec*)p; }
static inline vec load(const bf16* p) { return (vec)(__builtin_convertvector(*(const hvec*)p, ivec) << 16); }
static inline void store(float* p, vec v) { *(vec*)p = v; }
static inline void store(bf16* p, vec v) {
  ivec bits = (ivec)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  *(hvec*)p = __builtin_convertvector(bits, hvec);
}
static inline float sum(vec v) {
  float total = 0;
  for (int i = 0; i < VL; i++) total += v[i];
  return total;
}

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
