"""The cells of manual_lstm.cells, and the equations of their papers."""

from manual_lstm import ManualLSTM, cells
from tests.helpers import equations
from tests.helpers.equations import Equations

RECIPES: dict[str, type[ManualLSTM]] = {
    cls.__name__: cls
    for cls in (
        cells.LayerNormLSTM,
        cells.PeepholeLSTM,
        cells.CoupledLSTM,
        cells.ZoneoutLSTM,
        cells.VariationalLSTM,
        cells.HardSigmoidLSTM,
    )
}
EQUATIONS: dict[str, Equations] = {
    "LayerNormLSTM": equations.layer_norm,
    "PeepholeLSTM": equations.peephole,
    "CoupledLSTM": equations.coupled,
    "ZoneoutLSTM": equations.zoneout,
    "VariationalLSTM": equations.variational,
    "HardSigmoidLSTM": equations.hard_sigmoid,
}
