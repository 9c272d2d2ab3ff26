"""The table that `auto` reads."""

import jax
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.products import measured_facts
from aqt_search.products.carriers import EXECUTIONS, fastest
from aqt_search.products.measured_facts import FACTS, Fact, Work, facts_about, known_at

INT8 = [aqs.numeric_format("int8")] * 2


def work(kind="dot_general", rows=4096, terms=4096, columns=4096, groups=1, inputs=4096):
    return Work(kind, rows, terms, columns, groups, inputs)


def test_rows_name_what_there_is():
    for fact in FACTS:
        assert fact.execution in EXECUTIONS
        assert fact.form in ("lax", "rows")
        assert fact.backend in ("cpu", "gpu", "tpu")
        assert fact.ratio > 0
        assert fact.kind in ("dot_general", "conv_general_dilated")
        assert fact.measured or fact.backend == "tpu"  # no such machine was at hand


@pytest.mark.parametrize(
    "running, expected",
    [("0.9.2", "0.10.2"), ("0.10.2", "0.10.2"), ("0.11.4", "0.10.2"), ("0.12.0.1", "0.12.0"),
     ("0.20.0", "0.12.0"), ("1.0.0.dev2026", "0.12.0")],
)  # fmt: skip
def test_what_was_measured_last_before_this_version_holds(running, expected):
    facts = [Fact("cpu", "", version, "dot_general", "int8", "lax", 0.5)
             for version in ("0.12.0", "0.10.2")]  # fmt: skip
    assert [fact.jaxlib for fact in known_at(running, facts)] == [expected]


def test_nothing_is_known_of_other_machines():
    assert known_at("0.10.2", []) == []


def test_auto_takes_the_fastest_that_holds_the_formats():
    known = facts_about(work())
    assert known == sorted(known, key=lambda fact: fact.ratio)
    if jax.default_backend() == "cpu":
        assert fastest(work(), INT8) == known[0].execution
    floats = [aqs.numeric_format("e4m3")] * 2
    assert fastest(work(), floats) in ("bf16", "emulated")  # int8 holds none of them


@pytest.mark.parametrize("small", [{"columns": 8}, {"terms": 8}, {"groups": 2}])
def test_small_and_grouped_dots_are_not_in_the_table(small):
    assert fastest(work(**small), INT8) == "emulated"


def test_few_rows_of_codes_are_read_as_they_are():
    """Float values of the weights would be computed anew for each row there is."""
    if jax.default_backend() == "cpu":
        assert fastest(work(rows=1), INT8) == fastest(work(rows=8), INT8) == "int8"


def test_slower_forms_are_in_the_table_and_not_taken(monkeypatch):
    slow = Fact(jax.default_backend(), "", "0.1.0", "dot_general", "int8", "lax", 1.2)
    monkeypatch.setattr(measured_facts, "FACTS", (slow,))
    assert facts_about(work()) == [slow]
    assert fastest(work(), INT8) == "emulated"


def test_sizes_that_are_symbolic_are_taken_where_they_are_known_to_do():
    columns, small = jax.export.symbolic_shape("b, c", constraints=["b >= 64"])
    known = fastest(work(), INT8)
    assert fastest(work(columns=columns), INT8) == known
    assert fastest(work(columns=small), INT8) == "emulated"


@pytest.mark.parametrize("shape", [(16, 16), (32, 64)])
def test_the_form_of_a_convolution_changes_no_bit(shape):
    """Codes of int8 are summed exactly, whichever form the table takes."""
    rng = np.random.default_rng(0)
    x = rng.integers(-127, 128, (2, 9, 9, shape[0])).astype(np.float32)
    w = rng.integers(-127, 128, (3, 3, *shape)).astype(np.float32)
    x[0, 0, 0, 0], w[0, 0, 0, :] = 127, 127  # so that scales are 1
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    found = aqs.conv_general_dilated(
        x, w, (2, 2), "SAME", **numbers, lhs_format="int8", rhs_format="int8", execution="int8"
    )
    expected = jax.lax.conv_general_dilated(
        x.astype(np.int32), w.astype(np.int32), (2, 2), "SAME", **numbers,
        preferred_element_type=np.int32,
    )  # fmt: skip
    np.testing.assert_allclose(found, np.asarray(expected, np.float32), rtol=3e-7)
