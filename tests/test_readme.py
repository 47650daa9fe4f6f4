"""The READMEs: every example runs alone, what they show is what is printed, and every link resolves."""

import doctest
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from torch import nn

import manual_lstm.functional
import manual_lstm.module
import manual_lstm.swap.replace
from benchmarks import targets
from benchmarks.cases import GROUPS
from benchmarks.workload import INFERENCE, TRAINING
from manual_lstm.__main__ import main
from manual_lstm.testing import Case, assert_same_layer, comparing, conformance
from tests.helpers.planted import MISTAKES, planted

ROOT = Path(__file__).parent.parent
FOLDERS = ("manual_lstm", "benchmarks", "tests")
FILES = [ROOT / "README.md", *(path for name in FOLDERS for path in (ROOT / name).rglob("README.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
# How many python blocks each has: an example that is not found would not be run.
BLOCKS = {
    "README.md": 6,
    "manual_lstm/README.md": 11,
    "manual_lstm/testing/README.md": 2,
    "benchmarks/README.md": 1,
}
# A file or folder of the repository. A span such as `.safetensors` is the end of a name.
PATHS = r"\.ci/run|(?:\w[\w.-]*/)*\w[\w.-]*(?:/|\.(?:py|md|pt|png|toml))"
EXAMPLES = [
    pytest.param(block, id=f"{path}-{k}")
    for path, text in TEXTS.items()
    for k, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


def test_every_example_is_here() -> None:
    counts = {path: text.count("```python") for path, text in TEXTS.items()}
    assert {path: count for path, count in counts.items() if count} == BLOCKS
    assert len(EXAMPLES) == sum(BLOCKS.values())


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few cases for the examples that draw some: test_testing.py draws many of the same."""
    defaults = conformance.check_lstm.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "max_examples", 1)
    before = settings.default
    assert before is not None
    settings.register_profile("readme", before, max_examples=5)
    settings.register_profile("before", before)
    settings.load_profile("readme")
    yield
    settings.load_profile("before")


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("block", EXAMPLES)
def test_an_example_runs_alone(
    block: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if ".plot" in block:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)  # where an example may write its files
    module = ModuleType("readme_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where pickle looks for its classes
    names = vars(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(block, "<README>", "exec"), names)
        tests = [value for name, value in names.items() if name.startswith("test_")]
        assert len(tests) == len(re.findall(r"^def test_", block, re.MULTILINE))
        for test in tests:
            test()
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert len(promised) == block.count("print(")
    assert capsys.readouterr().out.splitlines() == promised


def test_the_first_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 230
    assert len(TEXTS["README.md"].encode()) <= 14_000


def anchors(text: str) -> set[str]:
    """The anchors of a text's headings, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", TEXTS)
def test_the_links_resolve(path: str) -> None:
    prose = re.sub(r"```.*?```", "", TEXTS[path], flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    assert links or path not in ("README.md", "manual_lstm/README.md", "benchmarks/README.md")
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / path).parent / name if name else ROOT / path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("path", TEXTS)
def test_the_paths_exist(path: str) -> None:
    """Files and folders that a README names in backticks, by a path from one of these folders."""
    folders = [(ROOT / path).parent, ROOT]
    if path == "tests/README.md":  # its tables have columns for these two
        folders += [ROOT / "manual_lstm", ROOT / "tests" / "helpers"]
    prose = re.sub(r"```.*?```", "", TEXTS[path], flags=re.DOTALL)
    words = [word for span in re.findall(r"`([^`\n]+)`", prose) for word in span.split()]
    paths = [word for word in words if re.fullmatch(PATHS, word)]
    assert paths or path not in ("README.md", "manual_lstm/README.md", "tests/README.md")
    missing = [name for name in paths if not any((folder / name).exists() for folder in folders)]
    assert not missing


def test_the_tests_readme_names_every_file() -> None:
    folder = ROOT / "tests"
    named = re.findall(r"`(\w+\.py)`", TEXTS["tests/README.md"])
    files = {path.name for path in [*folder.glob("test_*.py"), *(folder / "helpers").glob("[!_]*.py")]}
    assert files <= set(named)


def test_a_failing_case_says_what_the_readme_shows() -> None:
    text = TEXTS["manual_lstm/testing/README.md"]
    shown = re.search(r"```text\n(output differs.*?)\n```", text, re.DOTALL)
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
    shown = re.search(r"check resemblyzer/pretrained.pt\n(.*)\n", TEXTS["README.md"])
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
    section = TEXTS["manual_lstm/README.md"].split("\n## The files\n")[1].split("\n## ")[0]
    named = re.findall(r"^\| `([\w/]+\.py)` \|", section, re.MULTILINE)
    files = {path.relative_to(package) for path in package.rglob("*.py")}
    assert sorted(named) == sorted(path.as_posix() for path in files if path.name != "__init__.py")


def test_the_readme_has_the_speed_of_the_tables() -> None:
    tables = TEXTS["benchmarks/README.md"].split("```text\n")[1].split("\n```")[0]
    inference, training = (
        {
            **dict(re.findall(r"^([a-z-]+) +(\d\.\d\d) ", table, re.MULTILINE)),
            "plain": re.findall(r"^all .* (\d\.\d\d)$", table, re.MULTILINE)[0],
            "shapes": str(len(re.findall(r"^\d+,\d+,\d+,\d+ ", table, re.MULTILINE))),
        }
        for table in tables.split("\nTRAINING")
    )
    small, large = GROUPS["overhead"].cases, GROUPS["arithmetic"].cases
    rows = tables.split("\nTRAINING")[0].split("  overhead-bound")[1].split("  arithmetic-bound")[0]
    small_times = dict(re.findall(r"^(\d\S+) +\S+ +(\S+)", rows, re.MULTILINE))
    assert list(small_times) == [case.shape for case in small]
    prose = " ".join(TEXTS["README.md"].split())

    def shown(pattern: str) -> list[str]:
        found = re.search(pattern.replace("#", r"(\d+(?:\.\d+)?)"), prose)
        assert found, pattern
        return list(found.groups())

    text = "# times nn.LSTM's time in training and # times in inference"
    assert shown(rf"ManualLSTM takes {text} \(geometric means over # shapes") == [
        training["all"],
        inference["all"],
        training["shapes"],
    ]
    assert inference["shapes"] == training["shapes"]
    assert shown(f"plain loop, which takes {text}") == [training["plain"], inference["plain"]]
    by_group = (
        "Training / inference: many small steps # / #, large layers # / #, a single step # / #, "
        "published models # / #"
    )
    assert shown(by_group) == [
        mode[group]
        for group in ("overhead", "arithmetic", "one-step", "models")
        for mode in (training, inference)
    ]
    assert shown(r"in about nn.LSTM's time \(# times\)") == [training["arithmetic"]]
    ends = shown("inference of small layers, of one sequence or of a batch, where it is # to # times")
    times = sorted(map(float, small_times.values()))
    assert [float(end) for end in ends] == pytest.approx([times[0], times[-1]], abs=0.0501)
    sizes, batches = sorted(case.H for case in large), sorted(case.B for case in large)
    limits = [sizes[0], sizes[-1], batches[0], batches[-1]]
    assert shown("hidden sizes of # to #, batches of # to #") == [str(limit) for limit in limits]
    in_batches = sorted(case.H for case in small if case.B > 1)
    alone = [case.H for case in small if case.B == 1]
    expected = [str(size) for size in in_batches + alone]
    assert shown("batches with a hidden size of # or #, or one sequence with #") == expected


def test_the_readme_has_the_targets_of_the_benchmarks() -> None:
    limits = {
        (f"{group}, each shape", modes[INFERENCE], modes[TRAINING])
        for group, modes in targets.MOST_PER_CASE.items()
    }
    for group, by_threads in targets.MOST_MEAN.items():
        for threads, modes in zip(("one thread", "two threads"), by_threads):
            limits.add((f"{group}, geometric mean, {threads}", modes[INFERENCE], modes[TRAINING]))
    limits |= {(str(case), *most) for case, most in targets.MOST_OF_CASE.items()}
    section = TEXTS["benchmarks/README.md"].split("\n## Targets\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*) \| (\d+\.\d\d) \| (\d+\.\d\d) \|$", section, re.MULTILINE)
    assert {(name, float(first), float(second)) for name, first, second in rows} == limits
