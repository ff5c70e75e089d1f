"""What each method costs: seconds, memory and bytes by kind, never added up across kinds, and set against plain fine-tuning."""

import pandas as pd

from analysis import numbers
from analysis.load import Loaded
from analysis.statistics.comparison import mean_if_known

PLAIN = "full"
MEASURED = (
    "seconds_prepare",
    "tokens_prepare",
    "seconds_train",
    "tokens_trained",
    "tokens_added",
    "flops",
    "flops_added",
    "steps",
    "seconds_evaluate",
    "peak_memory_prepare_bytes",
    "peak_memory_train_bytes",
    "bytes_optimizer_state",
    "bytes_weights_delta",
    "bytes_importance",
    "bytes_start",
    "bytes_anchor",
)


def costs(loaded: Loaded) -> pd.DataFrame:
    """One row a (model, domain, method): the mean over its seeds of MEASURED, missing where a run does not know it, and

    reference                  `full` where it ran on the same hardware in the same study, else the method itself; '' if neither is known
    prepare_token_equivalents  seconds_prepare / (seconds_train / tokens_trained of the reference): the tokens it trains on meanwhile
    seconds_per_step           seconds_train / steps
    step_ratio                 seconds_per_step / that of `full`; each run had the machine's state of its own hour
    step_ratio_same_run        the same from results/bench/steps.json: median over rounds that time every method in turn
    same_run                   the race it is from
    reused                     whether any seed took its preparation from the store, with the seconds of when it was computed
    """
    rows = []
    for model, domain in loaded.comparisons:
        cells = loaded.of(model, domain)
        methods = dict.fromkeys(cells["method"])
        found = {method: _measured(loaded, cells[cells["method"] == method]) for method in methods}
        machine = {method: _machine(cells[cells["method"] == method].iloc[0]) for method in methods}
        for method, row in found.items():
            plain = found[PLAIN] if PLAIN in found and machine[PLAIN] == machine[method] else {}
            reference = PLAIN if _per(plain, "tokens_trained") else method if _per(row, "tokens_trained") else ""
            rate = _per(found[reference], "tokens_trained") if reference else None
            step, of_plain = _per(row, "steps"), _per(plain, "steps")
            rows.append(
                {
                    "model": model,
                    "domain": domain,
                    "method": method,
                    **row,
                    "reference": reference,
                    "prepare_token_equivalents": row["seconds_prepare"] / rate
                    if rate and row["seconds_prepare"] is not None
                    else None,
                    "seconds_per_step": step,
                    "step_ratio": step / of_plain if step and of_plain else None,
                    "step_ratio_same_run": same[0] if (same := same_run(loaded, model=model, method=method)) else None,
                    "same_run": same[1] if same else "",
                }
            )
    return pd.DataFrame(rows)


def same_run(loaded: Loaded, *, model: str, method: str) -> tuple[float, str] | None:
    """`method`'s median ratio to plain fine-tuning in the race of results/bench/steps.json on `model`, and the race's title.

    A race is on a model if its title begins with the model's name and a comma.
    """
    for path, record in loaded.bench.items():
        for race in record["races"] if path.stem == "steps" else ():
            for row in race["rows"]:
                if (row["runner"], race["against"], race["title"].split(",")[0]) == (method, PLAIN, model):
                    return row["ratio_median"], race["title"]
    return None


def _measured(loaded: Loaded, cells: pd.DataFrame) -> dict:
    prepared = [loaded.prepared.get(name, {}) for name in cells.index]
    own = cells.assign(
        peak_memory_prepare_bytes=[record.get("peak_memory_bytes") for record in prepared],
        # earlier records count what is carried into training as part of the start
        bytes_start=[
            record["bytes_start"] + record.get("bytes_carry", 0) if "bytes_start" in record else None
            for record in prepared
        ],
    )
    known = bool(cells["cost_known"].all()) if "cost_known" in cells else True
    mean = lambda key: mean_if_known(own[key]) if key in own else None
    # scoring is ours even where the checkpoint was made elsewhere
    return {key: mean(key) if known or key == "seconds_evaluate" else None for key in MEASURED} | {
        "reused": any(record.get("reused") for record in prepared)
    }


def _machine(cell: pd.Series) -> tuple:
    """What has to be equal before seconds are set against each other."""
    hardware = cell["hardware"] if isinstance(cell["hardware"], dict) else {}
    about = [*(hardware.get(key) for key in ("cpu", "cores", "gpu")), cell.get("device"), cell.get("processes")]
    return tuple(
        None if numbers.missing(value) else value for value in about
    )  # NaN, where a cell does not say, equals nothing


def _per(row: dict, key: str) -> float | None:
    """Seconds of training for one token or step."""
    seconds, number = row.get("seconds_train"), row.get(key)
    return seconds / number if seconds and number else None


SECONDS_HEADS = (
    "method",
    "preparation",
    "in training tokens",
    "training",
    "a training step",
    f"× {PLAIN}, between runs",
    f"× {PLAIN}, same run",
    "scoring",
)
BYTES_HEADS = (
    "method",
    "peak memory, preparation",
    "peak memory, training",
    "optimizer state",
    "tuned weights or adapter",
    "importance",
    "start",
    "anchor",
)


def seconds_row(row: pd.Series) -> list[tuple[str, str]]:
    """A method's row under SECONDS_HEADS: each cell its value and a note in small."""
    prepared = not numbers.missing(row["seconds_prepare"]) and numbers.seconds(row["seconds_prepare"]) != "0 s"
    return [
        (row["method"], ""),
        (numbers.seconds(row["seconds_prepare"]), "from the store" if row["reused"] else ""),
        (
            numbers.count(row["prepare_token_equivalents"]) if prepared else "–",
            f"{row['tokens_prepare']:,.0f} seen" if prepared and row["tokens_prepare"] > 0 else "",
        ),
        (numbers.seconds(row["seconds_train"]), _tokens(row)),
        (a_step(row["seconds_per_step"]), ""),
        (numbers.times(row["step_ratio"]), ""),
        (numbers.times(row["step_ratio_same_run"]), ""),
        (numbers.seconds(row["seconds_evaluate"]), ""),
    ]


def _tokens(row: pd.Series) -> str:
    """Tokens of the domain, and what the parts added to them, with the FLOPs as a share of the domain's."""
    if numbers.missing(row["tokens_trained"]):
        return ""
    text = f"{row['tokens_trained']:,.0f} tokens"
    if numbers.missing(row["tokens_added"]) or not row["tokens_added"]:
        return text
    known = not numbers.missing(row["flops_added"]) and not numbers.missing(row["flops"]) and row["flops"]
    share = f", +{row['flops_added'] / row['flops']:.0%} FLOPs" if known else ""
    return f"{text}, {row['tokens_added']:,.0f} added by parts{share}"


def a_step(value: float | None) -> str:
    """Seconds of one step, to three digits: steps of two methods differ by little."""
    return (
        numbers.seconds(value)
        if numbers.missing(value) or value >= 10
        else f"{value:.2f} s"
        if value >= 1
        else f"{1000 * value:.3g} ms"
    )


def bytes_row(row: pd.Series) -> list[tuple[str, str]]:
    """A method's row under BYTES_HEADS."""
    keys = (
        "peak_memory_prepare_bytes",
        "peak_memory_train_bytes",
        "bytes_optimizer_state",
        "bytes_weights_delta",
        "bytes_importance",
        "bytes_start",
        "bytes_anchor",
    )
    return [(row["method"], ""), *(("–" if row[key] == 0 else numbers.size(row[key]), "") for key in keys)]


def formula(rows: pd.DataFrame) -> list[str]:
    """How the derived columns come about; `rows` are of one comparison."""
    own = [row["method"] for _, row in rows.iterrows() if row["reference"] == row["method"] != PLAIN]
    plain = PLAIN if PLAIN in set(rows["reference"]) else "the method itself"
    lines = [
        f"in training tokens = seconds of preparation ÷ (seconds of training ÷ tokens trained, of {plain}): what could have been trained on meanwhile"
        + (
            f" (for {', '.join(own)} of the method itself: no {PLAIN} run on the same machine)."
            if own and plain == PLAIN
            else "."
        )
    ]
    lines += [
        f"× {PLAIN}, between runs = (seconds of training ÷ steps) ÷ the same of {PLAIN}: two runs of this study at different hours, so a busy machine shows in it.",
        f"× {PLAIN}, same run: the median over rounds of results/bench/steps.json, where the methods' steps are timed in turn in one process"
        + (
            f" ({'; '.join(races)})."
            if (races := [race for race in dict.fromkeys(rows["same_run"]) if race])
            else "; not measured on this model (python -m experiments bench steps)."
        ),
        "Nothing is added up across kinds. – is nothing of the kind, or not measured; unknown is a checkpoint made elsewhere.",
    ]
    if rows["reused"].any():
        lines.append("from the store: the same preparation had been computed before; its seconds are of then.")
    return lines


def as_markdown(loaded: Loaded) -> str:
    """The tables of seconds and of bytes, for each comparison; empty where no cell has finished."""
    lines, table = [], costs(loaded)
    for (model, domain), rows in table.groupby(["model", "domain"], sort=False) if len(table) else ():
        for heads, show in ((SECONDS_HEADS, seconds_row), (BYTES_HEADS, bytes_row)):
            lines += [
                *(["", f"### Cost: {model}, {domain}"] if show is seconds_row else []),
                "",
                f"| {' | '.join(heads)} |",
                f"|:--|{'--:|' * (len(heads) - 1)}",
            ]
            lines += [
                f"| {' | '.join(f'{value} ({note})' if note else value for value, note in show(row))} |"
                for _, row in rows.iterrows()
            ]
        lines += ["", *(f"- {line}" for line in formula(rows))]
    return "\n".join(lines) + "\n" if lines else ""
