// The bodies of the CUDA kernels, run by the host one warp after another; see tests/gpu_kernels.py.
#include "codec.h"

#include <cstring>
#include <vector>

namespace {

std::vector<qsdp::Segment> segments_of(const int64_t* table, int64_t rows) {
    std::vector<qsdp::Segment> segments(static_cast<size_t>(rows));
    if (rows > 0) memcpy(segments.data(), table, segments.size() * sizeof(qsdp::Segment));
    return segments;
}

}  // namespace

extern "C" void emulate_encode(const uint8_t* buffer, const int64_t* table, int64_t rows,
                               uint64_t key, const int64_t* header, uint8_t* payload,
                               int64_t payload_bytes, const float* levels) {
    qsdp::launch_jobs(qsdp::encode_items(segments_of(table, rows), payload_bytes).all(), levels,
                      buffer, payload, key, header, false, [](const qsdp::Job& job) {
                          for (int64_t unit = 0; unit < job.num_units + 7; ++unit) {
                              qsdp::run_unit<true>(job, unit);
                          }
                      });
}

extern "C" void emulate_decode(const uint8_t* payload, const int64_t* table, int64_t rows,
                               uint64_t key, uint8_t* buffer, bool add, const float* levels) {
    qsdp::launch_jobs(qsdp::decode_items(segments_of(table, rows), add).all(), levels, payload,
                      buffer, key, nullptr, add, [](const qsdp::Job& job) {
                          for (int64_t unit = 0; unit < job.num_units + 7; ++unit) {
                              qsdp::run_unit<false>(job, unit);
                          }
                      });
}
