#include "lists.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <type_traits>

#include "parallel.h"

namespace grasp_sparse {

namespace {

constexpr int64_t kGrain = 16384;  // entries a thread should have before a second one pays

// A non-decreasing pointer array from 0 to nnz.
bool valid_pointers(const int32_t* ptr, int64_t count, int64_t nnz) {
  bool valid = ptr[0] == 0 && ptr[count] == nnz;
  for (int64_t i = 0; i < count; ++i) valid &= ptr[i] <= ptr[i + 1];
  return valid;
}

inline bool inside(int32_t index, int64_t size) { return static_cast<uint32_t>(index) < static_cast<uint64_t>(size); }

// The value that a walk along `permutation` reads some entries after j: of another row each time, which nothing else foresees.
template <class T>
inline void fetch_value(const int32_t* permutation, int64_t j, int64_t nnz, const T* values) {
  constexpr int64_t kAhead = 48;
  if (j + kAhead >= nnz) return;
  const int32_t soon = permutation[j + kAhead];
  if (inside(soon, nnz)) __builtin_prefetch(values + soon);
}

}  // namespace

void corrupt(const char* indices) {
  throw std::runtime_error(std::string("grasp_sparse: ") + indices +
                           " point outside the weight; the sparse structure is corrupt. Rebuild it with "
                           "csr_from_mask, or load another checkpoint.");
}

void check_pointers(const Walk& walk) {
  if (!valid_pointers(walk.ptr, walk.rows, walk.nnz)) corrupt("crow_indices or ccol_indices");
}

void check_indices(const Walk& walk) {
  check_pointers(walk);
  bool valid = true;
  for (int64_t j = 0; j < walk.nnz; ++j) valid &= inside(walk.col[j], walk.cols);
  if (!valid) corrupt("col_indices or row_indices");
}

void build_row_lists(const Walk& walk, const int32_t* column_place, int64_t lists, int32_t* offsets) {
  check_pointers(walk);
  std::atomic<bool> valid{true};
  parallel_for(0, walk.nnz, kGrain, [&](int64_t begin, int64_t end) {
    bool ok = true;
    for (int64_t j = begin; j < end; ++j) {
      const int32_t col = walk.col[j];
      const bool in = inside(col, walk.cols);
      ok &= in;
      for (int64_t i = 0; i < lists; ++i) offsets[i * walk.nnz + j] = column_place[i * walk.cols + (in ? col : 0)];
    }
    if (!ok) valid = false;
  });
  if (!valid) corrupt("col_indices or row_indices");
}

template <class T>
const T* walked_values(const Walk& walk, const T* values, T* gathered) {
  if (!walk.permutation) return values;
  std::atomic<bool> valid{true};
  parallel_for(0, walk.nnz, kGrain, [&](int64_t begin, int64_t end) {
    bool ok = true;
    for (int64_t j = begin; j < end; ++j) {
      fetch_value(walk.permutation, j, walk.nnz, values);
      const int32_t from = walk.permutation[j];
      const bool in = inside(from, walk.nnz);
      ok &= in;
      gathered[j] = values[in ? from : 0];
    }
    if (!ok) valid = false;
  });
  if (!valid) corrupt("permutation");
  return gathered;
}

void check_permutation(const Walk& walk) {
  bool valid = true;
  for (int64_t j = 0; j < walk.nnz; ++j) valid &= inside(walk.permutation[j], walk.nnz);
  if (!valid) corrupt("permutation");
}

template <class T>
void build_transposed_lists(const CsrView& csr, const T* values, int64_t taps, int64_t groups, const int64_t* group_ptr,
                            const int64_t* tap_of, const int32_t* row_place, const int32_t* tap_place, int64_t lists,
                            const TransposedLists<T>& out) {
  if (!valid_pointers(csr.ccol, csr.cols, csr.nnz)) corrupt("ccol_indices");
  const int64_t channels = csr.cols / taps;
  const int64_t channel_step = csr.has_blocks ? 1 : taps, tap_step = csr.has_blocks ? channels : 1;
  int32_t place = 0;
  for (int64_t q = 0; q < groups; ++q) {
    int32_t* row_ptr = out.row_ptr + q * (channels + 1);
    for (int64_t channel = 0; channel < channels; ++channel) {
      row_ptr[channel] = place;
      for (int64_t k = group_ptr[q]; k < group_ptr[q + 1]; ++k) {
        const int64_t col = channel * channel_step + tap_of[k] * tap_step;
        place += csr.ccol[col + 1] - csr.ccol[col];
      }
    }
    row_ptr[channels] = place;
  }
  std::atomic<bool> valid{true};
  const int64_t grain = csr.nnz ? std::max<int64_t>(1, kGrain * groups * channels / csr.nnz) : groups * channels + 1;
  parallel_for(0, groups * channels, grain, [&](int64_t begin, int64_t end) {
    bool ok = true;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t channel = item / groups, q = item % groups;  // a range of channels: groups differ in size, one may be empty
      int32_t to = out.row_ptr[q * (channels + 1) + channel];
      for (int64_t k = group_ptr[q]; k < group_ptr[q + 1]; ++k) {
        const int64_t col = channel * channel_step + tap_of[k] * tap_step;
        for (int32_t j = csr.ccol[col]; j < csr.ccol[col + 1]; ++j, ++to) {
          if constexpr (!std::is_same_v<T, int32_t>) fetch_value(csr.permutation, j, csr.nnz, values);
          const int32_t row = csr.row[j], from = csr.permutation[j];
          const bool in = inside(row, csr.rows) && inside(from, csr.nnz);
          ok &= in;
          for (int64_t i = 0; i < lists; ++i)
            out.offsets[i * csr.nnz + to] = row_place[in ? row : 0] + tap_place[i * taps + tap_of[k]];
          if constexpr (std::is_same_v<T, int32_t>)
            out.values[to] = from;
          else
            out.values[to] = values[in ? from : 0];
        }
      }
    }
    if (!ok) valid = false;
  });
  if (!valid) corrupt("row_indices or permutation");
}

template const float* walked_values(const Walk&, const float*, float*);
template const double* walked_values(const Walk&, const double*, double*);
template void build_transposed_lists(const CsrView&, const float*, int64_t, int64_t, const int64_t*, const int64_t*,
                                     const int32_t*, const int32_t*, int64_t, const TransposedLists<float>&);
template void build_transposed_lists(const CsrView&, const double*, int64_t, int64_t, const int64_t*, const int64_t*,
                                     const int32_t*, const int32_t*, int64_t, const TransposedLists<double>&);
template void build_transposed_lists(const CsrView&, const int32_t*, int64_t, int64_t, const int64_t*, const int64_t*,
                                     const int32_t*, const int32_t*, int64_t, const TransposedLists<int32_t>&);

}  // namespace grasp_sparse
