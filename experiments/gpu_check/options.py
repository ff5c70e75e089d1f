"""Options of `python -m experiments gpu-check`; imports nothing heavy, for help pages."""

import argparse
from pathlib import Path

PARTS = ("checks", "speed", "comparison")
MODELS = ("gptj-6b", "llama3-8b")
METHODS = ("full", "mofo", "ewc", "hierarchical", "lora", "hierarchical-lora")
LAYOUTS = ("plain", "sharded")


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--parts",
        type=_among(PARTS),
        metavar="LIST",
        help="of checks,speed,comparison (default: checks,speed; comparison where --weights is given)",
    )
    command.add_argument("--models", type=_among(MODELS), default=MODELS, metavar="LIST", help=f"of {','.join(MODELS)}")
    command.add_argument(
        "--methods",
        type=_among(METHODS),
        default=METHODS[:5],
        metavar="LIST",
        help=f"of {','.join(METHODS)} (default: all but the last)",
    )
    command.add_argument("--layouts", type=_among(LAYOUTS), default=LAYOUTS, metavar="LIST", help="of plain,sharded")
    command.add_argument("--shape", type=_shape, metavar="ROWSxLENGTH", help="of a micro-batch (default: 4x2048)")
    command.add_argument("--compile", action="store_true", help="torch.compile each block in the speed part")
    command.add_argument("--only", default="", metavar="TEXT", help="pieces whose name contains this")
    command.add_argument("--again", action="store_true", help="repeat pieces that the file already has of this code")
    command.add_argument(
        "--minutes", type=_positive, default=9.0, help="start no piece that is not expected to end by then (default: 9)"
    )
    command.add_argument(
        "--tiny", action="store_true", help="tiny sizes, on the CPU too: tries the command and measures nothing"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="default: results/gpu/NAME-OF-THE-GPU.json")
    command.add_argument("--weights", type=Path, metavar="DIR", help="comparison: a model in Hugging Face layout")
    command.add_argument(
        "--data", type=Path, default=Path("work/data"), metavar="DIR", help="comparison: a study's (default: work/data)"
    )
    command.add_argument("--domain", default="", help="comparison: a folder of DATA/train (default: the only one)")
    command.add_argument("--rows", type=_whole, default=600, help="comparison: training rows (default: 600)")
    command.add_argument(
        "--learning-rate", type=_positive, default=1e-5, help="comparison: of every method (default: 1e-5)"
    )


def _among(known: tuple[str, ...]):
    def chosen(text: str) -> tuple[str, ...]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{(unknown or [text])[0]!r} is not one of {', '.join(known)}")
        return tuple(name for name in known if name in names)

    return chosen


def _shape(text: str) -> tuple[int, int]:
    rows, _, length = text.partition("x")
    if not (rows.isdecimal() and length.isdecimal() and int(rows) > 0 and int(length) > 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxLENGTH, such as 4x2048")
    return int(rows), int(length)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _whole(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
