"""Whether two models have the same tensors, so that one may have been tuned from the other."""

from experiments.audit.models import Model
from experiments.model.shape import Shape
from methods.errors import UserError


def refuse_other_architecture(base: Model, tuned: Model) -> None:
    """Raise UserError unless both have the same tensors; the rows of embedding and head may differ in number."""
    kinds = [model.config.model_type for model in (base, tuned)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{base.given} is a {kinds[0]} and {tuned.given} a {kinds[1]}: an audit compares a model with what it was "
            "tuned from, which has the same architecture"
        )
    shapes, embedding = [], set()
    for model in (base, tuned):
        built = Shape(config=model.config).build()
        shapes.append({name: tuple(p.shape) for name, p in built.named_parameters()})
        inside = {id(p): name for name, p in built.named_parameters()}
        layers = [layer for layer in (built.get_input_embeddings(), built.get_output_embeddings()) if layer is not None]
        embedding |= {inside[id(p)] for layer in layers for p in layer.parameters() if id(p) in inside}
    for name in dict.fromkeys([*shapes[0], *shapes[1]]):
        ours, theirs = (shape.get(name) for shape in shapes)
        if name in embedding and (ours is None or theirs is None or ours[1:] == theirs[1:]):
            continue  # added tokens, or a head that is no longer the embedding
        if ours != theirs:
            said = [list(shape) if shape else "nothing" for shape in (ours, theirs)]
            raise UserError(
                f"{base.given} and {tuned.given} are {kinds[0]}s of different sizes: {name} is {said[0]} in the first "
                f"and {said[1]} in the second, so one was not tuned from the other"
            )
