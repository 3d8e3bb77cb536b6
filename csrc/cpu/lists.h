// Weight lists: from CSR indices to (value, offset into the packed image) pairs. Built at every call in time linear in nnz
// (a call spends hundreds of times that in the kernels), which is also where every index is checked: a corrupt checkpoint
// cannot make a kernel read or write out of bounds.
#pragma once

#include "image.h"

namespace grasp_sparse {

// offsets[j] = column_place[col[j]], in the order of the walk. Throws std::runtime_error on an index out of range.
void build_row_list(const Walk& walk, const int32_t* column_place, int32_t* offsets);

// The values in the order of the walk: themselves, or gathered into `gathered` [nnz].
template <class T>
const T* walked_values(const Walk& walk, const T* values, T* gathered);

// Whether the columns of every row rise: only then do blocks of columns lie together in it.
bool columns_rise(const Walk& walk);

// cuts[b][row], b in [0, blocks]: the first entry of the row whose column is b * block or more. Columns rise.
void build_cuts(const Walk& walk, int64_t block, int64_t blocks, int32_t* cuts);

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
