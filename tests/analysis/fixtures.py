"""A results tree as the stages write it, with made-up but plausible numbers: for tests of what reads results/.

Nothing here is a measurement. `write_results` answers with the planned cells in grid order.
"""

import gzip
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.chosen import RULE
from experiments.bench import show
from experiments.bench.race import Race

METHODS = ("full", "lora", "ewc", "mofo", "hierarchical")
# name: role, metric, rows, chance, share right in the base, share of right answers a harsh method loses
TASKS = {
    "science": ("domain", "acc", 300, 0.25, 0.62, -0.30),
    "hellaswag": ("retention", "acc_norm", 200, 0.25, 0.43, 0.12),
    "piqa": ("retention", "acc_norm", 200, 0.5, 0.67, 0.06),
    "lambada_openai": ("retention", "acc", 200, 0.0, 0.40, 0.25),
    "copa": ("retention", "acc", 100, 0.5, 0.52, 0.02),
    "arc_easy": ("transfer", "acc_norm", 200, 0.25, 0.50, -0.08),
    "arc_challenge": ("transfer", "acc_norm", 200, 0.25, 0.27, -0.04),
    "openbookqa": ("transfer", "acc_norm", 200, 0.25, 0.31, -0.03),
}
HARSHNESS = {"full": 1.0, "lora": 0.7, "ewc": 0.45, "mofo": 0.6, "hierarchical": 0.4}
LEARNING = {"full": 1.0, "lora": 0.85, "ewc": 0.7, "mofo": 0.9, "hierarchical": 0.75}
SECONDS = {
    "full": (0.0, 252.3),
    "lora": (0.0, 171.9),
    "ewc": (96.4, 268.0),
    "mofo": (0.0, 301.2),
    "hierarchical": (88.7, 190.3),
}
DELTA = {"full": 269_060_552, "lora": 1_843_200, "ewc": 269_060_552, "mofo": 269_060_552, "hierarchical": 1_843_200}
IMPORTANCE = {"ewc": 538_060_000, "hierarchical": 3_686_400}
SETTINGS = {
    "full": {},
    "lora": {"lora": {"rank": 8, "alpha": 32, "targets": ["q_proj", "v_proj"]}},
    "ewc": {"ewc": {"strength": 10000.0, "samples": 256, "estimator": "empirical"}},
    "mofo": {"mofo": {"fraction": 0.1}},
    "hierarchical": {"lora": {"rank": 8, "alpha": 32}, "hierarchical": {"strength": 0.001, "temperature": "auto"}},
}
HARDWARE = {"cpu": "example CPU", "cores": 2, "gpu": None, "memory_bytes": 16 * 2**30}
VERSIONS = {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
NOTE = "4-bit instruct checkpoint, dequantised, scored without its chat template"
GIT = {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_items(path: Path, items: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    items.to_csv(text, index=False)
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        file.write(text.getvalue().encode())


def base_items(model: str, domain: str) -> pd.DataFrame:
    """Items of the bare model: one row a scored item, general text last."""
    draw = np.random.default_rng(1)
    rows = []
    for task, (_, _, n, _, right, _) in TASKS.items():
        name = domain if task == "science" else task
        for i in range(n):
            rows.append((name, i, digest(f"{name} {i}"), int(draw.random() < right), 0, 0, -float(draw.gamma(4, 2))))
    for i in range(128):
        tokens = int(draw.integers(80, 200))
        rows.append(("general", i, digest(f"general {i}"), tokens * float(draw.normal(3.05, 0.25)), None, tokens, None))
    items = pd.DataFrame(rows, columns=["task", "doc_id", "doc_hash", "score", "choice", "gold", "log_likelihood"])
    return in_nats(items, draw=np.random.default_rng(2), domain=domain)


def in_nats(items: pd.DataFrame, *, draw, domain: str, lost: float = 0.0, learned: float = 0.0) -> pd.DataFrame:
    """The columns in nats: `lost` nats an item of the right answers, `learned` of the domain's; margins fit the scores.

    `items` are the base's, or have its columns with the scores of a tuned model.
    """
    rows = []
    for row in items.to_dict("records"):
        if row["task"] == "general":
            tokens = int(row["tokens"] if "tokens" in row else row["gold"])
            about = {"gold": None, "log_likelihood": -row["score"], "tokens": tokens, "bytes": int(4.2 * tokens)}
            kl = lost * draw.chisquare(4) / 10
            rows.append(row | about | {"kl": kl, "kl_reverse": 0.9 * kl})
            continue
        chance = TASKS["science" if row["task"] == domain else row["task"]][3]
        move = learned if row["task"] == domain else -lost
        row["log_likelihood"] += move + (draw.normal(0, 0.4) if move else 0.0)
        row |= {"tokens": int(row.get("tokens") or draw.integers(1, 7)), "choice": None}
        row["bytes"] = 4 * row["tokens"]
        if chance:
            margin = (0.05 + abs(draw.normal(0, 1.5))) * (1 if row["score"] else -1)
            best = row["log_likelihood"] - margin
            others = [best, *(best - draw.gamma(2, 1, round(1 / chance) - 2))]
            wrong = np.arange(len(others)) + row["doc_id"] + (draw.random() < 0.03)  # seldom another wrong answer
            nats = np.array([row["log_likelihood"], *np.array(others)[wrong % len(others)]])  # choice 0 is right
            p = np.exp(nats - nats.max()) / np.exp(nats - nats.max()).sum()
            brier = float(((p - (np.arange(len(p)) == 0)) ** 2).sum())
            row |= {"choice": int(nats.argmax()), "margin": margin, "brier": brier}
            row["choices"] = ";".join(f"{value:.7g}" for value in nats)
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = ["task", "doc_id", "doc_hash", "score", "choice", "gold", "log_likelihood", "margin", "brier", "tokens"]
COLUMNS += ["bytes", "kl", "kl_reverse", "choices"]


def without_nats(root: Path) -> None:
    """Make all results in `root` those of an earlier version, which knew no nats but the items' log-likelihoods."""
    for path in root.rglob("items.csv.gz"):
        items = pd.read_csv(path)
        items["gold"] = items["gold"].fillna(items["tokens"])
        write_items(path, items[COLUMNS[:7]])
    for path in root.rglob("metrics.json"):
        known = json.loads(path.read_text())
        write_json(path, {k: v for k, v in known.items() if not any(part in k for part in NEW_KEYS)})


def with_a_text_domain(root: Path, domain: str = "science") -> None:
    """Make the domain of all results in `root` one of conversations: held-out nats per token of their answers."""
    base = None
    for path in sorted(root.rglob("items.csv.gz"), key=lambda path: "base" not in path.parts):
        items = pd.read_csv(path)
        own = items["task"] == domain
        nats, tokens = items.loc[own, "log_likelihood"], items.loc[own, "tokens"]
        items.loc[own, "score"] = nats * own.sum() / tokens.sum()
        items.loc[own, ["choice", "gold", "margin", "brier", "choices"]] = None
        write_items(path, items)
        value = -float(nats.sum() / tokens.sum())
        bits = value * tokens.sum() / items.loc[own, "bytes"].sum() / np.log(2)
        if base is None:
            base = (value, bits)
            continue
        metrics = json.loads((path.parent / "metrics.json").read_text())
        task = {"value": value, "base": base[0], "n": int(own.sum()), "role": "domain", "metric": "nats_per_token"}
        task |= {"chance": None, "unit": "nats", "higher_is_better": False, "per_item": True, "change": base[0] - value}
        metrics["scores_by_task"][domain] = task
        metrics |= {"domain_score": value, "domain_score_base": base[0], "domain_unit": "nats"}
        metrics |= {"domain_gain": base[0] - value, "domain_nll_gained": base[0] - value}
        metrics |= {"domain_bits_per_byte": bits, "domain_bits_per_byte_base": base[1]}
        write_json(path.parent / "metrics.json", metrics)


def with_roles(root: Path, **roles: str) -> None:
    """Give tasks of all results in `root` another role: arc_easy="score" scores the domain beside its own score."""
    for path in root.rglob("metrics.json"):
        metrics = json.loads(path.read_text())
        for task, role in roles.items():
            own = metrics["scores_by_task"][task]
            own |= {"role": role, "change": own["value"] - own["base"]}
            metrics["score_by_task"][task] = metrics["transfer_by_task"].pop(task)
        write_json(path, metrics)


NEW_KEYS = ("nll", "_kl", "margin", "brier", "per_byte_lost", "domain_bits", "score_by_task")


def tuned_items(base: pd.DataFrame, *, method: str, seed: int, domain: str) -> pd.DataFrame:
    """The base's items after fine-tuning: some right answers lost, some wrong ones gained."""
    draw = np.random.default_rng([seed, sum(map(ord, method))])
    harsh, learns = HARSHNESS.get(method, 0.5), LEARNING.get(method, 0.8)
    scores = []
    for row in base.itertuples():
        score = row.score
        if row.task == "general":
            score += row.tokens * draw.normal(0.11 * harsh, 0.02)
        else:
            loss = TASKS["science" if row.task == domain else row.task][5] * (learns if row.task == domain else harsh)
            if score and draw.random() < max(loss, 0) + 0.03:
                score = 0
            elif not score and draw.random() < max(-loss, 0) * 1.4 + 0.03:
                score = 1
        scores.append(score)
    tuned = base.assign(score=scores)
    return in_nats(tuned, draw=np.random.default_rng([seed, 5]), domain=domain, lost=0.5 * harsh, learned=1.2 * learns)


def scores_of(items: pd.DataFrame, *, domain: str, sha256: str) -> dict:
    tasks = {}
    for task, (role, metric, n, chance, _, _) in TASKS.items():
        name = domain if task == "science" else task
        value = float(items[items.task == name].score.mean())
        tasks[name] = {
            "role": role,
            "metric": metric,
            "value": value,
            "n": n,
            "chance": chance,
            "version": 1.0,
            "metrics": {metric: value},
        }
    text = items[items.task == "general"]
    tokens = float(text.tokens.sum())
    nats = float(text.score.sum()) / tokens
    general = {
        "perplexity": float(np.exp(nats)),
        "nats_per_token": nats,
        "bits_per_byte": nats / np.log(2) / 4.2,
        "tokens": int(tokens),
        "bytes": int(tokens * 4.2),
        "n": len(text),
    }
    scoring = {
        "scoring": 1,
        "scorer": "shared-prefix",
        "batch_size": 16,
        "dtype": "bfloat16",
        "limit": None,
        "lm_eval": "0.4.13",
        "transformers": "5.23.0",
    }
    return {"tasks": tasks, "general": general, "scoring": scoring, "weights_sha256": sha256}


def curve_of(*, method: str, domain: str, seed: int, steps: int = 60) -> pd.DataFrame:
    draw = np.random.default_rng([seed, 7, sum(map(ord, method))])
    harsh, learns, seconds = HARSHNESS.get(method, 0.5), LEARNING.get(method, 0.8), SECONDS.get(method, (0, 200))[1]
    rows = []
    for step in range(steps + 1):
        done = step / steps
        row = {"step": step, "tokens": step * 900, "seconds": seconds * done}
        if step:
            row |= {
                "loss": 1.6 * np.exp(-3 * done * learns) + 0.5 + draw.normal(0, 0.08),
                "grad_norm": 4 * np.exp(-done) + abs(draw.normal(0, 0.4)),
                "penalty": 0.02 * done if method in IMPORTANCE else 0.0,
                "learning_rate": 1e-5 * (1 - done),
                "tokens_per_second": 900 * steps / seconds,
            }
        if step % 12 == 0:
            rise = 1 - np.exp(-3 * done)
            row |= {f"probe_{domain}": 0.60 + 0.18 * rise * learns, f"probe_{domain}_nll": 1.5 - 0.7 * rise * learns}
            for task in ("hellaswag", "piqa", "lambada_openai", "copa"):
                lost = TASKS[task][5] * harsh * rise
                row |= {
                    f"probe_{task}": round((TASKS[task][4] - lost) * 50) / 50,
                    f"probe_{task}_nll": 2.6 + 0.8 * lost,
                }
            row["probe_perplexity"] = 21.0 * (1 + 0.12 * harsh * rise)
            row["probe_general_nll"] = np.log(row["probe_perplexity"])
        rows.append(row)
    return pd.DataFrame(rows)


def coefficients(layers: int = 30) -> dict[str, float]:
    norms = np.random.default_rng(3).gamma(2.0, 1.0, 2 * layers)
    weights = np.exp(norms / norms.std())
    names = [f"model.layers.{i}.self_attn.{kind}" for i in range(layers) for kind in ("q_proj", "v_proj")]
    return dict(zip(names, (len(names) * weights / weights.sum()).tolist()))


def write_results(
    root: Path,
    *,
    methods: tuple[str, ...] = METHODS,
    seeds: tuple[int, ...] = (0,),
    model: str = "smollm2-135m",
    domain: str = "science",
    failed: dict[str, str] | None = None,
    missing: tuple[str, ...] = (),
    not_a_result: bool = False,
) -> list[str]:
    """Fills `root` (a study's results folder). `failed`: method -> reason, `missing`: methods that never ran."""
    base = base_items(model, domain)
    base_sha, data_sha = digest(model), digest(domain)
    base_scores = scores_of(base, domain=domain, sha256=base_sha)
    whole, together = base, base_scores
    if (there := root / "base" / model).exists():  # a base is scored on the tasks of every domain
        whole = pd.concat([pd.read_csv(there / "items.csv.gz"), base]).drop_duplicates(["task", "doc_id"])
        together = base_scores | {
            "tasks": json.loads((there / "scores.json").read_text())["tasks"] | base_scores["tasks"]
        }
    write_json(root / "base" / model / "scores.json", together)
    write_json(
        root / "base" / model / "evaluate.json",
        {
            "seconds_evaluate": 181.0,
            "hardware": HARDWARE,
            "versions": VERSIONS,
            "git": GIT,
            "when": "2030-01-02T03:00:00+00:00",
        },
    )
    write_items(root / "base" / model / "items.csv.gz", whole)
    planned = []
    for method in methods:
        for seed in seeds:
            cell = f"{model}/{domain}/{method}/seed{seed}"
            planned.append(cell)
            if method in (failed or {}):
                write_json(
                    root / "failures" / f"{cell}.json",
                    {
                        "cell": cell,
                        "stage": "train",
                        "reason": failed[method],
                        "kind": "nan",
                        "when": "2030-01-02T03:40:00+00:00",
                    },
                )
            elif method not in missing:
                write_cell(
                    root, cell=cell, base=base, base_scores=base_scores, data_sha=data_sha, not_a_result=not_a_result
                )
    write_tuning(root, methods=methods, model=model, domain=domain)
    return planned


def write_cell(
    root: Path, *, cell: str, base: pd.DataFrame, base_scores: dict, data_sha: str, not_a_result: bool
) -> None:
    model, domain, method, seed = cell.split("/")
    seed = int(seed.removeprefix("seed"))
    folder, sha = root / "runs" / cell, digest(cell)
    items = tuned_items(base, method=method, seed=seed, domain=domain)
    scores = scores_of(items, domain=domain, sha256=sha)
    write_items(folder / "items.csv.gz", items)
    write_json(folder / "scores.json", scores)
    curve_of(method=method, domain=domain, seed=seed).to_csv(folder / "curve.csv", index=False)
    before, after = base_scores["tasks"], scores["tasks"]
    at_chance = ["copa"]
    kept = [t for t in after if after[t]["role"] == "retention" and t not in at_chance]
    lost = {t: before[t]["value"] - after[t]["value"] for t in kept}
    report = {part: {} for part in SETTINGS.get(method, {})}
    if "hierarchical" in report:
        report["hierarchical"] = {"coefficients": coefficients(), "warning": None}
    if "mofo" in report:
        report["mofo"] = {"realised_fraction": 0.1003}
    prepare, train = SECONDS.get(method, (0.0, 200.0))
    when = "2030-01-02T03:30:00+00:00"
    costs = {
        "seconds_train": train,
        "peak_memory_bytes": 3_100_000_000,
        "bytes_weights_delta": DELTA.get(method, 269_060_552),
        "bytes_anchor": 269_030_000 if method == "ewc" else 0,
        "bytes_optimizer_state": 2 * 538_060_000 if DELTA.get(method, 0) > 1e8 else 7_372_800,
        "tokens_trained": 54_000,
    }
    shared = {
        "weights_sha256": sha,
        "base_sha256": base_scores["weights_sha256"],
        "data_sha256": data_sha,
        "dtype": "bfloat16",
        "versions": VERSIONS,
        "hardware": HARDWARE,
        "git": GIT,
        "numerics": 1,
    }
    settings = {"learning_rate": 1e-5, "batch_size": 8, "warmup": 0.1, **SETTINGS.get(method, {})}
    write_json(
        folder / "train.json",
        {
            "cell": cell,
            "seed": seed,
            "seconds_begin": 0.0,
            "steps": 60,
            "settings": settings,
            "compute_dtype": "bfloat16",
            "device": "cpu",
            "when": when,
            "parts": report,
            **costs,
            **shared,
        },
    )
    write_json(
        folder / "evaluate.json",
        {"seconds_evaluate": 190.0, "hardware": HARDWARE, "versions": VERSIONS, "git": GIT, "when": when},
    )
    preparation = {
        "seconds_prepare": prepare,
        "tokens_prepare": 40_000 if prepare else 0,
        "bytes_importance": IMPORTANCE.get(method, 0),
    }
    write_json(
        root / "prepared" / model / method / f"seed{seed}" / "prepare.json",
        {
            **preparation,
            "bytes_start": 0,
            "peak_memory_bytes": 2_000_000_000,
            "reused": False,
            "hardware": HARDWARE,
            "versions": VERSIONS,
            "git": GIT,
            "when": when,
        },
    )

    def mean(table):
        return sum(table[t]["value"] for t in kept) / len(kept)

    write_json(
        folder / "metrics.json",
        nats_of(base, items, kept=kept, domain=domain)
        | {
            "cell": cell,
            "model": model,
            "domain": domain,
            "method": method,
            "seed": seed,
            "parts": SETTINGS.get(method, {}),
            "domain_score": after[domain]["value"],
            "domain_score_base": before[domain]["value"],
            "domain_gain": after[domain]["value"] - before[domain]["value"],
            "general_score": mean(after),
            "general_score_base": mean(before),
            "forgetting": sum(lost[t] for t in kept) / len(kept),
            "forgetting_by_task": lost,
            "at_chance": at_chance,
            "transfer_by_task": {
                t: after[t]["value"] - before[t]["value"] for t in after if after[t]["role"] == "transfer"
            },
            "scores_by_task": {
                t: {
                    "value": after[t]["value"],
                    "base": before[t]["value"],
                    "n": after[t]["n"],
                    "chance": after[t]["chance"],
                    "metric": after[t]["metric"],
                    "role": after[t]["role"],
                }
                for t in after
            },
            "general_perplexity": scores["general"]["perplexity"],
            "general_perplexity_base": base_scores["general"]["perplexity"],
            "general_bits_per_byte": scores["general"]["bits_per_byte"],
            "general_bits_per_byte_base": base_scores["general"]["bits_per_byte"],
            "seconds_evaluate": 190.0,
            "tokens_per_second": 54_000 / train,
            "n": {t: after[t]["n"] for t in after} | {"general_text": 128},
            **preparation,
            **costs,
            **shared,
            "scoring": scores["scoring"],
            "parts_report": report,
            "learning_rate": 1e-5,
            "cost_known": True,
            "model_note": NOTE,
            "not_a_result": not_a_result,
        },
    )


def nats_of(base: pd.DataFrame, tuned: pd.DataFrame, *, kept: list[str], domain: str) -> dict:
    """The numbers in nats of metrics.json, by their definitions."""

    def own(items: pd.DataFrame, task: str) -> pd.DataFrame:
        return items[items["task"] == task]

    before, after = own(base, "general"), own(tuned, "general")
    tokens = before["tokens"].sum()
    nats = [-float(text["log_likelihood"].sum()) / tokens for text in (before, after)]
    lost = {
        key: {
            task: float((own(base, task)[key] - own(tuned, task)[key]).mean())
            for task in dict.fromkeys(base["task"])
            if TASKS.get(task, [""])[0] == "retention" and own(base, task)[key].notna().all()
        }
        for key in ("log_likelihood", "margin", "brier")
    }

    def mean(key: str) -> float:
        return float(np.mean([lost[key][task] for task in kept if task in lost[key]]))

    learned = own(tuned, domain)["log_likelihood"].sum() - own(base, domain)["log_likelihood"].sum()
    return {
        "general_nll": nats[1],
        "general_nll_base": nats[0],
        "general_nll_lost": nats[1] - nats[0],
        "general_kl": float((after["kl"] * after["tokens"]).sum() / tokens),
        "general_kl_reverse": float((after["kl_reverse"] * after["tokens"]).sum() / tokens),
        "general_bits_per_byte_lost": (nats[1] - nats[0]) / np.log(2) / 4.2,
        "gold_nll_lost": mean("log_likelihood"),
        "margin_lost": mean("margin"),
        "gold_nll_lost_by_task": lost["log_likelihood"],
        "margin_lost_by_task": lost["margin"],
        "brier_lost_by_task": {task: -value for task, value in lost["brier"].items()},
        "domain_nll_gained": float(learned / own(base, domain)["tokens"].sum()),
        "domain_bits_per_byte": None,
        "score_by_task": {},
    }


def write_tuning(root: Path, *, methods: tuple[str, ...], model: str, domain: str) -> None:
    trials = []
    for method in methods:
        for k in range(3):
            trials.append(
                {
                    "method": method,
                    "settings": {"train.learning_rate": [5e-6, 1e-5, 2e-5][k]},
                    f"{domain}_nll": 1.2 - 0.1 * (k == 1),
                    "hellaswag_nll": 2.7,
                    "perplexity": 21.0 + k,
                    "seconds": 60.0 + k,
                    "chosen": k == 1,
                    "tied": False,
                    "end": "",
                }
            )
    if "mofo" in methods:
        trials[0] = {
            "method": trials[0]["method"],
            "settings": {"train.learning_rate": 1.0},
            "failed": "loss is NaN at step 3",
            "chosen": False,
        }
    write_json(
        root / "tuning" / model / f"{domain}.json",
        {
            "rule": RULE,
            "trials": trials,
            "base": {
                domain: 0.6,
                f"{domain}_nll": 1.5,
                "hellaswag": 0.44,
                "hellaswag_nll": 2.6,
                "piqa": 0.66,
                "piqa_nll": 2.4,
                "perplexity": 20.7,
            },
        },
    )


def write_bench(
    root: Path,
    name: str,
    *,
    races: list[Race],
    when: str = "2030-01-02T03:00:00+00:00",
    text: str = "What is compared, and why.",
    drawn: bool = True,
) -> Path:
    """A benchmark's record and figure, in the form `python -m experiments bench` writes."""
    record = {
        "name": name,
        "title": f"Title of {name}",
        "text": text,
        "races": [race.record() for race in races],
        "hardware": HARDWARE,
        "load": 0.4,
        "versions": VERSIONS,
        "git": GIT,
        "when": when,
    }
    write_json(root / "bench" / f"{name}.json", record)
    if drawn:
        show.draw(record, stem=root / "bench" / name)
    return root / "bench" / f"{name}.json"


def steps_race() -> Race:
    """Steps by method: ewc takes 1.5, 1.2 and 1.1 times full in three rounds, its fastest 1.25 times that of full."""
    return Race(
        title="smollm2-135m, science: a step",
        against="full",
        seconds={"full": [0.2, 0.3, 0.25], "ewc": [0.3, 0.36, 0.275], "lora": [0.1, 0.15, 0.125]},
    )
