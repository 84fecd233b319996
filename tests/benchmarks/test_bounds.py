import dataclasses
import json
from types import SimpleNamespace

import pytest

from kvjax.benchmarks import bounds, ceilings, kernels
from kvjax.benchmarks.bounds import Sequence, Work

WORK = Work(matrices=1000, head=100, weight_bytes=2200, attention_width=8, kv_bytes=64,
            windows={0: 2})  # fmt: skip
CEILINGS = {"copy": 1000.0, "matmul": 10_000.0}


def test_the_work_of_a_hand_computed_example():
    one = Sequence(prompt=3, known=0, output=2)
    # 3 prompt tokens and the first of 2 outputs run; they see 1 + 2 + 3 + 4 keys in 2 layers
    assert WORK.flops([one]) == 2 * 1000 * 4 + 2 * 100 * 2 + 4 * 8 * 10 * 2
    assert WORK.bytes([one], steps=2) == 2 * 2200 + 64 * 4  # one decoded token, 4 keys


def test_what_is_known_is_not_work_and_completions_share_their_prompt():
    whole, half = Sequence(10, 0, 1), Sequence(10, 5, 1)
    assert (
        WORK.flops([whole]) - WORK.flops([half]) == 2 * 1000 * 5 + 4 * 8 * (1 + 2 + 3 + 4 + 5) * 2
    )
    one, four = Sequence(10, 0, 3), Sequence(10, 0, 3, completions=4)
    decoded = 2 * 1000 * 2 + 2 * 100 * 3 + 4 * 8 * (11 + 12) * 2
    assert WORK.flops([four]) - WORK.flops([one]) == 3 * decoded


def test_a_window_bounds_the_keys_that_are_seen():
    sliding = dataclasses.replace(WORK, windows={4: 1, 0: 1})
    keys = (1 + 2 + 3 + 4 + 4 + 4) + (1 + 2 + 3 + 4 + 5 + 6)
    assert sliding.flops([Sequence(6, 0, 1)]) == 2 * 1000 * 6 + 2 * 100 + 4 * 8 * keys


def test_shares_are_of_the_ceilings_and_half_of_them_in_twice_the_time():
    found = bounds.shares(WORK, CEILINGS, [Sequence(3, 0, 2)], 1.0, 2)
    slow = bounds.shares(WORK, CEILINGS, [Sequence(3, 0, 2)], 2.0, 2)
    assert found["share_of_compute"] == pytest.approx((8000 + 400 + 640) / 10_000)
    assert found["share_of_bandwidth"] == pytest.approx((4400 + 256) / 1000)
    assert slow == pytest.approx({name: (share or 0) / 2 for name, share in found.items()})
    unknown = bounds.shares(WORK, CEILINGS, [], 1.0, None)
    assert unknown["share_of_bandwidth"] is None


def test_work_goes_through_json():
    assert Work.from_json(json.loads(json.dumps(dataclasses.asdict(WORK)))) == WORK


def test_ceilings_that_cannot_be_measured_are_said_and_none(capsys):
    assert bounds.ceilings("no such dtype") is None
    assert "ceilings were not measured" in capsys.readouterr().err


def test_the_product_s_ceiling_is_the_best_of_what_multiplies_here(monkeypatch):
    seconds = iter((0.5, 4.0, 1.0, 16.0))
    monkeypatch.setattr(ceilings, "Timer", lambda subject: Once(next(seconds)))
    sizes = SimpleNamespace(copy_bytes=64, matmul=64)
    found = ceilings.of(sizes, "bfloat16", 1)
    assert found["copy"] == 2 * 64 / 0.5
    assert found["matmul"] == 2 * 64**3 / 1.0  # XLA's in bfloat16; ours had 512 rows in 16 s


class Once:
    """A timer that knows the time."""

    def __init__(self, seconds):
        self.seconds = seconds

    def warm_up(self):
        pass

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_subjects_of_the_ceilings_run(dtype, monkeypatch):
    monkeypatch.setattr(kernels.Timer, "least", 1e-4)
    found = ceilings.of(SimpleNamespace(copy_bytes=2**12, matmul=64), dtype, 1)
    assert found["copy"] > 0
    assert found["matmul"] > 0
