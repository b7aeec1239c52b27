"""The table of methods names classes that exist, and imports no torch for a config."""

from __future__ import annotations

import subprocess
import sys

from loopos.methods.table import METHODS, config_classes, method_class


def test_every_row_names_a_config_and_a_trainer() -> None:
    assert ("posttraining", "fine_tuning") in METHODS
    classes = config_classes()
    assert list(classes) == list(METHODS)
    for mode, method in METHODS:
        assert classes[mode, method].model_fields["computation"]
        assert callable(method_class(mode, method))


def test_config_classes_need_no_torch() -> None:
    program = "import sys; from loopos.methods.table import config_classes; list(config_classes().values()); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"
