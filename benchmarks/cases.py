"""The shapes that are measured, in groups. Each group answers another question."""

from dataclasses import dataclass, field, replace


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

    @property
    def extra(self) -> list[str]:
        """What it is besides its shape, in words."""
        extra = [f"{self.layers} layers"] if self.layers > 1 else []
        extra += ["bidirectional"] if self.bidirectional else []
        extra += ["packed"] if self.packed else []
        return extra

    def __str__(self) -> str:
        return " ".join([self.shape, *self.extra])


@dataclass(frozen=True)
class Group:
    """Cases that belong together.

    Attributes:
        title: what the table prints above them.
        cases: the cases.
        notes: what the table prints above some of them.
    """

    title: str
    cases: tuple[Case, ...]
    notes: dict[Case, str] = field(default_factory=dict)


# Sizes of published models, and how they are run: what each does, and the project that publishes it.
MODELS = {
    Case(293, 1, 60, 128, 4, True): "speech segmentation (pyannote)",
    Case(300, 1, 150, 150, 2): "beat tracking (BeatNet)",
    Case(15, 1, 64, 64, 2, True): "Uzbek morphology",
    Case(85, 1, 64, 150, 2, True): "language identification (gssc)",
    Case(140, 1, 128, 256, 3, True): "diacritics of Arabic",
    Case(160, 13, 40, 256, 3): "speaker embedding (Resemblyzer)",
    Case(47, 64, 256, 256, 2): "names, character by character",
    Case(32, 8, 512, 256, 2, True): "reading text in images (CRNN)",
    Case(2000, 1, 1, 24): "guitar amplifier, a sample a step",
    Case(2, 1, 64, 64): "two steps",
}


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
    "models": Group(
        "published models at their own sizes",
        tuple(MODELS),
        {case: ", ".join([name, *case.extra]) for case, name in MODELS.items()},
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
        name: replace(group, cases=tuple(case for case in group.cases if case in QUICK))
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
