#include "lists.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "parallel.h"

// AddressSanitizer does not see stores past the cache.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#include <emmintrin.h>
#define GRASP_SPARSE_WRITES_PAST_CACHE
#endif

namespace grasp_sparse {

namespace {

constexpr int64_t kGrain = 16384;  // entries a thread should have before a second one pays

// A non-decreasing pointer array from 0 to nnz.
bool valid_pointers(const int32_t* ptr, int64_t count, int64_t nnz) {
  bool valid = ptr[0] == 0 && ptr[count] == nnz;
  for (int64_t i = 0; i < count; ++i) valid &= ptr[i] <= ptr[i + 1];
  return valid;
}

// std::bit_cast, which C++17 does not have, as which older versions of torch build extensions.
template <class To, class From>
inline To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Writes one entry of a list, of 4 or 8 bytes; with Past, past the cache (of x86), whose lines are to be filled in order.
//
// Lists that threads write together lie where they lay at the call before, and all threads have read them since: in the cache a line can
// be written when the others have given it up, and of cores that share no cache each line waits for that on its own (two dies of a Zen 4,
// 1024 -> 1024, batch 512, 95 %: the whole backward took 1.5 ms, and takes 1.1; on one die 1.0 either way).
template <bool Past, class T>
inline void write_entry(T* to, T value) {
#if defined(GRASP_SPARSE_WRITES_PAST_CACHE)
  if constexpr (Past && sizeof(T) == 4) return _mm_stream_si32(reinterpret_cast<int*>(to), bits_of<int>(value));
  if constexpr (Past && sizeof(T) == 8) return _mm_stream_si64(reinterpret_cast<long long*>(to), bits_of<long long>(value));
#endif
  *to = value;
}

// Calls write for a list or a part of one: with std::true_type, past the cache, a part, for others write the rest at the same time.
template <class Write>
bool write_part(bool all, const Write& write) {
  if (all) return write(std::false_type());
  const bool ok = write(std::true_type());
#if defined(GRASP_SPARSE_WRITES_PAST_CACHE)
  _mm_sfence();
#endif
  return ok;
}

inline bool inside(int32_t index, int64_t size) { return static_cast<uint32_t>(index) < static_cast<uint64_t>(size); }

// `to` = values in the order of entries [begin, end) of `permutation` [nnz]; of blocks (T is int32_t) their numbers. Each is of another
// row, which no processor foresees: so they are fetched ahead. False where one is outside.
template <bool Past, class T>
bool gather(const int32_t* __restrict permutation, int64_t begin, int64_t end, int64_t nnz, const T* __restrict values, T* __restrict to) {
  constexpr int64_t kAhead = 128;
  bool ok = true;
  for (int64_t j = begin; j < end; ++j) {
    const int32_t from = permutation[j];
    const bool in = inside(from, nnz);
    ok &= in;
    if constexpr (std::is_same_v<T, int32_t>) {
      write_entry<Past>(to + (j - begin), from);
    } else {
      const int32_t soon = j + kAhead < nnz ? permutation[j + kAhead] : 0;
      __builtin_prefetch(values + (inside(soon, nnz) ? soon : 0));
      write_entry<Past>(to + (j - begin), values[in ? from : 0]);
    }
  }
  return ok;
}

// `to` = where `count` entries of these rows, or columns, lie, of one tap. False where one is outside.
template <bool Past>
bool add_places(const int32_t* __restrict rows, int64_t count, int64_t all_rows, const int32_t* __restrict row_place, int32_t tap_place,
                int32_t* __restrict to) {
  bool ok = true;
  for (int64_t j = 0; j < count; ++j) {
    const bool in = inside(rows[j], all_rows);
    ok &= in;
    write_entry<Past>(to + j, row_place[in ? rows[j] : 0] + tap_place);
  }
  return ok;
}

bool all_inside(const int32_t* index, int64_t count, int64_t size) {
  std::atomic<bool> valid{true};
  parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    bool ok = true;
    for (int64_t j = begin; j < end; ++j) ok &= inside(index[j], size);
    if (!ok) valid = false;
  });
  return valid;
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
  if (!all_inside(walk.col, walk.nnz, walk.cols)) corrupt("col_indices or row_indices");
}

void build_row_lists(const Walk& walk, const int32_t* column_place, int64_t lists, int32_t* offsets) {
  check_pointers(walk);
  std::atomic<bool> valid{true};
  parallel_for(0, walk.nnz, kGrain, [&](int64_t begin, int64_t end) {
    const auto write = [&]<class Past>(Past) {
      bool ok = true;
      for (int64_t i = 0; i < lists; ++i)
        ok &= add_places<Past::value>(walk.col + begin, end - begin, walk.cols, column_place + i * walk.cols, 0,
                                      offsets + i * walk.nnz + begin);
      return ok;
    };
    if (!write_part(end - begin == walk.nnz, write)) valid = false;
  });
  if (!valid) corrupt("col_indices or row_indices");
}

template <class T>
const T* walked_values(const Walk& walk, const T* values, T* gathered) {
  if (!walk.permutation) return values;
  std::atomic<bool> valid{true};
  parallel_for(0, walk.nnz, kGrain, [&](int64_t begin, int64_t end) {
    const auto write = [&]<class Past>(Past) {
      return gather<Past::value>(walk.permutation, begin, end, walk.nnz, values, gathered + begin);
    };
    if (!write_part(end - begin == walk.nnz, write)) valid = false;
  });
  if (!valid) corrupt("permutation");
  return gathered;
}

void check_permutation(const Walk& walk) {
  if (!all_inside(walk.permutation, walk.nnz, walk.nnz)) corrupt("permutation");
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
  // With all taps in one group, single weights stay in the order of the columns, which one sweep reads much faster than many short ones.
  const bool in_order = group_ptr[groups] - group_ptr[groups - 1] == taps && (!csr.has_blocks || taps == 1);
  std::atomic<bool> valid{true};
  const int64_t grain = csr.nnz ? std::max<int64_t>(1, kGrain * channels / csr.nnz) : channels + 1;
  parallel_for(0, channels, grain, [&](int64_t begin, int64_t end) {
    const auto write = [&]<class Past>(Past) {
      bool ok = true;
      const auto gathered = [&](int32_t first, int32_t last, int32_t to) {
        ok &= gather<Past::value>(csr.permutation, first, last, csr.nnz, values, out.values + to);
      };
      const auto each_piece = [&](const auto& piece) {
        for (int64_t q = 0; q < groups; ++q) {
          int32_t to = out.row_ptr[q * (channels + 1) + begin];
          for (int64_t channel = begin; channel < end; ++channel) {
            for (int64_t k = group_ptr[q]; k < group_ptr[q + 1]; ++k) {
              const int64_t col = channel * channel_step + tap_of[k] * tap_step;
              const int32_t first = csr.ccol[col], last = csr.ccol[col + 1];
              piece(first, last, tap_of[k], to);
              to += last - first;
            }
          }
        }
      };
      if (in_order)
        gathered(csr.ccol[begin * taps], csr.ccol[end * taps], csr.ccol[begin * taps]);
      else
        each_piece([&](int32_t first, int32_t last, int64_t, int32_t to) { gathered(first, last, to); });
      for (int64_t i = 0; i < lists; ++i) {
        const auto places = [&](int32_t first, int32_t last, int64_t tap, int32_t to) {
          ok &= add_places<Past::value>(csr.row + first, last - first, csr.rows, row_place, tap_place[i * taps + tap],
                                        out.offsets + i * csr.nnz + to);
        };
        if (in_order && taps == 1)
          places(csr.ccol[begin], csr.ccol[end], 0, csr.ccol[begin]);
        else
          each_piece(places);
      }
      return ok;
    };
    if (!write_part(end - begin == channels, write)) valid = false;
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
