"""`python -m compositions.tinyworld`: make tinyworld's data, train its model, measure it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run the command that the arguments name."""
    parser = argparse.ArgumentParser(
        prog="python -m compositions.tinyworld",
        description="Make tinyworld's data, train its model, measure it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    data_command = commands.add_parser("data", help="write the data files (seconds)")
    data_command.add_argument("--folder", type=Path, default=HERE / "data")

    train_command = commands.add_parser("train", help="train tokenizer and model; an interrupted run goes on")
    train_command.add_argument("--folder", type=Path, default=HERE / "model")
    train_command.add_argument("--device", default="cpu")
    train_command.add_argument("--steps", type=int, help="stop after so many steps (to try it out)")
    train_command.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")

    table_command = commands.add_parser("table", help="measure the model and write the table of docs/tinyworld.md")
    table_command.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "tinyworld.md")
    table_command.add_argument("--edit-sets", type=int, default=5)
    table_command.add_argument("--seed", type=int, default=0, help="seed of the choice of edits")

    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make training many times slower
    if arguments.command == "data":
        from compositions.tinyworld.datasets import write_data
        from compositions.tinyworld.truth import make_world

        write_data(make_world(), arguments.folder)
    elif arguments.command == "train":
        import torch

        from compositions.tinyworld.train import TrainSettings, train

        torch.set_num_threads(arguments.threads)
        summary = train(TrainSettings(), arguments.folder, device=arguments.device, steps=arguments.steps)
        print(*(f"{key}: {value}" for key, value in summary.items()), sep="\n")
    else:
        from compositions.tinyworld.table import write_table

        rows = write_table(arguments.out, edit_sets=arguments.edit_sets, seed=arguments.seed, say=print)
        print(*(row.markdown() for row in rows), sep="\n")


if __name__ == "__main__":
    main()
