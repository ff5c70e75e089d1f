"""python -m methods             the parts: title, paper, one line, settings with types and defaults
python -m methods docs        write the settings tables into docs/methods/*.md
"""

import sys
import textwrap

from methods.errors import UserError, lacks


def main(arguments: list[str]) -> int:
    try:
        from methods import listing, registry

        if arguments == ["docs"]:
            for path in listing.write_docs():
                print(f"wrote {path}")
        elif not arguments:
            print("\n\n".join(listing.described(part) for part in registry.parts().values()))
        else:
            print(textwrap.dedent(__doc__).strip(), file=sys.stderr)
            return 0 if arguments in (["-h"], ["--help"]) else 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("experiments", "methods"):
            raise
        print(f"error: {lacks(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
