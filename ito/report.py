"""`python -m ito.report RUN`: write the run's `report.html` again.

Scores, training curves, a map of the embeddings, retrieval examples and mistakes, the configuration
and the machine, in one file that loads nothing from the network.
"""

from pathlib import Path

from ito.cli import Parser, shown, user_errors
from ito.config import add_options
from ito.model.exported import load
from ito.run import choose_data, open_chosen, refuse_strange
from ito.scoring.projections import PROJECTIONS
from ito.scoring.report_page import write_report


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m ito.report", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--map",
        choices=PROJECTIONS,
        default="pca",
        help="projection of the embedding map (default: pca)",
    )
    add_options(parser, only="data")
    with user_errors():
        options = parser.parse_args(arguments)
        options.data = None
        refuse_strange(options.run)
        encoder = load(options.run)
        dataset = open_chosen(options, choose_data(options))
        print(shown(write_report(options.run, encoder, dataset, options.map)))


if __name__ == "__main__":
    main()
