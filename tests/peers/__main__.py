"""`python -m tests.peers pyg | examples | packages`: see README.md beside this file."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pyg = commands.add_parser("pyg", help="PyG's own tests, plain and compressed")
    pyg.add_argument("--checkout", type=Path, required=True, help="a copy of PyG's repository")
    pyg.add_argument("--out", type=Path, default=Path("peers-out"), help="folder for results")
    pyg.add_argument("--tests", default="test/nn", help="folder or file below the checkout")
    pyg.add_argument("--dropout", choices=("seed", "mask"), default="seed")
    pyg.add_argument("--again", action="store_true", help="run the plain tests anew")
    pyg.add_argument("--limit", type=float, default=3600, help="seconds for each run")
    examples = commands.add_parser("examples", help="the models of PyG's examples")
    examples.add_argument("--checkout", type=Path, required=True, help="a copy of PyG's repository")
    examples.add_argument("--only", default="", help="part of an example's name")
    packages = commands.add_parser("packages", help="models of other packages that are installed")
    packages.add_argument("names", nargs="*", help="packages; all that are known when none is given")
    packages.add_argument("--only", default="", help="part of a model's name")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.command == "pyg":
        from tests.peers import pyg_tests

        checkout, out = given.checkout.resolve(), given.out.resolve()
        return pyg_tests.run(checkout, out, given.tests, dropout=given.dropout, again=given.again, limit=given.limit)
    if given.command == "examples":
        from tests.peers import examples as models

        return models.run(given.checkout / "examples", given.only)
    from tests.peers import packages as installed

    return installed.main(given.names, given.only)


if __name__ == "__main__":
    sys.exit(bool(main()))
