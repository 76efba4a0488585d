"""What `import velora_fx` brings with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import velora_fx

HEAVY = "scipy tabulate tqdm matplotlib transformers torch._dynamo torch._inductor torch.export"


def in_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_library_imports_no_compiler_solver_or_printer() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import velora_fx; "
        f"print(*(name for name in {HEAVY!r}.split() if name in set(sys.modules) - before))"
    )
    assert in_fresh_process(code) == ""


def test_a_plan_can_be_had_without_the_solver() -> None:
    code = "import sys; from velora_fx import Plan; print(Plan.__module__, 'scipy' in sys.modules)"
    assert in_fresh_process(code) == "velora_fx.plans False"


def test_every_public_name_is_there_at_its_first_use_and_listed() -> None:
    names = ", ".join(velora_fx.__all__)
    functions = ", ".join(name for name in velora_fx.__all__ if name != "__version__")
    code = f"from velora_fx import {names}; print(all(map(callable, ({functions}))), __version__)"
    assert in_fresh_process(code) == f"True {velora_fx.__version__}"
    assert set(velora_fx.__all__) <= set(dir(velora_fx))


def test_a_name_that_is_not_public_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'velora_fx' has no attribute 'planner'"):
        _ = velora_fx.planner
