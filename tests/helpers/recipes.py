"""The cells of manual_lstm/README.md, made from its text: whoever copies one copies what is tested."""

import re
from pathlib import Path
from typing import Any

from manual_lstm import ManualLSTM
from tests.helpers import equations
from tests.helpers.equations import Equations

_ROOT = Path(__file__).parent.parent.parent
_README = (_ROOT / "manual_lstm" / "README.md").read_text(encoding="utf-8")
_section = _README.split("\n## Change the cell\n")[1].split("\n## ")[0]
# One text for each cell: blank lines part them.
TEXTS = re.findall(r"```python\n(.*?)```", _section, re.DOTALL)[0].split("\n\n\n")

# Run here, so that pickle finds the classes.
exec(compile("\n\n\n".join(TEXTS), "manual_lstm/README.md", "exec"))

_found: dict[str, Any] = dict(globals())
RECIPES: dict[str, type[ManualLSTM]] = {
    name: found
    for name, found in _found.items()
    if isinstance(found, type) and issubclass(found, ManualLSTM) and found is not ManualLSTM
}
EQUATIONS: dict[str, Equations] = {
    "LayerNormLSTM": equations.layer_norm,
    "PeepholeLSTM": equations.peephole,
    "CoupledLSTM": equations.coupled,
    "ZoneoutLSTM": equations.zoneout,
    "VariationalLSTM": equations.variational,
    "HardSigmoidLSTM": equations.hard_sigmoid,
}
