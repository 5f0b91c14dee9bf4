#include "kernels.h"

// Compiled once for each instruction set: ISA names it, VL floats make a vector. Sums over k run in one fixed order whatever
// the number of rows, so that a row's result doesn't depend on its neighbours. kernels/reference.py holds the same
// operations in torch.

namespace {

#include "vectors.h"

constexpr int NV = VL == 16 ? 4 : 2;  // vectors across a panel
constexpr int NR = NV * VL;           // columns of a panel
constexpr int MR = 6;                 // rows of a tile: MR * NV sums stay in registers
constexpr int MAX_RANK = 512;
#ifdef __AVX512BF16__
constexpr bool DOT = true;  // the processor multiplies bf16 pairs itself
#else
constexpr bool DOT = false;
#endif

#include "linear.h"
#include "attention.h"
#include "elementwise.h"
#include "lora.h"
#include "sampling.h"
#include "logprobs.h"

}  // namespace

extern const Kernels KERNELS(ISA);
const Kernels KERNELS(ISA) = {
    STRING(ISA), NR,
    pack<float>, pack<bf16>,
    linear<float, float>, linear<bf16, bf16>, linear<bf16, float>,
    attend<float>, attend<bf16>,
    norm<float>, norm<bf16>,
    gelu<float>, gelu<bf16>,
    lora<float>, lora<bf16>,
    choose, logprobs,
};
