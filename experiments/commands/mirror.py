"""What a dashboard's runs hold, as plain values: parameters, points, tags, data sets, times.

A cell is a run, and the cells of one (model, domain, method) lie below a run with their aggregate; the bare base model
of a (model, domain) has one too. No dashboard is imported here: `experiments.commands.tracking` writes this into MLflow.
"""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime

import pandas as pd

from analysis import units
from analysis.load import Loaded

SCALARS = (
    "domain_score",
    "domain_score_base",
    "domain_gain",
    "general_score",
    "general_score_base",
    "forgetting",
    "general_perplexity",
    "general_perplexity_base",
    "general_bits_per_byte",
    "seconds_prepare",
    "seconds_train",
    "seconds_evaluate",
    "peak_memory_bytes",
    "bytes_importance",
    "bytes_anchor",
    "bytes_weights_delta",
    "bytes_optimizer_state",
    "tokens_trained",
    "tokens_prepare",
    "tokens_per_second",
    "mfu",
)
EXPERIMENT = "DVC_EXP_NAME"  # the tag of a run made within `dvc exp run`
# columns of a curve that tell about the machine and not about the model: the dashboard shows `system/` on a page of its own
MACHINE = ("tokens_per_second", "mfu")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, found again by its `key`: a cell, `model/domain/method`, or `model/domain` for the bare base.

    `metrics` are (key, value, milliseconds since 1970, step); `datasets` are (name, digest, rows, role); `texts` are
    small files by name.
    """

    key: str
    title: str
    status: str
    start: int
    end: int
    tags: dict[str, str]
    parameters: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    datasets: list[tuple[str, str, int | None, str]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)


def run_of(loaded: Loaded, cell: str, *, work: str = "work", aside: str = "") -> Run | None:
    """The run of a finished or failed cell; None for one that has not been run.

    `work` is where the study's weights lie, `aside` why the comparison leaves the cell out (empty where it does not).
    """
    failure = next((row for row in loaded.failures.to_dict("records") if row["cell"] == cell), None)
    if failure is None:
        return _finished(loaded, cell, work=work, aside=aside)
    return None if failure["kind"] == "not run" else _failed(failure)


def title_of(key: str) -> str:
    """`ewc science smollm2-135m seed0` for a cell, without the seed for a method, `base science smollm2-135m` for a base."""
    model, domain, *rest = key.split("/")
    method, *seed = rest or ["base"]
    return " ".join((method, domain, model, *seed))


def tags_of(key: str, tags: dict) -> dict[str, str]:
    """`tags` as text, without the unknown, with what the run is of."""
    model, domain, *rest = key.split("/")
    kind = {0: "base", 1: "group", 2: "cell"}[len(rest)]
    tags = {**tags, f"holdfast.{kind}": key, "model": model, "domain": domain, "method": rest[0] if rest else "base"}
    if len(rest) > 1:
        tags["seed"] = rest[1].removeprefix("seed")
    return {name: str(value) for name, value in tags.items() if value is not None and value != ""}


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def milliseconds(when) -> int:
    """Since 1970, of an ISO time; 0 where there is none."""
    return round(1000 * datetime.fromisoformat(when).timestamp()) if isinstance(when, str) and when else 0


def scored(items: pd.DataFrame) -> list[tuple[str, str, int | None, str]]:
    """Each scored set by the hash of its rows' hashes."""
    sets = items.groupby("task", sort=True)["doc_hash"] if len(items) else ()
    return [(task, digest_of("".join(hashes.astype(str))), len(hashes), "evaluation") for task, hashes in sets]


def points(value) -> str:
    """A share of 1 as percentage points for a description."""
    return "unknown" if value is None or pd.isna(value) else f"{100 * value:+.1f} points"


def gained(value, unit: str) -> str:
    """A gain in its unit for a description."""
    return points(value) if unit == units.SHARE or value is None or pd.isna(value) else f"{value:+.3g} {unit}"


def _finished(loaded: Loaded, cell: str, *, work: str, aside: str) -> Run:
    row = loaded.cells.loc[cell]
    curve = loaded.curves[loaded.curves["cell"] == cell] if len(loaded.curves) else pd.DataFrame()
    items = loaded.items[loaded.items["cell"] == cell] if len(loaded.items) else pd.DataFrame()
    end = milliseconds(row["when"])
    start = end - round(1000 * float(curve["seconds"].max())) if len(curve) and curve["seconds"].notna().any() else end
    parts = row["parts"] if isinstance(row.get("parts"), dict) else {}
    about = {key: row[key] for key in ("model", "domain", "method", "dtype", "numerics", "scoring")}
    settings = {**parts, **row["settings"], **about, "seed": int(row["seed"])}
    flag = " **NOT A RESULT.**" if row["not_a_result"] else ""
    flag += f" **Not in the comparison**: {aside}" if aside else ""
    kept = row.get("bytes_weights_delta")
    texts = {
        "environment.json": {key: row[key] for key in ("versions", "hardware", "git", "device", "dtype")},
        "model.json": {
            "path": f"{work}/cells/{cell}/weights",
            "sha256": row["weights_sha256"],
            "bytes_beside_base": None if pd.isna(kept) else int(kept),
            "dtype": row["dtype"],
            "base": row["model"],
            "base_sha256": row["base_sha256"],
        },
    }
    return Run(
        key=cell,
        title=title_of(cell),
        status="FINISHED",
        start=start,
        end=end,
        parameters={key: str(value) for key, value in sorted(_flatten(settings).items())},
        metrics=_scores(row, end) + _memory(loaded, row, end) + _curves(curve, start),
        datasets=[(f"{row['domain']} train", _data_digest(row["data_sha256"]), None, "training"), *scored(items)],
        texts={name: json.dumps(text, indent=2, sort_keys=True, default=str) for name, text in texts.items()},
        tags=tags_of(
            cell,
            {
                "mlflow.note.content": f"{row['model']} fine-tuned on {row['domain']} with **{row['method']}**, seed {row['seed']}.\n\n"
                f"Gain {gained(row['domain_gain'], units.of_domain(row))}, forgetting {points(row['forgetting'])}.{flag}",
                "git.commit": row["git"].get("commit"),
                "git.dirty": row["git"].get("dirty"),
                "mlflow.source.git.commit": row["git"].get("commit"),
                "not_comparable": aside,
                EXPERIMENT: row["git"].get("experiment"),
                "not_a_result": bool(row["not_a_result"]),
                "device": row["device"],
                "gpu": (row["hardware"] or {}).get("gpu"),
                "weights_sha256": row["weights_sha256"],
                "base_sha256": row["base_sha256"],
                "at_chance": ", ".join(row["at_chance"]),
                "model_note": row.get("model_note"),
            },
        ),
    )


def _failed(failure: dict) -> Run:
    """A crashed cell: FAILED, with its reason where a person looks first."""
    cell, when = failure["cell"], milliseconds(failure["when"])
    stage = f" in {failure['stage']}" if failure["stage"] else ""
    note = f"**Failed**: {title_of(cell)}.\n\n{failure['kind']}{stage}: {failure['reason']}"
    settings, parts, git = (
        failure[key] if isinstance(failure.get(key), dict) else {} for key in ("settings", "parts", "git")
    )
    tags = {
        "mlflow.note.content": note,
        "git.commit": git.get("commit"),
        "git.dirty": git.get("dirty"),
        EXPERIMENT: git.get("experiment"),
        **{f"failure.{key}": failure[key] for key in ("kind", "stage", "reason")},
    }
    return Run(
        key=cell,
        title=title_of(cell),
        status="FAILED",
        start=when,
        end=when,
        tags=tags_of(cell, tags),
        parameters={key: str(value) for key, value in sorted(_flatten({**parts, **settings}).items())},
    )


def _scores(row: pd.Series, end: int) -> list[tuple[str, float, int, int]]:
    values = {key: row.get(key) for key in SCALARS}
    if row.get("general_perplexity") and row.get("general_perplexity_base"):
        values["perplexity_ratio"] = row["general_perplexity"] / row["general_perplexity_base"]
    for kind in ("forgetting", "transfer"):
        values |= {f"{kind}/{task}": value for task, value in row[f"{kind}_by_task"].items()}
    if isinstance(apart := row.get("forgetting_apart"), dict):
        values |= {f"forgetting/{task}": about["forgetting"] for task, about in apart.items()}
    values |= {f"score/{task}": about["value"] for task, about in row["scores_by_task"].items()}
    return [(key, float(value), end, 0) for key, value in values.items() if value is not None and value == value]


def _memory(loaded: Loaded, row: pd.Series, end: int) -> list[tuple[str, float, int, int]]:
    """The largest memory of each stage apart."""
    peaks = {
        "prepare": loaded.prepared.get(row["cell"], {}).get("peak_memory_bytes"),
        "train": row.get("peak_memory_train_bytes"),
    }
    return [
        (f"system/peak_memory_{stage}_bytes", float(value), end, 0)
        for stage, value in peaks.items()
        if value is not None and value == value
    ]


def _curves(curve: pd.DataFrame, start: int) -> list[tuple[str, float, int, int]]:
    found = []
    for key in [key for key in curve.columns if key not in ("cell", "step", "seconds")]:
        name = (
            f"probe/{key.removeprefix('probe_')}"
            if key.startswith("probe_")
            else f"{'system' if key in MACHINE else 'curve'}/{key}"
        )
        for step, seconds, value in curve[["step", "seconds", key]].dropna().itertuples(index=False):
            found.append((name, float(value), start + round(1000 * seconds), int(step)))
    return found


def _data_digest(data) -> str:
    return data if isinstance(data, str) else digest_of(json.dumps(data, sort_keys=True))


def _flatten(block: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in block.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
