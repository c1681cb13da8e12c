"""What a process says when it is told to stop while it ends by an error of its own."""

import gc
import signal

import pytest
import torch.distributed as dist

from flextron.ranks.ending import Ending


def test_a_signal_to_stop_after_the_error_is_not_told(monkeypatch, capfd):
    kept = []
    monkeypatch.setattr(
        Ending, "_watch", lambda self, signals: kept.append(signals)
    )  # it would end this process
    handler, waker = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    ending = Ending("train", 0, 2, dist.HashStore(), "again")
    ending.settling = True
    try:
        with pytest.raises(ValueError, match="its own"), ending.heeded():
            raise ValueError("its own")
        gc.collect()
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGTERM, handler)
    assert capfd.readouterr().err == ""
