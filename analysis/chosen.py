"""Choose which block of a swept family to report: by probe rows at the end of training, never by a test row.

The rule is that of the tuning trials (`python -m experiments tune`): the highest objective, which is domain gain minus
forgetting in accuracy on probe rows, with forgetting the mean loss over the probe tasks. Blocks less than half a point
below the best count as equal, and of these the one with the lowest perplexity on the probe passages wins. Base scores
are the same for all blocks of a (model, domain), so the objective here leaves them out: domain probe + mean of the
probe tasks.
"""

import pandas as pd

from analysis.families import families
from analysis.load import Loaded

EQUAL = 0.005  # half a point, as in experiments/commands/tune.py
PREFIX = "probe_"
SCORES = ["domain_probe", "retention_probe", "perplexity_probe", "objective"]
COLUMNS = ["family", "method", "seeds", *SCORES, "chosen"]


def chosen(loaded: Loaded, family: str, *, model: str, domain: str) -> str | None:
    """The chosen block of a family; None if none of its blocks has probe scores on a domain that has accuracy."""
    table = choices(loaded, model=model, domain=domain)
    blocks = table[(table["family"] == family) & table["chosen"]]["method"]
    return None if blocks.empty else str(blocks.iloc[0])


def reported(loaded: Loaded) -> Loaded:
    """The results with one block per family, so that no setting is picked by its test scores.

    It is the chosen block; in a family without probe scores the method itself, or else its first block.
    """
    dropped: list[str] = []
    for model, domain in loaded.comparisons:
        cells, table = loaded.of(model, domain), choices(loaded, model=model, domain=domain)
        picked = set(table[table["chosen"]]["method"])
        for name, blocks in families(dict.fromkeys(cells["method"])).items():
            kept = next((block for block in blocks if block in picked), name if name in blocks else blocks[0])
            dropped += list(cells.index[cells["method"].isin(set(blocks) - {kept})])
    return loaded.without(dropped) if dropped else loaded


def choices(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    """One row per block, families together: family, method, seeds, the three probe scores, objective, chosen.

    Scores are those of a run's last step, averaged over the seeds that all probed blocks of the family share. A block
    that was not probed to the end, or shares no seed with the others, has no score and is not chosen. A family of one
    block needs no choice but is marked in the same way.
    """
    ends = _ends(loaded, model=model, domain=domain)
    rows = []
    cells = loaded.of(model, domain)
    for name, blocks in families(dict.fromkeys(cells["method"]) if len(cells) else ()).items():
        probed = [seeds for block in blocks if (seeds := {seed for method, seed in ends if method == block})]
        common = sorted(set.intersection(*probed)) if probed else []
        own = []
        for block in blocks:
            scores = [ends[block, seed] for seed in common if (block, seed) in ends]
            mean = pd.DataFrame(scores).mean() if scores else dict.fromkeys(SCORES)
            row = {"family": name, "method": block, "seeds": len(scores), "chosen": False}
            own.append(row | {key: mean[key] for key in SCORES})
        if scored := [row for row in own if row["seeds"]]:
            best = max(row["objective"] for row in scored)
            equal = [row for row in scored if row["objective"] > best - EQUAL]
            min(equal, key=lambda row: row["perplexity_probe"])["chosen"] = True
        rows += own
    return pd.DataFrame(rows, columns=COLUMNS)


def _ends(loaded: Loaded, *, model: str, domain: str) -> dict[tuple[str, int], dict[str, float]]:
    """The probe scores at the last step of each finished run, by (method, seed)."""
    ends = {}
    for cell, run in loaded.curves.groupby("cell", sort=False) if len(loaded.curves) else ():
        if cell not in loaded.cells.index or tuple(cell.split("/")[:2]) != (model, domain):
            continue
        last = run.loc[run["step"].idxmax()].dropna()
        scores = {key.removeprefix(PREFIX): value for key, value in last.items() if key.startswith(PREFIX)}
        tasks = [key for key in scores if key not in (domain, "perplexity") and not key.endswith("_nll")]
        if domain not in scores or not tasks or "perplexity" not in scores:
            continue
        retention = sum(scores[task] for task in tasks) / len(tasks)
        values = (scores[domain], retention, scores["perplexity"], scores[domain] + retention)
        ends[loaded.cells.at[cell, "method"], int(loaded.cells.at[cell, "seed"])] = dict(zip(SCORES, values))
    return ends
