"""Hooks in Megatron's training loop; `tests/run/test_step_log.py` and `tests/distributed` have real runs with them."""

import pytest

from neo_megatron.megatron_compat import cpu_platform, hooks


@pytest.fixture
def training(megatron):
    cpu_platform.install_training()
    from megatron.training import training

    return training


def stand_in(monkeypatch, training, name: str, calls: list) -> None:
    """Replaces a function of Megatron by one that notes how it was called, until the test ends."""
    monkeypatch.setattr(training, name, lambda *given, **named: calls.append((name, *given, named)) or "result")


def test_loading_ends_and_saving_begins_with_a_hook(training, monkeypatch):
    calls = []
    for name in ("load_checkpoint", "save_checkpoint"):
        stand_in(monkeypatch, training, name, calls)
    hooks.call_after_loading(lambda *given: calls.append(("loaded", *given)))
    hooks.call_before_saving(lambda *given: calls.append(("saving", *given)))
    assert training.load_checkpoint(["model"], "optimizer", "scheduler", strict=False) == "result"
    assert training.save_checkpoint(3, ["model"], "optimizer", "scheduler", 7, non_persistent_ckpt=True) == "result"
    assert calls == [
        ("load_checkpoint", ["model"], "optimizer", "scheduler", {"strict": False}),
        ("loaded", ["model"], "optimizer", "scheduler"),
        ("saving", "optimizer"),
        ("save_checkpoint", 3, ["model"], "optimizer", "scheduler", 7, {"non_persistent_ckpt": True}),
    ]


def test_a_hook_decides_how_often_a_split_is_evaluated(training, monkeypatch):
    calls = []
    stand_in(monkeypatch, training, "evaluate_and_print_results", calls)
    hooks.call_around_evaluation(lambda evaluate, iterator: [evaluate() for _ in iterator])
    for iterator in ([], ["one", "two"]):
        training.evaluate_and_print_results("prefix", "step", iterator, ["model"], 5, verbose=True)
    evaluated = ("evaluate_and_print_results", "prefix", "step", ["one", "two"], ["model"], 5, {"verbose": True})
    assert calls == [evaluated] * 2


def test_a_rerun_state_machine_is_turned_off(megatron):
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    machine, looked_at = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS), []
    own = machine.validate_result
    assert hooks.turn_off_rerun_state_machine(machine, looked_at.append) == own
    machine.validate_result("norm")
    assert looked_at == ["norm"] and machine.get_mode() is RerunMode.DISABLED
    assert not machine.validate_state_dict({"mode": RerunMode.VALIDATE_RESULTS})


@pytest.mark.parametrize("stages", [1, 2])
def test_a_skipped_step_reads_its_micro_batches(training, monkeypatch, stages):
    from megatron.core import num_microbatches_calculator, rerun_state_machine

    class Once:
        runs = 1

        def should_run_forward_backward(self, data_iterator):
            self.runs -= 1
            return self.runs == 0

    machine = Once()
    monkeypatch.setattr(rerun_state_machine, "get_rerun_state_machine", lambda: machine)
    monkeypatch.setattr(num_microbatches_calculator, "get_num_microbatches", lambda: 3)
    monkeypatch.setattr(training, "dummy_train_step", None)
    hooks.read_skipped_steps()
    iterators = [iter(range(5)) for _ in range(stages)]
    training.dummy_train_step(iterators[0] if stages == 1 else iterators)
    assert [next(iterator) for iterator in iterators] == [3] * stages


def test_a_patch_notices_that_megatron_has_changed(megatron):
    from megatron.core import optimizer

    hooks.require_lines(optimizer, ("    USING_PYTORCH_OPTIMIZER = False\n",))
    with pytest.raises(RuntimeError, match="megatron.core.optimizer has changed: it lacks 'such a line'.*pip install"):
        hooks.require_lines(optimizer, ("such a line\n",))
