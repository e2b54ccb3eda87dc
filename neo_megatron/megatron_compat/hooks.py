"""Hooks in Megatron's training loop, on any machine: log, evaluation, loading, saving and skipped steps are NEO's.

Every patch looks for the lines of Megatron that it relies on, so that another version ends with one sentence.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial, wraps
from typing import Any, Protocol

MEGATRON_VERSION = "0.19.2"

# Lines of megatron/training/training.py that call the replaced functions, or print the lines that are edited.
_TRAINING = (
    "            consume_seqlen_stats_in_iteration()\n",
    "num_floating_point_operations_in_batch = num_floating_point_operations(\n",
    "        throughput = num_floating_point_operations(\n",
    "elapsed_time = timers('interval-time').elapsed(barrier=True, reset=should_reset)",
    "avg = total_loss_dict[key].item() / float(\n                    max(1, total_loss_dict[advanced_iters_key])",
    "    should_reset = not is_first_iteration\n",
    "        report_memory_flag = training_log(\n            loss_dict,\n            total_loss_dict,\n"
    "            learning_rate,\n            iteration,\n            loss_scale,\n            report_memory_flag,\n"
    "            skipped_iter,\n",
    "            is_first_iteration=is_first_iteration,\n",
    "log_string += ' consumed samples: {:12d} |'",
    "log_string += ' skipped samples: {:12d} |'",
    "log_string += f' global batch size: {batch_size:5d} |'",
    "        print_rank_last(log_string)\n",
    "print_rank_0(f'Evaluating on {eval_iters * eval_batch_size} samples')",
    "prefix = f'iteration {iteration} on validation set'",
    "prefix = f'iteration {iteration} on test set'",
    "string = f' validation{suffix} loss at {prefix} | '",
)


class StepLog(Protocol):
    """The object that Megatron's training loop logs through; see `run.step_log`."""

    def training_log(
        self, log: Callable, losses: Any, total_losses: Any, iteration: int, skipped: int, first: bool
    ) -> Any: ...

    def evaluate(self, evaluate: Callable[[], None], prefix: str, iteration: int) -> None: ...

    def end_step(self, *arguments: Any, **keywords: Any) -> Any: ...

    def operations(self, *arguments: Any, **keywords: Any) -> Any: ...

    def line(self, text: str) -> str: ...


_STEP = (
    "            ) = train_step(\n",
    "            seq_length=args.seq_length,\n            micro_batch_size=args.micro_batch_size,\n"
    "            decoder_seq_length=args.decoder_seq_length,\n            forward_only=False,\n",
)


@cache
def train_steps_in(context: Callable[[], AbstractContextManager]) -> None:
    """Makes Megatron enter a context around each training step; inside, it reads `args.seq_length`."""
    from megatron.training import training

    require_lines(training, _STEP)
    step = training.train_step

    @wraps(step)
    def train_step(*arguments, **keywords):
        with context():
            return step(*arguments, **keywords)

    training.train_step = train_step


_OPTIMIZER = (
    "        config, config_overrides = get_megatron_optimizer_config(args)\n",
    "            config_overrides=config_overrides,\n",
    "        opt_param_scheduler = get_optimizer_param_scheduler(optimizer)\n",
)


@cache
def group_parameters_by(
    overrides: Callable[[Any, Any], dict[Any, dict[str, Any]]], take: Callable[[Any, Any], None]
) -> None:
    """Makes Megatron build its optimizer with further parameter groups.

    Args:
        overrides: from the arguments and Megatron's configuration of the optimizer, what groups of parameters have.
        take: is given the optimizer and the scheduler once both are built.
    """
    from megatron.training import training

    require_lines(training, _OPTIMIZER)
    configure, schedule = training.get_megatron_optimizer_config, training.get_optimizer_param_scheduler

    @wraps(configure)
    def get_megatron_optimizer_config(args):
        config, megatrons = configure(args)
        return config, {**megatrons, **overrides(args, config)}

    @wraps(schedule)
    def get_optimizer_param_scheduler(optimizer):
        scheduler = schedule(optimizer)
        take(optimizer, scheduler)
        return scheduler

    training.get_megatron_optimizer_config = get_megatron_optimizer_config
    training.get_optimizer_param_scheduler = get_optimizer_param_scheduler


@cache
def log_with(step_log: StepLog) -> None:
    """Makes Megatron's training loop log through ``step_log``; see there for the reasons."""
    from megatron.training import training

    require_lines(training, _TRAINING)
    log, evaluate = training.training_log, training.evaluate_and_print_results
    print_last, print_first = training.print_rank_last, training.print_rank_0

    @wraps(log)
    def training_log(
        loss_dict,
        total_loss_dict,
        learning_rate,
        iteration,
        loss_scale,
        report_memory_flag,
        skipped_iter,
        *rest,
        **more,
    ):
        first = more.pop("is_first_iteration")

        def megatrons(losses, first):
            return log(
                *(losses, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter),
                *rest,
                is_first_iteration=first,
                **more,
            )

        return step_log.training_log(megatrons, loss_dict, total_loss_dict, iteration, skipped_iter, first)

    @wraps(evaluate)
    def evaluate_and_print_results(prefix, forward_step_func, data_iterator, model, iteration, *rest, **more):
        def megatrons():
            evaluate(prefix, forward_step_func, data_iterator, model, iteration, *rest, **more)

        step_log.evaluate(megatrons, prefix, iteration)

    training.consume_seqlen_stats_in_iteration = step_log.end_step
    training.num_floating_point_operations = step_log.operations
    training.training_log = training_log
    training.evaluate_and_print_results = evaluate_and_print_results
    training.print_rank_last = _rewritten(print_last, step_log.line)
    training.print_rank_0 = _rewritten(print_first, step_log.line)


def use_writers(tensorboard: Any, wandb: Any) -> None:
    """Makes Megatron log scalars through these writers from now on."""
    from megatron.training import global_vars

    require_lines(global_vars, ("_GLOBAL_TENSORBOARD_WRITER = SummaryWriter(", "_GLOBAL_WANDB_WRITER = wandb\n"))
    global_vars._GLOBAL_TENSORBOARD_WRITER = tensorboard
    global_vars._GLOBAL_WANDB_WRITER = wandb


# Calls of the functions that are replaced, with the arguments that a hook is given.
_LOADING = (" = load_checkpoint(\n            model,\n            optimizer,\n            opt_param_scheduler,\n",)
_SAVING = (
    "    save_checkpoint(\n        iteration,\n        model,\n        optimizer,\n",
    "        save_checkpoint(\n            args.iteration,\n            model,\n            optimizer,\n",
)
_EVALUATION = (
    "            evaluate_and_print_results(\n                prefix, forward_step_func,\n"
    "                valid_data_iterator, model,\n",
    "        evaluate_and_print_results(\n            prefix,\n            forward_step_func,\n"
    "            test_data_iterator,\n",
    "                evaluate_and_print_results(prefix, forward_step_func,\n"
    "                                       valid_data_iterator, model,\n",
)
_RERUNS = (
    "            if self.mode == RerunMode.DISABLED:\n",
    "    def validate_result(\n        self,\n",
    "    def validate_state_dict(self, state_dict",
)


@cache
def call_after_loading(hook: Callable[[Any, Any, Any], None]) -> None:
    """Makes Megatron call ``hook(model, optimizer, scheduler)`` whenever it has loaded a checkpoint.

    Megatron has no hook of its own after loading that knows the optimizer.
    """
    from megatron.training import training

    require_lines(training, _LOADING)
    load = training.load_checkpoint

    @wraps(load)
    def load_checkpoint(model, optimizer, scheduler, *arguments, **keywords):
        loaded = load(model, optimizer, scheduler, *arguments, **keywords)
        hook(model, optimizer, scheduler)
        return loaded

    training.load_checkpoint = load_checkpoint


@cache
def call_before_saving(hook: Callable[[Any], None]) -> None:
    """Makes Megatron call ``hook(optimizer)`` before it saves a checkpoint."""
    from megatron.training import training

    require_lines(training, _SAVING)
    save = training.save_checkpoint

    @wraps(save)
    def save_checkpoint(iteration, model, optimizer, *arguments, **keywords):
        hook(optimizer)
        return save(iteration, model, optimizer, *arguments, **keywords)

    training.save_checkpoint = save_checkpoint


@cache
def call_around_evaluation(hook: Callable[[Callable[[], None], Any], None]) -> None:
    """Makes Megatron evaluate a split by ``hook(evaluate, data_iterator)``.

    Megatron also evaluates splits without data, and all splits with one number of iterations.
    """
    from megatron.training import training

    require_lines(training, _EVALUATION)
    evaluate = training.evaluate_and_print_results

    @wraps(evaluate)
    def evaluate_and_print_results(prefix, forward_step_func, data_iterator, *arguments, **keywords):
        hook(partial(evaluate, prefix, forward_step_func, data_iterator, *arguments, **keywords), data_iterator)

    training.evaluate_and_print_results = evaluate_and_print_results


def turn_off_rerun_state_machine(machine: Any, validate_result: Callable[..., None]) -> Callable[..., None]:
    """Turns Megatron's rerun state machine off and makes a hook validate; returns its own method."""
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    require_lines(RerunStateMachine, _RERUNS)
    original = machine.validate_result
    machine.mode = RerunMode.DISABLED
    machine.validate_result = validate_result
    machine.validate_state_dict = lambda state: False  # there is no state to load
    return original


def read_skipped_steps() -> None:
    """Makes Megatron skip a step of `--iterations-to-skip` by reading its micro-batches.

    Megatron broadcasts the tensors of a GPT between tensor-parallel ranks, and knows one data iterator.
    """
    from megatron.training import training

    require_lines(training, ("            dummy_train_step(train_data_iterator)\n",))
    training.dummy_train_step = _skip_step


def _skip_step(data_iterator: Any) -> None:
    """Reads the micro-batches of every virtual pipeline stage."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    while get_rerun_state_machine().should_run_forward_backward(data_iterator):
        for iterator in data_iterator if isinstance(data_iterator, list) else [data_iterator]:
            for _ in range(get_num_microbatches()):
                next(iterator)


@cache
def require_lines(owner: Any, lines: tuple[str, ...]) -> None:
    """Raises RuntimeError, with the remedy, if a module or class of Megatron lacks a line that a patch relies on."""
    source = inspect.getsource(owner)
    for line in lines:
        if line not in source:
            raise RuntimeError(
                f"{owner.__name__} has changed: it lacks {line.strip()!r}, which neo_megatron was written for; "
                f"pip install 'megatron-core=={MEGATRON_VERSION}'"
            )


def _rewritten(show: Callable[[str], None], line: Callable[[str], str]) -> Callable[[str], None]:
    @wraps(show)
    def shows(message: str) -> None:
        show(line(message) if isinstance(message, str) else message)

    return shows
