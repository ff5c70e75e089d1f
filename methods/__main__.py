"""python -m methods             the parts, a line each
python -m methods KEY ...     some of them: paper, settings with types and defaults, what it acts on
python -m methods docs        write the settings tables into docs/methods/*.md
"""

import os
import sys

from methods.errors import UserError, lacks


def main(arguments: list[str]) -> int:
    try:
        from methods import listing, registry

        if arguments == ["docs"]:
            for path in listing.write_docs():
                print(f"wrote {path}")
        elif arguments in (["-h"], ["--help"]):
            print(__doc__.strip())
        elif not arguments:
            print(listing.lines())
        else:
            print("\n\n".join(listing.described(registry.part(key)) for key in arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or closing it would complain once more
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("experiments", "methods"):
            raise
        print(f"error: {lacks(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
