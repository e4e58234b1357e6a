"""One page and pictures from any number of benchmarks: latency, accuracy, tokens, operators, delegates, devices.

python -m tflite.report host.json phone.json runs/evaluation/evaluation.json --output_dir=runs/report

The files are benchmark.json of tflite.benchmark, from any device, and evaluation.json of mobiatt_tf.training.evaluate,
whose accuracies are joined by the graphs' SHA-256. Ratios between devices refer to the first benchmark.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mobiatt_tf import cli, files
from tflite.reporting import page, png
from tflite.reporting.collect import Report, collect
from tflite.reporting.figures import figures


def write(report: Report, directory: Path) -> list[Path]:
    """Writes report.html and one report_NAME.png for each figure that has a chart, each whole or not at all.

    Returns:
        Their paths. Pictures of an earlier report that this one does not have are removed.

    Raises:
        UserError: the directory cannot be written or the disk is full.
    """
    found = figures(report)
    pictures = {figure.name: directory / f"report_{figure.name}.png" for figure in found}
    written = []
    for figure in found:
        if figure.panels:
            legend = [f"{graph.number}\N{NO-BREAK SPACE}{graph.name}" for graph in report.graphs]
            with files.atomic_path(pictures[figure.name]) as temporary:
                png.write(figure, legend, temporary)
            written.append(pictures[figure.name])
        else:
            pictures[figure.name].unlink(missing_ok=True)
    html = directory / "report.html"
    files.write_bytes(html, page.render(report).encode())
    return [html, *written]


def define_flags() -> None:
    """The command line's flags; a function, because several commands share their names."""
    flags.DEFINE_string("output_dir", "runs/report", "Directory for report.html and the pictures.")


def main(argv: Sequence[str]) -> None:
    """Reports on the files that the command names."""
    report = collect([files.user_path(path) for path in argv[1:]])
    written = write(report, files.user_path(flags.FLAGS.output_dir))
    for note in report.notes:
        print(f"note: {note}")
    print("written: " + ", ".join(str(path) for path in written), flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main, repeated="FILE")
