"""Columns, notes and causes of the table of results."""

from rows import efficiency, missing, row_of, shown

from hfprune_dist.results.metrics import METRICS
from hfprune_dist.results.table import causes, findings, notes

DENSE = row_of(ratio=0.0, recovery="none", kl=0.0, kl_stderr=0.0)


def test_few_columns_say_what_a_row_is_worth_and_costs():
    assert shown([DENSE, row_of()]) == {
        "model": ("llama", "llama"),
        "ratio": ("dense", "0.2"),
        "method": ("-", "surgeon-plain"),
        "recovery": ("none", "lora"),
        "kept%": ("100.0", "80.0"),
        "KL": ("0.000±0.000", "0.263±0.012"),
        "avg": ("68.3±4.2", "68.3±4.2"),
        "size": ("269MB", "269MB"),
        "time": ("4.4m", "4.4m"),
    }


def test_what_is_alike_or_unknown_in_all_rows_has_no_column():
    rows = [row_of(kl_stderr=None, average=None), row_of(method="hfprune", kl_stderr=None, average=None)]
    few = shown(rows)
    assert "recovery" not in few and "avg" not in few and few["KL"] == ("0.263", "0.263")
    assert shown([row_of(average=None), row_of()])["avg"] == ("-", "68.3±4.2")
    assert shown([missing(row_of())])["KL"] == ("missing",)


def test_every_metric_has_one_column_and_one_note_that_tells_its_direction():
    row = dict.fromkeys(METRICS, 1.0) | row_of(efficiency=efficiency(1.0, 1.0, 1.0))
    found, told = shown([row], wide=True), "\n".join(notes([row], wide=True))
    for metric in METRICS.values():
        assert metric.header in found and not {"-"} & {*found[metric.header]}
        assert not metric.meaning or f"{metric.header}: {metric.told}" in told
    assert len(found) == len({*found}) and {"demo_docstring", "width"} < found.keys()


def test_engines_are_a_column():
    passed, other = {"difference": 2e-5, "failure": ""}, {"difference": None, "failure": "no such shape"}
    rows = [DENSE, row_of(engines={"vllm": passed, "mlx": other})]
    found = shown(rows)
    assert found["engines"] == ("-", "vllm 2e-05, mlx fails")
    assert all("engines: largest difference of log-probabilities" in "".join(notes(rows, wide)) for wide in (0, 1))
    assert causes(rows) == [f"fails: {rows[1]['label']} in mlx: no such shape"]


def test_notes_tell_how_rows_were_measured():
    rows = [DENSE, row_of(), row_of(model="qwen", tokens=4096, windows=16), missing(row_of(ratio=0.5))]
    told = "\n".join(notes(rows, wide=True))
    assert "(n = 24 windows, 6,144 tokens or 16 windows, 4,096 tokens)" in told and "crows_pairs" not in told
    assert "demo_docstring acc_norm\n" in told and "time: of a row's own stages" in told
    rows = [row_of(decode_speed=1.2, efficiency=efficiency(1.2, 3.0, 0.1)) for _ in range(2)]
    rows += [row_of(method="loraprune", recovery="own", tasks={"crows_pairs_english": {"pct_stereotype": 0.6}})]
    told = "\n".join(notes(rows, wide=True))
    assert "for crows_pairs lower is" in told and told.startswith("recovery own: ")
    assert "(batch 4, 32 in, 16 out; transformers 5 on a processor, 2 threads)" in told
    on_a_gpu = {name: value for name, value in efficiency(1.2, 3.0, 0.1).items() if name not in ("threads", "cores")}
    (told,) = [line for line in notes([rows[0] | {"efficiency": on_a_gpu}], wide=True) if line.startswith("speed: ")]
    assert told.endswith("; transformers 5 on a processor)")


def test_the_finding_is_the_closest_row_at_each_ratio_and_what_it_keeps_of_the_dense_model():
    worse = [row_of(method="hfprune", kl=4.0), row_of(ratio=0.5, method="hfprune", kl=3.0, average=0.3)]
    others = [row_of(ratio=0.5, kl=1.0, average=0.41), row_of(ratio=0.5, kl=0.1, measured_as="b"), missing(row_of())]
    assert findings([DENSE, *worse, row_of(), *others]) == [
        "llama: with 20 % removed, surgeon-plain + lora keeps 100.0±8.8 % of the dense model's average score "
        "(KL 0.263±0.012); with 50 % removed, surgeon-plain + lora keeps 60.0±7.2 % of the dense model's average score "
        "(KL 1.000±0.012)."
    ]
    control = row_of(ratio=0.0, average=0.7, average_stderr=None)
    (told,) = findings([DENSE, control, row_of(recovery="lora via 0.1"), row_of(ratio=0.5, recovery="distill")])
    assert "surgeon-plain + lora via 0.1 keeps 97.6 % of the average score of dense + lora (KL" in told
    assert told.endswith("+ distill keeps 100.0±8.8 % of the dense model's average score (KL 0.263±0.012).")
    (told,) = findings([DENSE, row_of(average=None, average_stderr=None, recovery="none")])
    assert "surgeon-plain keeps 76.2±1.5 % of the dense model's most likely next tokens" in told
    assert findings([DENSE]) == findings([row_of()]) == findings([missing(DENSE), row_of()]) == []


def test_what_is_missing_or_not_comparable_is_named():
    others = [row_of(measured_as="another", label="this"), row_of("qwen", measured_as="another", label="that")]
    rows = [DENSE, missing(row_of(ratio=0.5)), row_of(cause="no speed: a rank died"), *others]
    assert causes(rows) == [
        "missing: llama 0.5 surgeon-plain: prune has not run yet",
        "missing: llama 0.2 surgeon-plain: no speed: a rank died",
        "not to be compared with their models' first rows: measured otherwise, or with other libraries: this",
    ], "of qwen, there is no other"
