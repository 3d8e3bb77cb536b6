// Mean and variance of the channels of an image, gathered by who computes it: task by task, and added up in the order of tasks, which
// are cut by shapes alone, so that any number of threads gives the same bits.
#pragma once

#include "isa.h"
#include "scratch.h"

namespace grasp_sparse {

class ChannelMoments {
 public:
  explicit ChannelMoments(int64_t channels) : channels_(channels), total_(CallScratch::mine().moments.reserve<double>(3 * channels)) {}

  // Room for the sums of each task.
  void expect(int64_t tasks) { parts_ = CallScratch::mine().sums.reserve<double>(tasks * 3 * channels_); }
  Moments of(int64_t task) const { return at(parts_ + task * 3 * channels_, true); }

  // Takes what a task has summed of so many values of each channel.
  void add(int64_t task, int64_t values) {
    const Moments part = of(task), all = at(total_, count_ == 0);
    for (int64_t c = 0; c < channels_; ++c)
      all.add(c, static_cast<double>(values), part.pivot[c], part.first[c], part.second[c]);
    count_ += values;
  }

  // The mean and the biased variance of a channel.
  double mean(int64_t c) const { return at(total_, false).pivot[c] + offset(c); }
  double var(int64_t c) const {
    const double var = at(total_, false).second[c] / static_cast<double>(count_) - offset(c) * offset(c);
    return var < 0 ? 0 : var;
  }

 private:
  double offset(int64_t c) const { return at(total_, false).first[c] / static_cast<double>(count_); }
  Moments at(double* sums, bool start) const { return {sums, sums + channels_, sums + 2 * channels_, start}; }

  int64_t channels_, count_ = 0;
  double *total_, *parts_ = nullptr;
};

}  // namespace grasp_sparse
