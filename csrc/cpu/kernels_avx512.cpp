#define QSDP_AVX512
#include "cpu/kernels-inl.h"

namespace qsdp {

extern const Kernels kAvx512Kernels{
    "avx512",           avx512::encode,         avx512::decode,        avx512::count_digits,
    avx512::mark_above, avx512::encode_changes, avx512::apply_changes, avx512::rotate};

}  // namespace qsdp
