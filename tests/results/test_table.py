"""Columns, notes and causes of the table of results."""

import pytest
from rows import efficiency, missing, row_of

from hfprune_dist.results.markdown import Column, cells, markdown
from hfprune_dist.results.metrics import METRICS, OF_SPEED
from hfprune_dist.results.rows import _efficiency
from hfprune_dist.results.table import causes, columns, flat_row, notes, report

DENSE = row_of(ratio=0.0, recovery="none", kl=0.0, kl_stderr=0.0)


def shown(rows, wide=False, **settings):
    """Map each header to what it shows for each row."""
    found = columns(rows, wide, **settings)
    return dict(zip([it.header for it in found], zip(*cells(rows, found), strict=True), strict=True))


def test_few_columns_say_what_a_row_is_worth_and_costs():
    assert shown([DENSE, row_of()]) == {
        "model": ("llama", "llama"),
        "ratio": ("dense", "0.2"),
        "method": ("-", "surgeon-plain"),
        "recovery": ("none", "lora"),
        "params": ("134.5M", "134.5M"),
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
    rows = [row_of(average=None), row_of()]
    few = shown(rows, with_errors=False)
    assert few["avg"] == ("-", "68.3±4.2") and few["KL"] == ("0.263", "0.263")
    assert shown([missing(row_of())])["KL"] == ("missing",)


def test_every_metric_has_one_column_and_one_note_that_tells_its_direction():
    row = row_of(**dict.fromkeys(OF_SPEED, 1.0), efficiency=efficiency(1.0, 1.0, 1.0), average_without_crows_pairs=0.1)
    found, told = shown([row], wide=True), "; ".join([*notes([row]), *notes([row], wide=True)])
    for metric in METRICS.values():
        assert metric.header in found and not {"-"} & {*found[metric.header]}
        assert not metric.meaning or f"{metric.header}: {metric.told}" in told
    assert len(found) == len({*found}) and {"demo_docstring", "width"} < found.keys()


def test_averages_without_crows_pairs_are_shown_where_they_differ():
    assert "avg w/o crows" not in shown([row_of()], wide=True)
    everything = shown([row_of(), row_of(average=0.7)], wide=True)
    assert (everything["avg"], everything["avg w/o crows"]) == (("68.3±4.2", "70.0±4.2"), ("68.3±4.2", "68.3±4.2"))


@pytest.mark.parametrize(("widths", "width"), [([9, 7, 8], "7-9"), ([8, 8], "8"), (None, "-")])
def test_a_width_is_that_of_all_layers_or_of_the_narrowest_and_the_widest(widths, width):
    row = row_of(intermediate_size=None, intermediate_sizes=widths)
    assert shown([row], wide=True)["width"] == (width,)


def test_further_texts_have_a_column_that_names_the_worst_if_there_are_several():
    none, one = row_of(other_texts={}), row_of(other_texts={"code": {"kl": 0.5, "kl_stderr": None}})
    assert not {it for it in shown([none], wide=True) if "KL " in it or "other KL" in it}
    assert shown([none, one], wide=True)["KL code"] == ("-", "0.500")
    several = row_of(other_texts={"code": {"kl": 0.5, "kl_stderr": 0.01}, "chat": {"kl": 0.4, "kl_stderr": 0.02}})
    lost = row_of(other_texts={"code": {"kl": 0.5, "kl_stderr": 0.01}, "chat": {"kl": None, "kl_stderr": None}})
    worst = shown([several, lost], wide=True)["worst other KL"]
    assert worst == ("0.500±0.010 (code)", "- (chat)"), "one that isn't known was too large"


def test_mixtures_of_experts_have_columns_of_their_own():
    sizes = {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    rows = [row_of(ratio=0.0, **sizes), row_of(**sizes | {"num_experts": 6}), row_of()]
    everything = shown(rows, wide=True)
    assert everything["experts"] == ("8", "6", "-") and everything["expert width"] == ("24", "24", "-")
    assert not {"experts", "expert width", "shared expert width"} & shown(rows[2:], wide=True).keys()


def test_notes_tell_over_how_many_examples_and_what_is_shared():
    rows = [DENSE, row_of(), row_of(model="qwen", tokens=4096, windows=16), missing(row_of(ratio=0.5))]
    fidelity, average, times, others = notes(rows)
    assert "±: standard error over windows" in fidelity and "n = 16-24 windows, 4,096-6,144 tokens" in fidelity
    assert "demo_docstring acc_norm (n = 60)" in average and "crows_pairs" not in average
    assert times.endswith("llama 3.0m"), "the only model of which several rows are done"
    assert others.startswith("kept%: ")
    assert causes(rows) == ["missing: llama 0.5 surgeon-plain: prune has not run yet"]
    assert notes([]) == notes([], wide=True) == []
    bias = {"tasks": {"crows_pairs_english": {"pct_stereotype": 0.6}, "piqa": {"acc": 0.7}}, "samples": {}}
    _, average, *_ = notes([row_of(**bias)])
    assert "for crows_pairs lower is" in average and average.endswith("crows_pairs_english pct_stereotype, piqa acc")
    assert "held-out text (n = 1 window, 1 token)" in notes([row_of(windows=1, tokens=1)])[0]
    more = [row_of(other_texts={name: {} for name in names}) for names in (["code"], ["code", "chat"])]
    assert "held-out text, the sweep's first (others: code, chat) (n = " in notes(more)[0]


def test_speed_is_that_of_the_last_workload_and_its_note_says_which():
    metrics = efficiency(1.254, tokens_per_s=123.4, seconds=0.0456) | {"dense": {}}
    metrics["runs"][-1] |= {"dense": {}, "first_token_speed": {"median": 2.5}}
    rows = [DENSE, row_of(**_efficiency({"metrics": metrics}))]
    assert shown(rows)["speed"] == ("-", "1.25")
    everything = shown(rows, wide=True)
    assert (everything["tokens/s"][1], everything["first token"][1]) == ("123.4", "45.6ms")
    assert (everything["least"], everything["most"]) == (("-", "1.13"), ("-", "1.38"))
    (told,) = [it for it in notes(rows) if it.startswith("speed")]
    assert told.endswith("(batch 4, 32 in, 16 out; a processor, threads: 2)")
    crowded = {**rows[1], "efficiency": rows[1]["efficiency"] | {"cores": 1}}
    assert any("threads: 2 on 1 core)" in note for note in notes([crowded])), "an affinity or a control group"
    elsewhere = [*rows, row_of(**_efficiency({"metrics": metrics | {"threads": 8, "cores": 8}}))]
    assert any("threads: 2 / batch 4, 32 in, 16 out; a processor, threads: 8)" in it for it in notes(elsewhere))
    flat = flat_row(rows[1])
    assert flat["efficiency/batch 1, 32 in, 16 out/decode_speed"] == 1.0 and "efficiency" not in flat
    assert flat["efficiency/batch 4, 32 in, 16 out/peak_memory_bytes"] == 3_000_000
    assert flat["efficiency/batch 4, 32 in, 16 out/first_token_speed"] == flat["first_token_speed"] == 2.5
    assert rows[1]["efficiency"].keys() == {"device", "threads", "cores", "model", "runs"}, (
        "the dense model has its own row"
    )


def test_a_row_that_lacks_its_speed_alone_keeps_its_scores():
    cause = "efficiency failed (killed): a rank died"
    rows = [row_of(speed_cause=cause), row_of("qwen", speed_cause=cause), row_of()]
    assert shown(rows)["KL"][0] == "0.263±0.012"
    assert causes(rows) == [f"speed missing: {rows[0]['label']}, {rows[1]['label']}: {cause}"], "once for all"


def test_rows_that_were_measured_in_another_way_are_named():
    others = [row_of(measured_as="another", label="this"), row_of("qwen", measured_as="another", label="that")]
    assert causes([DENSE, row_of(), *others]) == [
        "not to be compared with the first rows of their models, since measured in another way: this"
    ], "of qwen, there is no other"


def test_a_recovery_that_prunes_too_is_explained_where_a_row_has_it():
    own = [row_of(), row_of(method="loraprune", recovery="own")]
    assert notes(own)[0].startswith("recovery own: ") and not notes(own[:1])[0].startswith("recovery own")


def test_scores_of_tasks_stand_beside_what_tells_their_worth():
    flat = flat_row(row_of())
    assert [flat[f"demo_docstring/{name}"] for name in ("acc_norm", "samples")] == [0.7333, 60]


def test_names_do_not_break_markdown():
    table = markdown(["a|b\nc"], [Column("name", str, is_text=True), Column("length", lambda it: f"{len(it)}")])
    assert table == "| name | length |\n|---|---:|\n| a\\|b c | 5 |\n"
    assert markdown(["*a*"], [Column("_name_", str)]) == "| \\_name\\_ |\n|---:|\n| \\*a\\* |\n"
    assert "\n- missing: a \\*b\\*: no \\`c\\` here\n" in report(
        [row_of(status="missing", label="a *b*", cause="no `c`\nhere")]
    )
