#include "cpu/kernels-inl.h"

namespace qsdp {

extern const Kernels kScalarKernels{
    "scalar",           scalar::encode,         scalar::decode,        scalar::count_digits,
    scalar::mark_above, scalar::encode_changes, scalar::apply_changes, scalar::rotate};

}  // namespace qsdp
