"""What a run gained and forgot, in the one order in which every table, test, figure and command shows it.

Gain comes first: nats per token of the domain's scored rows, then its score. Then what was forgotten, the measures
that resolve the smallest differences first (the right answers of one run move one by one, nats with every item):

    domain_nll_gained, domain_gain
    general_nll_lost    nats per token of general text
    general_kl          KL(base‖tuned) of the next token there, exact over the vocabulary
    gold_nll_lost       nats of the right answers to retention items
    margin_lost         nats of the right answer's lead over the best wrong choice
    forgetting          accuracy on retention items

Each of the latter is the base's number minus the tuned model's, so that more is more forgotten, and has the name that
it has in metrics.json. A nat is the unit of a natural logarithm: 0.1 nats per token lost means that the tuned model
gives a text of 10 tokens 1/e of the probability that the base gives it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from analysis import numbers

GAIN = ("domain_nll_gained", "domain_gain")
ACCURACY = "forgetting"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure of forgetting in nats; accuracy's unit is the point.

    key     its name in metrics.json, in the tables and in tests.csv
    head    the head of its column
    name    what it is called within a sentence, and `unit` the unit of its numbers
    says    what it is, in a sentence for somebody who meets it for the first time
    value   the column of items.csv.gz that it compares; the score of a general passage is its nats
    general whether it is of the general text, per token; else of the retention tasks above chance, per item
    signed  whether it can be negative; a divergence cannot, and is not tested against the base, where it is 0
    """

    key: str
    head: str
    name: str
    unit: str
    says: str
    value: str
    general: bool
    signed: bool = True

    def show(self, value: float | None) -> str:
        """A number of this measure as text."""
        return numbers.nats(value) if self.signed else numbers.nats(value).removeprefix("+")


GENERAL = Measure(
    key="general_nll_lost",
    head="general text lost, nats/token",
    name="the loss on general text",
    unit="nats per token",
    says="General text lost: by how many nats per token the tuned model finds general text less likely than the base "
    "does, the mean over tokens (the logarithm of the ratio of the two perplexities).",
    value="score",
    general=True,
)
KL = Measure(
    key="general_kl",
    head="KL, nats/token",
    name="the divergence from the base",
    unit="nats per token",
    says="KL: how far the tuned model's predictions of the next token are from the base's on general text, "
    "KL(base‖tuned); 0 only if nothing changed, and it also sees changes that make the text no less likely.",
    value="kl",
    general=True,
    signed=False,
)
GOLD = Measure(
    key="gold_nll_lost",
    head="right answers lost, nats/item",
    name="the loss on right answers",
    unit="nats per item",
    says="Right answers lost: by how many nats the right answer to a retention item became less likely, whether or not "
    "the model still prefers it; the mean over the tasks that count.",
    value="log_likelihood",
    general=False,
)
MARGIN = Measure(
    key="margin_lost",
    head="margin lost, nats/item",
    name="the loss of margin",
    unit="nats per item",
    says="Margin lost: by how many nats the right answer lost ground to the best wrong choice; an item's answer turns "
    "wrong when its margin falls below 0.",
    value="margin",
    general=False,
)
NATS = (GENERAL, KL, GOLD, MARGIN)
BY_KEY: Mapping[str, Measure] = {measure.key: measure for measure in NATS}
FORGETTING = (*BY_KEY, ACCURACY)  # keys, as in ORDER
ORDER = (*GAIN, *FORGETTING)
