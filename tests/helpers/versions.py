"""What older versions of torch cannot do, as marks that say so."""

import pytest
import torch

from manual_lstm.engine.context import scan_compiles

compiles_scan = pytest.mark.skipif(
    not scan_compiles,
    reason="before 2.13 torch refuses to compile the scan of most cells; they are unrolled",
)

compiles_packing = pytest.mark.skipif(
    torch.__version__ >= "2.12" and torch.__version__ < "2.13",
    reason="torch 2.12 does not compile code that makes a PackedSequence and looks into it",
)
