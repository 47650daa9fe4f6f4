"""The README's picture: what the gates of a small character model do on a line of Python.

``python -m benchmarks.picture`` trains one layer of 64 units on Python's standard library for a few
minutes, finds the units that follow quotes and brackets, and draws a line that was not in the training.
"""

import argparse
import ast
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manual_lstm
from manual_lstm import ManualLSTM, Unrolled

H, B, T = 64, 32, 128
# Packages of the standard library, whose code is long enough and ordinary Python.
PACKAGES = [
    "asyncio",
    "concurrent",
    "ctypes",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "unittest",
    "urllib",
    "xml",
]
LINE = """\
raise ValueError('input should be 2-D or 3-D, but got ' + str(list(input.shape[:3])))
return input
"""


class Characters(nn.Module):
    """Predicts each next character."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.lstm = ManualLSTM(32, H)
        self.head = nn.Linear(H, characters)


def code(file: Path) -> str:
    """Return a file's code without comments and docstrings, so that each string ends in its line."""
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return "".join(c for c in ast.unparse(tree) + "\n" if c == "\n" or " " <= c <= "~")


def inside(text: str) -> dict[str, Tensor]:
    """Return which characters are in quotes, and which are in brackets."""
    quoted, bracketed = [], []
    quote, escaped, depth = "", False, 0
    for c in text:
        if quote:
            quote = "" if c == quote and not escaped else quote
            escaped = c == "\\" and not escaped
        elif c in "'\"":
            quote = c
        else:
            depth += (c in "([{") - (c in ")]}")
        quoted.append(quote != "")
        bracketed.append(depth > 0)
    return {"quotes": torch.tensor(quoted), "brackets": torch.tensor(bracketed)}


def train(model: Characters, codes: Tensor, steps: int) -> None:
    rows = codes[: len(codes) // B * B].view(B, -1).t()  # [characters of a row, B]
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    at, hx = 0, None
    for _ in range(steps):
        if at + T >= len(rows):
            at, hx = 0, None
        output, (h_n, c_n) = model.lstm(model.embedding(rows[at : at + T]), hx)
        following = rows[at + 1 : at + T + 1]
        loss = F.cross_entropy(model.head(output).flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        at, hx = at + T, (h_n.detach(), c_n.detach())


def share_right(c: Tensor, marks: Tensor, threshold: Tensor, sign: Tensor) -> Tensor:
    """Return how often ``sign * c > threshold`` equals ``marks``: the mean for true and false marks."""
    predicted = sign * c > threshold
    return (predicted[marks].double().mean(0) + (~predicted[~marks]).double().mean(0)) / 2


def best_unit(c: Tensor, marks: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return the unit whose cell state predicts the marks best, with its threshold and sign."""
    sign = (c[marks].mean(0) - c[~marks].mean(0)).sign()
    thresholds = (sign * c).quantile(torch.linspace(0.02, 0.98, 49).to(c), dim=0)  # [49, H]
    shares = torch.stack([share_right(c, marks, threshold, sign) for threshold in thresholds])
    k, unit = divmod(int(shares.argmax()), H)
    return unit, thresholds[k, unit], sign[unit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", default="gates.png")
    parser.add_argument("--steps", type=int, default=3000, help="how long to train")
    parser.add_argument(
        "--seed", type=int, default=2, help="another seed finds other units, perhaps worse ones"
    )
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = "".join(code(file) for name in PACKAGES for file in sorted((stdlib / name).rglob("*.py")))
    unseen = "".join(code(file) for file in sorted(Path(manual_lstm.__file__).parent.glob("*.py")))
    number = {c: k for k, c in enumerate(sorted(set(text + unseen + LINE)))}
    model = Characters(len(number))
    train(model, torch.tensor([number[c] for c in text]), arguments.steps)

    @torch.no_grad()
    def unroll(text: str) -> Unrolled:
        return model.lstm.unroll(model.embedding(torch.tensor([number[c] for c in text])))

    def cell_state(unrolled: Unrolled) -> Tensor:
        c = unrolled.c[0]
        assert isinstance(c, Tensor)
        return c  # [characters, H]

    seen = text[:60_000]
    c_seen, c_unseen = cell_state(unroll(seen)), cell_state(unroll(unseen))
    followers = {}
    for name, marks in inside(seen).items():
        unit, threshold, sign = best_unit(c_seen, marks)
        right = share_right(c_unseen[:, unit], inside(unseen)[name], threshold, sign)
        followers[name] = unit
        print(
            f"unit {unit} tells {name} from the rest: {100 * right:.1f}% right on files of manual_lstm"
        )

    unrolled = unroll(LINE)
    liveliest = cell_state(unrolled).tanh().std(0).argsort(descending=True).tolist()
    others = [unit for unit in liveliest if unit not in followers.values()][:10]
    labels = LINE.replace("\n", "↵").replace(" ", "␣")
    figure = unrolled.plot(labels=labels, units=[*followers.values(), *others])
    for axis in figure.axes:
        if axis.images:
            axis.set_yticks(range(len(followers)), followers)
    figure.savefig(arguments.file, dpi=110)


if __name__ == "__main__":
    main()
