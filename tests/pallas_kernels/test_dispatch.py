"""Backends refuse with a reason, every reason is kept, and outsiders may join."""

import pytest

from kvjax.pallas_kernels import OPERATIONS, Operation


def refuses(*args):
    raise NotImplementedError(f"needs four arguments, got {len(args)}")


def adds(*args):
    return sum(args)


@pytest.fixture
def operation():
    made = Operation(
        "test.add",
        {"*": ("picky", "plain")},
        {"picky": refuses, "plain": adds, "oracle": adds},
        {"oracle": "slow"},
    )
    yield made
    del OPERATIONS["test.add"]


def test_a_refusal_passes_the_work_on(operation):
    assert operation(1, 2) == 3


def test_every_reason_is_kept_when_all_refuse(operation):
    operation.implementations["plain"] = refuses
    with pytest.raises(ExceptionGroup, match=r"test\.add") as refusal:
        operation(1, 2)
    assert [str(e) for e in refusal.value.exceptions] == ["needs four arguments, got 2"] * 2


def test_a_backend_asked_for_by_name_runs_or_raises(operation):
    assert operation(1, 2, backend="oracle") == 3
    with pytest.raises(NotImplementedError, match="four arguments"):
        operation(1, 2, backend="picky")
    with pytest.raises(ValueError, match=r"no backend 'fast'.*picky"):
        operation(1, 2, backend="fast")


def test_for_a_time_calls_can_be_held_to_one_backend_and_its_refusal(operation):
    with operation.only("picky"), pytest.raises(NotImplementedError, match="four arguments"):
        operation(1, 2)
    assert operation(1, 2) == 3


def test_an_error_inside_a_backend_is_not_taken_for_a_refusal(operation):
    def broken(*args):
        raise ValueError("wrong shape")

    operation.implementations["picky"] = broken
    with pytest.raises(ValueError, match="wrong shape"):
        operation(1, 2)


def test_an_outside_backend_goes_first_on_its_platforms_only(operation):
    operation.register("mine", lambda *args: 42, platforms=("cpu",))
    assert operation(1, 2) == 42
    assert operation.order("cpu") == ("mine", "picky", "plain")
    assert operation.order("tpu") == ("picky", "plain")
    operation.register("hidden", adds)
    assert "hidden" not in operation.order("cpu")


def test_explain_names_the_choice_and_why_not_the_others(operation):
    assert operation.explain("cpu") == {
        "picky": "chosen",
        "plain": "after picky",
        "oracle": "slow",
    }


def test_every_operation_has_a_specification_and_runs_on_every_platform():
    for name in (
        "paged_attention", "merge_states", "attention_mass", "reposition", "page_ops.write_slots",
        "page_ops.gather_slots", "page_ops.copy_pages", "page_ops.export_span",
        "page_ops.import_span",
    ):  # fmt: skip
        operation = OPERATIONS[name]
        assert "reference" in operation.implementations
        for platform in ("cpu", "tpu", "cuda"):
            assert operation.order(platform)[-1] == "xla"
