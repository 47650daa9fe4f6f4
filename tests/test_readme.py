"""Every example of the README and of the docstrings, run."""

import doctest
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import manual_lstm.functional
import manual_lstm.module
import manual_lstm.swap.replace
from manual_lstm.__main__ import main
from manual_lstm.testing import Case, assert_same_layer, comparing, conformance
from tests.helpers.planted import MISTAKES, planted

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 12
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # where pickle looks for its classes
    names = vars(module)
    for block in blocks:
        exec(compile(block, "<README>", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_a_failing_case_says_what_the_readme_shows() -> None:
    shown = re.search(r"```text\n(output differs.*?)\n```", README, re.DOTALL)
    assert shown
    case = eval(shown[1].splitlines()[-1], {"Case": Case, "torch": torch})
    reference, layer = case.pair(planted(*MISTAKES["wrong from the 33rd step"]))
    with pytest.raises(AssertionError) as error:
        assert_same_layer(layer, reference, case)

    def without_noise(text: str) -> list[str]:
        # The gradient of the input is barely beyond what is allowed, and not on every machine.
        lines = [line for line in text.splitlines() if "grad of input" not in line]
        return [re.sub(r"-?\d\.\d{6,}", "#", line) for line in lines]

    assert without_noise(str(error.value)) == without_noise(shown[1])


def test_the_check_prints_what_the_readme_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # RESEMBLYZER_CHECKPOINT is the wheel's pretrained.pt; without it, a file of the same make.
    shown = re.search(r"check resemblyzer/pretrained.pt\n(.*)\n", README)
    assert shown
    file = os.environ.get("RESEMBLYZER_CHECKPOINT")
    if file is None:
        file = str(tmp_path / "pretrained.pt")
        weights = nn.LSTM(40, 256, num_layers=3).state_dict()
        torch.save({"model_state": {f"lstm.{k}": v for k, v in weights.items()}, "step": 1}, file)
    assert main(["check", file]) == 0
    printed = capsys.readouterr().out

    def without_figures(line: str) -> str:
        return re.sub(r"\d\.\de-\d\d", "#", line.strip())

    assert without_figures(printed) == without_figures(shown[1])


@pytest.mark.parametrize(
    "module",
    [
        manual_lstm.module,
        manual_lstm.functional,
        manual_lstm.swap.replace,
        sys.modules[Case.__module__],  # which manual_lstm.testing.cases, the function, hides
        comparing,
        conformance,
    ],
    ids=lambda m: m.__name__,
)
def test_the_docstrings_examples(module: ModuleType) -> None:
    results = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert results.attempted > 2
    assert results.failed == 0


def test_the_map_names_every_file() -> None:
    package = Path(manual_lstm.module.__file__).parent
    named = set(re.findall(r"`manual_lstm/([\w/]+\.py)`", README))
    files = {path.relative_to(package) for path in package.rglob("*.py")}
    assert named == {path.as_posix() for path in files if path.name != "__init__.py"}
