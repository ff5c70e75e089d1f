"""What each method costs: seconds, memory and bytes by kind, and relative to plain fine-tuning."""

import pandas as pd

from analysis import numbers, words
from analysis.load import Loaded
from analysis.roles import PLAIN
from analysis.statistics.comparison import mean_if_known

BYTES = {
    "peak_memory_prepare_bytes": "peak memory, preparation",
    "peak_memory_train_bytes": "peak memory, training",
    "bytes_optimizer_state": "optimizer state",
    "bytes_weights_delta": "tuned weights or adapter",
    "bytes_importance": "importance",
    "bytes_start": "start",
    "bytes_anchor": "anchor",
}
TRAINING = ("seconds_train", "tokens_trained", "tokens_added", "flops", "flops_added", "steps")
MEASURED = ("seconds_prepare", "tokens_prepare", *TRAINING, "seconds_evaluate", *BYTES)


def costs(loaded: Loaded, *pairs: tuple[str, str]) -> pd.DataFrame:
    """One row per (model, domain, method) of `pairs`, by default of all: MEASURED, the mean over its seeds, None if a
    run lacks it, and

    reused                     whether a seed took its preparation from the store, with the seconds of its computation,
                               which then count once in the mean
    training_reused            whether a seed took the training of another method, with the costs of that training
    timings_prepare, timings_train
                               how often the preparation and the training were timed for this method
    reference                  `full` if it ran on the same hardware in this study, else the method itself, or ''
    prepare_token_equivalents  seconds_prepare / (seconds_train / tokens_trained of the reference): the number of tokens
                               that could have been trained on meanwhile
    seconds_per_step           seconds_train / steps
    step_ratio                 seconds_per_step / that of `full`, of runs at different hours
    step_ratio_same_run        the same from results/bench/steps.json, the median over rounds that time all methods
    same_run                   the title of that race, and its number of rounds in `same_run_rounds`
    """
    rows = []
    for model, domain in pairs or loaded.comparisons:
        groups = dict(list(loaded.of(model, domain).groupby("method", sort=False)))
        measured = {method: _measured(loaded, cells) for method, cells in groups.items()}
        machine = {method: _machine(cells.iloc[0]) for method, cells in groups.items()}
        for method, row in measured.items():
            plain = measured[PLAIN] if PLAIN in measured and machine[PLAIN] == machine[method] else {}
            reference = PLAIN if _per(plain, "tokens_trained") else method if _per(row, "tokens_trained") else ""
            rate = _per(measured[reference], "tokens_trained") if reference else None
            step, of_plain = _per(row, "steps"), _per(plain, "steps")
            race = same_run(loaded, model=model, method=method)
            prepare = row["seconds_prepare"]
            row = {"model": model, "domain": domain, "method": method, **row, "reference": reference}
            row["prepare_token_equivalents"] = prepare / rate if rate and prepare is not None else None
            row["seconds_per_step"], row["step_ratio"] = step, step / of_plain if step and of_plain else None
            row["step_ratio_same_run"], row["same_run"], row["same_run_rounds"] = race or (None, "", 0)
            rows.append(row)
    return pd.DataFrame(rows)


def same_run(loaded: Loaded, *, model: str, method: str) -> tuple[float, str, int] | None:
    """The median ratio of `method` to plain fine-tuning in the race of results/bench/steps.json on `model`; its title
    and number of rounds.

    A race is on a model if its title begins with the model's name and a comma.
    """
    for path, record in loaded.bench.items():
        for race in record["races"] if path.stem == "steps" else ():
            for row in race["rows"]:
                if (row["runner"], race["against"], race["title"].split(",")[0]) == (method, PLAIN, model):
                    return row["ratio_median"], race["title"], race["rounds"]
    return None


def added(loaded: Loaded) -> pd.DataFrame:
    """One row per (model, domain, method, part) for which anything is recorded, means over the method's seeds:

    prepare_K, train_K   what the part added in the preparation and in the training, K of ADDED; None if a run lacks it
    flops                of the domain's rows in the training, which the two are shown against
    """
    rows = []
    for model, domain in loaded.comparisons:
        for method, cells in loaded.of(model, domain).groupby("method", sort=False):
            known = [value if isinstance(value, dict) else {} for value in cells.get("added", [])]
            phases = {phase: [each.get(phase) or {} for each in known] for phase in ("prepare", "train")}
            for part in sorted({name for each in phases.values() for costs in each for name in costs}):
                row = {"model": model, "domain": domain, "method": method, "part": part}
                for phase, each in phases.items():
                    for kind in ADDED:
                        values = pd.Series([costs.get(part, {}).get(kind, 0) for costs in each], dtype=object)
                        row[f"{phase}_{kind}"] = mean_if_known(values)
                rows.append(row | {"flops": mean_if_known(cells["flops"]) if "flops" in cells else None})
    kinds = [f"{phase}_{kind}" for phase in ("prepare", "train") for kind in ADDED]
    return pd.DataFrame(rows, columns=["model", "domain", "method", "part", *kinds, "flops"])


def _measured(loaded: Loaded, cells: pd.DataFrame) -> dict:
    prepared = [loaded.prepared.get(name, {}) for name in cells.index]
    # earlier records count what is carried into training as part of the start
    starts = [r["bytes_start"] + r.get("bytes_carry", 0) if "bytes_start" in r else None for r in prepared]
    peaks = [record.get("peak_memory_bytes") for record in prepared]
    own = cells.assign(peak_memory_prepare_bytes=peaks, bytes_start=starts)
    known = bool(cells["cost_known"].all()) if "cost_known" in cells else True
    # scoring is measured here even for a checkpoint that was made elsewhere
    keys = [key for key in MEASURED if key in own and (known or key == "seconds_evaluate")]
    means = {key: mean_if_known(own[key]) for key in keys}
    shared = cells["training_reused"].eq(True) if "training_reused" in cells else cells["seed"] < 0
    reused = {"reused": any(record.get("reused") for record in prepared), "training_reused": bool(shared.any())}
    reused |= {"timings_prepare": 0, "timings_train": int((~shared).sum()) if known else 0}
    if known and means.get("seconds_prepare") is not None:
        stored = pd.Series([record.get("seconds_prepare") for record in prepared], index=cells.index, dtype=float)
        once = own["seconds_prepare"].groupby(stored.fillna(own["seconds_prepare"])).mean()
        means["seconds_prepare"], reused["timings_prepare"] = mean_if_known(once), len(once)
    return dict.fromkeys(MEASURED) | means | reused


def _machine(cell: pd.Series) -> tuple:
    """What has to be equal before seconds are compared."""
    hardware = cell["hardware"] if isinstance(cell["hardware"], dict) else {}
    values = [*(hardware.get(key) for key in ("cpu", "cores", "gpu")), cell.get("device"), cell.get("processes")]
    return tuple(None if numbers.missing(value) else value for value in values)  # NaN is not equal to itself


def _per(row: dict, key: str) -> float | None:
    """Seconds of training per token or step."""
    seconds, number = row.get("seconds_train"), row.get(key)
    return seconds / number if seconds and number else None


STEP = f"× {PLAIN}, between runs", f"× {PLAIN}, same run"
SECONDS_HEADS = ("method", "preparation", "in training tokens", "training", "a training step", *STEP, "scoring")
BYTES_HEADS = ("method", *BYTES.values())
ADDED = ("tokens", "flops", "seconds", "bytes")
PARTS_HEADS = (
    "method",
    "part",
    *(f"preparation: {kind}" for kind in ("tokens", "FLOPs", "seconds", "stored")),
    *(f"training: {kind}" for kind in ("tokens", "FLOPs", "seconds in its hooks", "bytes")),
)


def seconds_row(row: pd.Series) -> list[tuple[str, str]]:
    """A method's row under SECONDS_HEADS: each cell is a value and a small note."""
    prepared = not numbers.missing(row["seconds_prepare"]) and numbers.seconds(row["seconds_prepare"]) != "0 s"
    seen = f"{row['tokens_prepare']:,.0f} seen" if prepared and row["tokens_prepare"] > 0 else ""
    return [
        (row["method"], ""),
        (numbers.seconds(row["seconds_prepare"]), _timed(row) if prepared else ""),
        (numbers.count(row["prepare_token_equivalents"]) if prepared else "–", seen),
        (numbers.seconds(row["seconds_train"]), _tokens(row)),
        (_step(row["seconds_per_step"]), ""),
        (numbers.times(row["step_ratio"]), ""),
        (numbers.times(row["step_ratio_same_run"]), "one round" if row["same_run_rounds"] == 1 else ""),
        (numbers.seconds(row["seconds_evaluate"]), ""),
    ]


def _timed(row: pd.Series) -> str:
    """How often the preparation was timed, and whether it came from the store."""
    count = "timed once" if row["timings_prepare"] == 1 else f"timed {row['timings_prepare']} times"
    return f"{count}, from the store" if row["reused"] else count


def _tokens(row: pd.Series) -> str:
    """Tokens of the domain, and what the parts added to them, with the FLOPs as a share of the domain's."""
    if numbers.missing(row["tokens_trained"]):
        return ""
    text = f"{row['tokens_trained']:,.0f} tokens{', shared' if row['training_reused'] else ''}"
    if numbers.missing(row["tokens_added"]) or not row["tokens_added"]:
        return text
    known = not numbers.missing(row["flops_added"]) and not numbers.missing(row["flops"]) and row["flops"]
    share = f", +{row['flops_added'] / row['flops']:.0%} FLOPs" if known else ""
    return f"{text}, {row['tokens_added']:,.0f} added by parts{share}"


def _step(value: float | None) -> str:
    """Seconds of one step, to three digits, because the steps of two methods differ by little."""
    if numbers.missing(value) or value >= 10:
        return numbers.seconds(value)
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def bytes_row(row: pd.Series) -> list[tuple[str, str]]:
    """A method's row under BYTES_HEADS."""
    return [(row["method"], ""), *(("–" if row[key] == 0 else numbers.size(row[key]), "") for key in BYTES)]


def part_row(row: pd.Series) -> list[tuple[str, str]]:
    """A part's row under PARTS_HEADS; FLOPs are a share of those of the domain's rows in the training."""
    cells = [(row["method"], ""), (row["part"], "")]
    for phase in ("prepare", "train"):
        tokens, flops, seconds, size = (row[f"{phase}_{kind}"] for kind in ADDED)
        shown = "unknown" if numbers.missing(flops) or not row["flops"] else f"{flops / row['flops']:.1%}"
        cells += [
            ("–" if tokens == 0 else numbers.count(tokens), ""),
            ("–" if flops == 0 else shown, ""),
            ("–" if seconds == 0 else numbers.seconds(seconds), ""),
            ("–" if size == 0 else numbers.size(size), ""),
        ]
    return cells


def formula(rows: pd.DataFrame) -> list[str]:
    """How the derived columns are computed; `rows` are of one comparison."""
    own = [row["method"] for _, row in rows.iterrows() if row["reference"] == row["method"] != PLAIN]
    plain = PLAIN if PLAIN in set(rows["reference"]) else "the method itself"
    but = ""
    if own and plain == PLAIN:
        but = f" (for {words.few(own)} of the method itself: no {PLAIN} run on the same machine)"
    named = dict(zip(rows["same_run"], rows["same_run_rounds"]))
    races = [f"{race}, {n} round{'s' if n != 1 else ''}" for race, n in named.items() if race]
    measured = f" ({'; '.join(races)})" if races else "; not measured on this model (python -m experiments bench steps)"
    lines = [
        f"In training tokens = seconds of preparation ÷ (seconds of training ÷ tokens trained, of {plain}): what could "
        f"have been trained on meanwhile{but}.",
        f"{STEP[0]} = (seconds of training ÷ steps) ÷ the same of {PLAIN}: two runs of this study at different hours, "
        "so a busy machine affects it.",
        f"{STEP[1]}: the median over rounds of results/bench/steps.json, which times the methods' steps in turn in "
        f"one process{measured}.",
        "Of a part: FLOPs are a share of those of the domain's rows in the training; the seconds of its hooks are the "
        "host's and are contained in those of the training, but for what the engine does on its behalf.",
        "Kinds of cost are never added up. – means nothing of the kind, or not measured; unknown means a checkpoint "
        "made elsewhere.",
    ]
    if rows["reused"].any():
        lines.append(
            "From the store: the same preparation had been computed before; its seconds are of then and count once."
        )
    if rows["training_reused"].any():
        lines.append("Shared: one training from which several methods begin and differ after it; each shows its costs.")
    return lines


def as_markdown(loaded: Loaded) -> str:
    """The tables of seconds and of bytes for each comparison; empty if no cell has finished."""
    lines, table, by_part = [], costs(loaded), added(loaded)
    for (model, domain), rows in table.groupby(["model", "domain"], sort=False) if len(table) else ():
        lines += ["", f"### Cost: {model}, {domain}"]
        parts = by_part[(by_part["model"] == model) & (by_part["domain"] == domain)]
        for heads, show, of_table in (
            (SECONDS_HEADS, seconds_row, rows),
            (BYTES_HEADS, bytes_row, rows),
            (PARTS_HEADS, part_row, parts),
        ):
            if not len(of_table):
                continue
            lines += ["", f"| {' | '.join(heads)} |", f"|:--|{'--:|' * (len(heads) - 1)}"]
            for _, row in of_table.iterrows():
                cells = [f"{value} ({note})" if note else value for value, note in show(row)]
                lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- {line}" for line in formula(rows))]
    return "\n".join(lines) + "\n" if lines else ""
