"""The positions of a model, and the preparations that would read beyond them."""

from experiments.errors import UserError
from experiments.shape import Shape
from methods.part import Part


def refuse_long_documents(study, *, model: str, method: str, shape: Shape, longest: int | None = None) -> None:
    """Raises UserError naming the part whose documents of general text have more tokens than the model has positions.

    longest   tokens of the longest document, where it is known; until then a `length` that is written in the method's block
              is taken for it. A model without a limit in its config (ALiBi's) takes any.
    """
    limit = shape.positions
    for part in study.methods[method].parts:
        if limit is None or type(part).prepare is Part.prepare:
            continue
        length = getattr(part, "length", None)
        if longest is None:
            reached = length if "length" in (study.methods[method].block.get(part.key) or {}) else None
        else:
            reached = min(length or longest, longest)
        if reached and reached > limit:
            raise UserError(f"methods.{method}.{part.key}.length is {length}, and {model} has {limit} positions: write `length: {limit}` or less there")
