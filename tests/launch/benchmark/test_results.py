import json

from hfprune_launch.benchmark.results import Chart, Findings, Line, markdown


def test_findings_add_up_and_travel_as_json():
    line, chart = Line("pass", "time", 2.0, "forwards", 2.3), Chart("t", "x", "y", [1, 2], {"ours": [1.0, 1.0]})
    both = Findings([line]) + Findings([], [chart])
    told = json.loads(json.dumps(both.to_json()))
    assert told["lines"][0]["target"] == 2.3 and told["charts"][0]["curves"] == {"ours": [1.0, 1.0]}


def test_the_table_has_a_row_for_each_line_and_no_target_where_there_is_none():
    table = markdown([Line("pass", "time", 2.346, "forwards", 2.3), Line("ranks", "same", 1.0, "share")])
    assert table.splitlines()[2:] == ["| pass | time | 2.35 forwards | 2.3 |", "| ranks | same | 1 share |  |"]
