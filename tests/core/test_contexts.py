"""What is the user's comes back as it was."""

from __future__ import annotations

import signal
import warnings

import pytest
import torch
from torch import nn

from cptv_ao.core.contexts import check_device, eval_mode, plain_torch, stop_on_interrupt


def test_every_module_gets_its_own_training_flag_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()

    def failing() -> None:
        with eval_mode(model, None):
            assert not any(module.training for module in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert [module.training for module in model.modules()] == [True, True, False]


def test_nothing_that_is_on_around_reaches_inside() -> None:
    filters = list(warnings.filters)
    with torch.inference_mode(), torch.autocast("cpu"), plain_torch():
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.ones(1).is_inference()
    assert list(warnings.filters) == filters


def test_the_first_interrupt_asks_and_the_second_raises(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []
    around = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background has none
    before = signal.getsignal(signal.SIGINT)

    def pressed_twice() -> None:
        with stop_on_interrupt(lambda: asked.append(1)):
            signal.raise_signal(signal.SIGINT)
            assert asked == [1]
            assert "Ctrl-C again gives up" in capsys.readouterr().err
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            pressed_twice()
        assert asked == [1]
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, around)


def test_a_handler_of_the_users_own_stays() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_interrupt(lambda: pytest.fail("it is the user's")):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("device", ["meta", "nowhere", "cuda:99"])
def test_a_device_that_cannot_compute_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="expected a device that this process can compute on"):
        check_device(device)
    check_device("cpu")
