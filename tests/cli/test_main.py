"""The command line, called in process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import velora_fx
from tests.cli.test_presets import LLAMA
from velora_fx.cli.main import main
from velora_fx.plans import Plan
from velora_fx.simulate.timeline import CATEGORIES

ROOT = Path(__file__).parents[2]
GIB = 2**30
CONFIG: dict[str, Any] = {**LLAMA, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3}
ENOUGH, TIGHT, TOO_LITTLE = "1", "0.0041", "0.0001"
NET = """
import ctypes

import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def make():
    return Net(), {"x": torch.randn(4, 16, 32)}

def printing():
    print("from Python")
    ctypes.CDLL(None).puts(b"from C")
    return make()
"""


@pytest.fixture
def llama(tmp_path: Path) -> list[str]:
    """The arguments for a tiny Llama on CPU, 8 x 32 tokens."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    shape = ["--batch-size", "8", "--seq-len", "32", "--dtype", "float32"]
    return ["--model", str(path), *shape, "--device", "cpu", "--optimizer", "sgd"]


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of factories in the current folder."""
    name = f"net_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    return name


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(llama: list[str], capsys: pytest.CaptureFixture[str]) -> Run:
    """The exit code, stdout and stderr for the tiny Llama with more arguments."""

    def run(*arguments: str) -> tuple[int, str, str]:
        return main([*llama, *arguments]), *capsys.readouterr()

    return run


def test_json_is_one_object_with_the_promised_keys(run: Run, llama: list[str]) -> None:
    code, out, err = run("--budget-gb", TIGHT, "--json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert (data["schema"], data["model"], data["compiled"], data["fits"]) == (6, llama[1], False, True)
    assert data["budget_bytes"] == int(float(TIGHT) * GIB)
    for peak in (data["baseline"], data["planned"]):
        assert set(peak["breakdown"]) == set(CATEGORIES)
        assert peak["peak_bytes"] == sum(peak["breakdown"].values())
    assert data["planned"]["peak_bytes"] <= data["budget_bytes"] < data["baseline"]["peak_bytes"]
    keys = "region tensor consumers shape dtype action sub_token_size bytes_before bytes_after"
    keys += " update_bytes_before update_bytes_after"
    assert all(set(decision) == set(keys.split()) for decision in data["decisions"])
    assert {decision["action"] for decision in data["decisions"]} == {"keep", "compress"}
    assert all(set(skipped) == {"module", "reason"} for skipped in data["skipped"])


def test_the_report_is_that_of_the_plan_in_the_json(run: Run) -> None:
    (code, report, _), (_, text, _) = run("--budget-gb", ENOUGH), run("--budget-gb", ENOUGH, "--json")
    assert code == 0 and report == f"{Plan.from_json(text)}\n" and "fits" in report


def test_without_a_budget_the_step_is_shown_as_it_is_with_the_reach_of_compression(run: Run) -> None:
    code, out, _ = run("--json")
    data = json.loads(out)
    assert code == 0
    assert data["budget_bytes"] is None
    assert data["planned"] == data["baseline"]
    assert {decision["action"] for decision in data["decisions"]} == {"keep"}
    assert data["notes"][0] == "135,616 parameters in float32"
    assert data["notes"][1].startswith("with everything compressed as far as possible the peak is ")


def test_a_budget_that_cannot_be_met_gives_the_tightest_plan_and_exit_code_1(run: Run) -> None:
    code, out, err = run("--budget-gb", TOO_LITTLE, "--json")
    data = json.loads(out)
    assert code == 1 and not data["fits"]
    assert data["budget_bytes"] < data["planned"]["peak_bytes"] < data["baseline"]["peak_bytes"]
    assert err.count("\n") == 1 and "the smallest peak that can be reached is" in err


def test_the_options_reach_the_plan(run: Run) -> None:
    options = f"--budget-gb {TIGHT} --method compress --sub-token-sizes 16,32 --projection batch_mean --seed 5"
    options += " --optimizer torch.optim:Adagrad --dtype bfloat16 --device cuda --json"
    code, out, _ = run(*options.split())
    data = json.loads(out)
    assert code == 1
    assert (data["projection"], data["seed"], data["optimizer"], data["device"]) == ("batch_mean", 5, "Adagrad", "cuda")
    assert {decision["sub_token_size"] for decision in data["decisions"]} == {32}
    assert {decision["dtype"] for decision in data["decisions"]} == {"bfloat16"}


@pytest.mark.slow
def test_factored_gradients_shrink_state_and_show_in_the_report_and_the_json(run: Run) -> None:
    options = ["--optimizer", "adamw", "--gradients", "factored", "--budget-gb", "0.0038"]
    (code, text, _), (_, out, _) = run(*options, "--json"), run(*options)
    data = json.loads(text)
    assert code == 0 and data["gradients"] == "factored"
    compressed = [decision for decision in data["decisions"] if decision["action"] == "compress"]
    assert any("o_proj" in decision["consumers"][0] for decision in data["decisions"])
    assert all(d["update_bytes_after"] <= d["update_bytes_before"] / d["sub_token_size"] + 40 for d in compressed)
    assert data["planned"]["breakdown"]["optimizer"] < data["baseline"]["breakdown"]["optimizer"]
    assert "gradient, state before" in out and "factored: they, the optimizer's state and all-reduce" in out


def test_accumulated_gradients_are_held_through_the_whole_step(run: Run) -> None:
    once, accumulated = (json.loads(run("--json", *more)[1]) for more in ([], ["--gradient-accumulation", "4"]))
    sizes = accumulated["baseline"]["breakdown"]
    assert sizes["gradients"] == sizes["parameters"] > once["baseline"]["breakdown"]["gradients"]
    assert any("4 batches" in note for note in accumulated["notes"])


def test_a_plot_is_written_beside_the_report_also_of_a_plan_that_does_not_fit(run: Run, tmp_path: Path) -> None:
    does_not = "DOES NOT FIT: the smallest reachable peak is"
    for budget, expected, says in ((ENOUGH, 0, "fits"), (TOO_LITTLE, 1, does_not)):
        picture = tmp_path / f"{budget}.png"
        code, out, _ = run("--budget-gb", budget, "--plot", str(picture))
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert code == expected and "predicted peak" in out and says in out


def test_files_that_could_not_be_written_are_refused_before_anything_is_planned(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("velora_fx.cli.main.presets.load", lambda *_, **__: pytest.fail("planned"))
    assert run("--plot", "x.jpg")[0] == 2
    code, _, err = run("--plot", str(tmp_path / "no" / "x.svg"))
    assert code == 2 and "no folder" in err


@pytest.mark.parametrize("sizes", [["--batch-size", "64"], ["--seq-len", "8"]])
def test_sizes_for_a_factory_that_makes_its_own_inputs_are_refused(net: str, sizes: list[str], capsys: Any) -> None:
    assert main(["--model", f"{net}:make", *sizes]) == 2
    assert "returns its own example inputs" in capsys.readouterr().err


def test_a_budget_above_what_the_device_has_is_warned_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("velora_fx.options._capacity_bytes", lambda device: 2**20)
    with pytest.warns(UserWarning, match=r"above the 0\.00 GiB"):
        run("--budget-gb", ENOUGH)


@pytest.mark.parametrize("budgets", [["--budget-gb", "1"], ["--sweep", "1,2"]])
def test_stdout_is_the_reports_alone(net: str, tmp_path: Path, budgets: list[str]) -> None:
    tool = str(ROOT / "tools" / "plan.py")
    command = [sys.executable, tool, "--model", f"{net}:printing", "--device", "cpu", *budgets]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    json.loads(done.stdout)
    assert "from Python" in done.stderr and "from C" in done.stderr


@pytest.mark.parametrize("closed", ["/dev/full", "-"])
def test_a_report_that_nobody_can_read_does_not_exit_as_one_that_does_not_fit(closed: str) -> None:
    command = f"{sys.executable} {ROOT / 'tools' / 'plan.py'} --help >{'&' * (closed == '-')}{closed}"
    done = subprocess.run(["bash", "-c", f"unset PYTHONUNBUFFERED; {command}"], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0 if closed == "-" else 3, False)


def test_a_plan_is_saved_and_shown_again(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    code, report, _ = run("--budget-gb", TIGHT, "--save", str(path))
    assert (code, main(["--plan", str(path)]), capsys.readouterr().out) == (0, 0, report)
    assert velora_fx.Plan.from_json(path.read_text()).fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass --model, to plan for it, or --plan, to show what was saved: got neither"),
        (["--model", "gpt2", "--plan", "x.json"], "got both"),
        (["--plan", "missing.json"], "missing.json"),
        (["--model", "gpt2", "--save", "no/such/x.json"], "--save: there is no folder"),
    ],
)
def test_bad_plan_files_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
