"""The device: its random state, which a run saves and goes on from, and what is said of it."""

import pytest
import torch

from lwm.runtime import hardware
from lwm.runtime.errors import InputError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def generator(monkeypatch):
    """A CUDA device's random state, as torch gives and takes it."""
    kept = {"state": torch.arange(16, dtype=torch.uint8)}

    def put(state, device):
        if state[0] == 255:
            raise RuntimeError("RNG state is wrong")
        kept["state"] = state.clone()

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: kept["state"].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", put)
    return kept


def test_the_random_state_of_a_device_is_put_back(generator):
    saved = hardware.random_state(CUDA)
    generator["state"] += 1
    hardware.set_random_state(CUDA, saved)
    assert torch.equal(generator["state"], torch.arange(16, dtype=torch.uint8))


def test_a_state_of_another_kind_of_device_is_left_aside(generator):
    before = generator["state"].clone()
    for state in (None, torch.zeros(44, dtype=torch.uint8)):  # of a CPU, and of MPS
        hardware.set_random_state(CUDA, state)
        assert torch.equal(generator["state"], before)
    assert hardware.random_state(CPU) is None
    hardware.set_random_state(CPU, before)


def test_a_damaged_state_is_said(generator):
    with pytest.raises(InputError, match="random state of the device is damaged"):
        hardware.set_random_state(CUDA, torch.full((16,), 255, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("capabilities", "said"),
    [
        ({"avx512_bf16": True, "amx_bf16": True, "avx512_f": True}, "Some CPU with amx_bf16, 3 thread(s) a run"),
        ({"avx512_bf16": True, "amx_bf16": False}, "Some CPU with avx512_bf16, 3 thread(s) a run"),
        ({"avx512_f": True}, "Some CPU, 3 thread(s) a run"),
    ],
)
def test_it_is_said_by_which_instructions_a_processor_multiplies_bf16(monkeypatch, capabilities, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "processor", lambda: "Some CPU")
    assert hardware.machine(3)["hardware"] == said
    assert hardware.has_bf16(CPU) == ("with" in said)
