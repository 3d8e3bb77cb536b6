"""What a result says of the machine."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from grasp_sparse.environment import cpu_model, describe_environment, instruction_limits

CORE = "processor\t: 0\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\nstepping\t: 1\n\n"


@pytest.fixture
def told(monkeypatch):
    """Sets what the kernel tells of the processor."""
    return lambda text: monkeypatch.setattr(Path, "read_text", lambda path, *_, **__: text)


def test_generations_of_one_name_are_told_apart(told):
    told(2 * CORE.format(family=25, model=17))
    older = cpu_model()
    told(2 * CORE.format(family=26, model=2))
    assert older == "AMD EPYC (family 25 model 17)" and cpu_model() == "AMD EPYC (family 26 model 2)"


def test_a_processor_without_a_name_is_its_architecture(told):
    told("processor\t: 0\nBogoMIPS\t: 50.00\nCPU architecture: 8\n")
    assert cpu_model() == platform.machine()


def test_without_that_file(monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert cpu_model() in (platform.processor(), platform.machine())


def test_what_keeps_dense_kernels_from_instructions_is_told(monkeypatch):
    for name in ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "")  # as good as unset
    assert instruction_limits() is None
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert describe_environment()["instruction_limits"] == "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"
