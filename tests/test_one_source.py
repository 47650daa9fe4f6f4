"""The equations stand in cell.py alone: whoever changes them there changes what runs."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import manual_lstm

PACKAGE = Path(manual_lstm.__file__).parent

# Runs on a copy of the package in which tanh is sigmoid, and computes that LSTM one gate at a time.
SCRIPT = """
import torch
from torch.nn.utils.rnn import pack_sequence
import manual_lstm
from manual_lstm import ManualLSTM, plain_loop

assert manual_lstm.__file__.startswith(FOLDER), manual_lstm.__file__
torch.manual_seed(0)
layer = ManualLSTM(3, 4, dtype=torch.float64)
parameters = list(layer.parameters())


def expected(sequence):
    w_ih, w_hh, b_ih, b_hh = parameters
    h = c = torch.zeros(4, dtype=torch.float64)
    outputs = []
    for x_t in sequence:
        i, f, g, o = (w_ih @ x_t + b_ih + w_hh @ h + b_hh).sigmoid().chunk(4)
        c = f * c + i * g
        h = o * c.sigmoid()
        outputs.append(h)
    return torch.stack(outputs)


def compare(name, input, sequences, outputs_of):
    wanted = [expected(sequence) for sequence in sequences]
    gradients = torch.autograd.grad(sum(part.sin().sum() for part in wanted), parameters)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            outputs = outputs_of(layer(input)[0])
        torch.testing.assert_close(outputs, wanted, rtol=0, atol=1e-12, msg=name)
    found = torch.autograd.grad(sum(part.sin().sum() for part in outputs), parameters)
    torch.testing.assert_close(found, gradients, rtol=0, atol=1e-12, msg=name)


x = torch.randn(6, 2, 3, dtype=torch.float64)
for T in (1, 6):
    compare(f"{T} steps", x[:T], x[:T].unbind(1), lambda output: list(output.unbind(1)))
sequences = [x[:6, 0], x[:3, 1]]
compare("packed", pack_sequence(sequences), sequences, torch.nn.utils.rnn.unpack_sequence)
with plain_loop():
    compare("plain loop", x, x.unbind(1), lambda output: list(output.unbind(1)))
"""


# What is added in one form alone, and which calls then differ from nn.LSTM.
FORMS = {
    "lstm_cell": ("    c = f * c + i * g\n", "    c = f * c + i * g + 1.0\n", {"one step"}),
    "lstm_cell_out": (".addcmul_(i, g)", ".addcmul_(i, g).add_(1.0)", {"steps", "packed"}),
    "lstm_cell_backward": ("d_c.mul_(f_conj)", "d_c.mul_(f_conj).add_(1.0)", {"gradient"}),
}
LOOK = """
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from manual_lstm import ManualLSTM

layer, lstm = ManualLSTM(3, 4), nn.LSTM(3, 4)
lstm.load_state_dict(layer.state_dict())
x = torch.randn(5, 2, 3)
packed = pack_padded_sequence(x, [5, 3])
pairs = {
    "one step": (layer(x[:1])[0], lstm(x[:1])[0]),
    "steps": (layer(x)[0], lstm(x)[0]),
    "packed": (layer(packed)[0].data, lstm(packed)[0].data),
}
if torch.allclose(*pairs["steps"], atol=1e-5):
    pairs["gradient"] = [torch.autograd.grad(m(x)[0].sum(), m.weight_hh_l0)[0] for m in (layer, lstm)]
print(sorted(name for name, pair in pairs.items() if not torch.allclose(*pair, atol=1e-5)))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The scripts on copies of the package, all under way at once."""
    source = (PACKAGE / "cell.py").read_text(encoding="utf-8")
    changes = {"tanh": (source.replace("tanh", "sigmoid"), SCRIPT)}
    for form, (old, new, _) in FORMS.items():
        assert source.count(old) == 1
        changes[form] = source.replace(old, new), LOOK
    processes = {}
    for name, (changed, script) in changes.items():
        folder = tmp_path_factory.mktemp(name)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, folder / "manual_lstm", ignore=ignored)
        (folder / "manual_lstm" / "cell.py").write_text(changed, encoding="utf-8")
        processes[name] = subprocess.Popen(
            [sys.executable, "-c", script.replace("FOLDER", repr(str(folder)))],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def test_tanh_made_sigmoid_in_cell_py_changes_every_call(runs: dict[str, Any]) -> None:
    source = (PACKAGE / "cell.py").read_text(encoding="utf-8")
    assert len(re.findall(r"torch\.tanh\(|\.tanh_\(\)", source)) >= 4
    _, errors = runs["tanh"].communicate()
    assert runs["tanh"].returncode == 0, errors


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_what_runs(form: str, runs: dict[str, Any]) -> None:
    printed, errors = runs[form].communicate()
    assert runs[form].returncode == 0, errors
    assert set(ast.literal_eval(printed)) == FORMS[form][2]


def test_no_other_file_of_the_layer_has_equations() -> None:
    for path in [*PACKAGE.glob("*.py"), *(PACKAGE / "engine").glob("*.py")]:
        if path.name in ("cell.py", "cells.py"):  # cells.py has other LSTMs
            continue
        names = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Attribute, ast.Name))
        }
        assert not {name for name in names if re.search("sigmoid|^tanh_?$|tanh_backward", name)}, path
