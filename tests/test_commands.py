"""What all commands have in common: wrong words, rows by name, progress, interruption, closed pipes."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from manual_lstm import __main__ as command
from manual_lstm.check.command import Progress, choose_rows, run_command
from manual_lstm.report import table
from manual_lstm.report.row import ReportRow
from manual_lstm.testing import __main__ as testing_command
from manual_lstm.testing import check_lstm

ROOT = Path(__file__).parents[1]


class TakesNothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()


class NoModule:
    def __init__(self, input_size: int, hidden_size: int) -> None:
        pass


HERE = __name__
WRONG: list[tuple[ModuleType, list[str], str]] = [
    (command, ["report", "--device", "gpu"], "'gpu' cannot be used here, only cpu"),
    (command, ["report", "--device", "meta"], "'meta' cannot be used here, only cpu"),
    (command, ["report", "nope"], "no row is named 'nope'; there are: torch.vmap over the input; "),
    (command, ["check"], "required: file"),
    (command, ["chekc"], "invalid choice: 'chekc'"),
    (testing_command, ["mylib:Nope"], "'mylib:Nope' cannot be found: ModuleNotFoundError"),
    (testing_command, [f"{HERE}:Nope"], "cannot be found: AttributeError"),
    (testing_command, ["torch.nn"], "should be a class of modules, but is module"),
    (testing_command, [f"{HERE}:NoModule"], "should be a class of modules, but is NoModule"),
    (testing_command, [f"{HERE}:TakesNothing"], r"for \(3, 4\) it raised TypeError"),
    (testing_command, ["--lacks", "prj_size", "torch.nn:LSTM"], "'prj_size'; there are: parameters, "),
    (testing_command, ["--rows", "hx,nope"], "no row is named 'nope'"),
    (testing_command, ["--lacks", "packed"], "--lacks is about a class"),
    (testing_command, ["--examples", "0"], "a positive whole number is wanted, but got '0'"),
]
if not torch.cuda.is_available():
    WRONG.append((command, ["report", "--device", "cuda"], "'cuda' cannot be used here, only cpu"))


@pytest.mark.parametrize(("module", "words", "shown"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_words_are_usage_errors(
    module: Any, words: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        module.main(words)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(shown, err), err


def test_lacks_does_not_swallow_the_class(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--examples", "1", "--rows", "hx,proj_size", "--lacks", "proj_size", "torch.nn:LSTM"]
    assert testing_command.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["proj_size", "lacks"], ["hx", "ok"]]


def test_rows_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[str] = []

    def row(label: str) -> ReportRow:
        def check(_: object) -> None:
            tried.append(label)

        return ReportRow(label, check)

    monkeypatch.setattr(table, "ROWS", [row("torch.vmap"), row("torch.vmap, nested"), row("pruning")])
    assert command.main(["report", "PRUNING", "torch.vmap"]) == 0
    assert set(tried) == {"torch.vmap", "pruning"}
    capsys.readouterr()
    assert command.main(["report", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == ["torch.vmap", "torch.vmap, nested", "pruning"]
    assert choose_rows(["vmap"], ["pruning", "torch.vmap", "torch.vmap, nested"]) == [
        "torch.vmap",
        "torch.vmap, nested",
    ]
    assert testing_command.main(["--list"]) == 0
    assert "proj_size" in capsys.readouterr().out.splitlines()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (_Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = Progress()
        progress(3, 47, "proj_size")
        assert ("row 3 of 47, 0 s: proj_size" in stream.getvalue()) == stream.isatty()
        progress.end()
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress("file")
    progress(1, 1, "new\nline\x1b[31m.pt")
    time.sleep(1.3)  # the seconds are shown anew
    progress.end()
    shown = terminal.getvalue()
    assert "\n" not in shown
    assert "\x1b[31m" not in shown
    assert "file 1 of 1, 1 s: new" in shown
    seen: list[tuple[int, int, str]] = []
    rows = ["float64", "hx"]
    check_lstm(nn.LSTM, max_examples=1, rows=rows, progress=lambda *row: seen.append(row))
    assert seen == [(1, 2, "float64"), (2, 2, "hx")]
    with pytest.raises(ValueError, match=r"rows should name checks.*nope"):
        check_lstm(nn.LSTM, rows=["nope"])


def _raises(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert run_command(lambda: 1) == 1


def _interrupt(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Send Ctrl-C as a terminal does, to the children too; return the status, stdout and stderr."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()  # one that goes on would do so for an hour
    return process.returncode, out, err


def _start(*words: str, **options: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    words = (sys.executable, *words)
    return subprocess.Popen(
        words, text=True, start_new_session=True, stdout=pipe, stderr=pipe, **options
    )


def test_an_interrupted_command_shows_no_traceback() -> None:
    running = _start("-m", "manual_lstm.testing", "--examples", "5000")
    time.sleep(4)
    assert _interrupt(running) == (130, "", "interrupted\n")


@pytest.mark.parametrize("module", ["manual_lstm", "manual_lstm.testing", "benchmarks"])
def test_a_command_is_interrupted_while_it_imports(module: str, tmp_path: Path) -> None:
    slow = "import pathlib, time\npathlib.Path('here').touch()\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(slow, encoding="utf-8")
    running = _start("-m", module, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not (tmp_path / "here").exists() and running.poll() is None:
        time.sleep(0.05)
    assert _interrupt(running) == (130, "", "interrupted\n")


def test_an_interruption_that_nobody_can_catch_ends_the_process() -> None:
    program = """
import os, signal
from manual_lstm.check.command import run_command

class Deleted:
    def __del__(self):
        raise KeyboardInterrupt

def main():
    Deleted()
    print("still here")

run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_another_program_keeps_its_handler(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.py").write_text(
        "import signal, manual_lstm\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n",
        encoding="utf-8",
    )
    words = [sys.executable, "-m", "benchmarks"]
    subprocess.run(words, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_closed_and_full_streams(tmp_path: Path) -> None:
    torch.save(nn.LSTM(3, 4).state_dict(), tmp_path / "model.pt")
    command = f"{sys.executable} -m manual_lstm check {tmp_path / 'model.pt'}"
    no_space = "[Errno 28] No space left on device\n"
    expected = {">&-": (0, ""), "2>&-": (0, ""), ">/dev/full": (1, no_space)}
    pipe = subprocess.PIPE
    running = {
        redirected: subprocess.Popen(
            f"{command} {redirected}", shell=True, text=True, stdout=pipe, stderr=pipe
        )
        for redirected in expected
    }
    for redirected, process in running.items():
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == expected[redirected], redirected


def test_a_command_that_nobody_reads_shows_no_traceback() -> None:
    words = [sys.executable, "-m", "manual_lstm", "report", "--list"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == ""
    assert running.wait(60) == 141
    running.stderr.close()
