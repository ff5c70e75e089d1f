"""The families of a screen in the order of what they lose on probe rows at one gain."""

import math

import numpy as np
import pandas as pd
import pytest

from analysis import leaders
from analysis.load import Loaded


def screened(ends):
    """Runs method -> (gain, loss) on probe rows, each from 2 nats of the domain and 3 of general text."""
    cells, curves = [], []
    for method, (gain, lost) in ends.items():
        cell = f"m/math/{method}/seed0"
        cells.append({"cell": cell, "model": "m", "domain": "math", "method": method, "seed": 0, "parts": {}})
        for step, share in ((0, 0.0), (1, 5.0), (8, 1.0)):
            row = {"probe_math_nll": 2 - share * gain, "probe_general_nll": 3 + share * lost}
            curves.append({"cell": cell, "step": step} | row)
    frame = pd.DataFrame(cells).set_index("cell", drop=False)
    return Loaded(cells=frame, curves=pd.DataFrame(curves), items=pd.DataFrame(), failures=pd.DataFrame())


def test_the_order_is_that_of_the_loss_at_nearly_the_plain_gain():
    ends = {
        "full": (0.36, 0.10),
        "full-s1": (0.4, 0.20),
        "full-s2": (0.38, 0.40),  # beaten by full-s1
        "kl": (0.34, 0.02),
        "kl-s1": (0.42, 0.06),
        "quick": (0.6, 0.05),  # gains more than L at its first setting: its loss there
        "slow": (0.37, 0.01),  # never gains L
    }
    level, table = leaders.ranking(screened(ends), model="m", domain="math")
    assert level == pytest.approx(0.95 * 0.4) and list(table["family"]) == ["kl", "quick", "full", "slow"]
    assert np.allclose(table["lost"][:3], [0.04, 0.05, 0.15]) and math.isnan(table["lost"][3])
    full = table.set_index("family").loc["full"]
    assert full["chosen"] == "full-s1"
    assert full["gains"]["full-s2"] == pytest.approx(0.38) and full["losses"]["full-s2"] == pytest.approx(0.40)


def test_what_a_method_prepared_is_part_of_what_it_gained_and_lost():
    """A warm-up on general text lowers its nats before the first step, and is not counted as a loss of them later."""
    loaded = screened({"full": (0.5, 0.2), "warm": (0.4, 0.1)})
    warm = loaded.curves["cell"] == "m/math/warm/seed0"
    loaded.curves.loc[warm & (loaded.curves["step"] == 0), ["probe_math_nll", "probe_general_nll"]] = [1.9, 2.8]
    loaded.prepared["m/math/warm/seed0"] = {"bytes_start": 7}
    table = leaders.ranking(loaded, model="m", domain="math")[1].set_index("family")
    assert table.at["warm", "gains"]["warm"] == pytest.approx(0.4)
    assert table.at["warm", "losses"]["warm"] == pytest.approx(0.1)


def test_without_plain_fine_tuning_there_is_no_level():
    with pytest.raises(ValueError, match="full was not probed on math"):
        leaders.ranking(screened({"kl": (0.3, 0.02)}), model="m", domain="math")
