"""The demo's sweep on GPUs gives the results that the README shows for CPUs (checks 1 and 2)."""

import re

import pytest
from gpu_runs import logs_of, visible
from ranks import ROOT
from sweeps import finish, results

# Rounding differs, and with it some of the units that are kept and four steps of training.
KL_TOLERANCE, KL_FLOOR, SIZE_TOLERANCE = 0.1, 0.02, 0.02


def readme_rows():
    """Return (KL, parameters in % of the dense model's) of each row of the README's first table of results."""
    lines = [line.strip("|").split("|") for line in (ROOT / "README.md").read_text().splitlines() if "| " in line]
    head = next([name.strip() for name in line] for line in lines if " kept% " in line)
    rows = [dict(zip(head, map(str.strip, line), strict=True)) for line in lines if line[0] == " llama "]
    return [(float(row["KL"].split("±")[0]), float(row["kept%"])) for row in rows]


def test_the_readme_has_the_rows_of_the_demo():
    rows = readme_rows()
    assert len(rows) == 6 and rows[0] == (0.0, 100.0)


@pytest.mark.parametrize("gpus", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multi_gpu)])
def test_the_table_of_the_demo(real_assets, tmp_path, gpus):
    text = (ROOT / "configs" / "demo.yaml").read_text().replace("../runs/demo-assets", str(real_assets))
    (tmp_path / "demo.yaml").write_text(text)
    out, which = tmp_path / "out", ["--models", "llama", "--ratios", "0.2,0.5"]
    finish(tmp_path / "demo.yaml", out, *which, environment=visible(gpus))
    rows = results(out)
    assert len(rows) == 6
    for row, (kl, kept) in zip(rows, readme_rows(), strict=True):
        assert float(row["kl"]) == pytest.approx(kl, rel=KL_TOLERANCE, abs=KL_FLOOR), row
        assert 100 * float(row["share_kept"]) == pytest.approx(kept, rel=SIZE_TOLERANCE), row
    assert not re.search(r"\b(nvcc|ninja)\b", logs_of(out)), "nothing is compiled on the way"
