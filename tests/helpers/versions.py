"""What older versions of torch cannot do, as marks that say so."""

import pytest

from manual_lstm.engine.context import scan_compiles

compiles_scan = pytest.mark.skipif(
    not scan_compiles,
    reason="before 2.13 torch refuses to compile the scan of most cells; they are unrolled",
)
