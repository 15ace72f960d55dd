"""Generate tinyworld's data, train its model and measure it: `python -m compositions.tinyworld`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m compositions.tinyworld",
        description="Generate tinyworld's data, train its model and measure it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    data_command = commands.add_parser("data", help="write the data files (seconds)")
    data_command.add_argument("--folder", type=Path, default=HERE / "data")

    train_command = commands.add_parser("train", help="train tokenizer and model, or resume an interrupted run")
    train_command.add_argument("--steps", type=int, help="stop after this many steps (for a trial)")
    review_command = commands.add_parser("review", help="run the missing review rounds on a trained model")
    for training in (train_command, review_command):
        training.add_argument("--folder", type=Path, default=HERE / "model")
        training.add_argument("--device", default="cpu")
        training.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")

    for command, what, document in (
        ("table", "measure the model", "tinyworld.md"),
        ("methods", "measure the effect of every method on the model (half an hour)", "methods.md"),
    ):
        measuring = commands.add_parser(command, help=f"{what} and write the table of docs/{document}")
        measuring.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / document)
        measuring.add_argument("--repeats", type=int, default=5, help="number of edit sets and seeds")
        measuring.add_argument("--seed", type=int, default=0, help="seed of the edit sets")

    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make training many times slower
    if arguments.command == "data":
        from compositions.tinyworld.datasets import write_data
        from compositions.tinyworld.truth import make_world

        write_data(make_world(), arguments.folder)
    elif arguments.command in ("train", "review"):
        import torch

        from compositions.tinyworld.train import TrainSettings, review_trained, train

        torch.set_num_threads(arguments.threads)
        settings, folder, device = TrainSettings(), arguments.folder, arguments.device
        if arguments.command == "train":
            summary = train(settings, folder, device=device, steps=arguments.steps)
        else:
            summary = review_trained(folder, settings, device=device)
        print(*(f"{key}: {value}" for key, value in summary.items()), sep="\n")
    else:
        from compositions.tinyworld.bench import around_table, write_table
        from compositions.tinyworld.methods import measure_methods
        from compositions.tinyworld.table import measure_model

        around_table(arguments.out)  # fail now, not after minutes of work
        measure = measure_model if arguments.command == "table" else measure_methods
        rows = measure(repeats=arguments.repeats, seed=arguments.seed, log=print)
        write_table(arguments.out, rows)
        print(*(row.markdown() for row in rows), sep="\n")


if __name__ == "__main__":
    main()
