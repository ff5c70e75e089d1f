"""Whether two models have the same tensors, so that one may be tuned from the other, and how their configs differ."""

from experiments.audit.models import Model
from experiments.model.shape import Shape
from methods.errors import UserError

# of a config: what says where it comes from, how it is stored, or what is told elsewhere
_ASIDE = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "initializer_range"}
_ASIDE |= {"vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}


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


def compare_configs(base: Model, tuned: Model) -> list[str]:
    """A sentence for each setting of the two configs that differs and may change what the same weights compute."""
    ours, theirs = (model.config.get_text_config().to_dict() for model in (base, tuned))
    names = [name for name in dict.fromkeys([*ours, *theirs]) if name not in _ASIDE and not name.endswith("drop")]
    return [
        f"The configs differ: {name} is {ours.get(name)} in the base and {theirs.get(name)} in the tuned model."
        for name in names
        if ours.get(name) != theirs.get(name) and "dropout" not in name
    ]
