"""What is said of a settled model before a study runs: whether its gate is that of the study, and what it showed."""

from analysis.families import family
from evaluation.chance import WARNING
from experiments.study.validation import HASHES
from methods.tools.files import read_json


def look(study, *, model: str) -> list[str]:
    """One line for each warning; none for a model that is not settled."""
    block = study.models[model].settle
    if block is None:
        return []
    rates = {
        study.settings(model=model, domain=domain, method=method).learning_rate
        for domain in study.grid.domains
        for method in study.grid.methods
        if not study.methods[method].parts and family(method) == method
    }
    lines = []
    path = study.paths.adapter(model).with_name("settle.json")
    record = read_json(path, "settled", "block", "steps", "gates") if path.is_file() else {"gates": []}
    held = {gate["learning_rate"]: gate["holds"] for gate in record["gates"]}  # the last one at each rate
    unsettled = [f"{rate:g}" for rate in sorted(rates) if held.get(rate) is False]
    if rates and not rates & {block.gate.learning_rate, *held}:
        trained = " and ".join(f"{rate:g}" for rate in sorted(rates))
        lines.append(
            f"models.{model}.settle.gate.learning_rate is {block.gate.learning_rate:g}, and plain fine-tuning in this "
            f"study has {trained}: at another rate the gate says nothing about this study"
        )
    if path.is_file():
        if record["block"] != {key: value for key, value in block.as_written.items() if key not in HASHES}:
            lines.append(
                f"models.{model}.settle is not what the adapter was made with ({path.relative_to(study.paths.root)}): "
                f"restore the block, or run `python -m experiments settle {model}`"
            )
        if unsettled:
            lines.append(
                f"{model} is not settled at a rate of {' or '.join(unsettled)}, with which this study trains: training "
                "still repairs it, and what a method loses is partly hidden"
            )
        elif not record["settled"]:
            lines.append(f"{model} is not settled after {record['steps']} steps: training still repairs it")
    return [WARNING + line for line in lines]
