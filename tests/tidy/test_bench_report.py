"""The benchmark's arithmetic: what a table says of samples that are known."""

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.peers import FUSE4FS
from bench.report import as_markdown, fill
from bench.results import Results
from bench.workload import Sample
from bench.workloads import WORKLOADS

BY_NAME = {work.name: work for work in WORKLOADS}


def results(**figures: tuple[float, float]) -> Results:
    """Three samples around each pair of figures (kernel, fusewire); names with ``_`` for ``-``."""
    made = Results()
    for name, pair in figures.items():
        for side, value in zip(("kernel", "fusewire"), pair, strict=True):
            for factor in (0.5, 1.0, 20.0):
                made.add(name.replace("_", "-"), side, Sample(value * factor, 100.0 if side == "fusewire" else None))
    return made


def cells(text: str, name: str) -> list[str]:
    """The cells of one workload's row."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    assert len(lines) == 1, text
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def test_workloads_are_told_apart_and_known_to_the_constants() -> None:
    assert len(BY_NAME) == len(WORKLOADS)
    assert set(FUSE4FS) <= set(BY_NAME)


def test_times_and_rates_are_relative_to_the_kernel() -> None:
    text = as_markdown(results(create=(10, 50), seq_write=(400, 100)))
    row = cells(text, "create")
    assert (row[2], row[4], row[5], row[6], row[7]) == ("10 µs", "5.00", "≤ 7", "yes", "6.8")
    assert row[8] == "100 µs/name"
    row = cells(text, "seq-write")
    assert (row[4], row[5], row[6], row[7]) == ("0.25", "≥ 0.6", "**no**", "0.24")


def test_mean_is_of_times() -> None:
    made = results(create=(10, 50), seq_write=(400, 20))      # 5 times and 20 times as long
    mean = made.mean_slowness(list(WORKLOADS), "fusewire")
    assert mean is not None and mean[1] == 2 and mean[0] == pytest.approx(10)
    assert "geometric mean of the time over 2 rows: fusewire 10.00 (target ≤ 2.5: **no**)" in as_markdown(made)


def test_absolute_figures_are_not_in_the_mean() -> None:
    made = results(grow_create=(1.2, 1.4), memory_idle=(1, 40))
    assert made.mean_slowness(list(WORKLOADS), "fusewire") is None
    assert cells(as_markdown(made), "grow-create")[4:7] == ["1.4 ×", "≤ 1.5", "yes"]


def test_slower_than_fuse4fs_is_marked() -> None:
    text = as_markdown(results(rename=(10, 160), mkdir=(10, 52)))
    assert (cells(text, "rename")[7], cells(text, "mkdir")[7]) == ("**15**", "5.2")
    assert "rows not slower than fuse4fs's constant: 1 of 2" in text


def test_a_failure_has_its_row() -> None:
    made = results(create=(10, 50))
    made.fail("unlink", "fusewire", "OSError: no")
    text = as_markdown(made)
    assert cells(text, "unlink")[4] == "failed"
    assert "unlink on fusewire: OSError: no" in text


def test_samples_come_back_from_their_file(tmp_path: Path) -> None:
    made, again = results(create=(10, 50)), Results()
    made.fail("unlink", "fuse2fs", "it ended")
    made.write(tmp_path / "samples.json")
    for _ in range(2):
        again.read(tmp_path / "samples.json")
    assert again.samples["create"]["kernel"] == made.samples["create"]["kernel"] * 2
    assert again.failures == made.failures and again.cost("create", "fusewire") == 100.0


def test_the_readme_is_filled_between_its_marks(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    fill(document, "new \\1\n")
    assert document.read_text() == "before\n<!-- bench -->\nnew \\1\n<!-- /bench -->\nafter\n"
    document.write_text("no marks\n")
    with pytest.raises(ValueError, match="marks"):
        fill(document, "new\n")


def test_the_list_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in BY_NAME)
    assert main(["--only", "nothing-like-this"]) == 2
