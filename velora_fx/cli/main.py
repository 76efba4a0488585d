"""The command line: plans a training step from a model's shape alone."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

import velora_fx
from velora_fx.capture import example_call
from velora_fx.cli import presets
from velora_fx.cli.help import DESCRIPTION, EPILOG
from velora_fx.cli.sweep import render_sweep, sweep
from velora_fx.options import GRADIENTS, METHODS, OBJECTIVES, PROJECTIONS, Options, budget_bytes_of
from velora_fx.plans import BudgetError, Plan
from velora_fx.report import figure_class

FITS, DOES_NOT_FIT, BAD_INPUT, FAILED = 0, 1, 2, 3
COMPILED = {"model": True, "blocks": "blocks"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help explains)")


def command() -> int:
    """`main` in a process of its own, whose output is the report's alone: what libraries in C print (HiGHS does) goes
    to stderr."""
    if sys.stdout is None or sys.stderr is None:  # closed
        return main()
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    try:
        with open(os.dup(1), "w", encoding=encoding, errors=errors) as report, contextlib.redirect_stdout(report):
            os.dup2(2, 1)
            return main()
    except BrokenPipeError:  # whoever reads the report has read enough
        return FAILED
    except OSError as error:  # the disk is full
        return _complain(error, FAILED)


def main(argv: Sequence[str] | None = None) -> int:
    """Plans as the arguments say and prints the report or JSON; returns the exit code, see `--help`."""
    try:
        arguments = parser().parse_args(argv)
        _check_files(arguments)
        with _user_code():
            plans = [_plan(arguments)] if arguments.sweep is None else _sweep(arguments)
        if arguments.plot is not None:
            plans[0].plot(arguments.plot)
        if arguments.save is not None:
            Path(arguments.save).write_text(plans[0].to_json())
    except (ValueError, ImportError, OSError) as error:
        return _complain(error, BAD_INPUT)
    except Exception:  # Python's own exit code for it is 1, which means here that the step does not fit
        traceback.print_exc()
        return FAILED
    if arguments.sweep is None:
        print(plans[0].to_json() if arguments.json else plans[0])
    elif arguments.json:
        print(json.dumps([plan.to_dict() for plan in plans], indent=2))
    else:
        print(f"{arguments.model}: {plans[0].notes[0]}\n\n{render_sweep(plans)}")
    return FITS if all(plan.fits for plan in plans) else DOES_NOT_FIT


def parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    made = _Parser(
        "velora-plan", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_step(made.add_argument)
    _add_options(made.add_argument)
    _add_output(made.add_argument)
    return made


def _add_step(add: Callable[..., Any]) -> None:
    add("--model", help="a preset, a Hugging Face config, or package.module:factory (see below)")
    add("--batch-size", type=int, metavar="N", help="texts or images of a batch (default: 1)")
    add("--seq-len", type=int, metavar="N", help="tokens of a text (default: what the model takes, up to 2048)")
    add(
        "--dtype",
        choices=DTYPES,
        help="of weights and inputs (default: bfloat16, what large models are trained in; a factory's own)",
    )
    add(
        "--optimizer",
        default="adamw",
        help='"adamw", "sgd", "none", or an optimizer class such as torch.optim:Adagrad (default: adamw)',
    )


def _add_options(add: Callable[..., Any]) -> None:
    add(
        "--sweep",
        metavar="GIB,GIB",
        help="a row for each of several budgets, such as 16,24,40,80, in place of a report",
    )
    add("--budget-gb", metavar="GIB", help="peak memory to fit, in GiB of 2^30 bytes (default: show the step as it is)")
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="what is planned for (default: cuda; no GPU is needed)",
    )
    add(
        "--compiled",
        nargs="?",
        const="model",
        choices=COMPILED,
        help="the step runs under torch.compile; blocks: each repeated block by itself (default: eager)",
    )
    add(
        "--method",
        choices=METHODS,
        default="auto",
        help="compress: VeLoRA alone; exact: recompute alone (default: auto)",
    )
    add("--gradients", choices=GRADIENTS, default="dense", help="factored: with optimizer state, M times smaller")
    add("--projection", choices=PROJECTIONS, default="signs", help="of the sub-tokens (default: signs)")
    add("--sub-token-sizes", metavar="M,M", help="sizes to choose from, such as 16,32 (default: 2 to 128)")
    add(
        "--gradient-accumulation",
        type=int,
        default=1,
        metavar="N",
        help="batches whose gradients are added up before a step (default: 1)",
    )
    add("--objective", choices=OBJECTIVES, default="memory", help="speed: besides fitting, compress where time falls")
    add("--seed", type=int, default=0, help="seed of the projections (default: 0)")


def _add_output(add: Callable[..., Any]) -> None:
    add("--json", action="store_true", help="print the plan as one JSON object instead of the report")
    add("--save", metavar="FILE", help="write the plan as JSON, for velora_fx.Plan.from_json and velora_fx.apply")
    add("--plan", metavar="FILE", help="show a plan that was saved, in place of a new one")
    add("--plot", metavar="FILE", help="draw memory over the step, as a .svg, .png or .pdf file (needs matplotlib)")


def _check_files(arguments: argparse.Namespace) -> None:
    """Refuses, before anything is planned, files that could not be written."""
    if arguments.plot is not None:
        figure_class(arguments.plot)
    for option in ("plot", "save"):
        path = getattr(arguments, option)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--{option}: there is no folder for {path}")
    if (arguments.model is None) == (arguments.plan is None):
        got = "neither" if arguments.plan is None else "both"
        raise ValueError(f"pass --model, to plan for it, or --plan, to show what was saved: got {got}")


def _sweep(arguments: argparse.Namespace) -> list[Plan]:
    """The plans for several budgets."""
    others = [name for name in ("budget_gb", "plot", "save", "plan") if getattr(arguments, name) is not None]
    if others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(f"--sweep names the budgets and prints a table: leave out {names}")
    budgets = [_number(part) for part in arguments.sweep.split(",") if part.strip()]
    if not budgets:
        raise ValueError("--sweep needs budgets in GiB such as 16,24,40")
    for budget in budgets:
        budget_bytes_of(budget, torch.device(arguments.device))
    options = Options(**_options(arguments))
    model, inputs, note = _load(arguments)
    with _named(arguments):
        plans = sweep(model, budgets, *example_call(inputs), options, torch.device(arguments.device), arguments.model)
    return [_noted(plan, arguments.model, note) for plan in plans]


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    given = vars(arguments)
    options = {field.name: given[field.name] for field in fields(Options) if field.name in given}
    return {
        **options,
        "optimizer": _optimizer(arguments.optimizer),
        "compiled": COMPILED.get(arguments.compiled, False),
        "sub_token_sizes": _sizes(arguments.sub_token_sizes),
    }


def _load(arguments: argparse.Namespace) -> tuple[torch.nn.Module, Any, str]:
    """The model, its example inputs, and a note on its size."""
    dtype = DTYPES.get(arguments.dtype)
    model, inputs = presets.load(arguments.model, arguments.batch_size, arguments.seq_len, dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    dtypes = dict.fromkeys(str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters())
    return model, inputs, f"{count:,} parameters in {' and '.join(dtypes)}"


@contextlib.contextmanager
def _named(arguments: argparse.Namespace) -> Iterator[None]:
    """Whatever a user's own model raises is bad input, and its name is told."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if ":" in arguments.model or ":" in arguments.optimizer:
            raise ValueError(f"a step of {arguments.model} raised {type(error).__name__}: {error}") from error
        raise


def _plan(arguments: argparse.Namespace) -> Plan:
    if arguments.plan is not None:
        try:
            return Plan.from_json(Path(arguments.plan).read_text())
        except ValueError as error:
            raise ValueError(f"--plan {arguments.plan}: {error}") from error
    options = _options(arguments)
    Options(**options)  # refused before a large model is made, as is the budget
    budget_gb = None if arguments.budget_gb is None else _number(arguments.budget_gb)
    if budget_gb is not None:
        budget_bytes_of(budget_gb, torch.device(arguments.device))
    model, inputs, note = _load(arguments)
    try:
        with _named(arguments):
            plan = velora_fx.plan(model, budget_gb, inputs, device=arguments.device, **options)
    except BudgetError as error:
        _complain(error, DOES_NOT_FIT)
        plan = error.plan
    return _noted(plan, arguments.model, note)


def _noted(plan: Plan, name: str, note: str) -> Plan:
    return replace(plan, model=name, notes=(note, *plan.notes))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--sub-token-sizes must be integers such as 16,32, got {text!r}") from None


def _optimizer(text: str) -> Any:
    return presets.import_path(text) if ":" in text else text


@contextlib.contextmanager
def _user_code() -> Iterator[None]:
    """Lets the current folder be imported from, and keeps other libraries' log lines and warnings off the terminal, and
    what a user's model prints off stdout."""
    disabled, path = logging.root.manager.disable, list(sys.path)
    logging.disable(logging.ERROR)
    sys.path.insert(0, os.getcwd())
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", "velora_fx:")
            yield
    finally:
        logging.disable(disabled)
        sys.path[:] = path


def _complain(error: Exception, code: int) -> int:
    print(f"velora-plan: {' '.join(str(error).split())}", file=sys.stderr)
    return code
