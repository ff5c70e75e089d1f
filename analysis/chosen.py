"""Which block of a swept family to report: chosen on probe rows at the end of training, never on a test row.

The rule is that of the trials (`python -m experiments tune`): the highest objective, domain gain minus forgetting in accuracy on
probe rows, where forgetting is the mean loss over the probe tasks; blocks less than half a point below the best count as equal,
and of these the lowest perplexity on the probe passages wins. Base scores are the same for all blocks of a (model, domain), so
they do not enter a choice, and the objective is written here without them: domain probe + mean of the probe tasks.
"""

import pandas as pd

from analysis.families import families
from analysis.load import Loaded

EQUAL = 0.005  # half a point, as in experiments/commands/tune.py
PREFIX = "probe_"
COLUMNS = ["family", "method", "seeds", "domain_probe", "retention_probe", "perplexity_probe", "objective", "chosen"]


def chosen(loaded: Loaded, family: str, *, model: str, domain: str) -> str | None:
    """The chosen block of a family; None where none of its blocks has probe scores on a domain that has accuracy."""
    table = choices(loaded, model=model, domain=domain)
    found = table[(table["family"] == family) & table["chosen"]]
    return None if found.empty else str(found.iloc[0]["method"])


def reported(loaded: Loaded) -> Loaded:
    """The results with one block a family: what a comparison speaks of, so that no setting is picked by its test scores.

    It is the chosen block; in a family without probe scores the method itself, or its first block.
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
    """A row a block, families together: family, method, seeds, the three probe scores, objective, chosen.

    Scores are of a run's last step, the mean over the seeds that all probed blocks of the family have. What was not probed to the
    end, or shares no seed with the others of its family, has no score and is not chosen; a family of one block needs no choice but
    is marked likewise.
    """
    ends = _ends(loaded, model=model, domain=domain)
    rows = []
    for name, blocks in (
        families(dict.fromkeys(loaded.of(model, domain)["method"])).items() if len(loaded.cells) else ()
    ):
        seeds = {block: {seed for method, seed in ends if method == block} for block in blocks}
        common = set.intersection(*(found for found in seeds.values() if found)) if any(seeds.values()) else set()
        own = []
        for block in blocks:
            scores = [ends[block, seed] for seed in sorted(common) if (block, seed) in ends]
            mean = pd.DataFrame(scores).mean() if scores else dict.fromkeys(COLUMNS[3:7])
            own.append(
                {
                    "family": name,
                    "method": block,
                    "seeds": len(scores),
                    **{key: mean[key] for key in COLUMNS[3:7]},
                    "chosen": False,
                }
            )
        done = [row for row in own if row["seeds"]]
        if done:
            best = max(row["objective"] for row in done)
            min((row for row in done if row["objective"] > best - EQUAL), key=lambda row: row["perplexity_probe"])[
                "chosen"
            ] = True
        rows += own
    return pd.DataFrame(rows, columns=COLUMNS)


def _ends(loaded: Loaded, *, model: str, domain: str) -> dict[tuple[str, int], dict[str, float]]:
    """The probe scores at the last step of each finished run, by (method, seed)."""
    found = {}
    for cell, run in loaded.curves.groupby("cell", sort=False) if len(loaded.curves) else ():
        if cell not in loaded.cells.index or tuple(cell.split("/")[:2]) != (model, domain):
            continue
        last = run.loc[run["step"].idxmax()]
        scores = {
            key.removeprefix(PREFIX): value for key, value in last.items() if key.startswith(PREFIX) and pd.notna(value)
        }
        tasks = [key for key in scores if key not in (domain, "perplexity") and not key.endswith("_nll")]
        if domain not in scores or not tasks or "perplexity" not in scores:
            continue
        retention = sum(scores[task] for task in tasks) / len(tasks)
        row = loaded.cells.loc[cell]
        found[row["method"], int(row["seed"])] = {
            "domain_probe": scores[domain],
            "retention_probe": retention,
            "perplexity_probe": scores["perplexity"],
            "objective": scores[domain] + retention,
        }
    return found
