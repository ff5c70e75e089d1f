"""What a study's params.yaml says of its methods: leaders, compositions and controls."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from analysis.families import family

PLAIN = "full"  # plain fine-tuning, to which every remedy is compared


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Roles of methods, by the name of a method or of its family.

    leaders        methods whose pairs are tested; without it, those of `leading`
    compositions   methods that combine several remedies
    controls       a method that trains on general text -> the same with strength 0, as params.yaml names them
    control_of     every method of the grid that trains on general text -> its control there, '' if there is none
                   (experiments/study/controls.py)
    """

    leaders: tuple[str, ...] = ()
    compositions: tuple[str, ...] = ()
    controls: Mapping[str, str] = field(default_factory=dict)
    control_of: Mapping[str, str] = field(default_factory=dict)

    def leading(self, methods: Iterable[str]) -> list[str]:
        """The leaders among `methods`: those named, or else all but plain fine-tuning, controls and compositions."""
        if self.leaders:
            return [method for method in methods if _among(method, self.leaders)]
        others = {PLAIN, *self.controls.values(), *self.compositions}
        return [method for method in methods if not _among(method, others)]

    def setting_levels(self, families: Iterable[str]) -> list[str]:
        """The families that decide at which gain all are compared: plain fine-tuning and the leaders that are named, or
        without named leaders all but compositions. One that gains little would leave no number for the others."""
        named, composed = {PLAIN, *map(family, self.leaders)}, set(map(family, self.compositions))
        return [name for name in families if (name in named if self.leaders else name not in composed)]

    def composed(self, methods: Iterable[str]) -> list[str]:
        """The compositions among `methods`."""
        return [method for method in methods if _among(method, self.compositions)]


def _among(method: str, names: Iterable[str]) -> bool:
    return bool({method, family(method)} & set(names))
