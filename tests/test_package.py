"""The package as users have it: the wheel, and models that were saved with an older version."""

import copy
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from torch import nn

from manual_lstm import ManualLSTM, replace_lstm, restore_lstm
from tests.helpers.layers import randn

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"


def run(*arguments: str, cwd: Path) -> str:
    """Run Python; what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves files behind and would find those of another."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    copytree(
        ROOT / "manual_lstm", source / "manual_lstm", ignore=ignore_patterns("__pycache__", "*.pyc")
    )
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
    run("-m", "pip", "wheel", *options, ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def modules_of(files: set[str]) -> list[str]:
    return sorted(
        file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in files
        if file.endswith(".py")
    )


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "manual_lstm"
    sources = {f"manual_lstm/{file.relative_to(package).as_posix()}" for file in package.rglob("*.py")}
    assert names == sources | {"manual_lstm/py.typed"}


IMPORTS = """
import importlib, sys
target = sys.argv[1]
sys.path.insert(0, target)
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert module.__file__.startswith(target), module.__file__
import manual_lstm, torch
print(manual_lstm.ManualLSTM(3, 4)(torch.zeros(5, 2, 3))[0].shape)
"""


def test_every_module_of_the_wheel_can_be_imported(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(target)]
    run("-m", "pip", "install", *options, str(wheel), cwd=tmp_path)
    modules = modules_of(set(ZipFile(wheel).namelist()))
    assert {"manual_lstm", "manual_lstm.engine.fused", "manual_lstm.testing.__main__"} <= set(modules)
    # Isolated: neither the folder of this checkout nor PYTHONPATH is on the path.
    printed = run("-I", "-c", IMPORTS, str(target), *modules, cwd=tmp_path)
    assert printed == "torch.Size([5, 2, 4])\n"


# Models saved whole, with torch.save(model), before the modules of the package had their places of
# today. A pickle names the class by its module: manual_lstm.module.ManualLSTM.


def check_against_nn_lstm(layer: ManualLSTM, batch_first: bool = False) -> None:
    """The layer's numbers are those of an nn.LSTM with its weights, and stay so in its copies."""
    reference = nn.LSTM(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        bias=layer.bias,
        batch_first=batch_first,
        dropout=layer.dropout,
        bidirectional=layer.bidirectional,
        proj_size=layer.proj_size,
    )
    reference.load_state_dict(layer.state_dict())
    reference.train(layer.training)
    x = randn(5, 2, 3).float()

    def results(lstm: nn.Module) -> Any:
        torch.manual_seed(0)  # the same dropout
        output, states = lstm(x)
        gradients = torch.autograd.grad(output.square().sum(), list(lstm.parameters()))
        return output, states, gradients

    expected = results(reference)
    torch.testing.assert_close(results(layer), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results(copy.deepcopy(layer)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_layer_that_an_older_version_saved() -> None:
    layer: Any = torch.load(DATA / "layer.pt", weights_only=False)
    assert type(layer) is ManualLSTM
    built = ManualLSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    assert repr(layer) == repr(built)
    check_against_nn_lstm(layer)
    unrolled, output = layer.unroll(torch.ones(5, 2, 3)), layer(torch.ones(5, 2, 3))[0]
    torch.testing.assert_close(unrolled.output, output, rtol=0, atol=1e-5)
    x = torch.randn(5, 2, 3)
    expected = layer(x)
    torch.testing.assert_close(layer.to_lstm()(x), expected, rtol=0, atol=1e-5)
    restored: Any = restore_lstm(layer)
    assert type(restored) is nn.LSTM
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    replaced: Any = replace_lstm(layer)
    assert type(replaced) is ManualLSTM
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_training_goes_on_with_a_model_that_an_older_version_saved() -> None:
    saved = torch.load(DATA / "training.pt", weights_only=False)
    model = saved["model"]
    layer: Any = model[1]
    assert type(layer) is ManualLSTM
    assert (layer.training, layer.dropout, layer.batch_first) == (True, 0.5, True)
    check_against_nn_lstm(layer, batch_first=True)
    twin = restore_lstm(copy.deepcopy(model))
    assert type(twin[1]) is nn.LSTM
    before = copy.deepcopy(model.state_dict())
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # a step changes its buffers
        torch.manual_seed(0)
        each(torch.ones(2, 5, 3))[0].square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
