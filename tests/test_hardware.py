"""The device: what it lacks, its random state, and what is asked of torch."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import refused

from lwm.runtime import hardware
from lwm.runtime.settings import read_settings

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def prepared(*flags: str) -> object:
    return hardware.prepare(read_settings("train_teacher_model", list(flags)))


def test_what_the_device_lacks_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "An old GPU")
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    assert "cuda:9" in refused(prepared, "--device", "cuda:9")
    assert "An old GPU has no bf16" in refused(prepared, "--device", "cuda:0", "--precision", "bf16")


def test_the_random_state_of_a_device_is_put_back(monkeypatch):
    now = torch.arange(16)  # of the device, as torch gives and takes it
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: now.clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: now.copy_(state))
    saved = hardware.random_state(CUDA)
    now += 1
    for state in (saved, None, torch.zeros(44)):  # the last two of a CPU and of MPS: left aside
        hardware.set_random_state(CUDA, state)
        assert torch.equal(now, saved)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.zeros(2) + torch.zeros(3))
    assert "damaged" in refused(hardware.set_random_state, CUDA, saved)
    assert hardware.random_state(CPU) is None


def test_deterministic_is_asked_of_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    for flags in ([], ["--deterministic"]):
        prepared("--device", "cpu", *flags)
        assert asked == [True] * len(flags)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("fastest", ["amx_bf16", ""])
def test_it_is_known_by_which_instruction_a_processor_multiplies_bf16(monkeypatch, fastest):
    capabilities = {"avx512_f": True, "avx512_bf16": bool(fastest), fastest: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert hardware.bf16_instruction() == fastest
    assert hardware.has_bf16(CPU) == bool(fastest)
