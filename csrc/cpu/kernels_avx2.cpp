#define QSDP_AVX2
#include "cpu/kernels-inl.h"

namespace qsdp {

extern const Kernels kAvx2Kernels{
    "avx2",           avx2::encode,         avx2::decode,        avx2::count_digits,
    avx2::mark_above, avx2::encode_changes, avx2::apply_changes, avx2::rotate};

}  // namespace qsdp
