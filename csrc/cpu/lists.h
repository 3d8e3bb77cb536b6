// Weight lists: from CSR indices to (value, offset into the packed image) pairs. Built at every call in time linear in nnz,
// which is also where the indices are checked: a corrupt checkpoint cannot make a kernel read or write out of bounds. A window
// of one tap needs no list of places, its kernels walk the indices themselves (Entries) and check them on the way.
#pragma once

#include "image.h"

namespace grasp_sparse {

// Throws std::runtime_error that names the indices.
[[noreturn]] void corrupt(const char* indices);

// Throws unless the pointers of the walk rise from 0 to nnz.
void check_pointers(const Walk& walk);

// And unless every index lies inside: of a walk that nobody takes.
void check_indices(const Walk& walk);

// Of a list of places, whose channels begin at row_ptr.
inline Entries checked_entries(const int32_t* places, const int32_t* row_ptr) {
  return {places, row_ptr, row_ptr + 1, row_ptr, true, 0, UINT32_MAX, 1, nullptr, nullptr};
}

// How the kernels see blocks of `outputs` channels in all by `inputs` packed channels, channel_size elements apart.
inline Blocks blocks_of(const BlockOrder& block, int64_t outputs, int64_t inputs, int64_t channel_size, const int32_t* index) {
  const int64_t last = inputs ? (inputs - 1) / block.inputs * block.inputs : 0;
  return {static_cast<int>(block.outputs), static_cast<int>(block.inputs), block.output_step, block.input_step, channel_size,
          static_cast<int32_t>(last * channel_size), static_cast<int>(inputs - last), static_cast<int>(outputs), index};
}

// `lists` lists, one after the other: offsets[j] = column_place[col[j]], in the order of the walk, the next one of the columns' places
// that follow. Throws std::runtime_error on an index out of range.
void build_row_lists(const Walk& walk, const int32_t* column_place, int64_t lists, int32_t* offsets);

// The values in the order of the walk: themselves, or gathered into `gathered` [nnz].
template <class T>
const T* walked_values(const Walk& walk, const T* values, T* gathered);

// Throws unless every entry of the permutation is that of a value.
void check_permutation(const Walk& walk);

// The transposed lists: for each group of taps (a stride phase) and each input channel, the entries (value, offset).
// Group q of `groups` has taps tap_of[group_ptr[q] … group_ptr[q + 1]); no tap is in two.
// row_ptr [groups * (channels + 1)] counts from the start of the whole list. offset = row_place[row] + tap_place[tap]; there
// are `lists` lists of offsets, one after the other, the next one of the taps' places that follow.
// Of blocks, a channel is a chunk of channels, and instead of its value (T is int32_t) an entry has the number of its block.
template <class T>
struct TransposedLists {
  T* values;         // [nnz]
  int32_t* offsets;  // [lists * nnz]
  int32_t* row_ptr;
};
template <class T>
void build_transposed_lists(const CsrView& csr, const T* values, int64_t taps, int64_t groups, const int64_t* group_ptr,
                            const int64_t* tap_of, const int32_t* row_place, const int32_t* tap_place, int64_t lists,
                            const TransposedLists<T>& out);

}  // namespace grasp_sparse
