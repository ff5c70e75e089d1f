"""leaders: order the families of a screen by what they lose on probe rows at one gain (analysis/leaders.py)."""

from analysis import chosen, leaders
from analysis.load import load_cells
from experiments.study import cells
from methods.errors import UserError


def main(study) -> None:
    """Print, for each model and domain, the families in order, with each one's chosen setting."""
    loaded = load_cells(study.paths.results, cells.grid(study))
    if not loaded.comparisons:
        raise UserError("no cell of the grid has finished: run the study first")
    for model, domain in loaded.comparisons:
        try:
            level, table = leaders.ranking(loaded, model=model, domain=domain)
        except ValueError as error:
            raise UserError(
                f"{error}: run it with `train.probes`, with a probe set of {domain} and `general.probe`"
            ) from None
        print(f"{model}, {domain}: general nats a token lost on probe rows at a gain of {level:.3f}")
        width = max(map(len, table["family"]))
        for _, row in table.iterrows():
            lost = "never gains it" if row["lost"] != row["lost"] else f"{row['lost']:+.4f}"
            each = ", ".join(f"{m} {g:.3f} {row['losses'][m]:+.4f}" for m, g in row["gains"].items())
            print(f"  {row['family']:<{width}}  {lost:<14}  {row['chosen']}   ({each})")
        choices = chosen.choices(loaded, model=model, domain=domain)
        ends = choices[choices["chosen"] & (choices["end"] != "")]
        if len(ends):
            each = ", ".join(f"{c.family} ({c.setting} {c.value:g}, the {c.end})" for c in ends.itertuples())
            print(f"  chosen at an end of its values, beyond which another one may learn more: {each}")
