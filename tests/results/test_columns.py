import pytest
from rows import SHARES, TRAINING, efficiency, missing, row_of

from hfprune_dist.results.column import Column, cells, markdown
from hfprune_dist.results.columns import all_columns, few_columns
from hfprune_dist.results.efficiency import efficiency_of
from hfprune_dist.results.formats import byte_count, count, duration
from hfprune_dist.results.notes import causes, notes, wide_notes
from hfprune_dist.results.table import flat_row, report

DENSE = row_of(ratio=0.0, recovery="none", kl=0.0, kl_stderr=0.0)


def shown(rows, columns):
    """Map each header to what it shows for each row."""
    return dict(zip([it.header for it in columns], zip(*cells(rows, columns), strict=True), strict=True))


def test_few_columns_say_what_a_row_is_worth_and_costs():
    assert shown([DENSE, row_of()], few_columns([DENSE, row_of()])) == {
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
    few = shown(rows, few_columns(rows))
    assert "recovery" not in few and "avg" not in few and few["KL"] == ("0.263", "0.263")
    rows = [row_of(average=None), row_of()]
    few = shown(rows, few_columns(rows, with_errors=False))
    assert few["avg"] == ("-", "68.3±4.2") and few["KL"] == ("0.263", "0.263")


def test_averages_without_crows_pairs_are_shown_where_they_differ():
    alike = row_of(average_without_crows_pairs_of_dense=0.5)
    everything = shown([alike], all_columns([alike]))
    assert everything["avg % of dense"] == ("90.1",) and "avg w/o crows" not in everything
    rows = [alike, row_of(average=0.7)]
    everything = shown(rows, all_columns(rows))
    assert (everything["avg"], everything["avg w/o crows"]) == (("68.3±4.2", "70.0±4.2"), ("68.3±4.2", "68.3±4.2"))
    assert everything["avg % of dense"] == ("50.0", "90.1")
    nothing = row_of(**dict.fromkeys(SHARES))
    assert not [it for it in shown([nothing], all_columns([nothing])) if "dense" in it or "recovery" in it]


@pytest.mark.parametrize(("widths", "width"), [([9, 7, 8], "7-9"), ([8, 8], "8"), (None, "-")])
def test_a_width_is_that_of_all_layers_or_of_the_narrowest_and_the_widest(widths, width):
    row = row_of(intermediate_size=None, intermediate_sizes=widths)
    assert shown([row], all_columns([row]))["width"] == (width,)


def test_all_columns_have_the_rest():
    rows = [row_of(shared_training_tokens=7), missing(row_of(ratio=0.3))]
    everything = shown(rows, all_columns(rows))
    assert everything["ppl"] == ("17.52±0.51", "-") and everything["agree"] == ("0.762±0.015", "-")
    assert everything["demo_docstring"] == ("73.3±5.8", "-") and everything["KL"] == ("0.2629±0.0123", "missing")
    assert (everything["time"][0], everything["shared"][0], everything["memory"][0]) == ("4.4m", "3.0m", "2.4GB")
    assert everything["avg % of dense"] == ("90.1", "-")
    assert everything["before recovery"][0] == "70.0" and everything["shared FLOPs"] == ("45T", "-")
    costs = [everything[name][0] for name in ("tokens", "FLOPs", "device-h", "wasted-h")]
    assert costs == ["10.24k", "45T", "0.073", "0"] and everything["shared tokens"] == ("7", "-")
    assert everything.keys() > {"reached", "params", "size", "width", "avg"}


def test_further_texts_have_a_column_that_names_the_worst_if_there_are_several():
    none, one = row_of(other_texts={}), row_of(other_texts={"code": {"kl": 0.5, "kl_stderr": None}})
    assert not {it for it in shown([none], all_columns([none])) if "KL " in it or "other KL" in it}
    assert shown([none, one], all_columns([none, one]))["KL code"] == ("-", "0.5000")
    several = row_of(other_texts={"code": {"kl": 0.5, "kl_stderr": 0.01}, "chat": {"kl": 0.4, "kl_stderr": 0.02}})
    lost = row_of(other_texts={"code": {"kl": 0.5, "kl_stderr": 0.01}, "chat": {"kl": None, "kl_stderr": None}})
    worst = shown([several, lost], all_columns([several, lost]))["worst other KL"]
    assert worst == ("0.5000±0.0100 (code)", "- (chat)"), "one that isn't known was too large"


def test_mixtures_of_experts_have_columns_of_their_own():
    sizes = {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    rows = [row_of(ratio=0.0, **sizes), row_of(**sizes | {"num_experts": 6}), row_of()]
    everything = shown(rows, all_columns(rows))
    assert everything["experts"] == ("8", "6", "-") and everything["expert width"] == ("24", "24", "-")
    assert not {"experts", "expert width", "shared expert width"} & shown(rows[2:], all_columns(rows[2:])).keys()


def test_notes_tell_directions_numbers_and_what_is_shared():
    rows = [DENSE, row_of(), row_of(model="qwen", tokens=4096, windows=16), missing(row_of(ratio=0.5))]
    fidelity, average, costs, training = notes(rows)
    assert "lower is better" in fidelity and "±: standard error over windows" in fidelity
    assert "n = 16-24 windows, 4,096-6,144 tokens" in fidelity
    assert "higher is better" in average and "demo_docstring acc_norm (n = 60)" in average
    assert costs.endswith("llama 3.0m"), "the only model of which several rows are done"
    assert "a row's own stages 45T FLOPs, 0.073 CPU rank-hours; of those that it shares 45T FLOPs" in training
    assert causes(rows) == ["missing: llama 0.5 surgeon-plain: prune has not run yet"]
    assert "crows_pairs" not in average and notes([]) == wide_notes([]) == []


def test_speed_has_columns_where_it_was_measured():
    metrics = efficiency(1.254, tokens_per_s=123.4, seconds=0.0456) | {"dense": {}}
    metrics["runs"][-1] |= {"dense": {}, "first_token_speed": {"median": 2.5}}
    rows = [DENSE, row_of(**efficiency_of({"metrics": metrics}))]
    assert shown(rows, few_columns(rows))["speed"] == ("-", "1.25")
    everything = shown(rows, all_columns(rows))
    assert (everything["tokens/s"][1], everything["first token"][1]) == ("123.4", "45.6ms")
    assert everything["speeds"] == ("-", "1.13-1.38")
    assert (everything["FLOPs/token"][1], everything["cache/token"][1]) == ("215M", "46kB")
    (told,) = [it for it in notes(rows) if it.startswith("speed")]
    assert told.endswith("(batch 4, 32 in, 16 out; a processor, threads: 2)")
    crowded = {**rows[1], "efficiency": rows[1]["efficiency"] | {"cores": 1}}
    assert any("threads: 2 on 1 core)" in note for note in notes([crowded])), "an affinity or a control group"
    flat = flat_row(rows[1])
    assert flat["efficiency/batch 1, 32 in, 16 out/decode_speed"] == 1.0 and "efficiency" not in flat
    assert flat["efficiency/batch 4, 32 in, 16 out/peak_memory_bytes"] == 3_000_000
    assert rows[1]["efficiency"].keys() == {"device", "threads", "model", "runs"}, "the dense model has its own row"
    assert flat["efficiency/batch 4, 32 in, 16 out/decode_tokens_per_s"] == flat["decode_tokens_per_s"] == 123.4
    first_token = flat["efficiency/batch 4, 32 in, 16 out/first_token_speed"]
    assert first_token == flat["first_token_speed"] == 2.5
    elsewhere = [*rows, row_of(**efficiency_of({"metrics": metrics | {"threads": 8}}))]
    assert [
        it for it in notes(elsewhere) if it.endswith("threads: 2 / batch 4, 32 in, 16 out; a processor, threads: 8)")
    ]
    unmeasured = [DENSE, row_of()]
    assert "speed" not in shown(unmeasured, few_columns(unmeasured))
    assert not [it for it in notes(unmeasured) if it.startswith("speed")]


def test_a_row_that_lacks_its_speed_alone_keeps_its_scores():
    cause = "efficiency failed (killed): a rank died"
    rows = [row_of(speed_cause=cause), row_of("qwen", speed_cause=cause), row_of()]
    assert shown(rows, few_columns(rows))["KL"][0] == "0.263±0.012"
    assert causes(rows) == [f"speed missing: {rows[0]['label']}, {rows[1]['label']}: {cause}"], "once for all"


def test_rows_that_were_measured_in_another_way_are_named():
    others = [row_of(measured_as="another", label="this"), row_of("qwen", measured_as="another", label="that")]
    assert causes([DENSE, row_of(), *others]) == [
        "not to be compared with the first rows of their models, since measured in another way: this"
    ], "of qwen, there is no other"


def test_notes_on_older_evaluations_and_bias():
    bias = {"tasks": {"crows_pairs_english": {"pct_stereotype": 0.6}, "piqa": {"acc": 0.7}}, "samples": {}}
    fidelity, average, _ = notes([row_of(kl_stderr=None, windows=None, **bias, **dict.fromkeys(TRAINING))])
    assert "n = 6,144 tokens" in fidelity and "±" not in fidelity
    assert "held-out text (n = 1 window, 1 token)" in notes([row_of(windows=1, tokens=1)])[0]
    more = [row_of(other_texts={name: {} for name in names}) for names in (["code"], ["code", "chat"])]
    assert "held-out text, the sweep's first (others: code, chat) (n = " in notes(more)[0]
    assert "for crows_pairs lower is" in average and average.endswith("crows_pairs_english pct_stereotype, piqa acc")


def test_notes_tell_the_range_of_what_differs_between_rows():
    costs = {"own_training_flops": 9e13, "shared_training_flops": 1e12, "training_device": "cuda"}
    rows = [row_of(), row_of(ratio=0.3, **costs), row_of(ratio=0.0, own_training_flops=0.0)]
    training = notes(rows)[-1]
    assert "own stages 45T to 90T FLOPs, 0.073 device-hours" in training, "what costs nothing is no part of a range"
    assert "that it shares 1.0T to 45T FLOPs" in training
    assert "0.073 GPU-hours" in notes([rows[1]])[-1]


def test_a_recovery_that_prunes_too_is_explained_where_a_row_has_it():
    own = [row_of(), row_of(method="loraprune", recovery="own")]
    assert notes(own)[0].startswith("recovery own: ") and not notes(own[:1])[0].startswith("recovery own")


def test_scores_of_tasks_stand_beside_what_tells_their_worth():
    flat = flat_row(row_of())
    told = [flat[f"demo_docstring/{name}"] for name in ("acc_norm", "samples", "of_dense")]
    assert told == [0.7333, 60, 0.9]


def test_names_do_not_break_markdown():
    table = markdown(["a|b\nc"], [Column("name", str, is_text=True), Column("length", lambda it: f"{len(it)}")])
    assert table == "| name | length |\n|---|---:|\n| a\\|b c | 5 |\n"
    assert markdown(["*a*"], [Column("_name_", str)]) == "| \\_name\\_ |\n|---:|\n| \\*a\\* |\n"
    assert "\n- missing: a \\*b\\*: no \\`c\\` here\n" in report(
        [row_of(status="missing", label="a *b*", cause="no `c`\nhere")]
    )


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        *[(count, value, shown) for value, shown in [(999, "999"), (1_236_000_000, "1.236B"), (67_278_528, "67.28M")]],
        *[(byte_count, value, shown) for value, shown in [(5, "5B"), (2_470_000_000, "2.5GB"), (16e9, "16GB")]],
        *[(duration, value, shown) for value, shown in [(0.4, "0s"), (99, "99s"), (100, "1.7m"), (1e9, "11574d")]],
        *[(form, None, "-") for form in (count, byte_count, duration)],
    ],
)
def test_numbers_are_short(form, value, expected):
    assert form(value) == expected
