"""The shapes that are measured, in groups. Each group answers another question."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A layer and its input.

    Attributes:
        T, B, I, H: steps, batch, input size, hidden size.
        layers: how many are stacked.
        bidirectional: whether each also runs backwards in time.
        packed: whether the input is a PackedSequence, of unsorted lengths drawn uniformly from 1..T.
    """

    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False

    @property
    def shape(self) -> str:
        return f"{self.T},{self.B},{self.I},{self.H}"

    def __str__(self) -> str:
        extra = [f"{self.layers} layers"] if self.layers > 1 else []
        extra += ["bidirectional"] if self.bidirectional else []
        extra += ["packed"] if self.packed else []
        return " ".join([self.shape, *extra])


@dataclass(frozen=True)
class Group:
    """Cases that belong together. The title is what the table prints above them."""

    title: str
    cases: tuple[Case, ...]


GROUPS = {
    "one-step": Group(
        "one step: the notebook's, and two of streaming",
        (Case(1, 100, 6, 32), Case(1, 1, 80, 256), Case(1, 16, 512, 512)),
    ),
    "overhead": Group(
        "overhead-bound: steps so small that calling costs more than computing",
        (Case(28, 64, 28, 128), Case(50, 32, 64, 64), Case(100, 1, 128, 256)),
    ),
    "arithmetic": Group(
        "arithmetic-bound: large products",
        (
            Case(100, 32, 256, 256),
            Case(50, 16, 512, 512),
            Case(35, 20, 650, 650),
            Case(20, 128, 512, 1024),
        ),
    ),
    "one-sequence": Group("one long sequence", (Case(200, 1, 80, 512),)),
    "single": Group(
        "one layer, one direction, to compare with the next group", (Case(50, 16, 256, 256),)
    ),
    "two-layers": Group(
        "two layers, bidirectional",
        (
            Case(50, 16, 256, 256, layers=2, bidirectional=True),
            Case(28, 64, 28, 128, layers=2, bidirectional=True),
        ),
    ),
    "packed": Group(
        "packed, not sorted, lengths uniform in 1..T", (Case(100, 32, 256, 256, packed=True),)
    ),
}

# The cases of each group that say most in the least time.
QUICK = {
    Case(1, 100, 6, 32),
    Case(1, 1, 80, 256),
    Case(28, 64, 28, 128),
    Case(100, 32, 256, 256),
    Case(50, 16, 512, 512),
    Case(200, 1, 80, 512),
    Case(28, 64, 28, 128, layers=2, bidirectional=True),
    Case(100, 32, 256, 256, packed=True),
}


def quick_groups(groups: dict[str, Group]) -> dict[str, Group]:
    """Return the groups with their quick cases only, without groups that have none."""
    quick_cases = {
        name: Group(group.title, tuple(case for case in group.cases if case in QUICK))
        for name, group in groups.items()
    }
    return {name: group for name, group in quick_cases.items() if group.cases}


def parse_shapes(text: str) -> tuple[Case, ...]:
    """Read ``T,B,I,H;T,B,I,H;...``. Raises ValueError, which says what is wrong."""
    cases = []
    for part in text.split(";"):
        try:
            T, B, I, H = (int(number) for number in part.split(","))
        except ValueError:
            raise ValueError(f"a shape is T,B,I,H, four whole numbers, but got {part!r}") from None
        if min(T, B, I, H) < 1:
            raise ValueError(f"a shape's numbers should be positive, but got {part!r}")
        cases.append(Case(T, B, I, H))
    return tuple(cases)
