// Weight lists: from CSR indices to (value, offset into the packed image) pairs. Built at every call in time linear in nnz
// (a call spends hundreds of times that in the kernels), which is also where every index is checked: a corrupt checkpoint
// cannot make a kernel read or write out of bounds.
#pragma once

#include "image.h"

namespace grasp_sparse {

// offsets[j] = column_place[col[j]], in CSR order. Throws std::runtime_error on an index out of range.
void build_row_list(const CsrView& csr, const int32_t* column_place, int32_t* offsets);

// The transposed lists: for each group of taps (a stride phase) and each input channel, the entries (value, offset).
// Group q of `groups` has taps tap_of[group_ptr[q] … group_ptr[q + 1]); no tap is in two.
// row_ptr [groups * (channels + 1)] counts from the start of the whole list. offset = row_place[row] + tap_place[tap].
template <class T>
struct TransposedLists {
  T* values;         // [nnz]
  int32_t* offsets;  // [nnz]
  int32_t* row_ptr;
};
template <class T>
void build_transposed_lists(const CsrView& csr, const T* values, int64_t taps, int64_t groups, const int64_t* group_ptr,
                            const int64_t* tap_of, const int32_t* row_place, const int32_t* tap_place,
                            const TransposedLists<T>& lists);

}  // namespace grasp_sparse
