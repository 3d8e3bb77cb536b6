"""csrc/cpu/shared_tasks.h: threads that take each other's tasks do every one of them, and none twice."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc" / "cpu"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
# Tasks of a few nanoseconds, so that threads meet all the time; one in four of them goes slowly and is helped by the others.
PROGRAM = """
#include "shared_tasks.h"

#include <cstdio>
#include <thread>

using grasp_sparse::SharedTasks;

template <bool Backwards>
bool each_once(int64_t count, int64_t threads, int64_t together) {
  SharedTasks tasks(count, threads, together);
  std::vector<std::atomic<int>> taken(count);
  std::vector<std::thread> workers;
  for (int64_t t = 0; t < threads; ++t)
    workers.emplace_back([&, t] {
      for (int64_t task; (task = tasks.take<Backwards>(t)) >= 0;) {
        taken[task].fetch_add(1, std::memory_order_relaxed);
        if (t % 4 == 3) std::this_thread::yield();
      }
    });
  for (std::thread& worker : workers) worker.join();
  for (const std::atomic<int>& times : taken)
    if (times != 1) return false;
  return true;
}

template <bool Backwards>
bool in_order(int64_t count) {
  SharedTasks tasks(count, 1);
  for (int64_t i = 0; i < count; ++i)
    if (tasks.take<Backwards>(0) != (Backwards ? count - 1 - i : i)) return false;
  return tasks.take<Backwards>(0) == -1;
}

// A thread begins with the first of tasks that are together, and goes on with the next of them.
bool begin_together(int64_t count, int64_t threads, int64_t together) {
  SharedTasks tasks(count, threads, together);
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t first = tasks.take<false>(t);
    if (first % together != 0 || tasks.take<false>(t) != first + 1) return false;
  }
  return true;
}

int main() {
  for (int64_t together : {1, 3})
    for (int64_t sets : {0, 1, 5, 300000})
      for (int64_t threads : {1, 2, 8})
        if (!each_once<false>(sets * together, threads, together) || !each_once<true>(sets * together, threads, together)) {
          std::printf("%d x %d tasks, %d threads\\n", static_cast<int>(sets), static_cast<int>(together), static_cast<int>(threads));
          return 1;
        }
  if (!in_order<false>(9) || !in_order<true>(9)) return 2;
  if (!begin_together(6, 2, 2) || !begin_together(10, 3, 2)) return 3;
}
"""


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_every_task_is_taken_once(tmp_path):
    (tmp_path / "tasks.cpp").write_text(PROGRAM)
    program = tmp_path / "tasks"
    command = [COMPILER, "-std=c++17", "-O2", "-Wall", "-Werror", "-pthread", f"-I{CSRC}", str(tmp_path / "tasks.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout
