"""model: a model's source to an ordinary safetensors folder with tokenizer and base.json."""

from experiments.model.weights import materialise


def main(study, *, model: str) -> None:
    materialise(name=model, block=study.models[model], packages=study.packages, out_dir=study.paths.model(model))
