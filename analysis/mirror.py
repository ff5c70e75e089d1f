"""What a dashboard's run of one cell holds, as plain values: parameters, points, tags, data sets, times.

No dashboard is imported here: `experiments.tracking` writes this into MLflow.
"""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime

import pandas as pd

from analysis.load import Loaded

SCALARS = (
    "domain_score", "domain_score_base", "domain_gain", "general_score", "general_score_base", "forgetting", "general_perplexity", "general_perplexity_base",
    "general_bits_per_byte", "seconds_prepare", "seconds_train", "seconds_evaluate", "peak_memory_bytes", "bytes_importance", "bytes_anchor",
    "bytes_weights_delta", "bytes_optimizer_state", "tokens_trained", "tokens_prepare", "tokens_per_second",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run. `metrics` are (key, value, milliseconds since 1970, step); `datasets` are (name, digest, rows, role)."""

    cell: str
    title: str
    status: str
    start: int
    end: int
    tags: dict[str, str]
    parameters: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    datasets: list[tuple[str, str, int | None, str]] = field(default_factory=list)
    environment: dict | None = None


def run_of(loaded: Loaded, cell: str) -> Run | None:
    """The run of a finished or failed cell; None for one that has not been run."""
    failure = next((row for row in loaded.failures.to_dict("records") if row["cell"] == cell), None)
    if failure is None:
        return _finished(loaded, cell)
    return None if failure["kind"] == "not run" else _failed(failure)


def _finished(loaded: Loaded, cell: str) -> Run:
    row = loaded.cells.loc[cell]
    curve = loaded.curves[loaded.curves["cell"] == cell] if len(loaded.curves) else pd.DataFrame()
    items = loaded.items[loaded.items["cell"] == cell] if len(loaded.items) else pd.DataFrame()
    end = _milliseconds(row["when"])
    start = end - round(1000 * float(curve["seconds"].max())) if len(curve) and curve["seconds"].notna().any() else end
    settings = {**(row["parts"] if isinstance(row.get("parts"), dict) else {}), **row["settings"], **{key: row[key] for key in ("model", "domain", "method", "dtype", "numerics", "scoring")}, "seed": int(row["seed"])}
    gain, lost = ("unknown" if pd.isna(row[key]) else f"{100 * row[key]:+.1f} points" for key in ("domain_gain", "forgetting"))
    flag = " **NOT A RESULT.**" if row["not_a_result"] else ""
    return Run(
        cell=cell, title=_title(cell), status="FINISHED", start=start, end=end,
        parameters={key: str(value) for key, value in sorted(_flatten(settings).items())},
        metrics=_scores(row, end) + _curves(curve, start),
        datasets=_datasets(row, items),
        environment={key: row[key] for key in ("versions", "hardware", "git", "device", "dtype")},
        tags=_tags(cell, {
            "mlflow.note.content": f"{row['model']} fine-tuned on {row['domain']} with **{row['method']}**, seed {row['seed']}.\n\nGain {gain}, forgetting {lost}.{flag}",
            "git.commit": row["git"].get("commit"), "git.dirty": row["git"].get("dirty"), "not_a_result": bool(row["not_a_result"]),
            "device": row["device"], "gpu": (row["hardware"] or {}).get("gpu"), "weights_sha256": row["weights_sha256"], "base_sha256": row["base_sha256"],
            "at_chance": ", ".join(row["at_chance"]), "model_note": row.get("model_note"),
        }),
    )


def _failed(failure: dict) -> Run:
    """A crashed cell: FAILED, with its reason where a person looks first."""
    when = _milliseconds(failure["when"])
    stage = f" in {failure['stage']}" if failure["stage"] else ""
    note = f"**Failed**: {_title(failure['cell'])}.\n\n{failure['kind']}{stage}: {failure['reason']}"
    tags = {"mlflow.note.content": note, **{f"failure.{key}": failure[key] for key in ("kind", "stage", "reason")}}
    return Run(cell=failure["cell"], title=_title(failure["cell"]), status="FAILED", start=when, end=when, tags=_tags(failure["cell"], tags))


def _title(cell: str) -> str:
    model, domain, method, seed = cell.split("/")
    return f"{method} {domain} {model} {seed}"


def _tags(cell: str, tags: dict) -> dict[str, str]:
    model, domain, method, seed = cell.split("/")
    tags = {**tags, "holdfast.cell": cell, "model": model, "domain": domain, "method": method, "seed": seed.removeprefix("seed")}
    return {key: str(value) for key, value in tags.items() if value is not None and value != ""}


def _scores(row: pd.Series, end: int) -> list[tuple[str, float, int, int]]:
    values = {key: row.get(key) for key in SCALARS}
    if row.get("general_perplexity") and row.get("general_perplexity_base"):
        values["perplexity_ratio"] = row["general_perplexity"] / row["general_perplexity_base"]
    for kind in ("forgetting", "transfer"):
        values |= {f"{kind}/{task}": value for task, value in row[f"{kind}_by_task"].items()}
    values |= {f"score/{task}": about["value"] for task, about in row["scores_by_task"].items()}
    return [(key, float(value), end, 0) for key, value in values.items() if value is not None and value == value]


def _curves(curve: pd.DataFrame, start: int) -> list[tuple[str, float, int, int]]:
    points = []
    for key in [key for key in curve.columns if key not in ("cell", "step", "seconds")]:
        name = f"probe/{key.removeprefix('probe_')}" if key.startswith("probe_") else f"curve/{key}"
        for step, seconds, value in curve[["step", "seconds", key]].dropna().itertuples(index=False):
            points.append((name, float(value), start + round(1000 * seconds), int(step)))
    return points


def _datasets(row: pd.Series, items: pd.DataFrame) -> list[tuple[str, str, int | None, str]]:
    """The training data by its hash, and each scored set by the hash of its rows' hashes."""
    data = row["data_sha256"] if isinstance(row["data_sha256"], str) else _sha256(json.dumps(row["data_sha256"], sort_keys=True))
    scored = items.groupby("task", sort=True)["doc_hash"] if len(items) else ()
    return [(f"{row['domain']} train", data, None, "training"), *((task, _sha256("".join(hashes.astype(str))), len(hashes), "evaluation") for task, hashes in scored)]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _flatten(block: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in block.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _milliseconds(when) -> int:
    """Since 1970, of an ISO time; 0 where there is none."""
    return round(1000 * datetime.fromisoformat(when).timestamp()) if isinstance(when, str) and when else 0
