"""Tables, plots and the page of runs made again from their results.json, without training.

    python tools/report.py results/PRISM/train_basis-1a2b3c4d ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import require
from lore.experiments.report.intervals import columns
from lore.experiments.report.tables import Table, markdown, measure_table, report
from lore.experiments.results import read_results


def main(runs: tuple[Path, ...] = (), only: tuple[str, ...] = ()) -> None:
    """Make the tables and plots of runs again from their results.json, without training.

    Args:
        runs: Folders of runs; several are also put side by side in one table.
        only: Print only these labels, such as "LoRe K=5"; the files in the folders have all.
    """
    require(bool(runs), "name at least one run's folder: python tools/report.py results/PRISM/...")
    names = [run.name for run in runs]
    read = {run.name if names.count(run.name) == 1 else str(run): read_results(run) for run in runs}
    known = {label for results in read.values() for label in results.labels}
    unknown = [label for label in only if label not in known]
    require(not unknown, f"--only {' '.join(unknown)}: these runs have {', '.join(sorted(known))}")
    texts = []
    for run, results in zip(runs, read.values(), strict=True):
        texts.append(report(run, [label for label in results.labels if label in only]))
    if len(runs) > 1:  # their accuracies in one table, a column for each set or number of shots
        together: Table = {}
        for name, results in read.items():
            wanted = [column.name for column in columns(results)]
            for row, cells in measure_table(results, "accuracy").items():
                some = {f"{name} {c}": cells[c].split(" [")[0] for c in cells if c in wanted}
                if some:
                    together[row] = together.get(row, {}) | some
        texts.append(markdown(together))
    sys.stdout.write("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--runs")
    cli(main)
