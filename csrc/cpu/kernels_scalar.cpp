#include "simd_scalar.h"

#define QSDP_ISA scalar
#include "kernels_text.h"

namespace qsdp {

extern const Kernels kScalarKernels{"scalar", scalar::encode, scalar::decode, scalar::count_digits,
                                    scalar::mark_above};

}  // namespace qsdp
