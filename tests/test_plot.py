"""The picture that an unrolled layer draws."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from manual_lstm import Unrolled
from manual_lstm.check.parity import data_of
from tests.helpers.layers import DEEP, make_layer, randn


def images(unrolled: Unrolled, **options: Any) -> dict[str, Any]:
    """What each panel shows, by its name: units in rows."""
    figure = unrolled.plot(**options)
    return {
        axis.get_ylabel(): np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images
    }


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib")


PLOTTED = {
    "dense": lambda: randn(9, 3, 3),
    "batch_first": lambda: randn(3, 9, 3),
    "as many steps as sequences": lambda: randn(3, 3, 3),
    "unbatched": lambda: randn(9, 3),
    "packed": lambda: pack_sequence([randn(n, 3) for n in (2, 5, 9)], enforce_sorted=False),
    "nested": lambda: torch.nested.nested_tensor([randn(n, 3) for n in (2, 5, 9)], layout=torch.jagged),
}


@pytest.mark.parametrize("form", PLOTTED)
@pytest.mark.usefixtures("matplotlib")
def test_the_panels_show_one_sample(form: str) -> None:
    layer = make_layer(batch_first=form in ("batch_first", "as many steps as sequences"), **DEEP)
    make_input: Callable[[], Any] = PLOTTED[form]
    unrolled = layer.unroll(make_input())

    def of_sample(part: Any) -> Tensor:
        if isinstance(part, PackedSequence):
            return unpack_sequence(part)[1]
        if part.is_nested:
            return part.unbind()[1]  # type: ignore[no-any-return]
        if form == "unbatched":
            return part  # type: ignore[no-any-return]
        return part[1] if layer.batch_first else part[:, 1]  # type: ignore[no-any-return]

    shown = images(unrolled, sample=0 if form == "unbatched" else 1, direction=2)
    names = [name.split()[-1] for name in shown]
    assert names == ["i", "f", "g", "o", "c", "h"]
    for name, image in zip(names, shown.values()):
        expected = of_sample(getattr(unrolled, name)[2]).float().detach().t().numpy()
        # the same rows, in any order
        np.testing.assert_allclose(sorted(image.tolist()), sorted(expected.tolist()), rtol=1e-6)


@pytest.mark.usefixtures("matplotlib")
def test_rows_can_be_chosen_and_are_the_same_in_all_panels() -> None:
    unrolled = make_layer().unroll(randn(9, 2, 3))
    shown = images(unrolled, units=[2, 0])
    for name, image in shown.items():
        part = data_of(getattr(unrolled, name.split()[-1])[0])[:, 0].float().detach()
        np.testing.assert_allclose(image, part.t()[[2, 0]], rtol=1e-6)
    order = [int(data_of(unrolled.c[0])[:, 0].abs().argmax(0)[k]) for k in range(4)]
    by_itself = images(unrolled)["cell state c"]
    largest = np.abs(by_itself).argmax(1)
    assert largest.tolist() == sorted(order)


@pytest.mark.usefixtures("matplotlib")
def test_labels_stand_below_their_steps() -> None:
    figure = make_layer().unroll(randn(5, 2, 3)).plot(labels="a b\nc")
    last = [axis for axis in figure.axes if axis.images][-1]
    assert [tick.get_text() for tick in last.get_xticklabels()] == ["a", " ", "b", "\n", "c"]
    with pytest.raises(ValueError, match="a label for each of the 5 steps, but got 4"):
        make_layer().unroll(randn(5, 2, 3)).plot(labels="abcd")


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_can_be_written(dtype: torch.dtype, tmp_path: Any) -> None:
    layer = make_layer(num_layers=2).to(dtype)
    file = tmp_path / "gates.png"
    layer.unroll(randn(9, 2, 3).to(dtype)).plot(direction=1).savefig(file)
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("matplotlib")
def test_no_step_to_draw() -> None:
    with pytest.raises(ValueError, match="no step"):
        make_layer().unroll(randn(0, 2, 3)).plot()


def test_without_matplotlib_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        make_layer().unroll(randn(5, 2, 3)).plot()
