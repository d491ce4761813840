"""``python -m pyproelbo``: fit a VAE or a DMM, take its ELBO apart (needs the extra ``cli``)."""

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 for a wrong input."""
    try:
        from pyproelbo.cli.app import run

        return run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # before there was anybody to take it
        print("stopped", file=sys.stderr)
        return 130
    except ImportError as error:
        needs = {"typer", "rich", "lightning", "sklearn"}
        if (error.name or "").partition(".")[0] not in needs and "pip install" not in str(error):
            raise
        print("error: the command line needs: pip install pyproelbo[cli]", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
